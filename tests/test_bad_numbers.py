"""Numbers that are not finite change nothing, wherever they arise; collapse is said; and a step that was called off is made again with one command."""
import json
import math
import os
import random
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import HERE, clip, job, ranks, rec, ssl, stop_at

import vtp.config
import vtp.finetune_decoder as second
import vtp.pretrain as package
from vtp.checkpoint import write_checkpoint
from vtp.data.batch_sampling import Batches
from vtp.data.shapes import Shapes
from vtp.dist import gather_objects, local, rank
from vtp.finetune_decoder import FinetuneDecoder
from vtp.generation.dit import DiTConfig
from vtp.generation.latents import CacheLatents
from vtp.generation.train import LatentBatches, TrainDiT
from vtp.job import At, launch, path_of, run_of
from vtp.loop import DTYPES, interposed, seed_step, to_device
from vtp.objectives.adversarial import Adversarial, DiffAugment, FeatureGAN, PatchGAN, Trunk
from vtp.objectives.reconstruction import Reconstruction, ReconstructionLoss
from vtp.optim import OptimConfig, optim_tensors
from vtp.recipes import recipe
from vtp.replay import main, replay, text, verdict
from vtp.run import Run, create

VALUES = (math.nan, math.inf, -math.inf, 1e38)
PLACES = ("batch", "gradient", "activation", "backward")
FIRST = job((rec(mse=0.0),), steps=1, log_every=1)
TUNE = OptimConfig(2e-3, (0.5, 0.9), 1e-8, 0.0, 2, 0.1, None)
LATENTS = CacheLatents(At(FIRST), Shapes(count=90, size=16, classes=4), batch=20, shard=40, dtype="fp32")


def all_three(**changes):
    return job((clip(), ssl(), rec()), **{**dict(steps=400, log_every=5), **changes})


def softmax(**changes):
    return job((ssl(centering="softmax"), rec()), **{**dict(steps=400, log_every=5), **changes})


def stage2(discriminator=PatchGAN(8, 1), **changes):
    gan = Adversarial(discriminator=discriminator, start_discriminator=0.0, start_generator=0.0, ramp=0.0, augment=DiffAugment(cutout=0.2))
    base = dict(of=At(FIRST), pairs=Shapes(count=400, size=16), rec=rec(mse=0.0), steps=400, adversarial=gan, optim=TUNE, optim_discriminator=TUNE, ema=0.8, dtype="fp32", log_every=5)
    return FinetuneDecoder(**{**base, **changes})


def with_trunk(**changes):
    return stage2(FeatureGAN(Trunk(At(FIRST), 2), kernel=3), **changes)


def dit(**changes):
    base = dict(latents=LATENTS, dit=DiTConfig(width=16, depth=2, heads=2, channels=8, grid=4, classes=4), steps=400, batch=16, ema=0.9, dtype="fp32", log_every=5,
                optim=OptimConfig(2e-3, (0.9, 0.95), 1e-8, 0.0, 0, 1.0, 1.0))
    return TrainDiT(**{**base, **changes})


def leaves(state):
    "Modules that compute: the discriminator's frozen trunk and a perceptual network are not among a state's."
    return {f"{group}.{name}": module for group, root in state.modules.items() for name, module in root.named_modules() if name and not list(module.children())}


def spoilt(tensor, value, dice):
    "`tensor` with `value` at a random place."
    flat = tensor.detach().flatten().clone()
    flat[dice.randrange(len(flat))] = value
    return tensor + (flat.view_as(tensor) - tensor.detach()) if math.isfinite(value) else torch.where(flat.view_as(tensor) == tensor.detach(), tensor, flat.view_as(tensor))


def images(batch):
    return [(part, key) for part, key in _floats(batch)]


def _floats(batch, path=()):
    for key, value in batch.items():
        if isinstance(value, dict): yield from _floats(value, (*path, key))
        elif value.is_floating_point(): yield batch, key


