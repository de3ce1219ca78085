"""What the experiments ask for, without training: the paper's numbers at its scale, each training once at the smallest, and nothing at all the second time."""
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from unittest import mock

import nbformat
import pandas as pd
import pytest
import torch
from tiny import HERE

import vtp.job
from vtp.config import digest
from vtp.evaluation.extractors import Inception
from vtp.evaluation.generation import GenerationQuality
from vtp.evaluation.linear_probe import LinearProbe
from vtp.evaluation.reconstruction import ReconstructionQuality
from vtp.flops import params
from vtp.generation.dit import DiT
from vtp.generation.latents import CacheLatents
from vtp.generation.train import TrainDiT
from vtp.job import ordered, path_of
from vtp.pretrain import Pretrain
from vtp.run import create

FOLDER = Path(__file__).resolve().parent.parent / "experiments"
IMAGENET = "data/imagenet"
# experiment -> (trainings of a tokenizer or frozen trunk at smoke, those that no experiment above it has)
TRAININGS = dict(scale_compute=(3, 3),              # AE, AE-small, VTP
                 hybrid_objectives=(6, 4),          # both latents of AE are there; both of CLIP+AE and SSL+AE are not
                 joint_objectives=(5, 0),
                 reconstruction_weight=(2, 1),      # one weight is the scale's own
                 scale_data=(4, 2),                 # one subset is the whole
                 scale_params=(8, 6),               # ViT-B under the shallow decoder is the scale's own; S, L, and L under the deep one
                 table1_autoencoders=(2, 1),        # the CNN
                 table2_comparison=(6, 2),          # VA-VAE, and the trunk that VA-VAE and RAE lean on
                 convergence=(5, 0), reconstructions=(3, 0), quickstart=(3, 0))
OURS = "scale_compute", "hybrid_objectives", "joint_objectives", "reconstruction_weight", "scale_data", "scale_params"
LARGE = "table2_comparison", "convergence"          # judged by LightningDiT-XL and 50,000 samples


class Launched(Exception):
    "The jobs that an experiment would launch."


def stop(*jobs, scale, machine, minutes): raise Launched(jobs)


@cache
def judges(name, scale):
    "What an experiment launches: its cells up to there, as they stand in the notebook. Nothing needs ImageNet before it runs."
    code = [cell.source for cell in nbformat.read(FOLDER / f"{name}.ipynb", as_version=4).cells if cell.cell_type == "code"]
    names = {}
    shown = {"vtp.study.study": stop, "IPython.display.display": lambda *things, **_: None}
    with ExitStack() as stack:
        for target, stand_in in shown.items(): stack.enter_context(mock.patch(target, stand_in))
        for option in ("display.width", "display.max_colwidth"): stack.callback(pd.set_option, option, pd.get_option(option))
        try:
            exec(compile(code[0], f"{name}, parameters", "exec"), names)
            names["scale"] = scale
            for number, source in enumerate(code[1:], 1): exec(compile(source, f"{name}, cell {number}", "exec"), names)
        except Launched as launched: return launched.args[0]
    raise AssertionError(f"{name} launches nothing")


@cache
def jobs(name, scale, kind=object):
    return [job for job in (jobs(name, scale) if kind is not object else ordered(judges(name, scale))) if isinstance(job, kind)]


def recipe(job): return "+".join(objective.name for objective in job.objectives)


