"""The trunk against its reference, if a checkout is at hand: DINOV3_REFERENCE (facebookresearch/dinov3) or VTP_REFERENCE (MiniMax-AI/VTP)."""
import importlib
import itertools
import os
import sys
import types
from pathlib import Path

import pytest
import torch

from vtp.rope import rope_table
from vtp.vit import ViT, ViTConfig

WIDTH, HEADS, DEPTH = 128, 2, 3
PLACES = {"dinov3": ("DINOV3_REFERENCE", "dinov3/models/vision_transformer.py", "dinov3.models.vision_transformer"),
          "vtp": ("VTP_REFERENCE", "vtp/models/encoders/vision_transformer.py", "vtp_reference.models.encoders.vision_transformer")}


def _package(name, folder):
    "An empty package at `folder`, so that its modules can be imported without running its __init__ (which needs transformers)."
    module = types.ModuleType(name)
    module.__path__ = [str(folder)]
    sys.modules.setdefault(name, module)


@pytest.fixture(scope="module", params=PLACES)
def reference(request):
    "The module with the reference's DinoVisionTransformer, and its name."
    variable, file, name = PLACES[request.param]
    if not os.environ.get(variable): pytest.skip(f"set {variable} to a checkout of the reference to compare with it")
    root = Path(os.environ[variable])
    if not (root / file).exists(): pytest.fail(f"{variable}={root} has no {file}")
    if request.param == "dinov3": sys.path.insert(0, str(root))
    else:
        for package in ("", ".models", ".models.encoders"): _package("vtp_reference" + package, root / "vtp" / package.replace(".", "/").strip("/"))
    return importlib.import_module(name), request.param


def _pair(reference, *, rope="bf16", ffn="swiglu", norm="rmsnorm", layer_scale=None, registers=0, qk_norm=False, normalize="separate"):
    "The reference and our trunk with the same random weights, and the reference's mask token."
    module, name = reference
    extra = dict(use_qk_norm=qk_norm) if name == "vtp" else {}
    theirs = module.DinoVisionTransformer(patch_size=16, embed_dim=WIDTH, depth=DEPTH, num_heads=HEADS, ffn_layer=ffn, norm_layer=norm, layerscale_init=layer_scale,
                                          n_storage_tokens=registers, pos_embed_rope_dtype=rope, pos_embed_rope_normalize_coords=normalize, **extra)
    theirs.init_weights()
    torch.manual_seed(0)
    for parameter in theirs.parameters(): torch.nn.init.normal_(parameter, std=.3 if parameter.ndim < 2 else .1)
    ours = ViT(ViTConfig(width=WIDTH, heads=HEADS, depth=DEPTH, ffn=ffn, norm=norm, layer_scale=layer_scale, registers=registers, qk_norm=qk_norm,
                         rope_dtype=rope, rope_normalize=normalize))
    state = theirs.state_dict()
    mask_token = state.pop("mask_token")[0]
    ours.load_state_dict(state)
    return theirs, ours, mask_token


def _distance(ours, theirs):
    "Largest difference relative to the largest value, over class token, registers and patches."
    theirs = [theirs[k] for k in ("x_norm_clstoken", "x_storage_tokens", "x_norm_patchtokens")]
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(ours, theirs) if b.numel())


VARIANTS = [dict(), dict(ffn="mlp"), dict(norm="layernorm"), dict(layer_scale=.3), dict(registers=4), dict(ffn="mlp", norm="layernorm", layer_scale=.3, registers=4),
            dict(qk_norm=True), dict(normalize="max"), dict(normalize="min")]


@pytest.mark.parametrize("variant,rope", list(itertools.product(VARIANTS, ("bf16", "fp32"))), ids=str)
def test_trunk(reference, variant, rope):
    "Two grids in one call, a mask on the first; and the intermediate tokens."
    if variant.get("qk_norm") and reference[1] == "dinov3": pytest.skip("DINOv3 has no QK-norm")
    theirs, ours, mask_token = _pair(reference, rope=rope, **variant)
    images, mask = [torch.randn(2, 3, 96, 64), torch.randn(3, 3, 48, 48)], torch.rand(2, 24) < .4
    theirs.eval(), ours.eval()
    with torch.no_grad():
        want, got = theirs.forward_features(images, [mask, None]), ours(images, [mask, None], mask_token)
        distance = max(_distance(g, w) for g, w in zip(got, want))
        last = theirs.get_intermediate_layers(images[0], n=2, return_class_token=True)
        between = max(((g.patches - w[0]).abs().max() / w[0].abs().max()).item() for g, w in zip(ours.intermediate(images[0], 2), last))
    print(f"{reference[1]} {variant} rope {rope}: {distance:.1e}, intermediate {between:.1e}")
    # bf16 rounds queries and keys: a last-bit difference before it (another kernel, another thread count) can become one bf16 step after it
    tolerance = 2e-6 if rope == "fp32" else 2e-3
    assert distance < tolerance and between < tolerance


@pytest.mark.parametrize("grid", [(6, 6), (14, 14), (16, 16), (9, 16)], ids=str)
@pytest.mark.parametrize("normalize", ["separate", "max", "min"])
def test_rope_table(reference, grid, normalize):
    "The bf16 table to the bit; the fp32 one to the reference's own rounding."
    for rope, dtype, exact in (("bf16", torch.bfloat16, True), ("fp32", torch.float32, False)):
        theirs, ours, _ = _pair(reference, rope=rope, normalize=normalize)
        sin, cos = theirs.rope_embed(H=grid[0], W=grid[1])
        our_cos, our_sin = rope_table(ours.config.rope, *grid, 0, dtype, torch.device("cpu"))
        our_sin = torch.cat([-our_sin[:, :our_sin.shape[1] // 2], our_sin[:, our_sin.shape[1] // 2:]], 1)     # ours holds the rotation's sign
        if exact: assert torch.equal(our_cos, cos) and torch.equal(our_sin, sin)
        else: assert torch.allclose(our_cos, cos, atol=5e-6) and torch.allclose(our_sin, sin, atol=5e-6)


@pytest.mark.parametrize("drop", [.3, .5])
def test_drop_path(reference, drop):
    "The same subsets from the same random state, hence the same output and gradients."
    theirs, ours, _ = _pair(reference, rope="fp32")
    images = [torch.randn(6, 3, 48, 48), torch.randn(10, 3, 32, 32)]
    torch.manual_seed(3)
    if reference[1] == "dinov3":
        for block in theirs.blocks: block.sample_drop_ratio = drop
        want = theirs.train().forward_features(images, [None, None])
    else: want = theirs.train().forward_features(images, [None, None], drop_ratio=drop)
    torch.manual_seed(3)
    got = ours.train()(images, drop=drop)
    assert max(_distance(g, w) for g, w in zip(got, want)) < 5e-6
    sum(w["x_norm_clstoken"].sum() for w in want).backward(), sum(g.cls.sum() for g in got).backward()
    gradients = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        assert torch.allclose(parameter.grad, gradients[name].grad, atol=1e-4 * gradients[name].grad.abs().max().item() + 1e-8), name
