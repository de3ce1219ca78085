"""kill -9 at any moment, start again: every byte that an uninterrupted run leaves, and every sample in its order."""
import functools
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from kills import Victim, Zygote, kill, unlike
from test_finetune import stage2
from test_quarantine import shard
from tiny import HERE, clip, job, rec, ssl, wait_for

from vtp.data.pairs import Shards
from vtp.data.shapes import Shapes
from vtp.evaluation.extractors import ShapesEvaluator
from vtp.evaluation.generation import GenerationQuality
from vtp.evaluation.linear_probe import LinearProbe
from vtp.evaluation.protocol import Evaluate
from vtp.evaluation.reconstruction import ReconstructionQuality
from vtp.generation.dit import DiTConfig
from vtp.generation.flow import SamplerConfig
from vtp.generation.latents import CacheLatents
from vtp.generation.train import TrainDiT
from vtp.job import At, ordered
from vtp.optim import OptimConfig
from vtp.perceptual import PerceptualConfig
from vtp.run import Run, create, locked
from vtp.training_state import load_training, save_training

EACH = replace(HERE, save_minutes=0.)                          # a checkpoint after every step
VAL = Shapes(count=32, size=16, split="val")
QUALITY = ReconstructionQuality(data=VAL, batch=16, perceptual=PerceptualConfig(kind="random_features"))
PROBE = LinearProbe(train=Shapes(count=64, size=16), val=VAL, steps=5, batch=32)
SAMPLES = GenerationQuality(reference=Shapes(count=60, size=16), samples=30, sampler=SamplerConfig("heun", 2), extractor=ShapesEvaluator(), batch=10, bootstrap=4)
CHECKPOINT = "checkpoints/.step-#"


def jobs(folder:Path) -> dict:
    "One of each kind; what they read has broken images, and of a training some steps are called off."
    data = Shards(shard(folder / "some.tar", {3: b"not an image", 40: b"\x89PNG torn", 66: b""}))
    pretrain = job(pairs=data, steps=7, log_every=2, keep=(3,), probes=(QUALITY, PROBE))
    latents = CacheLatents(At(pretrain), data, batch=8, shard=20, dtype="fp32")
    dit = TrainDiT(latents, DiTConfig(width=16, depth=2, heads=2, channels=8, grid=4, classes=1), steps=7, batch=16, optim=OptimConfig(2e-3, (0.9, 0.95), 1e-8, 0.0, 0, 1.0, None),
                   ema=0.9, dtype="fp32", log_every=2, keep=(3,))
    plain = job((rec(),), pairs=data, steps=7, log_every=2, keep=(3,))
    return dict(plain=plain, pretrain=pretrain, finetune=stage2(pretrain, pairs=data, steps=7, keep=(3,)), latents=latents, dit=dit,
                evaluate=Evaluate(At(pretrain), (QUALITY, PROBE, replace(QUALITY, samples=20))), sample=Evaluate(At(dit), (SAMPLES, replace(SAMPLES, seed=1))))


class World:
    "The jobs, the uninterrupted run of each, and victims to be compared with these."
    def __init__(self, folder:Path):
        self.folder, self.zygote, self.count = folder, Zygote(), 0
        self.jobs = jobs(folder)
        self.straight = functools.cache(self._straight)

    def victim(self, job, runs:Path, machine=EACH, **plan) -> Victim:
        poison = [1, 4] if job in [self.jobs[kind] for kind in ("pretrain", "finetune", "dit")] else []
        return Victim(self.zygote, job, runs, machine, self.folder / "cache", **{"poison": poison, **plan})

    def _straight(self, kind:str) -> Victim:
        "The run that nobody kills, and how long it took."
        for input in ordered([self.jobs[kind]])[:-1]: self.straight(next(name for name, one in self.jobs.items() if one == input))
        runs = self.folder / "straight"
        victim = self.victim(self.jobs[kind], runs, trace=str(runs / f"{kind}.trace"))
        began = time.monotonic()
        victim.finish().seconds = time.monotonic() - began
        victim.instants = Counter((runs / f"{kind}.trace").read_text().splitlines())
        return victim

    def fresh(self, kind:str, **plan) -> Victim:
        "A victim whose inputs are there."
        straight, self.count = self.straight(kind), self.count + 1
        runs = self.folder / f"{self.count}-{kind}"
        for input in ordered([self.jobs[kind]])[:-1]: shutil.copytree(self.victim(input, straight.runs).path, self.victim(input, runs).path)
        return self.victim(self.jobs[kind], runs, **plan)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    made = World(tmp_path_factory.mktemp("kills"))
    yield made
    made.zygote.close()