@pytest.mark.parametrize("name", OURS)
def test_trainings_at_paper_scale(name):
    batches = {"rec": (16384,), "clip+rec": (16384, 2048), "ssl+rec": (4096, 2048), "clip+ssl+rec": (16384, 4096, 2048)}      # the paper's B; an autoencoder reconstructs all of it
    found = jobs(name, "paper", Pretrain)
    for job in found:
        trunk, decoder, weights = job.tokenizer.trunk, job.tokenizer.decoder, job.weights
        assert tuple(objective.batch for objective in job.objectives) == batches[recipe(job)]
        assert weights.pop("rec") == .1 or name == "reconstruction_weight"
        assert set(weights.values()) <= {1.}
        assert (job.tokenizer.image_size, trunk.patch, decoder.width, decoder.heads) == (256, 16, 1024, 16)
        assert name == "scale_params" or (trunk.width, trunk.depth, trunk.heads, decoder.depth) == (1024, 24, 16, 4)
        assert job.steps == 67_140 and job.steps * 16384 >= 1.1e9 and job.seed == 0
        assert [round(200 * step / job.steps) for step in (*job.keep, job.steps)] == [5, 10, 20, 35, 60, 95, 135, 175, 200]
    three = {"rec", "clip+rec", "ssl+rec"}
    expected = dict(scale_compute={("rec", 64), ("rec", 32), ("clip+ssl+rec", 64)}, hybrid_objectives={(one, d) for one in three for d in (64, 256)},
                    joint_objectives={(one, 64) for one in {*three, "clip+ssl+rec"}} | {("rec", 32)}, reconstruction_weight={("clip+ssl+rec", 64)})
    assert {(recipe(job), job.tokenizer.latent) for job in found} == expected.get(name, {("rec", 64), ("clip+ssl+rec", 64)})


def test_what_the_scaling_studies_vary():
    weights = [job.weights["rec"] for job in jobs("reconstruction_weight", "paper", Pretrain)]
    assert sorted(weights) == [.1, .3, 1.]
    data = jobs("scale_data", "paper", Pretrain)
    assert sorted((recipe(job), job.pairs.subset) for job in data) == sorted((one, n) for one in ("rec", "clip+ssl+rec") for n in (100_000, 1_000_000, 10_000_000, 100_000_000))
    assert {job.steps * job.batch for job in data} == {67_140 * 16384}
    widths = {(384, 12, 6), (768, 12, 12), (1024, 24, 16)}
    found = {(recipe(job), (job.tokenizer.trunk.width, job.tokenizer.trunk.depth, job.tokenizer.trunk.heads), job.tokenizer.decoder.depth) for job in jobs("scale_params", "paper", Pretrain)}
    assert found == {(one, size, 4) for one in ("rec", "clip+ssl+rec") for size in widths} | {(one, (1024, 24, 16), 24) for one in ("rec", "clip+ssl+rec")}


def test_sizes_of_the_parts():
    with torch.device("meta"): built = [job.tokenizer.build() for job in jobs("scale_params", "paper", Pretrain)]
    assert {round(params(tokenizer.encoder) / 1e6, 1) for tokenizer in built} == {21.6, 85.7, 303.5}
    assert min(params(tokenizer.decoder) for tokenizer in built) / 1e6 == pytest.approx(51.3, abs=.1) and max(params(tokenizer.decoder) for tokenizer in built) / 1e6 == pytest.approx(303.6, abs=.1)


@pytest.mark.parametrize("name", [*OURS, "table1_autoencoders", *LARGE])
def test_judges_at_paper_scale(name):
    large = name in LARGE
    for job in jobs(name, "paper", TrainDiT):
        assert (job.dit.width, job.dit.depth, job.dit.heads, job.dit.patch, job.dit.grid, job.dit.classes) == ((1152, 28, 16, 1, 16, 1000) if large else (768, 12, 12, 1, 16, 1000))
        assert (job.steps, job.batch, job.ema, job.drop_labels, job.dtype) == (100_000, 1024, .9999, .1, "bf16")
        optim = job.optim
        assert (optim.lr, optim.betas, optim.weight_decay, optim.warmup_steps, optim.final, optim.clip) == (2e-4, (.9, .95), 0, 0, 1, None)
        assert (job.flow.mu, job.flow.sigma, job.flow.cosine) == (-.75, 1, 1)
    with torch.device("meta"): sizes = {dit.channels: params(DiT(dit)) / 1e6 for dit in {job.dit for job in jobs(name, "paper", TrainDiT)}}
    assert sizes[64] == pytest.approx(675. if large else 130.4, abs=.05)
    for job in jobs(name, "paper", CacheLatents): assert (job.data.root, job.data.split, job.samples, job.resize, job.flips) == (IMAGENET, "train", None, "center_crop", True)
    judged = [(job.of, one) for job in judges(name, "paper") for one in job.evaluators if isinstance(one, GenerationQuality)]
    for _, one in judged:
        sampler = one.sampler
        assert (one.samples, sampler.guidance, one.labels, one.quantise, one.dtype) == (50_000 if large else 10_000, 1, "uniform", "truncate", "fp32")
        assert (sampler.method, sampler.steps, sampler.shift) == ("euler", 250, .075) if large else (sampler.method, sampler.rtol, sampler.atol) == ("dopri5", 1e-3, 1e-6)
        assert one.extractor == Inception() and one.reference.endswith("VIRTUAL_imagenet256_labeled.npz")
    assert {of.step for of, _ in judged} <= ({12_500, 25_000, 50_000, 75_000, 100_000, None} if large else {100_000, None}) and judged


