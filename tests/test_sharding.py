"""Ranks that share a model (DDP, FSDP) train what one process trains, and their checkpoints are read by any number of ranks."""
import json
import sys
from dataclasses import replace
from functools import lru_cache, partial

import pytest
import torch
import torch.distributed as torch_dist
from tiny import HERE, clip, job, ranks, rec, ssl

import vtp.job
import vtp.pretrain as package
from vtp.checkpoint import Checkpoint, write_checkpoint
from vtp.config import dumps, loads
from vtp.data.batch_sampling import Batches
from vtp.data.shapes import Shapes
from vtp.dist import gather_objects, is_sharded, rank, world, wrap
from vtp.finetune_decoder import FinetuneDecoder
from vtp.generation.dit import DiTConfig
from vtp.generation.latents import CacheLatents
from vtp.generation.train import TrainDiT
from vtp.job import At, Machine, launch, run_of
from vtp.loop import DTYPES, averages, prepare, seed_step, to_device
from vtp.optim import OptimConfig, adamw, moments_like, optim_tensors
from vtp.pretrain import freeze_unused, train_step
from vtp.ranks import TIMEOUT
from vtp.run import Run, create

DROP = 0.3  # stochastic depth in the comparisons below: it is drawn for the global batch
STEPS = 3
FREEZE = dict(drop=DROP, freeze_last_layer=0.4)  # of 3 steps, the prototypes stay in the first
VARIANTS = {
    "all": (clip(), ssl(**FREEZE), rec(weight=0.1)),
    "siglip, softmax centres, on the latent": (clip(loss="siglip", tap="latent", drop=DROP), ssl(centering="softmax", tap="latent", **FREEZE)),
}


def text_of(name):
    return dumps(job(VARIANTS[name], dtype="fp64", steps=STEPS))


def full(tensors):
    return {name: (t.full_tensor() if is_sharded(t) else t).detach().clone() for name, t in tensors.items()}


class Training:
    "A few steps of a job in the running group, without a run directory."

    def __init__(self, text, sharding="ddp", machine=HERE):
        self.config = loads(text)
        config = self.config
        self.model = freeze_unused(config.build(), config).train()
        prepare(self.model, machine)
        self.wrapped = wrap(self.model, sharding)
        self.opt = adamw(self.model, config.optim)

    def step(self, number, poison=False):
        "Numbers of one step, means over ranks; `poison` puts a NaN into the last rank's batch."
        batch = Batches(self.config.pairs, self.config.objectives, self.config.seed, self.config.steps, rank(), world())[number]
        views = to_device({name: batch[name] for name in self.config.weights}, torch.device("cpu"), DTYPES[self.config.dtype])
        if poison and rank() == world() - 1:
            views["rec"]["image"][0, 0, 0, 0] = float("nan")
        seed_step(self.config.seed, number)
        numbers = train_step(self.wrapped, views, self.opt, self.config, number)
        return averages(numbers) | {"stepped": gather_objects(bool(numbers["stepped"]))}

    @property
    def state(self):
        return {"model": full(self.model.state_dict()), "optim": full(optim_tensors(self.opt))}


def trained(text, sharding="ddp", machine=HERE):
    training = Training(text, sharding, machine)
    return [training.step(number) for number in range(training.config.steps)], training.state


def guarded(text, sharding):
    "A good step, one that is poisoned on one rank, a good one: numbers, and the state after each."
    training, states, rows = Training(text, sharding), [], []
    for number in range(3):
        rows.append(training.step(number, poison=number == 1))
        states.append(training.state)
    return rows, states


def reductions(text):
    "What DDP reduces in each of two steps: (elements, buckets that were the last), parameters that train, and whether it looks for unused ones."
    training, seen = Training(text, "ddp"), []

    def reduce(_, bucket):
        seen[-1].append((bucket.buffer().numel(), bucket.is_last()))
        return torch_dist.all_reduce(bucket.buffer().div_(world()), async_op=True).get_future().then(lambda done: done.value()[0])

    training.wrapped.register_comm_hook(None, reduce)
    for number in range(2):
        seen.append([])
        training.step(number)
    trainable = sum(p.numel() for p in training.model.parameters() if p.requires_grad)
    return [(sum(n for n, _ in step), sum(last for _, last in step)) for step in seen], trainable, training.wrapped.find_unused_parameters


