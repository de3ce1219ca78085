"""What is planned is what a step takes: FLOPs, memory and disk against the real thing, at the smallest scale."""
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import HERE, clip, rec, ssl
from tiny import job as tiny_job
from torch.profiler import ProfilerActivity, profile

import vtp.rehearsal as package
from vtp.chains import chain, dit, finetune, latents
from vtp.data.batch_sampling import Batches
from vtp.evaluation.generation import GenerationQuality
from vtp.evaluation.protocol import Evaluate
from vtp.flops import count
from vtp.generation.flow import SamplerConfig
from vtp.generation.latents import CacheLatents
from vtp.generation.train import cost as dit_cost
from vtp.job import At, Job, Machine, launch, run_of
from vtp.loop import DTYPES, prepare, to_device
from vtp.memory import emptied, imagined, rehearse, size_of
from vtp.optim import adamw
from vtp.plan import Plan, Throughput, assumed, measured, plan, show
from vtp.pretrain import cost, train_step
from vtp.recipes import AE, VTP, at, recipe, sources
from vtp.rehearsal import fitting, memory, rehearsal, shares
from vtp.tokenizers.frozen import Untrained

TOKENS = 24  # of a caption, in `vtp.pretrain.cost` and so in the rows of a run


def of(views):
    return [tensor for view in views.values() for tensor in view.values()]


def real_batch(job):
    raw = Batches(job.pairs, job.objectives, job.seed, job.steps)[0]
    return to_device({name: raw[name] for name in job.weights}, torch.device("cpu"), DTYPES[job.dtype])


def allocated(job, machine, batch):
    "Peak of the CPU allocator in the second step of a training, with all that is there before, in bytes."
    model = job.build().train()
    prepare(model, machine)
    opt = adamw(model, job.optim)
    train_step(model, batch, opt, job, 0)
    here = [*model.parameters(), *model.buffers(), *of(batch), *(t for state in opt.state.values() for t in state.values())]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as heard:
        train_step(model, batch, opt, job, 1)
    return size_of(here) + np.cumsum([e.nbytes() for e in heard.profiler.kineto_results.events() if e.name() == "[memory]"]).max()


WAYS = {
    "rec": (("rec",), "fp32", Machine()),
    "rec, chunk": (("rec",), "fp32", Machine(chunk=8)),
    "clip and rec, bf16, recomputed": (("clip", "rec"), "bf16", Machine(checkpointing=True)),
    "all, fp32": (("clip", "ssl", "rec"), "fp32", Machine()),
    "all, bf16": (("clip", "ssl", "rec"), "bf16", Machine()),
    "all, chunk": (("clip", "ssl", "rec"), "fp32", Machine(chunk=8)),
}


@pytest.mark.parametrize("way", WAYS)
def test_memory_and_flops_are_those_of_a_real_step(way):
    names, dtype, machine = WAYS[way]
    job = replace(recipe(names, "smoke"), dtype=dtype)
    batch = real_batch(job)
    tokens = batch["clip"]["ids"].shape[1] if "clip" in names else TOKENS
    step = rehearsal(job, machine, tokens=tokens)
    whole = allocated(job, machine, batch)
    assert step.peak == pytest.approx(whole, rel=0.1)  # measured: 0.1 %, 6 % for "rec, chunk"
    fixed = step.trained + step.frozen + step.buffers + step.moments + step.batch
    assert step.peak - fixed == pytest.approx(whole - fixed, rel=0.12)  # what autograd saves, and gradients

    model = job.build().train()
    prepare(model, machine)
    counted = count(lambda: sum(job.weights[name] * loss for name, loss in model(batch, 0).items()).backward()).total
    assert step.flops == pytest.approx(counted, rel=0.005)  # the number of hidden patches is that of the fullest masks


def test_watching_a_real_step_gives_what_the_imagined_one_gives():
    job, found = recipe(("clip", "ssl", "rec"), "smoke"), []
    batch = real_batch(job)
    with torch.device("meta"):
        blank = job.build("meta").train()
    for model in (job.build().train(), blank):
        views = {name: {key: torch.empty(t.shape, dtype=t.dtype, device="meta") for key, t in view.items()} for name, view in batch.items()}

        def watched(views):
            opt = adamw(model, job.optim)
            return rehearse(lambda: train_step(model, views, opt, job, 0), [*model.parameters(), *model.buffers(), *of(views)], [opt])

        if model is blank:
            with imagined():
                emptied(model)
                found.append(watched({name: {key: torch.empty(t.shape, dtype=t.dtype) for key, t in view.items()} for name, view in views.items()}))
        else:
            found.append(watched(batch))
    assert found[0].flops == found[1].flops and found[0].moments == found[1].moments
    assert found[0].peak == pytest.approx(found[1].peak, rel=0.002)