def same(world:World, kind:str, victim:Victim, whole:bool=True):
    assert unlike(world.straight(kind), victim.finish(), whole) == [], f"after the kills {victim.kills}"


NAMED = dict(
    pretrain=[("half quarantine.jsonl", 1), ("update", 3), (f"half {CHECKPOINT}/optim.safetensors", 2), (f"rename {CHECKPOINT}", 1), ("remove checkpoints/step-#/optim.safetensors", 1), ("half metrics.jsonl", 2),
              ("reconstruct", 1), ("probe", 3), ("rename .done", 1)],
    finetune=[("update", 4), (f"fsync {CHECKPOINT}/discriminator.safetensors", 2), (f"open {CHECKPOINT}/manifest.json", 2), ("update", 3)],
    latents=[("encode", 2), ("half latents/.shard-#.safetensors", 2), ("rename latents/.shard-#.json", 1), ("half metrics.jsonl", 2), ("rename latents/.statistics.json", 1)],
    dit=[("update", 2), (f"half {CHECKPOINT}/ema.safetensors", 2), ("fsync checkpoints", 1), ("update", 3)],
    evaluate=[("reconstruct", 1), ("half metrics.jsonl", 1), ("probe", 2), ("rename .complete.json", 1), ("rename .done", 1)],
    sample=[("sample", 2), ("half metrics.jsonl", 2), ("sample", 5)],
)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", NAMED)
def test_killed_where_it_hurts(world, kind, record):
    victim = world.fresh(kind)
    for name, number in NAMED[kind]: assert victim.killed_at(name, number), (name, number)
    same(world, kind, victim)
    record(fault=f"kill -9 in {kind}", promise="bitwise what an uninterrupted run leaves", tried=len(victim.kills))


@pytest.mark.timeout(300)
def test_killed_through_the_command_line(world, record):
    "`python -m vtp.worker`, with a loader worker: processes that nothing has prepared leave the same."
    victim, dice = world.fresh("plain"), random.Random(7)
    create(victim.path, victim.job, replace(EACH, workers=1))
    env = dict(os.environ, **victim.env, PYTHONPATH=str(Path(__file__).parent.parent))
    for step in (2, 4):
        with open(victim.log, "a") as said:
            process = subprocess.Popen([sys.executable, "-m", "vtp.worker", str(victim.path)], env=env, stdout=said, stderr=said, start_new_session=True)
        wait_for(lambda: any(c.step >= step for c in Run(victim.path).checkpoints()) or process.poll() is not None)
        time.sleep(dice.uniform(0, 0.1))
        kill(process.pid)
        if process.wait() == -signal.SIGKILL: victim.kills.append(step)
    assert victim.kills
    same(world, "plain", victim, whole=False)                  # the command line notes no order
    record(fault="kill -9 of python -m vtp.worker", promise="bitwise what an uninterrupted run leaves", tried=len(victim.kills))


def test_loader_workers_do_not_keep_the_run(world, record):
    "They live on for seconds when only their trainer is killed; the run is free at once."
    victim = world.fresh("plain")
    for step in (2, 4):
        process, = victim.start(machine=replace(EACH, workers=2))
        wait_for(lambda: any(c.step >= step for c in Run(victim.path).checkpoints()))
        os.kill(process, signal.SIGKILL)
        assert os.WTERMSIG(world.zygote.ask(process)) == signal.SIGKILL
    victim.kills.append("the trainer alone, twice")
    same(world, "plain", victim)
    record(fault="kill -9 of a trainer, not of its loader workers", promise="the next start is not refused", tried=2)