def collectives(text, machine=HERE):
    "How often the second step of FSDP scatters gradients over the ranks, and how many numbers go in: all gradients of the step, once."
    training, sent = Training(text, "fsdp", machine), []
    training.step(0)
    before = {name: getattr(torch_dist, name) for name in ("reduce_scatter_single", "reduce_scatter_tensor") if hasattr(torch_dist, name)}     # torch has renamed it
    for name, call in before.items():
        setattr(torch_dist, name, lambda *args, call=call, **kwargs: (sent.append(kwargs["input"].numel() if "input" in kwargs else args[1].numel()), call(*args, **kwargs))[1])
    training.step(1)
    for name, call in before.items():
        setattr(torch_dist, name, call)
    padded = sum(-(-len(p) // world()) * world() * (p.numel() // len(p)) for p in training.model.parameters() if p.requires_grad and p.ndim)
    return len(sent), sum(sent) / padded


def held(text, sharding):
    "Bytes of parameters, gradients and moments after a step: of this rank, and of the whole."
    training = Training(text, sharding)
    training.step(0)
    training.opt.zero_grad()
    losses = training.wrapped(to_device({k: v for k, v in Batches(training.config.pairs, training.config.objectives, 0, 9, rank(), world())[0].items() if k in training.config.weights},
                                        torch.device("cpu"), torch.float64), 1)
    sum(losses.values()).backward()
    kinds = {"parameters": list(training.model.parameters()), "gradients": [p.grad for p in training.model.parameters() if p.grad is not None],
             "moments": list(optim_tensors(training.opt).values())}
    mine = {kind: sum((t.to_local() if is_sharded(t) else t).nbytes for t in tensors) for kind, tensors in kinds.items()}
    return gather_objects(mine), {kind: sum(t.numel() * t.element_size() for t in tensors) for kind, tensors in kinds.items()}


def passed_on(text, steps):
    "Checkpoints that are read and, where a folder to write is named, written again as they were read: what each reader found, gathered."
    found = []
    for sharding, source, target in steps:
        training = Training(text, sharding)
        checkpoint = Checkpoint(source / "step-000000002")
        training.model.load_state_dict(checkpoint.tensors("model", like=training.model.state_dict()))
        optim = checkpoint.tensors("optim", like=moments_like(training.opt))
        if target and (sharding == "fsdp" or rank() == 0):
            write_checkpoint(target, 2, {"model": training.model.state_dict(), "optim": optim}, {"step": 2})
        torch_dist.barrier()
        found.append({"model": full(training.model.state_dict()), "optim": full(optim)})
    return found


def read_by_dcp(text, folder):
    "What torch.distributed.checkpoint reads of ours into a fresh model, sharded where there are ranks: gathered."
    import torch.distributed.checkpoint as dcp

    training = Training(text, "fsdp")
    state = training.model.state_dict()
    dcp.load(state, storage_reader=dcp.HuggingFaceStorageReader(str(folder)), no_dist=world() == 1)
    return full(state)


def saved(text, sharding, folder):
    "Two steps, then a checkpoint: what is in it, gathered."
    training = Training(text, sharding)
    for number in range(2):
        training.step(number)
    if is_sharded(next(training.model.parameters())) or rank() == 0:
        write_checkpoint(folder, 2, {"model": training.model.state_dict(), "optim": optim_tensors(training.opt)}, {"step": 2})
    torch_dist.barrier()
    return training.state


def loaded(text, sharding, folder):
    "A fresh training that takes the checkpoint: its state, gathered, and how many bytes of it this rank's tensors hold."
    training, checkpoint = Training(text, sharding), Checkpoint(folder / "step-000000002")
    model = checkpoint.tensors("model", like=training.model.state_dict())
    optim = checkpoint.tensors("optim", like=moments_like(training.opt))
    held = sum((t.to_local() if is_sharded(t) else t).numel() for t in (*model.values(), *optim.values()))
    training.model.load_state_dict(model)
    return {"model": full(training.model.state_dict()), "optim": full(optim)}, held


def torn(text, folder):
    "One rank's disk is full: the error in each rank."
    training, room = Training(text, "fsdp"), sys.modules[write_checkpoint.__module__]
    write = room.save_file
    if rank() == 1:
        def write(tensors, file, *about):
            raise OSError(28, "No space left on device")
    before, room.save_file = room.save_file, write
    try:
        write_checkpoint(folder, 2, {"model": training.model.state_dict()}, {})
        said = "nothing"
    except (OSError, RuntimeError) as error:
        said = str(error)
    finally:
        room.save_file = before
    return gather_objects(said)


def stopped(path, step):
    "Work on a run, SIGTERM arriving in the middle of `step` on one rank; then go on."
    import signal

    from vtp.worker import work

    inner = package.train_step

    def interrupted(model, batch, opt, config, number):
        if number == step and rank() == 1:
            signal.raise_signal(signal.SIGTERM)
        return inner(model, batch, opt, config, number)

    package.train_step = interrupted
    try:
        finished = work(path)
    finally:
        package.train_step = inner
    return finished, Run(path).at().step, work(path)


def worked(path):
    from vtp.worker import work

    return work(path)


def together(calls):
    "Several calls in one group of ranks: starting ranks is what takes the time."
    return {name: call(*args) for name, (call, args) in calls.items()}


PRETRAIN = job((rec(),), steps=1, log_every=1)
LATENTS = CacheLatents(At(PRETRAIN), Shapes(count=40, size=16, classes=4), batch=20, shard=40, dtype="fp32")
DIT = TrainDiT(LATENTS, DiTConfig(width=16, depth=2, heads=2, channels=8, grid=4, classes=4), steps=4, batch=16, ema=0.9, dtype="fp64", log_every=2,
               optim=OptimConfig(2e-3, (0.9, 0.95), 1e-8, 0.0, 0, 1.0, 1.0))
LONG = job((clip(), ssl(drop=DROP), rec()), steps=6, log_every=2, keep=(2,))
WAYS_OF_TWO = [("all", "fsdp"), *((name, "ddp") for name in VARIANTS)]       # the campaign has every way of everything
KNOWN = (*(loads(text_of(name)) for name in VARIANTS), LONG)
RECOMPUTED = replace(HERE, checkpointing=True, chunk=3)
WAYS = {"plain": HERE, "checkpointing": replace(HERE, checkpointing=True), "chunks": replace(HERE, chunk=3), "both": RECOMPUTED}


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    return tmp_path_factory.mktemp("sharding")


@pytest.fixture(scope="module")
def alone():
    return {name: trained(text_of(name)) for name in VARIANTS}


@pytest.fixture(scope="module")
def two(places):
    "Everything that is asked of two ranks."
    write_one(places)
    machine = replace(HERE, procs=2, sharding="fsdp")
    calls = {f"{name} {sharding}": (trained, (text_of(name), sharding)) for name, sharding in WAYS_OF_TWO}
    calls |= {"recomputed": (trained, (text_of("all"), "fsdp", RECOMPUTED))}
    calls |= {f"guard {sharding}": (guarded, (text_of("all"), sharding)) for sharding in ("ddp", "fsdp")}
    calls |= {"reductions": (reductions, (text_of("all"),))} | {f"collectives {name}": (collectives, (text_of("all"), machine)) for name, machine in WAYS.items()}
    calls |= {f"held {sharding}": (held, (text_of("all"), sharding)) for sharding in ("ddp", "fsdp")}
    calls |= {"saved": (saved, (text_of("all"), "fsdp", places / "two")), "loaded": (loaded, (text_of("all"), "fsdp", places / "one"))}
    calls |= {"torn": (torn, (text_of("all"), places / "torn"))}
    for name, config in (("straight", LONG), ("stopped", LONG), ("dit", DIT)):
        create(places / name, config, machine)
    calls |= {"straight": (worked, (str(places / "straight"),)), "stopped": (stopped, (str(places / "stopped"), 3)), "dit": (worked, (str(places / "dit"),))}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VTP_RUNS", str(places / "runs"))
        launch(DIT, machine=HERE)
        return ranks(together, calls, nproc=2, jobs=KNOWN)


@pytest.fixture(scope="module")
def four(places, two):
    calls = {"all fsdp": (trained, (text_of("all"), "fsdp")), "loaded": (loaded, (text_of("all"), "fsdp", places / "two")), "saved": (saved, (text_of("all"), "fsdp", places / "four"))}
    return ranks(together, calls, nproc=4, jobs=KNOWN)


def write_one(places):
    training = Training(text_of("all"))
    for number in range(2):
        training.step(number)
    write_checkpoint(places / "one", 2, {"model": training.model.state_dict(), "optim": optim_tensors(training.opt)}, {"step": 2})


def apart(a, b):
    "The largest difference, relative to each tensor's largest value; the keys and shapes are the same."
    worst = 0.0
    for group in a:
        assert a[group].keys() == b[group].keys()
        for name, tensor in a[group].items():
            assert tensor.shape == b[group][name].shape and tensor.dtype == b[group][name].dtype, name
            worst = max(worst, float((tensor - b[group][name]).abs().max() / tensor.abs().max().clamp(min=1e-6)))
    return worst


def equal(a, b):
    return all(a[group].keys() == b[group].keys() and all(torch.equal(a[group][name], b[group][name]) for name in a[group]) for group in a)


def same(alone, shared):
    "Numbers and weights; gradients at the trunk are not looked at in chunks."
    for row, other in zip(alone[0], shared[0], strict=True):
        assert row.keys() - other.keys() in (set(), {k for k in row if k.endswith(("_grad", "_cos"))}) and all(row["stepped"]) and all(other["stepped"])
        assert {k: v for k, v in other.items() if k != "stepped"} == pytest.approx({k: row[k] for k in other if k != "stepped"}, rel=1e-10)
    assert apart(alone[1], shared[1]) < 1e-8


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name,sharding", WAYS_OF_TWO)
def test_two_ranks_train_the_model_of_one(name, sharding, alone, two):
    same(alone[name], two[f"{name} {sharding}"])


@pytest.mark.timeout(300)
def test_four_ranks_train_the_model_of_one(alone, four):
    same(alone["all"], four["all fsdp"])


MATRIX = {
    "clip": (clip(drop=DROP),), "siglip": (clip(loss="siglip", drop=DROP),), "rec": (rec(drop=DROP),), "ssl": (ssl(**FREEZE),), "ssl, softmax": (ssl(centering="softmax", **FREEZE),),
    "ssl on the latent": (ssl(tap="latent", **FREEZE),), "all apart": (clip(drop=DROP), ssl(**FREEZE), rec(drop=0.5, weight=0.1)), **VARIANTS,
}


def matrix(texts, sharding, machine):
    return {name: trained(text, sharding, machine) for name, text in texts.items()}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("chunk", [None, 2])
@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
@pytest.mark.parametrize("procs", [2, 4])
def test_any_objective_on_any_ranks(procs, sharding, chunk):
    "Every objective alone and together, Sinkhorn and softmax over ranks, unequal numbers of masked patches, stochastic depth, in one piece or in chunks."
    texts = {name: dumps(job(objectives, dtype="fp64", steps=STEPS)) for name, objectives in MATRIX.items()}
    for name, found in ranks(matrix, texts, sharding, replace(HERE, chunk=chunk), nproc=procs, jobs=map(loads, texts.values())).items():
        same(reference(texts[name]), found)


@lru_cache
def reference(text): return trained(text)


def test_the_comparison_is_of_a_model_that_moved(alone):
    rows, state = alone["all"]
    start = job(VARIANTS["all"], dtype="fp64", steps=STEPS).build().state_dict()
    parts = ("tokenizer.encoder", "tokenizer.decoder", "objectives.clip.text", "objectives.clip.logit_scale", "objectives.ssl.head.mlp", "objectives.ssl.teacher.encoder")
    for part in parts:
        assert any(not torch.equal(state["model"][n], t) for n, t in start.items() if n.startswith(part)), part
    assert rows[0]["grad_norm"] > 3                                                        # it was clipped


def test_fsdp_with_recomputed_activations_and_chunks(alone, two):
    same(alone["all"], two["recomputed"])


@pytest.mark.slow
def test_fsdp_under_autocast_is_close():
    half = dumps(job(VARIANTS["all"], dtype="bf16", steps=STEPS))
    (rows, _), (shared, state) = trained(half), ranks(trained, half, "fsdp", nproc=2, jobs=[loads(half)])
    assert [row["loss"] for row in shared] == pytest.approx([row["loss"] for row in rows], rel=2e-2)
    assert {t.dtype for t in state["model"].values() if t.is_floating_point()} == {torch.float32}


def test_the_dit_and_its_average(places, two, monkeypatch):
    monkeypatch.setenv("VTP_RUNS", str(places / "runs"))
    shared, one = Run(places / "dit"), run_of(DIT)
    groups = ("model", "ema", "optim")
    assert two["dit"] and apart(*({group: run.at().tensors(group) for group in groups} for run in (one, shared))) < 1e-9
    for row, other in zip(one.rows(), shared.rows(), strict=True):
        assert other == pytest.approx(row, rel=1e-9)
    assert all((shared.at().path / f"{group}.index.json").exists() for group in groups) and not torch.equal(*(shared.at().tensors(g)["blocks.0.attn.qkv.weight"] for g in groups[:2]))


def test_the_second_stage_is_refused():
    "Its adaptive weight needs gradients at one whole matrix in the middle of a backward pass."
    second = FinetuneDecoder(At(PRETRAIN), Shapes(count=40, size=16), rec(mse=0.0), steps=4)
    with pytest.raises(ValueError, match=r"FinetuneDecoder can't be trained with sharding='fsdp': launch it by itself with Machine\(sharding='ddp'\)"):
        launch(second, machine=replace(HERE, procs=2, sharding="fsdp"))
    assert not run_of(second).path.exists() and not run_of(PRETRAIN).path.exists()


@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
def test_a_nan_on_one_rank_stops_the_step_of_all(sharding, two):
    rows, (first, second, third) = two[f"guard {sharding}"]
    assert [row["stepped"] for row in rows] == [[True, True], [False, False], [True, True]]
    students = [name for name in first["model"] if "teacher" not in name]
    assert all(torch.equal(first["model"][n], second["model"][n]) for n in students) and equal({"o": first["optim"]}, {"o": second["optim"]})
    assert all(tensor.isfinite().all() for tensor in (*third["model"].values(), *third["optim"].values())) and not equal(first, third)


def test_ddp_reduces_each_gradient_once(two):
    steps, trainable, searched = two["reductions"]
    assert steps == [(trainable, 1), (trainable, 1)] and not searched


@pytest.mark.parametrize("way", WAYS)
def test_fsdp_reduces_each_gradient_once(way, two):
    "Blocks of trunk (2), decoder (2) and text (1), and the rest of the model; the trunk runs twice, for clip with rec and for ssl, and for every chunk."
    assert two[f"collectives {way}"] == (2 + 2 + 1 + 1, 1)


def test_a_rank_of_fsdp_holds_its_share(two):
    "Of parameters, gradients and moments, up to the row that can't be cut; DDP holds them whole."
    (shares, whole), (copies, _) = two["held fsdp"], two["held ddp"]
    for kind, total in whole.items():
        assert total > 0 and all(copy[kind] == total for copy in copies)
        assert abs(sum(mine[kind] for mine in shares) - total) < 1e-3 * total and max(mine[kind] for mine in shares) < 0.53 * total, kind


def test_a_sharded_checkpoint_is_read_whole_on_one_process(places, two):
    checkpoint = Checkpoint(places / "two" / "step-000000002")
    assert checkpoint.damage() is None
    assert equal({group: checkpoint.tensors(group) for group in ("model", "optim")}, two["saved"])
    files = sorted(f.name for f in checkpoint.path.iterdir())
    assert files == ["manifest.json", "model.00000-of-00002.safetensors", "model.00001-of-00002.safetensors", "model.index.json",
                     "optim.00000-of-00002.safetensors", "optim.00001-of-00002.safetensors", "optim.index.json", "state.json"]
    sizes = [(checkpoint.path / f"model.{k:05d}-of-00002.safetensors").stat().st_size for k in range(2)]
    assert min(sizes) > 0.4 * sum(sizes)


def test_any_number_of_ranks_reads_it(places, two, four):
    read, held = four["loaded"]                                      # written by two, read by four
    assert equal(read, two["saved"]) and held < 0.4 * sum(t.numel() for group in two["saved"].values() for t in group.values())
    one = Checkpoint(places / "one" / "step-000000002")              # written by one, read by two
    assert equal(two["loaded"][0], {group: one.tensors(group) for group in ("model", "optim")})
    written = Checkpoint(places / "four" / "step-000000002")
    assert equal({group: written.tensors(group) for group in ("model", "optim")}, four["saved"]) and apart(four["saved"], two["saved"]) < 1e-8


def test_it_goes_from_hand_to_hand(places, two, four):
    "Written by one process, by two ranks, by four; read by one, by two and three that share the model or have a copy each, and written anew by these: bit by bit the same."
    text = text_of("all")
    three = [("fsdp", places / "four", places / "three"), ("ddp", places / "two", places / "three copies"), ("fsdp", places / "one", None)]
    for found, source in zip(ranks(passed_on, text, three, nproc=3, jobs=KNOWN), ("four", "two", "one"), strict=True):
        assert equal(found, whole_of(places / source))
    again = [("fsdp", places / "three", None), ("ddp", places / "four", None), ("fsdp", places / "three copies", None)]
    for found, source in zip(ranks(passed_on, text, again, nproc=2, jobs=KNOWN), ("four", "four", "two"), strict=True):
        assert equal(found, whole_of(places / source))
    assert equal(whole_of(places / "three"), four["saved"]) and equal(whole_of(places / "three copies"), two["saved"])


def whole_of(folder):
    checkpoint = Checkpoint(folder / "step-000000002")
    assert checkpoint.damage() is None
    return {group: checkpoint.tensors(group) for group in ("model", "optim")}


def test_torch_s_own_reader_reads_it(places, two, four, tmp_path):
    "The files of a group say where in the whole their rows lie, as torch.distributed.checkpoint's reader of safetensors wants it; on one process and on two ranks."
    for writer, expected in (("two", two), ("four", four)):
        folder = tmp_path / writer
        folder.mkdir()
        for file in (places / writer / "step-000000002").glob("model.*.safetensors"):
            (folder / file.name).symlink_to(file)
        for found in (read_by_dcp(text_of("all"), folder), ranks(read_by_dcp, text_of("all"), folder, nproc=2, jobs=KNOWN)):
            assert equal({"model": found}, {"model": expected["saved"]["model"]})


def test_a_missing_or_changed_shard_is_seen(places, two):
    checkpoint = Checkpoint(places / "two" / "step-000000002")
    file = checkpoint.path / "model.00001-of-00002.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert "other bytes" in checkpoint.damage()
    file.unlink()
    assert "missing" in checkpoint.damage()
    file.write_bytes(content)
    assert checkpoint.damage() is None


def test_nothing_in_it_is_a_pickle(places, two, four):
    for folder in ("two", "four"):
        for file in (places / folder / "step-000000002").iterdir():
            if file.suffix == ".json":
                json.loads(file.read_text())
            else:
                size = int.from_bytes(file.read_bytes()[:8], "little")
                assert file.suffix == ".safetensors" and json.loads(file.read_bytes()[8:8 + size])


def test_ranks_that_write_together_fail_together(places, two):
    first, second = two["torn"]
    assert "rank 1 could not write its part" in first and "No space left" in first and "No space left" in second
    assert not (places / "torn" / "step-000000002").exists()


def rows_of(run):
    return (run.path / "metrics.jsonl").read_bytes()


def test_a_resume_of_shards_is_bitwise(places, two):
    straight, halted = Run(places / "straight"), Run(places / "stopped")
    finished, step, again = two["stopped"]
    assert two["straight"] and not finished and step == 4 and again and straight.done and halted.done
    assert equal(*({group: run.at().tensors(group) for group in ("model", "optim")} for run in (straight, halted)))
    assert rows_of(straight) == rows_of(halted) and (straight.at(2).path / "model.index.json").exists()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_from_one_process_to_shards_and_back(places, two, monkeypatch, tmp_path):
    "A run of one process whose last steps two sharded ranks make, and a run of shards whose last steps one process makes."
    import shutil

    monkeypatch.setenv("VTP_RUNS", str(tmp_path))
    monkeypatch.setattr(vtp.job, "start", partial(ranks, jobs=[LONG]))
    whole, = launch(LONG, machine=HERE)
    expected = {"model": whole.at().tensors("model")}
    for name, first, machine in (("up", whole, replace(HERE, procs=2, sharding="fsdp")), ("down", Run(places / "straight"), HERE)):
        monkeypatch.setenv("VTP_RUNS", str(tmp_path / name))
        run = create(run_of(LONG).path, LONG, machine)
        shutil.copytree(first.at(2).path, run.path / "checkpoints" / "step-000000002")
        shutil.copy(first.path / "metrics.jsonl", run.path)
        run, = launch(LONG, machine=machine)
        assert apart({"model": run.at().tensors("model")}, expected) < 1e-3               # fp32: the sums over ranks are in another order
        assert [row["loss"] for row in run.rows()] == pytest.approx([row["loss"] for row in whole.rows()], rel=1e-4)
        assert (run.at().path / "model.index.json").exists() == (name == "up")
        again = LONG.load()                                                                # on one CPU, whoever wrote it
        assert torch.equal(again.state_dict()["tokenizer.encoder.trunk.cls_token"], run.at().tensors("model")["tokenizer.encoder.trunk.cls_token"])


def test_machines_that_can_not_be():
    with pytest.raises(ValueError, match="sharding='zero' is not known: use one of"):
        Machine(sharding="zero")
    with pytest.raises(ValueError, match="timeout_minutes=0 positive"):
        Machine(timeout_minutes=0)
    assert 60 * Machine().timeout_minutes == TIMEOUT
