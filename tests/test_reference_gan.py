"""Room 37 against the code of LDM's ancestor (taming) and of RAE, when environment variables name checkouts of them.

    git clone https://github.com/CompVis/taming-transformers
    git clone https://github.com/bytetriper/RAE
    TAMING_REFERENCE=$PWD/taming-transformers RAE_REFERENCE=$PWD/RAE python -m pytest -s tests/test_reference_gan.py

Compared with commits 3ba01b2 of taming-transformers and a4d18c4 of RAE. Only the files that are needed are loaded, so that none of their
dependencies (pytorch_lightning, …) has to be there. RAE's frozen network gets random weights: what is compared is what is computed with them.
"""
import ast
import os
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from checkouts import module, stub
from torch import nn

from vtp.objectives.adversarial import DINO, Adversarial, BatchNorm, DiffAugment, FeatureGAN, PatchGAN, adaptive_weight, augment, draws, hinge

TAMING, RAE = os.environ.get("TAMING_REFERENCE"), os.environ.get("RAE_REFERENCE")
needs_taming = pytest.mark.skipif(not TAMING, reason="TAMING_REFERENCE does not name a checkout of CompVis/taming-transformers")
needs_rae = pytest.mark.skipif(not RAE, reason="RAE_REFERENCE does not name a checkout of bytetriper/RAE")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def taming(monkeypatch):
    "taming's discriminator and its loss module; LPIPS, which downloads weights, is left out."
    for name in ("taming", "taming.modules", "taming.modules.losses", "taming.modules.discriminator"): stub(monkeypatch, name)
    root = Path(TAMING) / "taming" / "modules"
    module(monkeypatch, "taming.modules.util", root / "util.py")
    stub(monkeypatch, "taming.modules.losses.lpips", LPIPS=nn.Identity)
    net = module(monkeypatch, "taming.modules.discriminator.model", root / "discriminator" / "model.py")
    return net, module(monkeypatch, "taming.modules.losses.vqperceptual", root / "losses" / "vqperceptual.py")


def largest(ours, theirs):
    "Largest difference relative to the largest value, for `pytest -s`."
    difference = ((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-12)).item()
    print(f"\n{os.environ['PYTEST_CURRENT_TEST'].split('::')[1].split(' ')[0]}: {difference:.1e}", end="")
    return difference


def copied(ours, theirs):
    "`theirs` with the weights of `ours`, both in the order of their layers."
    mine, others = list(ours.parameters()), list(theirs.parameters())
    assert [p.shape for p in mine] == [p.shape for p in others]
    with torch.no_grad():
        for a, b in zip(mine, others):
            b.copy_(a)
    return theirs


@needs_taming
@pytest.mark.parametrize("width,layers,size", [(64, 3, 256), (8, 2, 32), (4, 1, 16)])
def test_patchgan_forward_and_gradients(taming, width, layers, size):
    ours = PatchGAN(width, layers).build()
    theirs = copied(ours, taming[0].NLayerDiscriminator(3, width, layers)).train()
    image = torch.randn(2, 3, size, size)
    a, b = image.clone().requires_grad_(), image.clone().requires_grad_()
    assert ours(a).shape == theirs(b).shape
    assert largest(ours(a), theirs(b)) < 1e-6
    weight = torch.randn_like(ours(image))
    (ours(a) * weight).sum().backward()
    (theirs(b) * weight).sum().backward()
    assert largest(a.grad, b.grad) < 1e-5
    for p, q in zip(ours.parameters(), theirs.parameters()):
        assert torch.allclose(p.grad, q.grad, rtol=1e-4, atol=1e-4 * float(q.grad.abs().max()))


@needs_taming
@torch.no_grad()
def test_patchgan_parameters_and_start(taming):
    ours, theirs = PatchGAN().build(), taming[0].NLayerDiscriminator().apply(taming[0].weights_init)
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters()) == 2_765_633
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters()):
        assert p.shape == q.shape
        if p.numel() > 1000:
            assert p.std() == pytest.approx(q.std().item(), rel=0.05) and abs(p.mean() - q.mean()) < 1e-3, name
    norms = [[m for m in net.modules() if isinstance(m, kind)] for net, kind in ((ours, BatchNorm), (theirs, nn.BatchNorm2d))]
    assert len(norms[0]) == len(norms[1]) == 3
    for p, q in zip(*norms):
        assert p.eps == q.eps and not p.bias.any() and not q.bias.any()
        assert p.weight.mean() == pytest.approx(q.weight.mean().item(), abs=0.01) and p.weight.std() == pytest.approx(q.weight.std().item(), rel=0.3)


@needs_taming
def test_hinge(taming):
    real, fake = torch.randn(2, 4, 1, 30, 30) * 2
    assert largest(hinge(real, fake), taming[1].hinge_d_loss(real, fake)) < 1e-6