def copies(state):
    "All that a training carries, by name; a moment that is not there yet is 0. The teacher's temperature is a schedule, and `refused` a count."
    found = {f"{group}/{name}": tensor for group, module in state.modules.items() for name, tensor in module.state_dict().items() if "teacher_temp" not in name and "refused" not in name}
    found |= {f"{group}/{name}": tensor for group, opt in state.opts.items() for name, tensor in optim_tensors(opt).items()}
    return {name: local(tensor).clone() for name, tensor in found.items()}


def same(before, after):
    return all(torch.equal(before[name], tensor) if name in before else not tensor.any() for name, tensor in after.items())


class Faults:
    "In the place of a loop: a fault in each step, and what it did. `plan`: (place, value, rank) of each."

    def __init__(self, plan, seed):
        self.plan, self.dice, self.told, self.lost, self.off = plan, random.Random(seed), [], [], 0

    def __call__(self, config, run, batches, state, done, step):
        self.config, self.state, self.step, self.batches = config, state, step, batches
        with torch.random.fork_rng():
            self.modules = self.used(done)
            for number, fault in enumerate(self.plan, done + 1): self.one(number, *fault)
        return True

    def make(self, number, spoil=lambda batch: None):
        batch = {name: view for name, view in self.batches[number].items() if name not in ("keys", "bad")}
        seed_step(self.config.seed, number)
        batch = to_device(batch, torch.device("cpu"), DTYPES[self.config.dtype])
        spoil(batch)
        return bool(self.step(batch, number)["stepped"])

    def used(self, number):
        "A good step, and the modules that take part in it."
        seen = {}
        handles = [m.register_forward_hook(lambda m, i, out, n=name: seen.update({n: m}) if isinstance(out, torch.Tensor) and out.is_floating_point() else None) for name, m in leaves(self.state).items()]
        assert self.make(number)
        for handle in handles: handle.remove()
        return seen

    def one(self, number, place, value, where):
        mine, name, before, handles, spoil = rank() == where, "", copies(self.state), [], lambda batch: None
        name = self.dice.choice(sorted(self.modules))
        hit, dice = [], random.Random(self.dice.random())
        if place == "batch" and mine:
            def spoil(batch):
                part, key = dice.choice(images(batch))
                part[key] = spoilt(part[key], value, dice)
        if place == "gradient":
            parameters = {f"{group}.{n}": p for group, root in self.state.modules.items() for n, p in root.named_parameters() if p.requires_grad}
            name = self.dice.choice(sorted(parameters))
            if hasattr(parameters[name], "device_mesh"): place, name = "backward", self.dice.choice(sorted(self.modules))     # FSDP: gradients of a rank never are at its parameters
            elif mine: handles.append(parameters[name].register_hook(lambda g: spoilt(g, value, dice)))
        if place == "activation" and mine:
            def forward(module, args, out):
                if not hit: return hit.append(1) or spoilt(out, value, dice)
            handles.append(self.modules[name].register_forward_hook(forward))
        if place == "backward" and mine:
            def behind(module, args, out):
                if out.requires_grad: out.register_hook(lambda g: None if hit else hit.append(1) or spoilt(g, value, dice))
            handles.append(self.modules[name].register_forward_hook(behind))
        stepped = self.make(number, spoil)
        for handle in handles: handle.remove()
        after = copies(self.state)
        everyone = gather_objects((stepped, same(before, after) if not stepped else all(t.isfinite().all() for t in after.values())))
        if len({s for s, _ in everyone}) > 1 or not all(fine for _, fine in everyone): self.lost.append((number, place, value, where, name, everyone, [n for n, t in after.items() if n in before and not torch.equal(before[n], t)][:3]))
        self.off += not stepped
        self.told.append((place, value, stepped))


def plan(count, seed, procs=1):
    dice = random.Random(seed)
    return [(dice.choice(PLACES), dice.choice(VALUES), dice.randrange(procs)) for _ in range(count)]


EVERY = [(place, value, 0) for place in PLACES for value in VALUES]


def inject(config, faults, seed=0, machine=HERE):
    "The faults, one a step, in a training of `config`: what came of them."
    launch(*(vtp.job.ordered(vtp.job.inputs(config))), machine=HERE)
    run = create(path_of(config), config, machine)
    found = Faults(faults, seed)
    with interposed(found): config(run)
    return found


