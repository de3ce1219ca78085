"""How a job is computed changes nothing that it computes: activation checkpoints, processes, the evaluation's ranks."""
from dataclasses import replace

import pytest
import torch
from tiny import HERE, clip, job, ranks, rec, ssl, stop_at

import vtp.job
from vtp.config import digest, dumps, loads
from vtp.data.shapes import Shapes
from vtp.evaluation.linear_probe import LinearProbe
from vtp.evaluation.reconstruction import ReconstructionQuality
from vtp.evaluation.zero_shot import Retrieval, ZeroShot
from vtp.job import launch
from vtp.perceptual import PerceptualConfig


def trained(small, machine, folder, monkeypatch):
    monkeypatch.setenv("VTP_RUNS", str(folder))
    run, = launch(small, machine=machine)
    return run.at().tensors("model"), run.rows()


def test_activation_checkpointing(tmp_path, monkeypatch):
    small = job(steps=4, dtype="fp64", log_every=1)
    weights, rows = trained(small, HERE, tmp_path / "plain", monkeypatch)
    again, rows2 = trained(small, replace(HERE, checkpointing=True), tmp_path / "recomputed", monkeypatch)
    assert all(torch.allclose(weights[k], again[k], rtol=1e-9, atol=1e-12) for k in weights)
    assert [r["loss"] for r in rows2] == pytest.approx([r["loss"] for r in rows], rel=1e-9)


@pytest.mark.timeout(300)
def test_two_processes_train_the_same_model(tmp_path, monkeypatch):
    small = job((clip(), ssl(drop=0.3), rec()), steps=6, dtype="fp64", log_every=2)
    monkeypatch.setattr(vtp.job, "start", ranks)
    weights, rows = trained(small, HERE, tmp_path / "one", monkeypatch)
    again, rows2 = trained(small, replace(HERE, procs=2), tmp_path / "two", monkeypatch)
    for key in ("loss", "clip", "ssl", "rec", "grad_norm", "samples", "flops", "bad"):
        assert [r[key] for r in rows2] == pytest.approx([r[key] for r in rows], rel=1e-6), key
    worst = max((weights[k] - again[k]).abs().max() for k in weights if weights[k].is_floating_point())
    assert worst < 1e-6, worst


def test_a_resume_on_two_processes(tmp_path, monkeypatch):
    "A run that one process began is finished by two, on the same samples."
    small = job((clip(), ssl(drop=0.3), rec()), steps=6, dtype="fp64", log_every=2)
    weights, rows = trained(small, HERE, tmp_path / "one", monkeypatch)
    with monkeypatch.context() as patched:
        stop_at(patched, 2)
        with pytest.raises(InterruptedError):
            trained(small, HERE, tmp_path / "both", monkeypatch)
    monkeypatch.setattr(vtp.job, "start", ranks)
    again, rows2 = trained(small, replace(HERE, procs=2), tmp_path / "both", monkeypatch)
    assert [r["loss"] for r in rows2] == pytest.approx([r["loss"] for r in rows], rel=1e-6)
    assert max((weights[k] - again[k]).abs().max() for k in weights if weights[k].is_floating_point()) < 1e-6


def test_bf16_is_close_to_fp32(tmp_path, monkeypatch):
    "A loose check that autocast trains the same thing; parity is checked in wider types."
    small = job(steps=4, log_every=1)
    _, rows = trained(small, HERE, tmp_path / "wide", monkeypatch)
    _, rows2 = trained(replace(small, dtype="bf16"), HERE, tmp_path / "half", monkeypatch)
    assert [r["loss"] for r in rows2] == pytest.approx([r["loss"] for r in rows], rel=2e-2)


EVALUATORS = (
    ReconstructionQuality(data=Shapes(count=90, size=16, split="val"), batch=16, perceptual=PerceptualConfig(kind="random_features")),
    LinearProbe(train=Shapes(count=200, size=16), val=Shapes(count=90, size=16, split="val"), steps=20, batch=32),
    ZeroShot(data=Shapes(count=90, size=16, split="val"), batch=16),
    Retrieval(data=Shapes(count=90, size=16, split="val"), batch=16),
)


def measured(text, number):
    "In every rank: the rows of one evaluator on a fresh model."
    model = loads(text).build().eval()
    return list(EVALUATORS[number].rows(model, torch.device("cpu")))


@pytest.mark.parametrize("number", range(len(EVALUATORS)), ids=lambda n: type(EVALUATORS[n]).__name__)
def test_evaluation_does_not_depend_on_ranks(number):
    text = dumps(job())
    one, two = measured(text, number), ranks(measured, text, number, nproc=2)
    assert len(one) == len(two) and one
    for a, b in zip(one, two):
        assert a.keys() == b.keys()
        for key in a:
            assert b[key] == (pytest.approx(a[key], rel=1e-6) if isinstance(a[key], float) else a[key]), key


def test_the_machine_is_not_part_of_the_digest():
    small = job()
    assert digest(small) == digest(loads(dumps(small))) and "procs" not in dumps(small)


@pytest.mark.slow
def test_a_compiled_model_can_be_gone_through_twice():
    "Losses that compare gradients (VA-VAE's weight, the second stage's) ask a graph for two of them."
    import torch
    from tiny import TOKENIZER

    from vtp.job import Machine
    from vtp.loop import prepare

    tokenizer = TOKENIZER.build().train()
    prepare(tokenizer, Machine(compile=True))
    z = tokenizer.encode(torch.rand(2, 3, 16, 16))
    last = tokenizer.encoder.bottleneck.weight
    first, = torch.autograd.grad(z.square().mean(), last, retain_graph=True)
    inner = tokenizer.encoder.trunk.blocks[0].attn.qkv.weight
    again = [torch.autograd.grad(loss, inner, retain_graph=True)[0] for loss in (z.square().mean(), 2 * z.square().mean())]
    assert first.isfinite().all() and torch.allclose(2 * again[0], again[1], rtol=1e-4, atol=1e-9)