@needs_taming
@pytest.mark.parametrize("scale", [1.0, 1e-9, 1e9])
def test_adaptive_weight(taming, scale):
    their_loss = taming[1].VQLPIPSWithDiscriminator(0, disc_weight=0.5)
    layer = nn.Conv2d(4, 3, 3)
    decoded = layer(torch.randn(2, 4, 9, 9))
    rec, gan = decoded.abs().mean(), -PatchGAN(4, 1).build()(decoded).mean() * scale
    theirs = their_loss.calculate_adaptive_weight(rec, gan, last_layer=layer.weight)
    ours, finite = adaptive_weight(*(torch.autograd.grad(loss, layer.weight, retain_graph=True)[0] for loss in (rec, gan)))
    assert finite and largest(Adversarial().weight * ours, theirs) < 1e-6


# -- RAE --------------------------------------------------------------------------------------------------------------------------------------------------------

@pytest.fixture
def rae(monkeypatch):
    "RAE's discriminator, DiffAugment and losses."
    stub(monkeypatch, "rae_disc")
    root = Path(RAE) / "src" / "disc"
    module(monkeypatch, "rae_disc.utils", root / "utils.py")
    return types.SimpleNamespace(**{name: module(monkeypatch, f"rae_disc.{name}", root / f"{name}.py") for name in ("dinodisc", "diffaug", "gan_loss")})


@needs_rae
def test_feature_discriminator(rae, tmp_path):
    import timm

    network = timm.create_model("vit_small_patch8_224.dino", num_classes=0)
    with torch.no_grad():
        for name, p in network.named_parameters():                      # like a trained network: nothing is at its initial zero
            p.normal_(std=0.05)
            if "norm" in name and name.endswith("weight"):
                p.add_(1)
    torch.save(network.state_dict(), tmp_path / "dino.pth")
    ours = FeatureGAN(DINO(str(tmp_path / "dino.pth"))).build().eval()
    theirs = rae.dinodisc.DinoDisc(torch.device("cpu"), str(tmp_path / "dino.pth"), ks=9, recipe="S_8").eval()
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters() if p.requires_grad) == 7_386_245
    for mine, other in zip(ours.heads, theirs.heads):
        convs = (mine.narrow[0], other[0][0]), (mine.wide[0], other[1].fn[0]), (mine.logit, other[2])
        with torch.no_grad():
            for a, b in convs:
                b.weight_orig.copy_(a.parametrizations.weight.original)
                b.bias.copy_(a.bias)
                b.weight_u.copy_(a.parametrizations.weight[0]._u)
                b.weight_v.copy_(a.parametrizations.weight[0]._v)
    image = torch.rand(1, 3, 256, 256) * 2 - 1
    a, b = image.clone().requires_grad_(), image.clone().requires_grad_()
    assert ours(a).shape == (1, 3920)
    assert largest(ours(a), theirs(b)) < 1e-4
    ours(a).mean().backward()
    theirs(b).mean().backward()
    off = (a.grad - b.grad).norm() / b.grad.norm()      # as a whole: where a leaky ReLU's input is almost zero, rounding decides its slope
    print(f", gradient {off:.1e}", end="")
    assert off < 1e-2


@needs_rae
@pytest.mark.parametrize("cutout", [0.0, 0.2])
@pytest.mark.parametrize("size", [32, 256])
def test_diff_augment(rae, monkeypatch, cutout, size):
    image, u = torch.rand(6, 3, size, size) * 2 - 1, draws(0, np.arange(6), 0).float()
    numbers = u[:, [0, 1, 2, 3, 4, 5, 6]].T[..., None, None]
    monkeypatch.setattr(torch, "rand", lambda *shape, **options: numbers if len(shape) > 1 else torch.zeros(shape))
    theirs = rae.diffaug.DiffAug(prob=1.0, cutout=cutout).aug(image)
    assert largest(augment(image, DiffAugment(cutout=cutout), u), theirs) < 1e-6


@needs_rae
def test_losses_of_rae(rae):
    real, fake = torch.randn(2, 3, 3920)
    assert largest(hinge(real, fake), rae.gan_loss.hinge_d_loss(real, fake)) < 1e-6
    source = (Path(RAE) / "src" / "train_stage1.py").read_text()
    function = next(n for n in ast.parse(source).body if isinstance(n, ast.FunctionDef) and n.name == "calculate_adaptive_weight")
    scope = {"torch": torch}
    exec(compile(ast.Module([function], []), "train_stage1.py", "exec"), scope)      # one function of a script that can't be imported
    layer = nn.Linear(6, 5)
    out = layer(torch.randn(8, 6))
    rec, gan = out.abs().mean(), -out.tanh().mean()
    ours, _ = adaptive_weight(*(torch.autograd.grad(loss, layer.weight, retain_graph=True)[0] for loss in (rec, gan)), eps=1e-6)
    assert largest(ours, scope["calculate_adaptive_weight"](rec, gan, layer.weight)) < 1e-6