@pytest.mark.parametrize("name", ["hybrid_objectives", "joint_objectives"])
def test_understanding_is_read_off_the_latent(name):
    "Each checkpoint has one chain: a probe on the bottleneck's mean, reconstruction of the validation set by both decoders, generation."
    evaluators = [one for job in judges(name, "paper") for one in job.evaluators]
    probes = [one for one in evaluators if isinstance(one, LinearProbe) and (one.tap, one.pool) == ("latent", "mean")]
    checkpoints = 9 * len(jobs(name, "paper", Pretrain))
    assert len(probes) == len([one for one in evaluators if isinstance(one, GenerationQuality)]) == checkpoints
    assert len([one for one in evaluators if isinstance(one, ReconstructionQuality) and (one.data.root, one.data.split, one.samples) == (IMAGENET, "val", None)]) == 2 * checkpoints
    assert {(one.train.root, one.train.split, one.train_samples) for one in probes} == {(IMAGENET, "train", None)}


def test_every_experiment_that_launches_is_here():
    launching = {path.stem for path in FOLDER.glob("*.ipynb") if any("study(" in cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code")}
    assert launching == set(TRAININGS)


def test_what_two_figures_need_is_one_run():
    known = {}
    for name, (trained, new) in TRAININGS.items():
        found = {digest(job): job for job in jobs(name, "smoke")}
        trainings = {key for key, job in found.items() if isinstance(job, Pretrain)}
        assert (len(trainings), len(trainings - set(known))) == (trained, new), name
        known |= found
    first = {digest(job) for name in list(TRAININGS)[:4] for job in jobs(name, "smoke")}
    chains = 3 * (3 + 4) + 1                         # three checkpoints of seven trainings, and the end of one more
    assert len(first) == (7 + 1) + 7 * chains        # behind each: understanding, decoder, reconstruction, latents, DiT, two budgets


def launched(name, monkeypatch):
    "The jobs that a launch of an experiment starts, where each that is started is done at once."
    started = []

    def done(job, machine):
        started.append(job)
        (create(path_of(job), job, machine).path / "done").touch()

    monkeypatch.setattr(vtp.job, "_start", done)
    vtp.job.launch(*judges(name, "smoke"), machine=HERE)
    return started


def test_an_experiment_starts_what_is_not_done(monkeypatch):
    first = launched("quickstart", monkeypatch)
    assert len(first) == len(jobs("quickstart", "smoke")) == 3 * (1 + 7)                   # AE, AE-small and VTP, the last checkpoint of each
    weight = launched("reconstruction_weight", monkeypatch)
    assert [job.weights["rec"] for job in weight if isinstance(job, Pretrain)] == [.1] and len(weight) == 1 + 7
    for name in ("quickstart", "reconstruction_weight"): assert launched(name, monkeypatch) == []      # again: nothing but plotting
    lost = jobs("reconstruction_weight", "smoke", TrainDiT)[-1]
    (path_of(lost) / "done").unlink()
    assert launched("reconstruction_weight", monkeypatch) == [lost]
