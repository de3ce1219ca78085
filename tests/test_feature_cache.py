"""Batches larger than memory: chunks change neither losses nor gradients, on any number of ranks and with either contrastive loss; they hold one chunk's activations."""
import statistics
from dataclasses import replace

import pytest
import torch
from test_drop_path import CPU, same, step
from tiny import clip, job, ranks, rec, ssl

from vtp.chunks import replayed
from vtp.config import dumps, loads
from vtp.data.augment import CropConfig
from vtp.data.batch_sampling import Batches
from vtp.dist import alone, gather_objects, rank, world, wrap
from vtp.flops import count
from vtp.loop import to_device
from vtp.memory import Live
from vtp.objectives.contrastive import ContrastiveLoss
from vtp.objectives.overall import Overall
from vtp.objectives.self_supervised import SelfDistillation
from vtp.perceptual import PerceptualConfig
from vtp.pretrain import _blank, freeze_unused
from vtp.recipes import VTP
from vtp.text import TextConfig
from vtp.tokenizers.vit import ViTTokenizerConfig
from vtp.vit import ViTConfig

VARIANTS = {
    "clip": (clip(drop=0.4),),
    "siglip": (clip(loss="siglip", drop=0.4),),
    "clip on the latent": (clip(drop=0.4, tap="latent"),),
    "shared pass": (clip(), rec()),
    "all": (clip(loss="siglip", drop=0.2), ssl(drop=0.3), rec(drop=0.4)),
}
TEXTS = {name: dumps(job(objectives, dtype="fp64")) for name, objectives in VARIANTS.items()}


def steps(names, chunks, checkpointing=False):
    "In ranks that are started once."
    return {(name, chunk): step(TEXTS[name], chunk, checkpointing) for name in names for chunk in chunks}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", VARIANTS)
def test_chunks_equal_one_piece(name, checkpointing):
    "A batch of 16 (8 for the others) in chunks that divide it, that do not, and of one."
    whole = step(TEXTS[name])
    for chunk in (1, 4, 5):
        same(whole, step(TEXTS[name], chunk, checkpointing))


@pytest.mark.timeout(300)
def test_chunks_on_two_ranks_equal_one_process():
    whole = steps(VARIANTS, (None,))
    for (name, _), found in ranks(steps, list(VARIANTS), (3,), True, nproc=2, jobs=map(loads, TEXTS.values())).items():
        same(whole[name, None], found)


def unequal(text):
    "As `step`, but every rank cuts its captions at its own longest: texts of rank 0 are short, those of the last rank fill the context."
    config = loads(text)
    batch = Batches(config.pairs, config.objectives, config.seed, config.steps, rank(), world())[0]
    model = freeze_unused(config.build(), config).train()
    views = to_device({"clip": batch["clip"]}, CPU, torch.float64)
    places = rank() * len(views["clip"]["ids"]) + torch.arange(len(views["clip"]["ids"]))
    lengths = 3 + places * 60 // 16                                         # of the pair at this place, whoever has it
    ids = torch.where(torch.arange(77) < lengths[:, None] - 1, 320 + places[:, None] * 77 + torch.arange(77), 0)
    views["clip"]["ids"] = ids.scatter(1, lengths[:, None] - 1, 49407)[:, :int(lengths.max())]
    wrapped = wrap(model)
    loss = wrapped(views, 7)["clip"]
    loss.backward()
    values = gather_objects((loss.item(), views["clip"]["ids"].shape[1]))
    return {"clip": statistics.fmean(value for value, _ in values)}, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}, [columns for _, columns in values]