def in_ranks(calls):
    "In each of several ranks: the faults of several runs."
    results = {}
    for name, (path, faults, seed) in calls.items():
        run, found = Run(path), Faults(faults, seed)
        with interposed(found): run.job(run)
        results[name] = found.told, found.lost, found.off
    return results


KINDS = {"pretrain": all_three, "pretrain, softmax centres": softmax, "second stage, PatchGAN": stage2, "second stage, FeatureGAN": with_trunk, "DiT": dit}


@pytest.mark.timeout(240)
@pytest.mark.parametrize("kind", [pytest.param(kind, marks=pytest.mark.slow) if "softmax" in kind else kind for kind in KINDS])
def test_a_fault_anywhere_changes_nothing(kind, record):
    found = inject(KINDS[kind](), EVERY, seed=1)
    print(kind, found.off, [told for told in found.told if told[2]])
    record(fault=f"NaN, Inf, 1e38 in a batch, an activation, a gradient: {kind}", promise="no step, or a finite one; nothing else moves", tried=len(EVERY), lost=len(found.lost), skipped=found.off)
    assert not found.lost, found.lost
    assert all(not stepped for place, value, stepped in found.told if place == "gradient" and not math.isfinite(value)) and found.off >= 9


def ranks_of(tmp_path, count, seed):
    "Runs for two ranks, DDP and FSDP (the second stage knows only DDP)."
    calls = {}
    for name, config, sharding in (("pretrain ddp", all_three(), "ddp"), ("pretrain fsdp", all_three(), "fsdp"), ("softmax ddp", softmax(), "ddp"), ("second ddp", stage2(), "ddp"), ("dit fsdp", dit(), "fsdp")):
        path = tmp_path / name.replace(" ", "-")
        create(path, config, replace(HERE, procs=2, sharding=sharding))
        calls[name] = str(path), plan(count, f"{seed} {name}", 2), seed
    return calls


@pytest.mark.timeout(300)
def test_a_fault_on_one_rank_stops_all(tmp_path, record):
    launch(LATENTS, machine=HERE)
    found = ranks(in_ranks, ranks_of(tmp_path, 5, 3), nproc=2)
    tried, lost, off = (sum(len(told) for told, _, _ in found.values()), [entry for _, lost, _ in found.values() for entry in lost], sum(off for _, _, off in found.values()))
    record(fault="NaN, Inf, 1e38 on one rank of two, DDP and FSDP", promise="no rank steps, or all do with finite numbers", tried=tried, lost=len(lost), skipped=off)
    assert not lost and off >= 10 and all(off for _, _, off in found.values()), (lost, found)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_campaign(tmp_path, record):
    seed, tried, lost, off = 5, 0, [], 0
    for kind, make in KINDS.items():
        found = inject(make(), plan(60, f"{seed} {kind}"), seed)
        tried, lost, off = tried + len(found.told), lost + found.lost, off + found.off
    for told, bad, skipped in ranks(in_ranks, ranks_of(tmp_path, 24, seed), nproc=2).values(): tried, lost, off = tried + len(told), lost + bad, off + skipped
    record(fault="NaN, Inf, 1e38 at a random tensor, step and rank", promise="no step, or a finite one; nothing else moves", tried=tried, lost=len(lost), skipped=off)
    print(tried, off)
    assert tried >= 400 and not lost, (seed, lost)


def poison(patch, steps, where=package, name="train_step", at=1):
    "A NaN in one pixel of the batch of these steps (from 0)."
    inner = getattr(where, name)

    def poisoned(*args):
        if args[-1] in steps: args[at]["rec"]["image"][0, 0, 0, 0] = math.nan
        return inner(*args)

    patch.setattr(where, name, poisoned)


def everything(run):
    last = run.at()
    return {group: last.tensors(group) for group in ("model", "optim")}, (run.path / "metrics.jsonl").read_bytes()


def equal(a, b): return a[1] == b[1] and all(a[0][g].keys() == b[0][g].keys() and all(torch.equal(a[0][g][n], t) for n, t in b[0][g].items()) for g in a[0])


