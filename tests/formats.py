"""Synthetic checkpoints from the published key lists in data/formats, never from our own modules.

A list is {"source", "commit", "note", "keys": …} in one of two forms. Symbolic: `keys` is a list of [name, shape] or [name, shape, {"dtype", "if"}];
shapes hold numbers or expressions of the dimensions ("3*D"), `{i:depth}` in a name repeats it for i = 0 … depth - 1, and "if" names a dimension that
must not be 0; `sizes` gives dimensions by name. Explicit: `keys` is {size: {name: shape or [shape, dtype]}}."""
import ast
import json
import operator
import re

import torch

from vtp.run import root

_OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.FloorDiv: operator.floordiv}
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "int64": torch.int64}


def _value(expression, dims):
    "A number, or whole-number arithmetic on the names of dimensions."
    def of(node):
        if isinstance(node, ast.Constant): return node.value
        if isinstance(node, ast.Name): return dims[node.id]
        return _OPERATORS[type(node.op)](of(node.left), of(node.right))
    return expression if isinstance(expression, int) else of(ast.parse(expression, mode="eval").body)


def _repeated(name, dims):
    "`name` for every value of its `{i:depth}`."
    found = re.search(r"\{\w+:(\w+)\}", name)
    if not found: return [name]
    return [one for i in range(dims[found[1]]) for one in _repeated(name[:found.start()] + str(i) + name[found.end():], dims)]


def shapes(name, size="tiny", **changes):
    "{key: (shape, dtype)} of the format `name` at a size; `changes` replace dimensions of a symbolic list."
    listed = json.loads((root() / f"data/formats/{name}.json").read_text())
    keys = listed["keys"]
    if isinstance(keys, dict):
        if changes: raise ValueError(f"{name} is an explicit list: sizes {sorted(keys)}, no dimensions to change")
        plain = {key: shape if len(shape) == 2 and isinstance(shape[0], list) else [shape, "fp32"] for key, shape in keys[size].items()}
        return {key: (tuple(shape), _DTYPES[dtype]) for key, (shape, dtype) in plain.items()}
    dims = listed["sizes"][size] | changes
    found = {}
    for key, shape, *rest in keys:
        options = rest[0] if rest else {}
        if "if" in options and not dims[options["if"]]: continue
        for one in _repeated(key, dims): found[one] = tuple(_value(side, dims) for side in shape), _DTYPES[options.get("dtype", "fp32")]
    return found


def synthetic(name, size="tiny", seed=0, std=.05, **changes):
    "A checkpoint {key: tensor} of seeded random numbers: matrices N(0, std²), vectors near 1 where they scale (`weight`, `gamma`) and near 0 elsewhere."
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for key, (shape, dtype) in shapes(name, size, **changes).items():
        noise = torch.randn(shape, generator=generator)
        scales = len(shape) == 1 and key.endswith(("weight", "gamma"))
        tensors[key] = (std * noise + scales).to(dtype)
    return tensors
