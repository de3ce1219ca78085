"""Rooms 40 and 41 against the code of latent diffusion and of VA-VAE, when environment variables name checkouts of them.

    git clone https://github.com/CompVis/latent-diffusion
    git clone https://github.com/hustvl/LightningDiT
    LDM_REFERENCE=$PWD/latent-diffusion VAVAE_REFERENCE=$PWD/LightningDiT python -m pytest -s tests/test_reference_ldm.py

Compared with commits a506df5 of latent-diffusion and 2725fed of LightningDiT. Only the files that are needed are loaded, and what they import
beside torch is replaced by stand-ins: LPIPS by our random features, the discriminator by a constant.
"""
import os
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from checkouts import module, stub
from torch import nn

from vtp.data.augment import CropConfig
from vtp.flops import count, params
from vtp.job import At
from vtp.objectives.distillation import Distillation, alignment, divergence, last_layer
from vtp.perceptual import PerceptualConfig, perceptual
from vtp.tokenizers.ldm_cnn import CNNConfig
from vtp.tokenizers.representation import OwnTrunk
from vtp.tokenizers.vit import ViTTokenizerConfig
from vtp.vit import ViTConfig

LDM, VAVAE = os.environ.get("LDM_REFERENCE"), os.environ.get("VAVAE_REFERENCE")
needs_ldm = pytest.mark.skipif(not LDM, reason="LDM_REFERENCE does not name a checkout of CompVis/latent-diffusion")
needs_vavae = pytest.mark.skipif(not VAVAE, reason="VAVAE_REFERENCE does not name a checkout of hustvl/LightningDiT")
STANDIN = PerceptualConfig(kind="random_features")
SMALL = CNNConfig(image_size=32, latent=4, width=32, multipliers=(1, 2, 2), blocks=2, attention=(16, 8))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def networks(monkeypatch, root):
    "The file of Encoder and Decoder, and that of the posterior."
    for name in ("ldm", "ldm.modules"):
        stub(monkeypatch, name)
    stub(monkeypatch, "ldm.util", instantiate_from_config=None)
    stub(monkeypatch, "ldm.modules.attention", LinearAttention=object)
    modules = Path(root) / "ldm" / "modules"
    return module(monkeypatch, "ldm_model", modules / "diffusionmodules" / "model.py"), module(monkeypatch, "ldm_distributions", modules / "distributions" / "distributions.py")


def theirs(model, config):
    "Encoder, decoder and the two convolutions, as AutoencoderKL puts them together, with random norms too."
    options = dict(ch=config.width, out_ch=3, ch_mult=config.multipliers, num_res_blocks=config.blocks, attn_resolutions=config.attention, in_channels=3,
                   resolution=config.image_size, z_channels=config.latent, double_z=True)
    found = nn.ModuleDict({"encoder": model.Encoder(**options), "decoder": model.Decoder(**options),
                           "quant_conv": nn.Conv2d(2 * config.latent, 2 * config.latent, 1), "post_quant_conv": nn.Conv2d(config.latent, config.latent, 1)})
    for name, parameter in found.named_parameters():
        if "norm" in name:
            nn.init.normal_(parameter, float(name.endswith("weight")), 0.2)
    return found


@needs_ldm
def test_latents_pixels_and_gradients_are_those_of_ldm(monkeypatch):
    model, distributions = networks(monkeypatch, LDM)
    reference = theirs(model, SMALL).double()
    ours = SMALL.build().double()
    ours.load_state_dict(reference.state_dict())
    image, noise = torch.rand(2, 3, 32, 48, dtype=torch.float64), torch.randn(2, 4, 8, 12, dtype=torch.float64)
    posterior = distributions.DiagonalGaussianDistribution(reference["quant_conv"](reference["encoder"](2 * image - 1)))
    mean, logvar = ours.posterior(image)
    assert torch.allclose(mean, posterior.mode(), rtol=1e-9, atol=1e-11) and torch.allclose(logvar, posterior.logvar, rtol=1e-9, atol=1e-11)
    assert torch.allclose(divergence(mean, logvar), posterior.kl().mean(), rtol=1e-10) and ours.encode(image).equal(mean)
    decoded = reference["decoder"](reference["post_quant_conv"](posterior.mean + posterior.std * noise))
    again = ours.decode(mean + (logvar / 2).exp() * noise)
    assert torch.allclose(2 * again - 1, decoded, rtol=1e-9, atol=1e-11)
    (decoded.square().sum() + posterior.kl().sum()).backward()
    ((2 * again - 1).square().sum() + 2 * divergence(mean, logvar)).backward()
    for name, parameter in reference.named_parameters():
        assert torch.allclose(dict(ours.named_parameters())[name].grad, parameter.grad, rtol=1e-7, atol=1e-9), name


