"""Stochastic depth belongs to the global batch: the same subsets on one process, on many, and in any chunks, also where a rank keeps nothing."""
import pytest
import torch
from tiny import clip, job, ranks, rec, ssl

from vtp.config import dumps, loads
from vtp.data.batch_sampling import Batches
from vtp.data.samples import mix
from vtp.dist import gather_objects, rank, world, wrap
from vtp.drop_path import Drop, drop_of, kept, plan
from vtp.loop import DTYPES, prepare, to_device
from vtp.job import Machine
from vtp.pretrain import freeze_unused
from vtp.vit import Blocks, ViTConfig

CPU = torch.device("cpu")


def step(text, chunk=None, checkpointing=False, number=3):
    "In every rank: losses (means over ranks) and gradients (averaged by DDP) of one step, with stochastic depth of the global batch."
    config = loads(text)
    batch = Batches(config.pairs, config.objectives, config.seed, config.steps, rank(), world())[number]
    model = freeze_unused(config.build(), config).train()
    prepare(model, Machine(checkpointing=checkpointing))
    for objective in model.objectives.values():
        objective.chunk = chunk
    wrapped = wrap(model)
    losses = wrapped(to_device({name: batch[name] for name in config.weights}, CPU, DTYPES[config.dtype]), int(mix(config.seed, number)))
    sum(config.weights[name] * loss for name, loss in losses.items()).backward()
    means = {name: sum(values) / world() for name, values in zip(losses, zip(*gather_objects([loss.item() for loss in losses.values()])))}
    return means, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def same(ours, theirs, tolerance=1e-10):
    "Losses and gradients equal, relative to the largest gradient."
    (losses, gradients), (losses2, gradients2) = ours, theirs
    assert losses2 == pytest.approx(losses, rel=tolerance, abs=1e-12)
    assert gradients.keys() == gradients2.keys() and gradients
    largest = max(g.abs().max() for g in gradients.values())
    worst = max((gradients[name] - gradients2[name]).abs().max() for name in gradients)
    assert worst <= tolerance * largest, worst / largest


VARIANTS = {
    "clip": (clip(drop=0.4),),
    "ssl": (ssl(drop=0.3),),
    "all": (clip(drop=0.2), ssl(drop=0.5, batch=4), rec(drop=0.6, batch=4)),
}


def steps(texts, chunks):
    "Every combination: in ranks that are started once."
    return {(name, chunk): step(text, chunk) for name, text in texts.items() for chunk in chunks}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("procs,chunks", [(1, (1, 3)), (2, (None, 3)), (4, (None,))])
def test_ranks_and_chunks_equal_one_process(procs, chunks):
    "With a batch of 4 on 4 ranks, many a rank keeps no sample of a branch."
    texts = {name: dumps(job(objectives, dtype="fp64")) for name, objectives in VARIANTS.items()}
    whole = {name: step(text) for name, text in texts.items()}
    for (name, _), found in ranks(steps, texts, chunks, nproc=procs, jobs=map(loads, texts.values())).items():
        same(whole[name], found)


@pytest.mark.parametrize("chunk", [None, 3])
def test_activation_checkpoints_replay_the_subsets(chunk):
    text = dumps(job(VARIANTS["all"], dtype="fp64"))
    same(step(text), step(text, chunk, checkpointing=True))


def test_steps_and_objectives_draw_anew():
    text = dumps(job(VARIANTS["clip"], dtype="fp64"))
    (first, _), (again, _), (other, _) = step(text), step(text), step(text, number=4)
    assert first == again and first != other


def rows_kept(drop, pieces, crops_of=1):
    "Weights (places,) of the first block's attention, put together from pieces of the batch, by a branch that returns ones."
    found = []
    for rows in pieces:
        (attention, _), = plan(drop[rows], [crops_of * (rows.stop - rows.start)], 1, CPU)
        weights = torch.zeros(crops_of * (rows.stop - rows.start), dtype=torch.float64)
        found.append(weights.index_add(0, attention[0].samples, torch.full((len(attention[0].samples),), attention[0].scale, dtype=torch.float64)).view(crops_of, -1))
    return torch.cat(found, 1).flatten()