def test_after_k_in_a_row_it_stops_and_can_go_on(monkeypatch, tmp_path, record):
    small = job(steps=12, log_every=2, keep=(4,), skips=3)
    monkeypatch.setenv("VTP_RUNS", str(tmp_path / "straight"))
    straight = everything(launch(small, machine=HERE)[0])
    monkeypatch.setenv("VTP_RUNS", str(tmp_path / "stopped"))
    with monkeypatch.context() as patched:
        poison(patched, range(5, 12))
        with pytest.raises(RuntimeError, match=r"3 steps in a row had no finite gradient: the last checkpoint is intact, .*quarantine.jsonl; see .* python -m vtp.replay pretrain-\S+ 6$"):
            launch(small, machine=HERE)
    run = run_of(small)
    assert [c.step for c in run.checkpoints()] == [4] and run.at(4).damage() is None and not run.done
    rows = run.rows("quarantine")
    assert [row["step"] for row in rows] == [6, 7, 8] and all(len(row["keys"]) == 16 and not row["loss_finite"] and row["reason"].startswith("loss not finite") for row in rows)
    assert rows[0]["command"] == f"python -m vtp.replay {run.path.name} 6"
    assert equal(everything(launch(small, machine=HERE)[0]), straight) and run.rows("quarantine") == []
    record(fault="k steps in a row that are not finite", promise="stopped, last checkpoint whole, continued to the bit", tried=1, skipped=3)


def test_fewer_in_a_row_do_not_stop_it(monkeypatch):
    small = job(steps=12, log_every=4, skips=3)
    poison(monkeypatch, (1, 2, 4, 5, 7, 11))
    run, = launch(small, machine=HERE)
    assert run.done and run.rows()[-1]["skipped"] == 6 and [row["step"] for row in run.rows("quarantine")] == [2, 3, 5, 6, 8, 12]


def test_an_infinite_loss_with_a_finite_gradient_is_called_off(monkeypatch):
    "What overflows is a number that is added without a gradient."
    inner = ReconstructionLoss.terms
    monkeypatch.setattr(ReconstructionLoss, "terms", lambda self, decoded, image: {name: value + (math.inf if name == "l1" else 0) for name, value in inner(self, decoded, image).items()})
    for config, groups in ((job((rec(),), steps=2, log_every=1, skips=3), ("model",)), (stage2(steps=2, log_every=1, skips=3), ("decoder", "discriminator", "ema"))):
        run, = launch(config, machine=HERE)
        assert run.rows()[-1]["skipped"] == 2 and all(tensor.isfinite().all() for group in groups for tensor in run.at().tensors(group).values())


@pytest.mark.parametrize("what", ["weight", "teacher", "moment", "buffer"])
def test_a_state_that_is_not_finite_is_never_saved(monkeypatch, what):
    "A fault of memory, of which no gradient tells: found when the state is to be saved."
    small, inner = softmax(steps=8, log_every=2, keep=(4,)), package.train_step

    def faulty(model, batch, opt, config, number):
        numbers = inner(model, batch, opt, config, number)
        if number == 7:
            tensor = dict(weight=lambda: model.tokenizer.decoder.proj_out.bias, teacher=lambda: model.objectives["ssl"].teacher.head.mlp[0].bias,
                          moment=lambda: opt.state[model.tokenizer.encoder.bottleneck.weight]["exp_avg"], buffer=lambda: model.objectives["ssl"].centers)[what]()
            with torch.no_grad(): tensor.view(-1)[3] = math.inf
        return numbers

    with monkeypatch.context() as patched:
        patched.setattr(package, "train_step", faulty)
        with pytest.raises(ValueError, match="is not finite at step 8: not saved, the checkpoint before it stays"):
            launch(small, machine=HERE)
    run = run_of(small)
    assert [c.step for c in run.checkpoints()] == [4] and run.at(4).damage() is None
    assert launch(small, machine=HERE)[0].done


# Monitors


