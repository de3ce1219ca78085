"""The official VTP format against the official code, if a checkout of MiniMax-AI/VTP is named by VTP_REFERENCE. `transformers` is used if it is installed, else two stand-in base classes.

    python tests/test_reference_official.py     writes tests/golden/vtp.json: numbers only, made by the official code"""
import importlib
import json
import math
import os
import sys
import types
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from formats import shapes
from official_cases import CHANGES, checkpoint, dims, distance, outputs, write

from vtp.tokenizers.official import OfficialConfig, OfficialVTP, to_official

GOLDEN = Path(__file__).parent / "golden/vtp.json"
GOLDEN_SIZES = {"released": ((48, 32), (256, 384), (512, 512))}         # elsewhere 48 × 32
EXACT = {"pooled_bottleneck": 2e-6}                                     # the mean of patches that nearly cancel: the patches' rounding weighs more than 1e-6
KEPT, SAMPLED = ("latents", "pixels", "cls", "block", "image", "text", "logits"), 8      # outputs that are stored, and values of each


def _stand_ins():
    "What the official model asks of transformers: a config that holds its fields, and a module that holds its config."
    class PretrainedConfig:
        def __init__(self, **kwargs): vars(self).update(kwargs)

    class PreTrainedModel(torch.nn.Module):
        def __init__(self, config, *args, **kwargs): super().__init__()
        def post_init(self): pass
    sys.modules["transformers"] = types.SimpleNamespace(PretrainedConfig=PretrainedConfig, PreTrainedModel=PreTrainedModel)


def official_code(checkout):
    "The module with VTPConfig and VTPModel of a checkout; its package is called vtp_reference here."
    try: importlib.import_module("transformers")
    except ImportError: _stand_ins()
    for package in ("", ".models"):
        module = types.ModuleType("vtp_reference" + package)
        module.__path__ = [str(Path(checkout) / "vtp" / package.strip("."))]
        sys.modules.setdefault("vtp_reference" + package, module)
    return importlib.import_module("vtp_reference.models.vtp_hf")


def official_model(code, change, tensors):
    model = code.VTPModel(code.VTPConfig(**change)).eval()
    model.load_state_dict(tensors)
    return model


