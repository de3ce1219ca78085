"""Rooms 60 and 61 against LightningDiT's own code, when the environment variable LIGHTNINGDIT_REFERENCE names a checkout of it.

    git clone https://github.com/JingfengYao/LightningDiT      # the fork that VTP names: it alone has the law of t
    LIGHTNINGDIT_REFERENCE=$PWD/LightningDiT python -m pytest tests/test_reference_dit.py

Compared with commit 9860985. torch.compile is switched off while its files are loaded; fairscale, which it imports and does not use, and timm are stood in for.
"""
import importlib
import os
import sys
import types

import numpy as np
import pytest
import torch
from torch import nn

from vtp.data.samples import mix
from vtp.generation.dit import DiT, DiTConfig, from_reference
from vtp.generation.flow import FlowConfig, SamplerConfig, flow_loss, gaussian, guided, integrate, interpolate, logit_normal, time_grid

CHECKOUT = os.environ.get("LIGHTNINGDIT_REFERENCE")
pytestmark = pytest.mark.skipif(not CHECKOUT, reason="LIGHTNINGDIT_REFERENCE does not name a checkout of JingfengYao/LightningDiT")
CONFIG = DiTConfig(width=96, depth=2, heads=4, channels=8, grid=4, classes=10)


class PatchEmbed(nn.Module):
    "What LightningDiT uses of timm's: a convolution to tokens."
    def __init__(self, size, patch, channels, width, bias=True):
        super().__init__()
        self.num_patches, self.patch_size = (size // patch) ** 2, (patch, patch)
        self.proj = nn.Conv2d(channels, width, patch, patch, bias=bias)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)