@pytest.mark.parametrize("machine", [HERE, replace(HERE, checkpointing=True)], ids=["plain", "recomputed"])
def test_looking_changes_nothing(monkeypatch, tmp_path, machine):
    states = []
    for every in (1, 100):
        monkeypatch.setenv("VTP_RUNS", str(tmp_path / str(every)))
        run, = launch(job((clip(), ssl(centering="softmax"), rec(drop=0.1)), steps=4, log_every=every), machine=machine)
        states.append(everything(run)[0])
        assert len(run.rows()) == (4 if every == 1 else 1) and {"clip_grad", "ssl_grad", "rec_grad", "clip_ssl_cos", "clip_rec_cos", "ssl_rec_cos"} <= run.rows()[-1].keys()
    assert equal((states[0], b""), (states[1], b""))


def test_checkpoints_and_one_objective_see_the_same_and_chunks_do_not_look():
    small = job(dtype="fp64", steps=2, log_every=2)
    rows = []
    for machine in (HERE, replace(HERE, checkpointing=True)):
        if run_of(small).path.exists(): run_of(small).path.rename(run_of(small).path.with_name(f"aside{len(rows)}"))
        rows.append(launch(small, machine=machine)[0].rows())
    for others in rows[1:]:
        for row, other in zip(rows[0], others, strict=True): assert {k: v for k, v in other.items() if k.endswith(("_grad", "_cos"))} == pytest.approx({k: v for k, v in row.items() if k.endswith(("_grad", "_cos"))}, rel=1e-7)
    blind, = launch(replace(small, seed=1), machine=replace(HERE, chunk=3))          # the graph of all chunks would be kept
    assert not any(name.endswith(("_grad", "_cos")) for row in blind.rows() for name in row)
    alone, = launch(job((rec(),), steps=1, log_every=1), machine=HERE)
    assert alone.rows()[0]["rec_grad"] > 0 and not any(name.endswith("_cos") for name in alone.rows()[0])


@pytest.mark.parametrize("which", ["tiny", pytest.param("smoke", marks=pytest.mark.slow)])
def test_nothing_warns_where_all_is_well(which, capsys):
    runs = launch(*((recipe(("clip", "ssl", "rec"), "smoke"),) if which == "smoke" else (job(log_every=1), stage2(steps=12, log_every=2))), machine=HERE)
    warned = [(run.path.name, row["step"], row["warn"]) for run in runs for row in run.rows() if "warn" in row]
    assert not warned and " is below " not in capsys.readouterr().out


@dataclass(frozen=True, kw_only=True)
class Against(Reconstruction):
    "Whatever reconstruction wants, the opposite."
    name: ClassVar[str] = "against"

    def build(self, tokenizer):
        return Opposite(super().build(tokenizer).config)


class Opposite(ReconstructionLoss):
    def forward(self, tokenizer, batch): return -super().forward(tokenizer, batch)


def collapsed(patch, change):
    "`change(model)` before every step."
    inner = package.train_step

    def step(model, batch, opt, config, number):
        with torch.no_grad(): change(model)
        return inner(model, batch, opt, config, number)

    patch.setattr(package, "train_step", step)


def flat_latent(model): model.tokenizer.encoder.bottleneck.weight.zero_()
def dead_channel(model): model.tokenizer.encoder.bottleneck.weight[3].zero_()
def hot(model): model.objectives["clip"].logit_scale.fill_(math.log(100))


def undecided(model):
    last = model.objectives["ssl"].teacher.head.mlp[-1]
    last.weight.zero_(), last.bias.zero_()


def one_answer(model):
    head = model.objectives["ssl"].teacher.head
    head.mlp[-1].weight.zero_(), head.mlp[-1].bias.fill_(1.0)
    head.last_layer.weight_v[5].fill_(1.0), head.last_layer.weight_g[5].fill_(50.0)
    model.objectives["ssl"].centers.zero_()


CASES = {"latent": (flat_latent, (clip(), rec()), {"rec_latent_std", "rec_latent_std_min"}), "channel": (dead_channel, (rec(),), {"rec_latent_std_min"}),
         "temperature": (hot, (clip(), rec()), {"clip_scale"}), "undecided teacher": (undecided, (ssl(),), {"ssl_teacher_evenness"}),
         "one answer": (one_answer, (ssl(centering="softmax"),), {"ssl_teacher_evenness", "ssl_teacher_kl"})}