@needs_ldm
@pytest.mark.parametrize("config", [CNNConfig(), CNNConfig(latent=32), CNNConfig(latent=4, multipliers=(1, 2, 4, 4), attention=())], ids=lambda c: c.label)
def test_published_sizes_have_the_same_names_shapes_and_flops(monkeypatch, config):
    model, _ = networks(monkeypatch, LDM)
    image, z = torch.empty(1, 3, 256, 256, device="meta"), torch.empty(1, config.latent, *[256 // config.stride] * 2, device="meta")
    with torch.device("meta"):
        reference, ours = theirs(model, config), config.build()
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in reference.state_dict().items()} and params(ours) == params(reference)
    counted = count(lambda: (reference["quant_conv"](reference["encoder"](image)), reference["decoder"](reference["post_quant_conv"](z))))
    assert count(lambda: ours(image)) == counted


@needs_ldm
def test_in_single_precision_too(monkeypatch):
    model, _ = networks(monkeypatch, LDM)
    reference = theirs(model, SMALL)
    ours = SMALL.build()
    ours.load_state_dict(reference.state_dict())
    image = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        moments = reference["quant_conv"](reference["encoder"](2 * image - 1))
        decoded = reference["decoder"](reference["post_quant_conv"](moments[:, :4]))
        off = [((a - b).norm() / b.norm()).item() for a, b in ((ours.encode(image), moments[:, :4]), (2 * ours(image) - 1, decoded))]
    print(f"relative difference: latents {off[0]:.1e}, pixels {off[1]:.1e}")
    assert max(off) < 1e-5


class Distance(nn.Module):
    "Our stand-in for LPIPS, in the shape of LPIPS's output."
    def __init__(self):
        super().__init__()
        self.distance = perceptual(STANDIN)
    def forward(self, image, target): return self.distance(image, target)[:, None, None, None]


class Constant(nn.Module):
    "A discriminator without an opinion, that depends on the image all the same."
    def __init__(self, **options): super().__init__()
    def forward(self, image): return 0 * image.sum((1, 2, 3))


@pytest.fixture
def loss_of(monkeypatch):
    "Options → VA-VAE's loss module without an adversary."
    stub(monkeypatch, "taming")
    for name in ("taming.modules", "taming.modules.losses"):
        stub(monkeypatch, name)
    stub(monkeypatch, "taming.modules.losses.vqperceptual", LPIPS=Distance, NLayerDiscriminator=Constant, weights_init=lambda m: None, hinge_d_loss=None, vanilla_d_loss=None,
         adopt_weight=lambda weight, step, threshold=0, value=0.0: weight if step >= threshold else value)
    found = module(monkeypatch, "vavae_loss", Path(VAVAE) / "vavae" / "ldm" / "modules" / "losses" / "contperceptual.py")
    return lambda **options: found.LPIPSWithDiscriminator(disc_start=10**9, kl_weight=1e-6, disc_weight=0.5, disc_factor=0.0, **options).double()


@dataclass(frozen=True)
class Training:
    "A stand-in for a training: its model has random weights, always the same."
    tokenizer: ViTTokenizerConfig
    keep: ClassVar[tuple] = ()
    steps: ClassVar[int] = 1

    def load(self, step=None, where="cpu"):
        with torch.random.fork_rng():
            torch.manual_seed(7)
            return SimpleNamespace(tokenizer=self.tokenizer.build().eval().double())

    def build(self, where="cpu"): return SimpleNamespace(tokenizer=self.tokenizer.build())


@needs_vavae
@pytest.mark.parametrize("weight, m1, m2", [(0.1, 0.5, 0.25), (0.5, 0.0, 0.0), (0.1, 0.9, 0.05)])
def test_the_loss_and_its_gradients_are_those_of_vavae(monkeypatch, loss_of, weight, m1, m2):
    "Their loss sums over an image what ours averages: 3HW times ours, term by term."
    _, distributions = networks(monkeypatch, Path(VAVAE) / "vavae")
    cnn = CNNConfig(image_size=16, latent=4, width=8, multipliers=(1, 2, 2), blocks=1, attention=(4,), groups=4).build().double()
    part = ViTConfig(width=32, depth=2, heads=2, patch=4)
    training = Training(ViTTokenizerConfig(16, part, part, latent=8))
    config = Distillation(crop=CropConfig(16), perceptual=STANDIN, representation=OwnTrunk(At(training)), vf_weight=weight, cos_margin=m1, distmat_margin=m2)
    objective = config.build(cnn).double()
    image = torch.rand(3, 3, 16, 16, dtype=torch.float64)
    torch.manual_seed(1)
    ours = objective(cnn, {"image": image})
    got = torch.autograd.grad(ours, [*cnn.parameters(), objective.proj.weight])

    torch.manual_seed(1)
    posterior = distributions.DiagonalGaussianDistribution(cnn.quant_conv(cnn.encoder(2 * image - 1)))
    with monkeypatch.context() as patched:                            # theirs draws in single precision
        patched.setattr(torch, "randn", lambda shape: torch.randn_like(posterior.mean))
        z = posterior.sample()
    features = objective.features(image).mT.unflatten(-1, (4, 4))
    projected = nn.functional.conv2d(z, objective.proj.weight[:, :, None, None])
    reference = loss_of(vf_weight=weight, adaptive_vf=True, cos_margin=m1, distmat_margin=m2)
    loss, log = reference(2 * image - 1, 2 * cnn.decode(z) - 1, posterior, 0, 0, last_layer=cnn.decoder.conv_out.weight, z=projected, aux_feature=features, enc_last_layer=cnn.encoder.conv_out.weight)
    n, watched = image[0].numel(), objective.monitor
    assert last_layer(cnn) is cnn.encoder.conv_out.weight
    assert ours.item() * n == pytest.approx(loss.item(), rel=1e-10)
    assert watched["vf"].item() == pytest.approx(log["train/vf_loss"].item(), rel=1e-10) and watched["kl"].item() == pytest.approx(log["train/kl_loss"].item(), rel=1e-10)
    assert weight * watched["adaptive"].item() == pytest.approx(log["train/vf_weight"].item(), rel=1e-9)
    assert (watched["l1"] + watched["perceptual"]).item() * n == pytest.approx(log["train/nll_loss"].item(), rel=1e-10)
    for g, h in zip(got, torch.autograd.grad(loss, [*cnn.parameters(), objective.proj.weight]), strict=True):
        assert torch.allclose(n * g, h, rtol=1e-7, atol=1e-9)


@needs_vavae
def test_the_two_terms_on_random_tokens(monkeypatch, loss_of):
    for m1, m2 in ((0.5, 0.25), (0.0, 0.0)):
        reference = loss_of(vf_weight=1.0, cos_margin=m1, distmat_margin=m2)
        image, z, features = torch.rand(2, 3, 16, 16, dtype=torch.float64), torch.randn(2, 24, 4, 5, dtype=torch.float64), torch.randn(2, 24, 4, 5, dtype=torch.float64)
        posterior = SimpleNamespace(kl=lambda: torch.zeros(2, dtype=torch.float64))
        _, log = reference(image, image, posterior, 0, 0, z=z, aux_feature=features)
        assert sum(alignment(z.flatten(2).mT, features.flatten(2).mT, m1, m2)).item() == pytest.approx(log["train/vf_loss"].item(), rel=1e-12)


@needs_vavae
def test_the_released_class_computes_the_same(monkeypatch):
    "LightningDiT's tokenizer/autoencoder.py, which loads the released weights: the posterior and the pixels, from the file that both read."
    reference = module(monkeypatch, "lightning_autoencoder", Path(VAVAE) / "tokenizer" / "autoencoder.py").AutoencoderKL(embed_dim=4, ch_mult=(1,))
    ours = CNNConfig(image_size=32, latent=4, width=128, multipliers=(1,), attention=()).build()
    ours.load_state_dict(reference.state_dict())
    image = torch.rand(1, 3, 24, 32)
    with torch.no_grad():
        posterior = reference.encode(2 * image - 1)
        assert torch.allclose(ours.encode(image), posterior.mode(), rtol=1e-5, atol=1e-6)
        assert torch.allclose(2 * ours.decode(posterior.mode()) - 1, reference.decode(posterior.mode()), rtol=1e-5, atol=1e-5)
