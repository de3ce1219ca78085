"""The solvers against torchdiffeq, and samples made by two processes against those made by one."""
import numpy as np
import pytest
import torch
from torch import nn

from vtp.data.samples import mix
from vtp.dist import gather_objects
from vtp.ranks import start
from vtp.generation.dit import DiT, DiTConfig
from vtp.generation.flow import SamplerConfig, gaussian, integrate, time_grid
from vtp.generation.sample import generate, noise_of
from vtp.interfaces import Tokenizer
from vtp.loop import DTYPES

SHAPE = (3, 4, 4)


class Plain(Tokenizer):
    "Latents are images."
    image_size, latent_shape = 4, SHAPE

    def decode(self, z):
        return z


class Small(nn.Module):
    "What `sample` asks of a generator, around a DiT with random weights."
    def __init__(self):
        super().__init__()
        self.tokenizer, self.classes, self.objectives = Plain(), 5, {}
        self.register_buffer("mean", torch.zeros(1, 3, 1, 1))
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.dit = DiT(DiTConfig(width=32, depth=2, heads=2, channels=3, grid=4, classes=5))
            for p in self.dit.parameters():
                nn.init.normal_(p, mean=float(p.shape == (32,)), std=.2)

    def velocity(self, x, t, labels):
        return self.dit(x, t, labels)

    def decode(self, z):
        return torch.sigmoid(self.tokenizer.decode(z) / 4)


class Still(Small):
    "Samples are their noise."
    def velocity(self, x, t, labels):
        return torch.zeros_like(x)

    def decode(self, z):
        return z / 16 + .5


def curved(x, t, labels=None):
    "A velocity that is stiff here and slow there, and differs from sample to sample."
    time = t.view(-1, 1, 1, 1)
    return torch.sin(3 * x.roll(1, 1) + 6 * time) * 2 - x * (1 + 20 * torch.exp(-((time - .4) * 10) ** 2)) + x.mean((1, 2, 3), keepdim=True)


def torchdiffeq_end(method, x, grid, **settings):
    "x(1) by torchdiffeq, and how often it asked for the velocity."
    from torchdiffeq import odeint

    calls = []

    def velocity(t, x):
        calls.append(t)
        return curved(x, t.to(x).expand(len(x)))

    return odeint(velocity, x, grid, method=method, **settings)[-1], len(calls)


@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("rtol", [1e-2, 1e-3, 1e-5])
def test_batch_control_is_torchdiffeq(dtype, bound, rtol):
    "As LightningDiT calls it: 50 output points, tolerances as lists. The same steps, hence the same count, and the same end."
    x = gaussian(mix(0, np.arange(5)), SHAPE, dtype=dtype)
    expected, calls = torchdiffeq_end("dopri5", x, torch.linspace(0, 1, 50), rtol=[rtol], atol=[rtol * 1e-3])
    z, nfe = integrate(curved, x, SamplerConfig("dopri5", rtol=rtol, atol=rtol * 1e-3, control="batch"))
    print(f"rtol {rtol}, {dtype}: {(z - expected).abs().max():.1e}, NFE {calls}")
    assert (nfe == calls).all() and (z - expected).abs().max() < bound


def test_the_count_of_torchdiffeq_does_not_depend_on_its_output_points():
    "Why dopri5 has no `steps` here."
    x = gaussian(mix(0, np.arange(5)), SHAPE, dtype=torch.float64)
    (a, n), (b, m) = (torchdiffeq_end("dopri5", x, torch.linspace(0, 1, points, dtype=torch.float64), rtol=1e-3, atol=1e-6) for points in (2, 250))
    assert n == m and torch.equal(a, b)


def test_sample_control_alone_is_torchdiffeq_with_a_cut_last_step():
    "A single sample has nobody to share a step with: the same steps but for the last, and an end closer to the truth than the tolerance."
    x = gaussian(mix(1, np.arange(4)), SHAPE, dtype=torch.float64)
    truth, _ = torchdiffeq_end("dopri5", x, torch.linspace(0, 1, 2, dtype=torch.float64), rtol=1e-11, atol=1e-12)
    z, nfe = integrate(curved, x, SamplerConfig("dopri5", rtol=1e-5, atol=1e-8))
    for i in range(4):
        theirs, calls = torchdiffeq_end("dopri5", x[i:i + 1], torch.linspace(0, 1, 2, dtype=torch.float64), rtol=1e-5, atol=1e-8)
        assert abs(calls - nfe[i]) <= 6 and (z[i] - theirs[0]).abs().max() < 1e-4
    assert (z - truth).abs().max() < 1e-4 and len(set(nfe.tolist())) > 1


@pytest.mark.parametrize("method, theirs", [("euler", "euler"), ("heun", "heun2")])
@pytest.mark.parametrize("shift", [0., .3])
def test_fixed_steps_are_torchdiffeq(method, theirs, shift):
    x = gaussian(mix(2, np.arange(5)), SHAPE, dtype=torch.float64)
    expected, calls = torchdiffeq_end(theirs, x, time_grid(40, shift))
    z, nfe = integrate(curved, x, SamplerConfig(method, 40, shift))
    assert (nfe == calls).all() and (z - expected).abs().max() < 1e-12


SAMPLERS = {"euler": SamplerConfig(steps=12, shift=.3), "guided heun": SamplerConfig("heun", 8, guidance=2., interval=(.1, .9)), "dopri5": SamplerConfig("dopri5")}


def everything(batch, samples=23):
    "Noise as the ranks make it, and for each sampler and dtype all samples in order and their counts: put together from every rank."
    found = {}
    for dtype in ("fp64", "fp32"):
        generator = Small().eval().to(DTYPES[dtype])
        for name, config in SAMPLERS.items():
            parts = [(places, noise_of(0, places, SHAPE), images, nfe) for places, images, nfe in generate(generator, config, samples, batch, law="balanced", dtype=dtype)]
            mine = [np.concatenate(p) for p in zip(*parts)]
            places, *values = (np.concatenate(p) for p in zip(*gather_objects(mine)))
            assert sorted(places) == list(range(samples))
            found[name, dtype] = [v[places.argsort()] for v in values]
    return found


@pytest.mark.timeout(300)
def test_two_ranks_make_the_samples_of_one():
    "Noise bitwise; samples to 1e-10 in float64; in float32 to 1e-5 with fixed steps, within dopri5's tolerance of 1e-3."
    one, two = everything(batch=23), start(everything, 4, nproc=2)
    for name, dtype in one:
        (noise, images, nfe), (noise2, images2, nfe2) = one[name, dtype], two[name, dtype]
        difference = np.abs(images - images2).max()
        print(f"{name}, {dtype}: {difference:.1e}")
        assert np.array_equal(noise, noise2) and noise.dtype == np.float32
        assert difference < (1e-10 if dtype == "fp64" else 1e-3 if name == "dopri5" else 1e-5), (name, dtype)
        assert dtype == "fp32" or np.array_equal(nfe, nfe2), name
        assert images.std() > .05 and len({image.tobytes() for image in images}) == 23


def test_samples_start_from_their_noise():
    "For batches of 1, 7 and 64 bitwise: a generator that does nothing shows it."
    whole = noise_of(0, np.arange(65), SHAPE)
    for batch in (1, 7, 64):
        assert torch.equal(torch.cat([images for _, images, _ in generate(Still().eval(), SamplerConfig(steps=2), 65, batch)]), (whole / 16 + .5).clamp(0, 1))
