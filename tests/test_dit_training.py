"""Training the DiT: ranks, resuming, budgets, the average, encoding on the fly, and what is refused."""
import shutil
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import HERE

import vtp.generation.train as package
from vtp.data.pairs import Shards
from vtp.data.shapes import Shapes
from vtp.generation.dit import DiTConfig
from vtp.generation.latents import CacheLatents, open_latents
from vtp.generation.train import Generator, LatentBatches, TrainDiT, cost
from vtp.job import At, launch, run_of
from vtp.optim import OptimConfig
from test_latents import PRETRAIN, change, tar

LATENTS = CacheLatents(At(PRETRAIN), Shapes(count=90, size=16, classes=4), batch=16, shard=40, dtype="fp32")
LEAN = replace(LATENTS, store=False)
DIT = DiTConfig(width=16, depth=2, heads=2, channels=8, grid=4, classes=4)


def train(**changes):
    base = dict(latents=LATENTS, dit=DIT, steps=10, batch=16, optim=OptimConfig(2e-3, (0.9, 0.95), 1e-8, 0.0, 0, 1.0, None), ema=0.9, dtype="fp32", log_every=3)
    return TrainDiT(**{**base, **changes})


def state(run):
    "Everything a run leaves that must not depend on how it went."
    last = run.at()
    return {group: last.tensors(group) for group in ("model", "ema", "optim")}, (run.path / "metrics.jsonl").read_bytes(), last.state


def fresh(small):
    shutil.rmtree(run_of(small).path)


def differ(a, b):
    "Largest difference of two states' tensors, relative to 1 or to a tensor's largest number if that is more."
    assert all(a[0][group].keys() == b[0][group].keys() for group in a[0])
    pairs = [(a[0][group][name].double(), b[0][group][name].double()) for group in a[0] for name in a[0][group]]
    return max(float((x - y).abs().max() / x.abs().max().clamp(min=1)) for x, y in pairs)


def stop_at(patch, *steps):
    "Raise SIGTERM in the middle of these steps, each once."
    left, step = set(steps), package.train_step

    def interrupted(*arguments):
        if arguments[-1] in left:
            left.remove(arguments[-1])
            signal.raise_signal(signal.SIGTERM)
        return step(*arguments)

    patch.setattr(package, "train_step", interrupted)


@pytest.mark.timeout(240)
def test_two_ranks_train_the_same_model():
    small = train(dtype="fp64", steps=6)
    one, rows = state(launch(small, machine=HERE)[0]), run_of(small).rows()
    fresh(small)
    two = state(launch(small, machine=replace(HERE, procs=2))[0])
    assert differ(one, two) < 1e-9
    for a, b in zip(rows, run_of(small).rows(), strict=True):
        assert a == pytest.approx(b, rel=1e-9)


def test_ranks_and_the_encoder_do_not_change_the_global_batch():
    launch(LATENTS, LEAN, machine=HERE)
    for latents, name in ((LATENTS, "z"), (LEAN, "image")):
        whole, parts = LatentBatches(train(latents=latents))[7], [LatentBatches(train(latents=latents), rank, 4)[7] for rank in range(4)]
        assert torch.equal(torch.cat([part[name] for part in parts]), whole[name]) and torch.equal(torch.cat([part["labels"] for part in parts]), whole["labels"])
        assert [key for part in parts for key in part["keys"]] == whole["keys"]


@pytest.mark.timeout(240)
@pytest.mark.parametrize("changes", [{}, dict(latents=LEAN), dict(dtype="bf16")], ids=["stored", "on the fly", "bf16"])
def test_resume_is_bitwise(monkeypatch, changes):
    small = train(**changes)
    straight = state(launch(small, machine=HERE)[0])
    fresh(small)
    stop_at(monkeypatch, 3, 4)
    for number, workers in ((4, 0), (5, 1)):
        with pytest.raises(InterruptedError, match="launch again"):
            launch(small, machine=replace(HERE, workers=workers))
        assert run_of(small).at().step == number
    again = state(launch(small, machine=replace(HERE, workers=2))[0])
    assert differ(straight, again) == 0 and again[1:] == straight[1:]


