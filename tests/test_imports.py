"""Imports run downhill: a notebook's module imports only modules of smaller notebook numbers."""
import ast
import re
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent


def rooms():
    "module name -> notebook number"
    numbers = {}
    for path in sorted((ROOT / "nbs").glob("*.ipynb")):
        for cell in nbformat.read(path, as_version=4).cells:
            found = re.search(r"^#\|\s*default_exp\s+(\S+)", cell.source, re.M)
            if found:
                numbers[f"vtp.{found[1]}"] = re.match(r"\d+[a-z]?", path.stem)[0]
    return numbers


def imported(module, text):
    "Names of the vtp modules that a module's text imports, at any depth of nesting."
    package = module.split(".")[:-1]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            yield name
            yield from (f"{name}.{alias.name}" for alias in node.names)


def test_every_module_has_a_notebook():
    modules = {".".join(p.relative_to(ROOT).with_suffix("").parts) for p in (ROOT / "vtp").rglob("*.py")}
    modules = {m for m in modules if not m.endswith(("__init__", "_modidx"))}
    assert modules == set(rooms())


@pytest.mark.parametrize("module", sorted(rooms()))
def test_imports_run_downhill(module):
    numbers = rooms()
    text = (ROOT / (module.replace(".", "/") + ".py")).read_text()
    uphill = [n for n in imported(module, text) if n in numbers and numbers[n] >= numbers[module]]
    assert not uphill, f"{module} (notebook {numbers[module]}) imports {[(n, numbers[n]) for n in uphill]}"


def test_only_dist_imports_torch_distributed():
    for path in (ROOT / "vtp").rglob("*.py"):
        names = set(imported("vtp." + path.stem, path.read_text()))
        if any(n.startswith("torch.distributed") or n.startswith("torch.nn.parallel") for n in names):
            assert path.name in ("dist.py", "ranks.py"), f"{path.name} talks to torch.distributed: that is the job of vtp.dist, and of vtp.ranks, which starts the ranks"


def test_the_check_sees_an_uphill_import():
    assert "vtp.pretrain" in set(imported("vtp.vit", "def f():\n    from .pretrain import Pretrain"))
    assert "vtp.pretrain" in set(imported("vtp.data.pairs", "from ..pretrain import Pretrain"))
    assert "vtp.pretrain" in set(imported("vtp.vit", "import vtp.pretrain"))