def test_a_plan_leaves_no_trace_in_real_models():
    "Tables that models share must not be those of a model without values."
    job, losses = tiny_job(), []
    batch = real_batch(job)
    for turn in range(2):
        torch.manual_seed(0)
        model = job.build().train()
        losses.append(sum(model(batch, 0).values()).item())
        rehearsal(replace(job, seed=turn + 5))
    assert losses[0] == losses[1]


def test_flops_are_those_that_a_run_says():
    for names in (("rec",), ("clip", "ssl", "rec")):
        job = recipe(names, "smoke")
        assert plan(job, tokens=TOKENS).flops == pytest.approx(job.spent()["flops"], rel=1e-9)
    generator = dit(job, "smoke")
    assert plan(generator).flops == pytest.approx(generator.steps * generator.batch * dit_cost(generator.dit))
    tuned = finetune(job, "smoke")
    assert plan(tuned).flops == pytest.approx(tuned.spent()["flops"] - job.spent()["flops"])
    alone = plan(job, tokens=TOKENS)
    assert alone.shares == pytest.approx({o.name: cost(job).alone[o.name] * o.batch for o in job.objectives})
    assert alone.step_flops < sum(alone.shares.values())  # one pass of the trunk serves contrast and reconstruction


def test_disk_is_what_is_written(tmp_path):
    job = tiny_job(keep=(4, 8))
    store = CacheLatents(At(job), job.pairs, samples=64, batch=16, shard=32, dtype="fp32")
    planned = {p.job.kind: p for p in plan([store], HERE)}
    assert list(planned) == ["pretrain", "latents"]
    launch(store, machine=HERE)
    run = run_of(job)
    size = sum(f.stat().st_size for f in run.checkpoints()[-1].path.rglob("*") if f.is_file())
    assert job.checkpoint_bytes() == pytest.approx(size, rel=0.1)
    written = sum(f.stat().st_size for f in run.path.rglob("*.safetensors"))
    assert written <= planned["pretrain"].disk and planned["pretrain"].disk == pytest.approx(5 * size, rel=0.1)  # two kept, the two newest, one on its way
    stored = sum(f.stat().st_size for f in run_of(store).path.rglob("*.safetensors"))
    assert stored == pytest.approx(planned["latents"].disk, rel=0.1)
    again = plan([store], HERE)
    assert not again and again.done == 2 and "all 2 jobs are done" in show(again).data
    assert plan(job).steps == job.steps  # who asks for one job hears of it, done or not


def test_devices_share_activations_and_with_fsdp_the_model():
    job = at(VTP, "smoke")
    one, ddp, fsdp = (memory(job, Machine(procs=n, sharding=s)) for n, s in ((1, "ddp"), (4, "ddp"), (4, "fsdp")))
    assert ddp.parameters == one.parameters and fsdp.parameters == one.parameters / 4 and fsdp.moments == one.moments / 4
    assert fsdp.gathered > 0 == ddp.gathered and ddp.batch == pytest.approx(one.batch / 4, rel=0.05)
    assert ddp.activations < one.activations and fsdp.activations == ddp.activations
    assert ddp.peak >= sum((ddp.parameters, ddp.frozen, ddp.gradients, ddp.moments, ddp.batch))  # its gradients stay in the buckets
    with pytest.raises(ValueError, match="3 devices can't share"):
        plan(job, Machine(procs=3))
    assert memory(finetune(job, "smoke"), Machine(procs=2, sharding="fsdp")).gathered == 0  # it knows ddp only


def test_checkpointing_costs_flops_and_saves_memory():
    job = at(AE, "cpu")
    plain, again = plan(job), plan(job, Machine(checkpointing=True))
    assert again.memory.activations < plain.memory.activations / 2 and 1.1 < again.flops / plain.flops < 4 / 3


def test_many_chunks_are_like_few(monkeypatch):
    "What is said of many chunks from three of them is what all of them take."
    job, found = recipe(("clip", "rec"), "smoke"), []
    for most in (2, 1000):
        monkeypatch.setattr(package, "PIECES", most)
        found.append(rehearsal(job, Machine(chunk=8), tokens=TOKENS))
    assert found[0].peak == pytest.approx(found[1].peak, rel=0.02) and found[0].flops == pytest.approx(found[1].flops, rel=0.002)