def test_a_kept_step_is_a_shorter_run():
    long, short = train(keep=(4,)), train(steps=4)
    launch(long, short, machine=HERE)
    early, alone, late = At(long, 4).load(), short.load(), long.load()
    assert all(torch.equal(a, b) for a, b in zip(early.state_dict().values(), alone.state_dict().values()))
    assert not all(torch.equal(a, b) for a, b in zip(early.dit.parameters(), late.dit.parameters()))
    assert At(long, 4).spent() == short.spent() and long.spent()["dit_samples"] == 160 and long.spent()["dit_flops"] == 160 * cost(DIT)
    assert {k: v for k, v in run_of(long).rows()[-1].items() if k in long.spent()} == long.spent()


def test_the_average_is_a_recursion(monkeypatch):
    seen, step = [], package.train_step

    def noted(dit, *arguments):
        if not seen:
            seen.append([p.detach().clone() for p in dit.parameters()])
        numbers = step(dit, *arguments)
        seen.append([p.detach().clone() for p in dit.parameters()])
        return numbers

    monkeypatch.setattr(package, "train_step", noted)
    small = train(dtype="fp64", steps=5)
    launch(small, machine=HERE)
    average = seen[0]
    for weights in seen[1:]:
        average = [0.9 * a + 0.1 * w for a, w in zip(average, weights)]
    assert all(torch.allclose(a, b, rtol=1e-12, atol=1e-15) for a, b in zip(average, small.load().dit.parameters()))


def test_on_the_fly_trains_what_the_cache_trains():
    stored, fly = train(), train(latents=LEAN)
    launch(stored, fly, machine=HERE)
    for a, b in zip(run_of(stored).rows(), run_of(fly).rows(), strict=True):
        assert a == pytest.approx(b, rel=1e-4)


def test_ways_of_computing_do_not_change_the_model():
    small = train(dtype="fp64", steps=4)
    plain = state(launch(small, machine=HERE)[0])
    fresh(small)
    assert differ(plain, state(launch(small, machine=replace(HERE, checkpointing=True))[0])) < 1e-12
    half = train(dtype="bf16", steps=4)
    launch(half, machine=HERE)
    for a, b in zip(run_of(half).rows(), run_of(small).rows(), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=2e-2)
    assert all(p.dtype == torch.float32 for p in half.load().parameters())


def test_latents_that_are_not_finite_call_the_step_off():
    launch(LATENTS, machine=HERE)
    small = train(steps=8, log_every=2, skips=5, latents=LATENTS)
    batches = LatentBatches(small)
    target = int(batches.reader.order(0, batches.positions(3))[0])          # in step 3, and not before
    early = set(batches.reader.order(0, np.arange(48)).tolist())
    assert target not in early
    shard = int(np.searchsorted(batches.reader.starts, target, side="right")) - 1
    file = run_of(LATENTS).path / "latents" / f"shard-{shard:05d}.safetensors"
    tensors = load_file(file)
    with safe_open(file, "pt") as opened:
        made_with = opened.metadata()
    for name in ("z", "z_flipped"):
        tensors[name][target - batches.reader.starts[shard], 0, 0, 0] = float("nan")
    save_file(tensors, file, made_with)
    run = launch(small, machine=HERE)[0]
    listed = run.rows("quarantine")
    assert listed[0]["step"] == 4 and f"hash {batches.reader.keys[target]:016x}" in listed[0]["keys"] and len(listed[0]["keys"]) == 16
    assert run.rows()[-1]["skipped"] == len(listed) and all(p.isfinite().all() for p in small.load().parameters())


def test_bad_images_on_the_fly_are_replaced(tmp_path, monkeypatch):
    monkeypatch.setenv("VTP_CACHE", str(tmp_path / "cache"))
    data = Shards(tar(tmp_path / "some.tar", torn=(3, 17)))
    small = train(latents=replace(LEAN, data=data), dit=replace(DIT, classes=40))         # labels 0 … 39
    run = launch(small, machine=HERE)[0]
    assert run.rows("quarantine") == [] and run.rows()[-1]["bad"] == 0          # the cache has left them out already
    with pytest.raises(ValueError, match="the images have 40 classes, dit.classes=48: set classes=40"):       # classes without names are counted
        launch(replace(small, dit=replace(DIT, classes=48)), machine=HERE)