@contextmanager
def in_fp64(code, model):
    "The official model with everything in fp64: weights, norms and RoPE."
    norms = sys.modules["vtp_reference.models.layers.normalization"].RMSNorm
    forward = norms.forward
    model.double()
    for module in model.modules():
        if type(module).__name__ == "RopePositionEmbedding":
            module.dtype = torch.float64
            module.periods.data = 100. ** (2 * torch.arange(module.D_head // 4, dtype=torch.float64) / (module.D_head // 2))
    norms.forward = lambda self, x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight
    try: yield model
    finally: norms.forward = forward


@pytest.fixture(scope="module")
def code():
    checkout = os.environ.get("VTP_REFERENCE")
    if not checkout: pytest.skip("set VTP_REFERENCE to a checkout of MiniMax-AI/VTP to compare with it")
    if not (Path(checkout) / "vtp/models/vtp_hf/modeling_vtp.py").exists(): pytest.fail(f"VTP_REFERENCE={checkout} has no vtp/models/vtp_hf/modeling_vtp.py")
    return official_code(checkout)


@pytest.mark.parametrize("case", CHANGES)
def test_key_list(code, case):
    model = code.VTPModel(code.VTPConfig(**CHANGES[case]))
    assert {name: (tuple(value.shape), value.dtype) for name, value in model.state_dict().items()} == shapes("vtp", "tiny", **dims(CHANGES[case]))


def test_published_sizes_and_defaults(code):
    config = code.VTPConfig()
    assert {name: getattr(config, name) for name in vars(OfficialConfig())} == vars(OfficialConfig())
    for name, (width, depth, heads) in {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16)}.items():
        with torch.device("meta"): model = code.VTPModel(code.VTPConfig(vision_embed_dim=width, vision_depth=depth, vision_num_heads=heads, decoder_embed_dim=width, decoder_depth=depth, decoder_num_heads=heads))
        assert {key: tuple(value.shape) for key, value in model.state_dict().items()} == {key: shape for key, (shape, _) in shapes("vtp", name).items()}


@pytest.mark.parametrize("case", CHANGES)
def test_faithful_and_exact(code, case, tmp_path):
    change = CHANGES[case]
    folder, tensors = write(tmp_path, change), checkpoint(change)
    theirs = official_model(code, change, tensors)
    for height, width in GOLDEN_SIZES.get(case, ((48, 32),)):
        want, got = outputs(theirs, change, height, width), outputs(OfficialVTP(str(folder)).load(), change, height, width)
        assert {name: (value.shape, value.dtype) for name, value in got.items()} == {name: (value.shape, value.dtype) for name, value in want.items()}
        far = {name: distance(got[name], want[name], name) for name in want}
        print(f"{case} {height}×{width}: faithful {max(far.values()):.1e}", end="")
        assert max(far.values()) < 5e-5, far
    with in_fp64(code, theirs):
        for height, width in GOLDEN_SIZES.get(case, ((48, 32),)):
            want, got = outputs(theirs, change, height, width, torch.float64), outputs(OfficialVTP(str(folder), rope="exact").load(), change, height, width)
            far = {name: distance(got[name], want[name], name) for name in want}
            fp64 = outputs(OfficialVTP(str(folder), rope="exact").load().double(), change, height, width, torch.float64)
            print(f", exact {max(far.values()):.1e}, in fp64 {max(distance(fp64[name], want[name], name) for name in want):.1e}")
            assert max(far.values()) < EXACT.get(case, 1e-6), far
            assert max(distance(fp64[name], want[name], name) for name in want) < 1e-12


def test_bf16(code, tmp_path):
    "Under autocast: the official dtypes, and the official numbers up to bf16."
    change = CHANGES["released"]
    ours, theirs = OfficialVTP(str(write(tmp_path, change))).load(), official_model(code, change, checkpoint(change))
    with torch.autocast("cpu", torch.bfloat16): got, want = outputs(ours, change), outputs(theirs, change)
    assert {name: value.dtype for name, value in got.items()} == {name: value.dtype for name, value in want.items()}
    assert max(distance(got[name], want[name], name) for name in want) < 2e-2


@pytest.mark.parametrize("case", ["released", "sigmoid", "no_text"])
def test_export_loads_in_the_official_class(code, case, tmp_path):
    "What we write is read strictly by the official class, and computes the same."
    change = CHANGES[case]
    model = OfficialVTP(str(write(tmp_path / "first", change))).load()
    folder = to_official(model, tmp_path / "second")
    if hasattr(code.VTPModel, "from_pretrained"):
        theirs, loading = code.VTPModel.from_pretrained(folder, output_loading_info=True)
        assert not any(loading.values()), loading
        if theirs.config.train_clip and torch.isnan(theirs.attn_mask).any() or case != "no_text" and not torch.equal(theirs.attn_mask, torch.full((77, 77), -math.inf).triu(1)):
            theirs.attn_mask = torch.full((77, 77), -math.inf).triu(1)          # transformers 5 leaves buffers that are not saved uninitialised
    else:
        from safetensors.torch import load_file
        theirs = official_model(code, {k: v for k, v in json.loads((folder / "config.json").read_text()).items() if k in vars(OfficialConfig())}, load_file(folder / "model.safetensors"))
    want = outputs(theirs.eval(), change)
    assert max(distance(value, want[name], name) for name, value in outputs(model, change).items()) < 5e-5


def places(value):
    "Which values are stored."
    return torch.linspace(0, value.numel() - 1, min(SAMPLED, value.numel())).long()

def make_golden():
    "{case: {size: {output: [length, values]}}} of the official code, in its bf16 RoPE and in fp64."
    code, golden = official_code(os.environ["VTP_REFERENCE"]), {}
    for case, change in CHANGES.items():
        theirs, golden[case] = official_model(code, change, checkpoint(change)), {}
        def numbers(dtype, size):
            return {name: [float(f"{value.double().norm().item():.8g}"), [float(f"{v:.8g}") for v in value.flatten()[places(value)].tolist()]] for name, value in outputs(theirs, change, *size, dtype).items() if name in KEPT}
        sizes = GOLDEN_SIZES.get(case, ((48, 32),))
        for size in sizes: golden[case]["×".join(map(str, size))] = {"faithful": numbers(torch.float32, size)}
        with in_fp64(code, theirs):
            for size in sizes: golden[case]["×".join(map(str, size))]["exact"] = numbers(torch.float64, size)
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text(json.dumps({"source": "https://github.com/MiniMax-AI/VTP", "commit": "5ce1eb67010fff3c1eed483352483be6a1838556",
                                  "note": "made by tests/test_reference_official.py: the official code on checkpoints and inputs by seed; for each output its length and 8 evenly spaced values", "cases": golden}, ensure_ascii=False).replace("}}, ", "}},\n"))


if __name__ == "__main__": make_golden()