def unequals(names): return {name: unequal(TEXTS[name]) for name in names}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("procs", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_both_losses_at_any_world_size(procs):
    "1, 2 and 4 ranks, whose captions are cut at unequal lengths."
    one, many = unequals(("clip", "siglip")), ranks(unequals, ("clip", "siglip"), nproc=procs, jobs=[loads(TEXTS[name]) for name in ("clip", "siglip")])
    for name in one:
        same(one[name][:2], many[name][:2])
        assert len(set(many[name][2])) == procs and max(many[name][2]) == one[name][2][0]


def reductions(text, chunk):
    "In every rank: how often each parameter's gradient arrived in one backward pass, and how many times ranks exchanged gradients."
    config, arrivals, exchanged = loads(text), {}, []
    batch = Batches(config.pairs, config.objectives, config.seed, config.steps, rank(), world())[0]
    model = freeze_unused(config.build(), config).train()
    for objective in model.objectives.values():
        objective.chunk = chunk
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            arrivals[name] = 0
            parameter.register_post_accumulate_grad_hook(lambda p, name=name: arrivals.__setitem__(name, arrivals[name] + 1))
    wrapped = wrap(model)

    def exchange(state, bucket):
        exchanged.append(bucket.buffer().numel())
        future = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    wrapped.register_comm_hook(None, exchange)
    sum(wrapped(to_device({name: batch[name] for name in config.weights}, CPU, torch.float64), 1).values()).backward()
    return set(arrivals.values()), sum(exchanged), sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.timeout(300)
def test_gradients_are_exchanged_once_a_step():
    arrivals, exchanged, trained = ranks(reductions, TEXTS["all"], 3, nproc=2, jobs=[loads(TEXTS["all"])])
    assert arrivals == {1} and exchanged == trained


@pytest.mark.parametrize("name", ["clip", "siglip", "all"])
def test_autocast(name):
    "bf16 over fp32 weights: chunks differ from one piece by no more than bf16 differs from fp32."
    config = loads(dumps(job(VARIANTS[name], dtype="fp32")))
    batch = to_device({n: v for n, v in Batches(config.pairs, config.objectives, 0, 1)[0].items() if n in config.weights}, CPU)

    def gradient(chunk, half):
        model = freeze_unused(config.build(), config).train()
        for objective in model.objectives.values():
            objective.chunk = chunk
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss = sum(model(batch, 1).values())
        loss.backward()
        assert loss.dtype == torch.float32
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    wide, half, chunked = gradient(None, False), gradient(None, True), gradient(3, True)
    assert (chunked - half).norm() < 1.5 * (half - wide).norm() < 0.3 * wide.norm()
    assert (chunked - wide).norm() < 1.2 * (half - wide).norm()


def test_random_numbers_of_torch_are_replayed():
    "Dropout, noise and stochastic depth without a seed of the step: the second pass draws what the first drew."
    torch.manual_seed(0)
    weight = torch.ones(8, dtype=torch.float64, requires_grad=True)
    made, = replayed(lambda rows: (torch.nn.functional.dropout(weight[rows], 0.5) * torch.randn(rows.stop - rows.start, dtype=torch.float64) * weight[rows],), 8, 3)
    after = torch.get_rng_state()
    made.sum().backward()
    assert torch.allclose(weight.grad, 2 * made.detach()) and made.count_nonzero() > 1 and torch.equal(torch.get_rng_state(), after)
    text = dumps(job(VARIANTS["clip"], dtype="fp64"))
    model = loads(text).build().train()
    view = to_device({"clip": Batches(loads(text).pairs, loads(text).objectives, 0, 1)[0]["clip"]}, CPU, torch.float64)
    found = []
    for model.objectives["clip"].chunk in (None, 4):
        torch.manual_seed(5)
        loss = model(view)["clip"]
        found.append(torch.autograd.grad(loss, model.objectives["clip"].visual_proj.weight)[0])
    assert torch.allclose(*found, rtol=1e-10)


def test_sums_of_sharded_parameters_are_replayed(monkeypatch):
    "A parameter that is shared out is not asked for its gradient in the forward pass: the chunk runs again in the backward pass, to the same end."
    config, found = loads(TEXTS["shared pass"]), []
    batch = to_device({n: v for n, v in Batches(config.pairs, config.objectives, 0, 1)[0].items() if n in config.weights}, CPU, torch.float64)
    for sharded in (False, True):
        model, calls = freeze_unused(config.build(), config).train(), []
        if sharded:
            next(model.tokenizer.decoder.parameters()).device_mesh = "stands in for a DTensor's"
        model.objectives["rec"].chunk = 3
        decode = model.tokenizer.decode
        model.tokenizer.decode = lambda z: calls.append(len(z)) or decode(z)
        sum(model(batch).values()).backward()
        found.append([p.grad for p in model.parameters() if p.grad is not None])
        assert calls == [3, 3, 2] + ([2, 3, 3] if sharded else [])
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-13)


class Saved(torch.autograd.graph.saved_tensors_hooks):
    "Bytes of distinct storages that autograd keeps for the backward pass."
    def __init__(self):
        self.sizes = {}
        super().__init__(self.pack, lambda tensor: tensor)

    def pack(self, tensor):
        self.sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor


def contrast(pairs, width=64):
    "A contrastive objective whose activations outweigh its weights, and a batch."
    torch.manual_seed(0)
    part = ViTConfig(width=width, depth=4, heads=2, patch=8)
    tokenizer = ViTTokenizerConfig(64, part, part, latent=8).build().train()
    objective = clip(batch=pairs, text=TextConfig(width, 2, 2, vocab=512, dim=32), crop=CropConfig(64), drop=0.2).build(tokenizer)
    ids = torch.randint(1, 511, (pairs, 16)).index_fill(1, torch.tensor([15]), 511)       # the largest ends the text
    return tokenizer, objective, {"image": torch.rand(pairs, 3, 64, 64), "ids": ids, "seed": 1}