@pytest.fixture(scope="module")
def reference():
    "The checkout's modules `models.lightningdit` and `transport`."
    def module(name, **members):
        made = types.ModuleType(name)
        vars(made).update(members)
        return made

    parts = ("fairscale", "fairscale.nn", "fairscale.nn.model_parallel", "timm", "timm.models")
    unused = dict.fromkeys(("ColumnParallelLinear", "ParallelEmbedding", "RowParallelLinear"))
    stand_ins = {name: module(name) for name in (*parts, "fairscale.nn.model_parallel.initialize")}
    stand_ins["fairscale.nn.model_parallel.layers"] = module("layers", **unused)
    stand_ins["timm.models.vision_transformer"] = module("vision_transformer", PatchEmbed=PatchEmbed, Mlp=None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", lambda function: function)
        patch.setenv("XFORMERS_DISABLED", "1")
        patch.syspath_prepend(CHECKOUT)
        for name, made in stand_ins.items():
            patch.setitem(sys.modules, name, made)
        names = ("models", "models.lightningdit", "models.swiglu_ffn", "models.pos_embed", "models.rmsnorm", "transport")
        for name in names:
            patch.delitem(sys.modules, name, raising=False)
        yield importlib.import_module("models.lightningdit"), importlib.import_module("transport")
        for name in [n for n in sys.modules if n.split(".")[0] in ("models", "transport")]:
            del sys.modules[name]


@pytest.fixture(scope="module")
def pair(reference):
    "LightningDiT with random weights in every place, and ours with the same."
    torch.manual_seed(0)
    theirs = reference[0].LightningDiT(input_size=CONFIG.grid, patch_size=1, in_channels=CONFIG.channels, hidden_size=CONFIG.width, depth=CONFIG.depth,
                                       num_heads=CONFIG.heads, num_classes=CONFIG.classes, use_swiglu=True, use_rope=True, use_rmsnorm=True).eval()
    for name, p in theirs.named_parameters():
        if p.requires_grad:
            nn.init.normal_(p, mean=float("norm" in name), std=.15)
    ours = DiT(CONFIG).eval()
    ours.load_state_dict(from_reference(theirs.state_dict(), CONFIG))
    return ours, theirs


def noise(seed, n=6, dtype=torch.float32):
    return gaussian(mix(seed, np.arange(n)), (CONFIG.channels, CONFIG.grid, CONFIG.grid), dtype=dtype)


LABELS, T = torch.tensor([0, 3, 9, 5, 10, 1]), torch.tensor([0., .05, .3, .5, .9, 1.])


def largest(ours, theirs):
    "Largest difference relative to the largest value, for `pytest -s`."
    difference = ((ours - theirs).abs().max() / theirs.abs().max()).item()
    print(f"{os.environ['PYTEST_CURRENT_TEST'].split('::')[1].split(' ')[0]}: {difference:.1e}")
    return difference


def test_forward_and_gradient(pair):
    ours, theirs = pair
    v, w = ours(noise(0), T, LABELS), theirs(noise(0), T, LABELS)
    assert largest(v, w) < 1e-5 and w.std() > .1
    for model, out in ((ours, v), (theirs, w)):
        model.zero_grad()
        out.square().mean().backward()
    known = dict(theirs.named_parameters())
    assert {name for name, p in known.items() if p.requires_grad} == {name for name, _ in ours.named_parameters()}
    assert max(largest(p.grad, known[name].grad) for name, p in ours.named_parameters()) < 1e-4


def test_first_weights(reference):
    "The same law of initial weights, name by name: zeros, constants, spread and range."
    torch.manual_seed(1)
    theirs = reference[0].LightningDiT(input_size=4, patch_size=1, in_channels=8, hidden_size=96, depth=2, num_heads=4, num_classes=1000,
                                       use_swiglu=True, use_rope=True, use_rmsnorm=True).state_dict()
    for name, ours in DiT(DiTConfig(96, 2, 4, 8, 4)).state_dict().items():
        a, b = ours, theirs[name]
        assert a.shape == b.shape and torch.equal(a.std() == 0, b.std() == 0), name
        if a.numel() < 2 or a.std() == 0:
            assert torch.equal(a, b), name
        else:
            assert a.std() / b.std() == pytest.approx(1, abs=.1) and a.abs().max() / b.abs().max() == pytest.approx(1, abs=.35), name


@pytest.mark.parametrize("interval", [(0., 1.), (.3, 1.)])
@pytest.mark.parametrize("channels", ["first3", "all"])
def test_guidance(pair, channels, interval):
    "The three channels of the reference's own function; all channels by the formula, on the reference's network."
    ours, theirs = pair
    velocity = guided(ours, SamplerConfig(guidance=4., channels=channels, interval=interval), CONFIG.classes)
    with torch.no_grad():
        for t in (.1, .6):
            x, times = noise(1), torch.full((6,), t)
            doubled = (torch.cat([x, x]), torch.cat([times, times]), torch.cat([LABELS, torch.full((6,), 10)]))
            if channels == "first3":
                expected = theirs.forward_with_cfg(*doubled, cfg_scale=4., cfg_interval=True, cfg_interval_start=interval[0])[:6]
            else:
                c, u = theirs(*doubled).chunk(2)
                expected = u + 4. * (c - u) if t >= interval[0] else c
            assert largest(velocity(x, times, LABELS), expected) < 1e-5


def test_loss_with_given_noise_and_t(reference, pair, monkeypatch):
    (ours, theirs), config = pair, FlowConfig(-.75, 1.)
    transport = reference[1].create_transport(use_cosine_loss=True, use_lognorm=True, lognorm_mu=config.mu, lognorm_sigma=config.sigma)
    normal, z, eps = gaussian(mix(4, np.arange(6)), ()), noise(5), noise(6)
    drawn = sys.modules["transport.transport"]
    monkeypatch.setattr(drawn.norm, "rvs", lambda loc, scale, size: loc + scale * normal.numpy().astype(np.float64))
    monkeypatch.setattr(torch, "randn_like", lambda x: eps)
    with torch.no_grad():
        expected = transport.training_losses(theirs, z, dict(y=LABELS))
        x_t, velocity = interpolate(z, eps, t := logit_normal(normal, config))
        losses = flow_loss(ours(x_t, t, LABELS), velocity, config)
    assert largest(losses["velocity"], expected["loss"]) < 1e-6 and largest(losses["cosine"], expected["cos_loss"]) < 1e-6
    assert torch.equal(losses["loss"], losses["velocity"] + losses["cosine"])


@pytest.mark.parametrize("shift", [0., .075])
def test_time_grid(reference, shift):
    ode = sys.modules["transport.integrators"].ode
    theirs = ode(None, t0=0, t1=1, sampler_type="euler", num_steps=250, atol=1e-6, rtol=1e-3, timestep_shift=shift).t
    assert len(theirs) == 250 and largest(time_grid(250, shift).float(), theirs) < 1e-6


def sampled(reference, theirs, x, **settings):
    "The reference's sampler on its own network, and how often that was called."
    calls = []

    def model(x, t, y):
        calls.append(len(x))
        return theirs(x, t, y)

    sampler = reference[1].Sampler(reference[1].create_transport())
    with torch.no_grad():
        return sampler.sample_ode(**settings)(x, model, y=LABELS)[-1], len(calls)


@pytest.mark.parametrize("shift", [0., .075])
def test_euler(reference, pair, shift):
    ours, theirs = pair
    expected, calls = sampled(reference, theirs, noise(7), sampling_method="euler", num_steps=250, timestep_shift=shift)
    z, nfe = integrate(ours, noise(7), SamplerConfig(steps=250, shift=shift), LABELS)
    assert largest(z, expected) < 1e-5 and calls == 249 and (nfe == 249).all()


def test_guided_euler(reference, pair):
    "Its sampler carries the unguided half along and throws it away; ours never makes it."
    ours, theirs = pair
    labels = torch.cat([LABELS, torch.full((6,), 10)])
    settings = dict(sampling_method="euler", num_steps=30, timestep_shift=.3)
    with torch.no_grad():
        sampler = reference[1].Sampler(reference[1].create_transport()).sample_ode(**settings)
        expected = sampler(torch.cat([noise(9)] * 2), theirs.forward_with_cfg, y=labels, cfg_scale=2., cfg_interval=True, cfg_interval_start=.2)[-1][:6]
    config = SamplerConfig(steps=30, shift=.3, guidance=2., interval=(.2, 1.), channels="first3")
    z, nfe = integrate(guided(ours, config, 10), noise(9), config, LABELS)
    assert largest(z, expected) < 1e-5 and (nfe == 29).all()


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_dopri5_with_one_step_for_the_batch(reference, pair, dtype, bound):
    "The network of one side for both: here the solver is compared."
    theirs = pair[1]

    def model(x, t, y):         # it computes in fp32: what it gives is taken as a function of wider numbers
        return theirs(x.float(), t.float(), y).to(dtype)

    expected, calls = sampled(reference, model, noise(8, dtype=dtype), sampling_method="dopri5", num_steps=50)
    z, nfe = integrate(model, noise(8, dtype=dtype), SamplerConfig("dopri5", control="batch"), LABELS)
    assert largest(z, expected) < bound and (nfe == calls).all() and calls > 20