def test_what_a_kill_leaves_is_not_published(world, monkeypatch, tmp_path):
    "A killed training can be put elsewhere as it is, and goes on there to the same end."
    victim = world.fresh("plain")
    assert victim.killed_at("update", 3) and victim.killed_at("rename .env.json")
    monkeypatch.setenv("VTP_RUNS", str(victim.runs))
    folder = save_training(victim.job, tmp_path / "published")
    monkeypatch.setenv("VTP_RUNS", str(tmp_path / "elsewhere"))
    there = world.victim(victim.job, tmp_path / "elsewhere")
    there.path = load_training(str(folder)).path
    same(world, "plain", there, whole=False)


LAUNCHER = """
from dataclasses import replace
from tiny import HERE, job, rec
from vtp.job import launch
if __name__ == "__main__": launch(job((rec(),), steps=100000, log_every=100000, keep=(1,)), machine=replace(HERE, procs=2, workers=1))
"""


def of_runs(folder:Path) -> list[int]:
    "The processes whose runs are in a folder."
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if f"VTP_RUNS={folder}\0".encode() in (process / "environ").read_bytes(): found.append(int(process.name))
        except (OSError, ProcessLookupError): pass
    return found


@pytest.mark.timeout(240)
def test_ranks_and_their_loaders_do_not_outlive_the_launcher(tmp_path, record):
    (tmp_path / "run.py").write_text(LAUNCHER)
    env = dict(os.environ, VTP_RUNS=str(tmp_path / "killed"), PYTHONPATH=os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parent.parent)]))
    process = subprocess.Popen([sys.executable, str(tmp_path / "run.py")], env=env, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(lambda: list((tmp_path / "killed").glob("*/checkpoints/step-*")))
        assert len(of_runs(tmp_path / "killed")) >= 5                          # launcher, two ranks, two loader workers
        process.kill()
        process.wait()
        wait_for(lambda: not of_runs(tmp_path / "killed"), 60)
    finally:
        for left in of_runs(tmp_path / "killed"): os.kill(left, signal.SIGKILL)
    run = Run(next((tmp_path / "killed").glob("pretrain-*")))
    with locked(run): assert run.latest().step >= 1 and not run.done
    record(fault="kill -9 of the launcher of two ranks", promise="nobody is left, the run is free, its checkpoint whole", tried=1)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("dtype,within", [("fp64", 1e-10), pytest.param("fp32", 1e-6, marks=pytest.mark.slow)])
def test_ranks_and_workers_change_between_kills(world, dtype, within, record):
    small = job((clip(), ssl(), rec()), pairs=world.jobs["plain"].pairs, steps=7, log_every=1, keep=(3,), dtype=dtype)
    straight, victim = (world.victim(small, world.folder / f"ranks-{dtype}-{name}") for name in ("straight", "killed"))
    straight.finish()
    assert victim.killed_at("update", 3, ranks=2, machine=replace(EACH, workers=1))
    assert victim.killed_at(f"half {CHECKPOINT}/optim.safetensors", 2, machine=replace(EACH, workers=2))
    assert victim.killed_at(f"fsync {CHECKPOINT}/model.safetensors", 2, ranks=2)
    victim.finish()
    given, as_given = ({step: what[:2] for step, what in one.order().items()} for one in (straight, victim))
    assert given == as_given and len(given) == small.steps
    assert (victim.path / "quarantine.jsonl").read_bytes() == (straight.path / "quarantine.jsonl").read_bytes() != b""
    losses = lambda victim: [{name: row[name] for name in ("step", "loss", "rec", "clip", "ssl", "bad")} for row in Run(victim.path).rows()]
    assert len(losses(straight)) == small.steps and losses(victim) == [pytest.approx(row, rel=within) for row in losses(straight)]
    record(fault="kill -9, then other numbers of ranks and workers", promise=f"the order of samples; losses within {within:g}", tried=len(victim.kills))


SHARDED = replace(EACH, procs=2, sharding="fsdp", timeout_minutes=1.)


@pytest.mark.timeout(400)
def test_killed_while_ranks_write_together(world, record):
    "Both at once, or one of them: the other then ends by itself, and says why."
    small = job((clip(), rec()), pairs=world.jobs["plain"].pairs, steps=6, log_every=2, keep=(3,))
    straight, victim = (world.victim(small, world.folder / f"shards-{name}", SHARDED) for name in ("straight", "killed"))
    straight.finish(ranks=2)
    for expected, (alone, who, name) in enumerate([(False, 1, f"half {CHECKPOINT}/model.#-of-#.safetensors"), (True, 0, f"open {CHECKPOINT}/manifest.json"),
                                                   (True, 1, f"half {CHECKPOINT}/optim.#-of-#.safetensors"), (False, 0, f"rename {CHECKPOINT}")], 1):
        assert victim.killed_at(name, 2, victim=who, alone=alone, ranks=2)
        assert Run(victim.path).latest().step == expected                      # the one before it is whole
        assert ("lost another rank" in victim.log.read_text()) == (expected > 1)
    victim.finish(ranks=2)
    assert unlike(straight, victim) == [], f"after the kills {victim.kills}"
    record(fault="kill -9 of one or both of two ranks that write a sharded checkpoint", promise="the one before it stays whole; bitwise what an uninterrupted run leaves", tried=len(victim.kills))


# ---------------------------------------------------------------- the test of the test

@pytest.mark.parametrize("how,name,number", [
    ("rows are not cut", f"half {CHECKPOINT}/model.safetensors", 4), ("moments are forgotten", "update", 4), ("the place in the data is forgotten", "update", 4),
    ("the ledger is forgotten", "update", 7), ("named before it is written", "half checkpoints/step-#/optim.safetensors", 2)])
def test_a_wrong_resume_is_noticed(world, how, name, number):
    victim = world.fresh("plain", broken=how)
    assert victim.killed_at(name, number)
    with pytest.raises(AssertionError, match="failed after the kills|after the kills|other samples"): same(world, "plain", victim)


# ---------------------------------------------------------------- campaigns

def random_kills(world:World, kind:str, kills:int, seed:int, workers=(0,)) -> int:
    "Kill runs at random moments, start them again with other workers, and compare each that comes to its end; how many that were."
    dice, done, victim, given = random.Random(seed), 0, world.fresh(kind), 0
    machines = [replace(EACH, workers=n) for n in workers]
    while given < kills:
        given += victim.killed_after(dice.uniform(0, 1.2 * world.straight(kind).seconds), machine=dice.choice(machines))
        if (victim.path / "done").exists():
            same(world, kind, victim)
            done, victim = done + 1, world.fresh(kind)
    same(world, kind, victim)
    return done + 1


def every_instant(world:World, kind:str, seed:int) -> list[tuple[str, int]]:
    "Kill at each instant that the uninterrupted run has, and at its second or third time if it comes so often."
    dice, victim, kills = random.Random(seed), world.fresh(kind), []
    instants = world.straight(kind).instants
    for name, number in [(name, 1) for name in instants] + [(name, dice.choice((2, 3))) for name, times in instants.items() if times >= 3]:
        if not victim.killed_at(name, number):                 # the run is past that: a new one is not
            same(world, kind, victim)
            victim = world.fresh(kind)
            assert victim.killed_at(name, number), f"{name} never came"
        kills.append((name, number))
    same(world, kind, victim)
    return kills


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("kind", NAMED)
def test_killed_at_random_moments(world, kind, record):
    "Random moments find what nobody has thought of."
    kills, seed = dict(evaluate=10, sample=10).get(kind, 20), 5
    print("seed", seed)
    random_kills(world, kind, kills, seed, workers=(0, 1, 2))
    record(fault=f"kill -9 of {kind} at a random moment", promise="bitwise what an uninterrupted run leaves", tried=kills)


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("kind", NAMED)
def test_killed_at_every_instant(world, kind, record):
    "Each change of a file in the run directory that the uninterrupted run makes, and the middle of writing each file."
    kills = every_instant(world, kind, seed=6)
    record(fault=f"kill -9 of {kind} before each change of a file", promise="bitwise what an uninterrupted run leaves", tried=len(kills))