def test_memory_falls_with_the_number_of_chunks():
    "What autograd keeps after the forward pass is features; what is alive at the peak is one chunk's activations beside what every step has."
    tokenizer, objective, batch = contrast(32)
    kept, peak = {}, {}
    for chunks in (1, 2, 4, 8):
        objective.chunk = 32 // chunks
        saved = Saved()
        with saved:
            loss = objective(tokenizer, batch)
        kept[chunks] = sum(saved.sizes.values())
        loss.backward()
        for module in (tokenizer, objective):
            module.zero_grad()
        with Live() as watch:
            objective(tokenizer, batch).backward()
        peak[chunks] = watch.peak
        for module in (tokenizer, objective):
            module.zero_grad()
    base = sum(4 * p.numel() for module in (tokenizer.encoder, objective) for p in module.parameters())      # the gradients
    activations = {chunks: most - base for chunks, most in peak.items()}
    print({chunks: f"saved {kept[chunks] / 2**20:.1f} MiB, peak {peak[chunks] / 2**20:.1f} MiB, less gradients {activations[chunks] / 2**20:.1f} MiB" for chunks in peak})
    assert all(kept[1] / kept[chunks] > 20 for chunks in (2, 4, 8))
    for chunks in (2, 4, 8):
        assert activations[1] / activations[chunks] > 0.6 * chunks, activations


@pytest.mark.parametrize("name,least", [("ssl", 1.5), ("rec", 1.5)])
def test_memory_of_the_other_terms(name, least):
    "Half the batch at a time and less."
    part = ViTConfig(width=64, depth=4, heads=2, patch=4)
    config = job(({"ssl": ssl, "rec": rec}[name](batch=16),), tokenizer=ViTTokenizerConfig(16, part, part, latent=8))
    batch = to_device({name: Batches(config.pairs, config.objectives, 0, 1)[0][name]}, CPU)
    peak = {}
    for chunk in (None, 4):
        model = freeze_unused(config.build(), config).train()
        model.objectives[name].chunk = chunk
        with Live() as watch:
            model(batch, 1)[name].backward()
        peak[chunk] = watch.peak - sum(4 * p.numel() for p in model.parameters() if p.requires_grad)
    print(name, {chunk: f"{value / 2**20:.1f} MiB" for chunk, value in peak.items()})
    assert peak[None] / peak[4] > least, peak


@pytest.mark.slow
def test_flops_of_the_papers_step():
    "VTP-L at a sixth of its depth, in the proportion 8 : 2 : 1, counted on the meta device: CLIP's cache costs less than 18 %; a sum in chunks (reconstruction) nothing; the student in chunks one forward of it."
    (clip, ssl, rec), whole = VTP.objectives, VTP.tokenizer
    tokenizer = replace(whole, trunk=replace(whole.trunk, depth=4), decoder=replace(whole.decoder, depth=1))
    objectives = replace(clip, text=replace(clip.text, depth=2)), ssl, replace(rec, perceptual=PerceptualConfig(kind="random_features"))
    with alone(), torch.random.fork_rng(), torch.device("meta"):
        model = Overall(tokenizer.build(), objectives).train()
    views = {o.name: _blank(o, n) for o, n in zip(objectives, (16, 4, 2))}

    def flops(**chunks):
        for name, objective in model.objectives.items():
            objective.chunk = chunks.get(name)
        return count(lambda: sum(model(views).values()).backward()).total

    plain = flops()
    ratios = {"feature cache": flops(clip=4, ssl=4, rec=4), "rec in chunks": flops(rec=1), "all in chunks": flops(clip=4, ssl=1, rec=1)}
    ratios = {name: value / plain for name, value in ratios.items()}
    print({name: f"{value:.3f}" for name, value in ratios.items()})
    assert 1.1 < ratios["feature cache"] < 1.18 and abs(ratios["rec in chunks"] - 1) < 1e-3
    assert ratios["feature cache"] < ratios["all in chunks"] < 1.34


def test_who_has_a_chunk():
    "The machine sets it on every objective that has one; without one nothing is replayed."
    model = job().build()
    assert {name: objective.chunk for name, objective in model.objectives.items()} == dict(clip=None, ssl=None, rec=None)
    assert isinstance(model.objectives["clip"], ContrastiveLoss) and isinstance(model.objectives["ssl"], SelfDistillation)
    model.objectives["clip"].chunk = 0
    config = job()
    with pytest.raises(ValueError, match="chunk=0"):
        model(to_device({n: v for n, v in Batches(config.pairs, config.objectives, 0, 1)[0].items() if n in config.weights}, CPU))