def test_fitting_finds_the_largest_chunk_that_fits():
    job, room = at(AE, "smoke"), 19e6
    table = fitting(job, room).set_index("chunk")
    best = table[table.fits].index.max()
    assert not table.fits[0] and table.fits.any() and not table.fits.get(2 * best, False) and (2 * best in table.index or 2 * best >= job.batch)
    assert all(row.fits == (row.peak_gb <= 0.9 * room / 1e9) for row in table.itertuples())
    assert memory(job, Machine(chunk=int(best))).peak / 1e9 == table.peak_gb[best] and table.extra[best] > 0 == table.extra[0]
    assert fitting(job, 1e9).chunk.tolist() == [0]


def test_a_chain_is_planned_with_its_inputs_once_each():
    _, held = sources("smoke")
    one, other = (chain(at(job, "smoke"), held, "smoke") for job in (AE, VTP))
    planned = plan([*one.measures, *other.measures, *one.measures], throughput=Throughput("given for a test", 1e10))
    assert len(planned) == 16 and planned.done == 0
    table = planned.table()
    assert table["device-hours"].iloc[-1] == pytest.approx(sum(p.flops for p in planned) / 1e10 / 3600)
    for p in planned:
        assert math.isnan(p.row()["s a step"]) == (p.steps is None) and p.flops > 0
    text = show(planned, room=1e9).data
    assert "16 jobs" in text and "given for a test" in text and "Every training fits" in text and text.count("| pretrain |") == 2
    assert "**Too large**" in show(planned, room=1e7).data


def test_sampling_costs_its_evaluations():
    judge = dict(reference="somewhere.npz", samples=100)
    generator = dit(at(VTP, "smoke"), "smoke")
    def flops(**sampler): return plan(Evaluate(At(generator), (GenerationQuality(sampler=SamplerConfig(**sampler), **judge),))).flops / 100
    velocity = (flops(steps=11) - flops(steps=6)) / 5
    assert velocity == pytest.approx(dit_cost(generator.dit) / 3, rel=0.02)  # forward alone; what is behind it is the decoder
    assert flops(method="heun", steps=11) - flops(steps=11) == pytest.approx(10 * velocity)
    assert flops(steps=11, guidance=2.0) - flops(steps=11) == pytest.approx(10 * velocity)
    adaptive = plan(Evaluate(At(generator), (GenerationQuality(sampler=SamplerConfig("dopri5"), **judge),)))
    assert "dopri5" in adaptive.notes[0] and "dopri5" in show(adaptive).data


def test_the_papers_numbers_come_out():
    "84 GB of latents and 1.41e19 FLOPs of a B/1 are known from elsewhere."
    assert plan(latents(VTP, "paper")).disk == pytest.approx(84e9, rel=0.01)
    assert plan(dit(VTP, "paper"), Machine(procs=8)).flops == pytest.approx(1.41e19, rel=0.01)


def test_a_throughput_says_how_it_is_known():
    job = at(AE, "smoke")
    found = measured(job, seconds=0.2, where="cpu")
    assert found.name.startswith("measured") and 1e8 < found.flops_per_s < 1e13
    planned = plan(job, throughput=found)
    assert planned.device_hours == pytest.approx(planned.flops / found.flops_per_s / 3600) and planned.step_seconds == pytest.approx(planned.step_flops / found.flops_per_s)
    assert measured(dit(job, "smoke"), seconds=0.1, where="cpu").flops_per_s > 1e8
    assert math.isnan(plan(job).device_hours) and "no hours" in show(plan(job)).data
    assert assumed(1e15, 0.4, "a data sheet").flops_per_s == 4e14
    for nonsense in (lambda: assumed(1e15, 1.5, "x"), lambda: Throughput("", 1e12), lambda: Throughput("x", 0), lambda: measured(finetune(job, "smoke"))):
        with pytest.raises(ValueError):
            nonsense()


def test_jobs_that_train_nothing_cost_nothing_and_unknown_ones_are_refused():
    free = plan(Untrained(at(AE, "smoke").tokenizer))
    assert isinstance(free, Plan) and free.flops == 0 == free.disk and free.memory is None
    with pytest.raises(ValueError, match="can't be planned"):
        plan(Job())
    with pytest.raises(ValueError, match="no step to rehearse"):
        rehearsal(latents(at(AE, "smoke"), "smoke"))
    assert shares(tiny_job((clip(), ssl(), rec())), 4) == {"clip": 4, "ssl": 2, "rec": 2}