@pytest.mark.parametrize("case", CASES)
def test_collapse_warns_once(case, monkeypatch, capsys):
    change, objectives, columns = CASES[case]
    collapsed(monkeypatch, change)
    run, = launch(job(objectives, steps=6, log_every=1), machine=HERE)
    seen = [set(row.get("warn", "").split()) for row in run.rows()]
    said = [line for line in capsys.readouterr().out.splitlines() if " is below " in line or " is above " in line]
    assert columns <= set().union(*seen) and len(said) >= len(columns) and all(sum(f" {name} = " in line for line in said) == 1 for name in columns), (seen, said)


def test_opposed_objectives_warn(monkeypatch, capsys):
    monkeypatch.setattr(vtp.config, "allowed", vtp.config.allowed | {__name__})
    against = Against(batch=8, weight=1.0, mse=2.0, crop=rec().crop, perceptual=rec().perceptual)
    run, = launch(job((rec(), against), steps=5, log_every=1), machine=HERE)
    assert [row.get("warn") for row in run.rows()] == [None, None] + 3 * ["rec_against_cos"] and run.rows()[0]["rec_against_cos"] < -0.9
    assert capsys.readouterr().out.count("pull the trunk in opposite directions") == 1


def test_a_spike_and_a_saturated_discriminator_warn_and_clear(monkeypatch, tmp_path, capsys):
    inner = package.train_step
    with monkeypatch.context() as patched:
        patched.setattr(package, "train_step", lambda *args: (lambda n: n | {"loss": n["loss"] * (5 if args[-1] in (9, 10) else 1)})(inner(*args)))
        small = job((rec(),), steps=14, log_every=1)
        run, = launch(small, machine=HERE)
        said = capsys.readouterr().out
        assert [row["step"] for row in run.rows() if row.get("warn") == "loss"] == [10, 11] and said.count("step 10: loss") == said.count("in its range again") == 1
        straight = (run.path / "metrics.jsonl").read_bytes()
        monkeypatch.setenv("VTP_RUNS", str(tmp_path / "again"))
        stop_at(patched, 9)
        with pytest.raises(InterruptedError): launch(small, machine=HERE)
        run, = launch(small, machine=HERE)                       # interrupted in the middle of the warning
        assert (run.path / "metrics.jsonl").read_bytes() == straight and capsys.readouterr().out.count(": a spike") == 1
    step = second.finetune_step
    monkeypatch.setattr(second, "finetune_step", lambda *args: step(*args) | {"saturated": torch.tensor(float(args[-1] < 4))})
    run, = launch(stage2(steps=8, log_every=1), machine=HERE)
    assert [row["step"] for row in run.rows() if row.get("warn") == "saturated"] == [3, 4]


# The step again


def files(folder):
    return {str(file.relative_to(folder)): (file.read_bytes(), file.stat().st_mtime_ns) for file in sorted(folder.rglob("*")) if file.is_file()}


@pytest.mark.timeout(240)
@pytest.mark.parametrize("config", [all_three(steps=5, log_every=1, keep=(2,)), stage2(steps=6, log_every=1, keep=(2,)), dit(steps=6, log_every=1, keep=(2,))], ids=["pretrain", "second stage", "DiT"])
def test_exact_is_the_step_that_was(config):
    run, = launch(config, machine=HERE)
    os.chmod(run.path, 0o555)
    try:
        before = files(run.path)
        found = replay(run.path, 5, exact=True)
        assert files(run.path) == before
    finally: os.chmod(run.path, 0o755)
    row = next(row for row in run.rows() if row["step"] == 5)
    own, wide = found.passes
    shared = own.numbers.keys() & row.keys()
    assert {"loss", "grad_norm"} <= shared and all(own.numbers[name] == row[name] for name in shared) and own.stepped and found.samples == []
    assert wide.dtype == "fp64" and wide.numbers["loss"] == pytest.approx(own.numbers["loss"], rel=1e-4)
    assert found.weights == 4 and "those that the step had" in text(found)
    if not isinstance(config, package.Pretrain): return
    assert own.gradients["clip"] > own.numbers["clip_grad"] and own.gradients.keys() == {"clip", "ssl", "rec"}
    near = replay(run.path, 5)
    assert near.weights == 2 and "2 steps apart" in text(near) and "--exact" in verdict(near) and own.numbers != near.passes[0].numbers