@pytest.mark.parametrize("rate,total", [(0.1, 16), (0.5, 7), (0.95, 12), (0.3, 1)])
def test_the_number_kept_is_that_of_the_global_batch(rate, total):
    "max(⌊B(1 - r)⌋, 1) samples with weight B / kept, however it is cut."
    for seed in range(20):
        drop = Drop(rate, (seed, 0), 0, total, total)
        whole = rows_kept(drop, [slice(0, total)])
        assert (whole > 0).sum() == kept(total, rate) == max(int(total * (1 - rate)), 1)
        assert whole.sum().item() == pytest.approx(total)
        for chunk in (1, 2, 5):
            pieces = [slice(i, min(i + chunk, total)) for i in range(0, total, chunk)]
            assert torch.equal(rows_kept(drop, pieces), whole)
    several = rows_kept(Drop(rate, (1, 0), 0, total, total), [slice(i, i + 1) for i in range(total)], crops_of=4)
    assert (several > 0).sum() == max(int(4 * total * (1 - rate)), 1)


def test_a_slice_that_keeps_nothing():
    "Its output is the plain stream and its gradients are zeros, not absent."
    torch.manual_seed(0)
    blocks = Blocks(ViTConfig(width=32, heads=2, depth=2)).double().train()
    drop = next(d for seed in range(1000) for d in [Drop(0.9, (seed, 0), 0, 2, 16)]
                if all(k.scale == 0 for pair in plan(d, [2], 2, CPU) for branch in pair for k in branch))
    tokens = torch.randn(2, 5, 32, dtype=torch.float64)
    out = blocks(tokens, (2, 2), drop)
    assert torch.equal(out, blocks.norm(tokens))
    out.square().sum().backward()
    for name, parameter in blocks.named_parameters():
        assert parameter.grad is not None and (name.startswith("norm") or not parameter.grad.any()), name


@pytest.mark.slow
def test_a_compiled_block_takes_any_number():
    "Blocks are compiled one by one; the subsets are worked out outside of them."
    torch.manual_seed(0)
    blocks, tokens = Blocks(ViTConfig(width=32, heads=2, depth=1)).train(), torch.randn(12, 5, 32)
    calls = [drop_of(0.5, "clip", 12, seed)[rows] for seed in range(2) for rows in (slice(0, 12), slice(0, 5), slice(5, 12))]
    plain = [blocks(tokens[:drop.count], (2, 2), drop) for drop in calls]
    torch._dynamo.reset()
    for block in blocks.blocks:
        block.compile(backend="aot_eager", fullgraph=True)
    for drop, expected in zip(calls, plain):
        assert torch.allclose(blocks(tokens[:drop.count], (2, 2), drop), expected, atol=1e-6)


def test_evaluation_and_a_rate_of_zero_draw_nothing():
    blocks, tokens = Blocks(ViTConfig(width=32, heads=2, depth=1)), torch.randn(2, 5, 32)
    state = torch.get_rng_state()
    assert torch.equal(blocks.eval()(tokens, (2, 2), 0.5), blocks(tokens, (2, 2)))
    blocks.train()(tokens, (2, 2), drop_of(0.0, "rec", 2))
    assert torch.equal(torch.get_rng_state(), state)


def test_odd_settings_are_refused():
    with pytest.raises(ValueError, match="drop=1"):
        drop_of(1.0, "clip", 4, 0)
    with pytest.raises(ValueError, match="4 samples, but 6 crops"):
        Blocks(ViTConfig(width=32, heads=2, depth=1)).train()(torch.randn(6, 5, 32), (2, 2), drop_of(0.5, "clip", 4, 0))