def test_unlabelled_images_are_of_one_class(tmp_path, monkeypatch):
    monkeypatch.setenv("VTP_CACHE", str(tmp_path / "cache"))
    plain = replace(LATENTS, data=Shards(tar(tmp_path / "plain.tar", unlabelled=True)))
    with pytest.raises(ValueError, match="no labels, dit.classes=4: set classes=1"):
        launch(train(latents=plain), machine=HERE)
    small = train(latents=plain, dit=replace(DIT, classes=1), drop_labels=0.5)
    launch(small, machine=HERE)
    assert set(LatentBatches(small)[0]["labels"].tolist()) == {0, 1}


def test_what_does_not_fit_is_refused():
    for changes, words in ((dict(dit=replace(DIT, channels=4)), "channels=8, grid=4"), (dict(dit=replace(DIT, grid=8)), "channels=8, grid=4"),
                           (dict(dit=replace(DIT, classes=3)), "4 classes, dit.classes=3: set classes=4"), (dict(dit=replace(DIT, classes=48)), "4 classes, dit.classes=48: set classes=4"),
                           (dict(latents=replace(LATENTS, of=At(PRETRAIN, 1))), "step 1 is not kept")):
        with pytest.raises(ValueError, match=words):
            launch(train(**changes), machine=HERE)
        assert not run_of(PRETRAIN).done                            # before anything has started
    for changes in (dict(batch=0), dict(ema=1.0), dict(drop_labels=2), dict(dtype="fp8"), dict(steps=0)):
        with pytest.raises(ValueError):
            train(**changes)
    launch(LATENTS, machine=HERE)
    with pytest.raises(ValueError, match="3 processes can't share batch=16"):
        LatentBatches(train(), 0, 3)
    with pytest.raises(FileNotFoundError):
        train().load()


@pytest.mark.parametrize("latents", [LATENTS, LEAN], ids=["stored", "on the fly"])
def test_a_dit_of_other_latents_is_refused(latents):
    "Another encoder, its latents made anew as the message says: the DiT is done, and not theirs."
    small = train(latents=latents, keep=(4,))
    launch(small, machine=HERE)
    old = small.load()
    change("encoder")
    with pytest.raises(ValueError, match="made with encoder .* launch again to make the latents anew"):
        small.load()
    fresh(latents)
    launch(small, machine=HERE)
    then, now = run_of(small).at().state["data"], open_latents(latents).digest
    assert then != now and run_of(small).done
    for step in (None, 4):
        with pytest.raises(ValueError, match=f"trained on latents {then}, but latents-.* now holds {now}: put .* back .*, or remove .* launch again"):
            At(small, step).load()
    fresh(small)
    launch(small, machine=HERE)
    new = small.load()
    assert not torch.equal(old.mean, new.mean) and not all(torch.equal(a, b) for a, b in zip(old.dit.parameters(), new.dit.parameters()))


def test_the_same_latents_made_anew_are_the_same():
    small = train()
    launch(small, machine=HERE)
    fresh(LATENTS)
    launch(LATENTS, machine=HERE)
    small.load()


def test_the_generator_is_whole():
    small = train()
    launch(small, machine=HERE)
    generator = small.load()
    assert isinstance(generator, Generator) and not generator.training and generator.classes == 4 and generator.objectives == {}
    assert generator.mean.shape == generator.std.shape == (1, 8, 1, 1)
    x = torch.randn(3, 8, 4, 4)
    assert torch.equal(generator.velocity(x, torch.rand(3), torch.tensor([0, 3, 4])).isfinite(), torch.ones(3, 8, 4, 4, dtype=torch.bool))
    assert generator.decode(x).shape == (3, 3, 16, 16)
    assert generator.tokenizer.encoder_hash() == LATENTS.of.load().tokenizer.encoder_hash()