def test_an_overflow_is_told_from_a_bad_sample(capsys):
    small = job((rec(),), steps=8, log_every=1, keep=(4,))
    run, = launch(small, machine=HERE)
    last = run.at(4)
    tensors = {group: last.tensors(group) for group in ("model", "optim")}
    tensors["model"]["tokenizer.decoder.proj_out.weight"] *= 1e25
    write_checkpoint(run.path / "checkpoints", 4, tensors, last.state)
    found = replay(run.path.name, 5)
    own, wide = found.passes
    assert not own.stepped and wide.stepped and found.samples is None and own.first and own.parameters > len(own.gradients) and math.isinf(own.numbers["loss"])
    main([str(run.path), "5"])
    said = capsys.readouterr().out
    assert "another batch is not finite either: the weights of step 4 are to blame; in fp64 it is finite, so fp32 overflows" in said and "first output that is not finite: model." in said


def test_a_latent_that_is_not_finite_is_found():
    small = dit(steps=6, log_every=1, keep=(2,))
    launch(LATENTS, machine=HERE)
    reader = LatentBatches(small).reader
    target = int(reader.order(0, np.arange(48, 64))[5])                      # in the fourth step
    number = int(np.searchsorted(reader.starts, target, side="right")) - 1
    file = run_of(LATENTS).path / "latents" / f"shard-{number:05d}.safetensors"
    tensors = load_file(file)
    with safe_open(file, "pt") as shard: made_with = shard.metadata()
    for name in ("z", "z_flipped"): tensors[name][target - reader.starts[number], 0, 0, 0] = math.nan
    save_file(tensors, file, made_with)
    run, = launch(small, machine=HERE)
    assert run.rows("quarantine")[0]["step"] == 4
    found = replay(run.path, 4)
    (sample,), = found.samples
    assert found.keys and sample.key == f"shapes/train/{int(reader.positions[target]):08}" and sample.shard.endswith(file.name) and not found.passes[1].stepped


def test_the_command_of_a_row(monkeypatch, tmp_path):
    "As it stands there, in a process of its own, on a run that was stopped; the fault was injected, so it is not in the batch."
    small = job(steps=12, log_every=2, keep=(4,), skips=3)
    poison(monkeypatch, range(5, 12))
    with pytest.raises(RuntimeError) as stopped: launch(small, machine=HERE)
    command = run_of(small).rows("quarantine")[0]["command"]
    assert str(stopped.value).endswith(command)
    env = dict(os.environ, PYTHONPATH=str(Path(__file__).parent.parent))
    done = subprocess.run([sys.executable, *command.split()[1:], "--exact"], env=env, capture_output=True, text=True)
    assert done.returncode == 0 and "step 6 of 12, called off in the run, which had the same keys" in done.stdout and "finite here" in done.stdout, done.stderr[-2000:]
    with pytest.raises(SystemExit, match="step 13 is none of 1 … 12"): main([run_of(small).path.name, "13"])


def test_the_part_of_one_rank():
    small = job((clip(), rec()), steps=4, log_every=1, keep=(2,))
    run, = launch(small, machine=HERE)
    with pytest.raises(ValueError, match="rank 1 is none of 0 … 0"): replay(run.path, 3, rank=1)
    about = json.loads((run.path / "env.json").read_text())
    (run.path / "env.json").write_text(json.dumps(about | {"world": 2}))
    seen, inner = [], package.train_step
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(package, "train_step", lambda *args: seen.append(args[1]["clip"]["image"]) or inner(*args))
        found = replay(run.path, 3, rank=1)
    part = Batches(small.pairs, small.objectives, small.seed, small.steps, 1, 2)[2]
    assert found.batch == 8 and torch.equal(seen[0], to_device(part["clip"]["image"], "cpu"))
    with pytest.raises(ValueError, match="latents.* is no training"): replay(launch(LATENTS, machine=HERE)[0].path, 1)
