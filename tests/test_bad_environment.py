"""Disks that are full or read-only, two owners, clocks that jump, signals, missing and wrong files, changed configs, no network: refused at once with the way out, or stopped with nothing lost."""
import errno
import multiprocessing
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from faults import Ended, Full, moments, signals
from kills import remains
from test_finetune import stage2
from tiny import HERE, clip, job, rec

import vtp.finetune_decoder as second_stage
import vtp.pretrain as package
from vtp.adopt import adopt
from vtp.config import differences, dumps
from vtp.data.shapes import Shapes
from vtp.evaluation.protocol import Evaluate
from vtp.evaluation.reconstruction import ReconstructionQuality
from vtp.generation.dit import DiTConfig
from vtp.generation.latents import CacheLatents
from vtp.generation.train import TrainDiT
from vtp.job import At, has_room, launch, ordered, path_of, run_of
from vtp.optim import OptimConfig
from vtp.perceptual import PerceptualConfig
from vtp.run import Run, create, locked
from vtp.worker import work

EACH = replace(HERE, save_minutes=0.)                          # a checkpoint after every step
QUALITY = ReconstructionQuality(data=Shapes(count=16, size=16, split="val"), batch=16, extractor=None, perceptual=PerceptualConfig(kind="random_features"))
PRETRAIN = job((rec(),), steps=3, log_every=1, keep=(1,), probes=(QUALITY,))
LATENTS = CacheLatents(At(PRETRAIN), Shapes(count=16, size=16), batch=8, shard=8)
DIT = TrainDiT(LATENTS, DiTConfig(width=16, depth=2, heads=2, channels=8, grid=4, classes=48), steps=2, batch=8, optim=OptimConfig(2e-3, (0.9, 0.95), 1e-8, 0.0, 0, 1.0, None), dtype="fp32", log_every=1)
JOBS = dict(pretrain=PRETRAIN, finetune=stage2(PRETRAIN, steps=4, pairs=Shapes(count=64, size=16)), latents=LATENTS, dit=DIT, evaluate=Evaluate(At(PRETRAIN), (QUALITY, replace(QUALITY, samples=8))))
# a thread of TensorBoard's that meets a full disk ends with the error, which the next row raises in the main thread, and cannot close its file
pytestmark = [pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning"), pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")]


class World:
    "Each job's uninterrupted run, and copies of its inputs for one that is to be disturbed."
    def __init__(self, folder:Path): self.folder, self.count, self.known = folder, 0, {}

    def straight(self, kind:str) -> dict[str, str]:
        "Every file that the uninterrupted run leaves, but those that say how it went."
        if kind not in self.known:
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("VTP_RUNS", str(self.folder / "straight"))
                with moments(self.folder / "straight", lambda number, name: None) as seen: run, = launch(JOBS[kind], machine=EACH)
                self.known[kind] = remains(run.path), seen.names
        return self.known[kind][0]

    def writes(self, kind:str) -> int:
        "How many writes the job makes once its inputs are there."
        self.straight(kind)
        if len(self.known[kind]) == 2:
            with pytest.MonkeyPatch.context() as patch:
                runs = self.fresh(kind, patch)
                with moments(runs, lambda number, name: None) as seen: run, = launch(JOBS[kind], machine=EACH)
                assert remains(run.path) == self.straight(kind)
                self.known[kind] += (seen.names,)
        return len(self.known[kind][2])

    def fresh(self, kind:str, patch) -> Path:
        "A new folder of runs, with the inputs of the job."
        self.straight(kind)
        runs, self.count = self.folder / f"{self.count}-{kind}", self.count + 1
        runs.mkdir()
        for input in ordered([JOBS[kind]])[:-1]:
            patch.setenv("VTP_RUNS", str(self.folder / "straight"))
            shutil.copytree(path_of(input), runs / path_of(input).name)
        patch.setenv("VTP_RUNS", str(runs))
        return runs


@pytest.fixture(scope="module")
def world(tmp_path_factory): return World(tmp_path_factory.mktemp("environment"))


def whole(run:Run) -> int:
    "The newest step; every checkpoint that is there by name is whole."
    assert [c.damage() for c in run.checkpoints()] == [None] * len(run.checkpoints())
    return max((c.step for c in run.checkpoints()), default=0)


def refuses(act, *words, error=ValueError, seconds:float=1.):
    "That `act` raises an error that says all the words, within a second of computing time (on a machine that does other things, clocks tell nothing)."
    began = time.process_time()
    with pytest.raises(error) as found: act()
    assert time.process_time() - began < seconds
    for word in words: assert word in str(found.value), f"{word!r} is not in {found.value}"


# ---------------------------------------------------------------- a full disk

def filled(world:World, kind:str, first:int, stays:bool) -> None:
    "The disk is full from the `first` write on, or at that write; with room again, the run ends as if nothing had been."
    with pytest.MonkeyPatch.context() as patch:
        runs = world.fresh(kind, patch)
        name = world.writes(kind) and world.known[kind][2][first - 1]
        stays |= name.startswith("open ") and (world.folder / "straight" / name[6:]).is_dir()             # a file without a name, for a trial: if that fails once, another way is tried
        run, story, before = run_of(JOBS[kind]), f"{kind}, write {first} ({name}), {'for good' if stays else 'once'}", []
        def watched(number, name, disk=Full(first, stays)):
            if number == first: before.append(whole(run))
            disk(number, name)
        with moments(runs, watched):
            with pytest.raises(OSError) as found: launch(JOBS[kind], machine=EACH)
        assert "VTP_RUNS" in str(found.value) and "ree some space" in str(found.value), f"{story}: {found.value}"
        assert found.value.errno == errno.ENOSPC and whole(run) >= before[0], story
        assert not list(run.path.glob("checkpoints/.step-*")), f"{story}: the half of a checkpoint still fills the disk"
        launch(JOBS[kind], machine=EACH)
        assert remains(run.path) == world.straight(kind), story
        shutil.rmtree(runs)


@pytest.mark.timeout(240)
@pytest.mark.parametrize("kind", JOBS)
def test_a_disk_that_is_full_at_some_writes(world, kind, record):
    dice = random.Random(7)
    chosen = sorted(dice.sample(range(1, world.writes(kind) + 1), 10))
    for first in chosen: filled(world, kind, first, stays=dice.random() < .5)
    record(fault="disk full at a write", promise="stopped with the way out; launched again, bitwise the uninterrupted run", tried=len(chosen))


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("kind", JOBS)
def test_a_disk_that_is_full_at_each_write(world, kind, record):
    for first in range(1, world.writes(kind) + 1): filled(world, kind, first, stays=first % 2 == 0)
    record(fault="disk full at each write", promise="stopped with the way out; launched again, bitwise the uninterrupted run", tried=world.writes(kind))


@pytest.mark.parametrize("how", ["a row is half written", "nothing can be cut either"])
def test_half_a_row_is_cut_off_although_the_disk_is_still_full(world, monkeypatch, how, record):
    runs, run = world.fresh("pretrain", monkeypatch), run_of(PRETRAIN)
    names = world.writes("pretrain") and world.known["pretrain"][2]
    rows = [number for number, name in enumerate(names, 1) if name.startswith("row ") and name.endswith("metrics.jsonl")]
    with moments(runs, Full(rows[3])), pytest.raises(OSError, match="VTP_RUNS"): launch(PRETRAIN, machine=EACH)
    torn = (run.path / "metrics.jsonl").read_bytes()
    assert not torn.endswith(b"\n") and len(run.rows()) == torn.count(b"\n")
    if how == "nothing can be cut either":
        with moments(runs, lambda number, name: name.startswith("truncate") and Full(number)(number, name)), pytest.raises(OSError, match="VTP_RUNS"): launch(PRETRAIN, machine=EACH)
        assert (run.path / "metrics.jsonl").read_bytes() == torn
    else: run.rewind(run.latest())
    launch(PRETRAIN, machine=EACH)
    assert remains(run.path) == world.straight("pretrain")
    record(fault="half a row, disk full", promise="cut off on resume", tried=1)


def test_pictures_and_curves_that_find_no_room_stop_the_run_too(world, monkeypatch, record):
    runs, run = world.fresh("pretrain", monkeypatch), run_of(PRETRAIN)
    def at(number, name):
        if number is None and list(run.path.glob("checkpoints/step-*2")): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), name)
    with moments(runs, at), pytest.raises(OSError, match="VTP_RUNS"): launch(PRETRAIN, machine=EACH)
    assert whole(run) >= 2 and not run.done
    launch(PRETRAIN, machine=EACH)
    assert remains(run.path) == world.straight("pretrain")
    record(fault="TensorBoard finds the disk full", promise="stopped with the way out; launched again, bitwise the uninterrupted run", tried=1)


def mount(*options) -> bool: return subprocess.run(["mount", *options], capture_output=True).returncode == 0


def test_a_small_disk(world, monkeypatch, tmp_path, record):
    "A tmpfs that has room for a checkpoint and a half, then more. Where nothing may be mounted, `test_a_limit_on_the_size_of_files` meets the kernel's own errors."
    disk = tmp_path / "disk"
    disk.mkdir()
    world.straight("pretrain")
    size = max(c.size for c in Run(world.folder / "straight" / path_of(PRETRAIN).name).checkpoints())
    if not mount("-t", "tmpfs", "-o", f"size={3 * size // 2}", "none", str(disk)): pytest.skip("mount is not allowed here; a limit on the size of files is tried instead")
    try:
        monkeypatch.setenv("VTP_RUNS", str(disk))
        run = run_of(PRETRAIN)
        with pytest.raises(OSError, match="No space left.*VTP_RUNS") as found: launch(PRETRAIN, machine=EACH)
        assert found.value.errno == errno.ENOSPC and whole(run) == 1
        refuses(lambda: launch(PRETRAIN, machine=EACH), "takes", "bytes", "VTP_RUNS", error=OSError)             # now the size of a checkpoint is known
        assert mount("-o", "remount,size=64m", str(disk))
        launch(PRETRAIN, machine=EACH)
        assert remains(run.path) == world.straight("pretrain")
    finally: subprocess.run(["umount", "-l", str(disk)], check=True)
    record(fault="a tmpfs that is full", promise="stopped with the way out; with room, bitwise the uninterrupted run", tried=2)


def test_a_limit_on_the_size_of_files(world, monkeypatch, record):
    "RLIMIT_FSIZE: the kernel refuses (SIGXFSZ is ignored in Python, EFBIG remains)."
    world.fresh("pretrain", monkeypatch)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, hard))
    try:
        with pytest.raises(OSError, match="File too large.*VTP_RUNS"): launch(PRETRAIN, machine=EACH)
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    run = run_of(PRETRAIN)
    assert whole(run) == 0 and not list(run.path.glob("checkpoints/.*"))
    launch(PRETRAIN, machine=EACH)
    assert remains(run.path) == world.straight("pretrain")
    record(fault="files may not be so large", promise="stopped with the way out; without the limit, bitwise the uninterrupted run", tried=1)


def test_room_for_checkpoints_is_asked_for_before_the_start(monkeypatch, capsys, record):
    small = job((rec(),), steps=6, keep=(2, 4))
    free = shutil.disk_usage("/").free
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(free, 0, free))
    monkeypatch.setattr(type(small), "checkpoint_bytes", lambda self: free + 1)
    monkeypatch.setattr(type(small), "check", lambda self: None)
    refuses(lambda: launch(small, machine=HERE), f"{free + 1:,} bytes", "VTP_RUNS", error=OSError)
    assert not run_of(small).path.exists()
    monkeypatch.setattr(type(small), "checkpoint_bytes", lambda self: free // 4)
    has_room(small)
    assert "room for 5 checkpoints" in capsys.readouterr().out                  # 2 that stay, 2 newest, 1 that is being written
    monkeypatch.setattr(type(small), "checkpoint_bytes", lambda self: free // 6)
    has_room(small)
    assert capsys.readouterr().out == ""
    record(fault="no room for a checkpoint", promise="refused in the first second", tried=1)


@pytest.mark.parametrize("kind", ["pretrain", "finetune", "dit"])
def test_what_a_checkpoint_takes_is_known_beforehand(world, kind, monkeypatch):
    "By a process that has counted nothing yet; headers of small tensors and small files are not in it."
    for counted in (package.cost, second_stage.cost): counted.cache_clear()
    known = JOBS[kind].checkpoint_bytes()
    world.straight(kind)
    monkeypatch.setenv("VTP_RUNS", str(world.folder / "straight"))
    checkpoint = run_of(JOBS[kind]).checkpoints()[-1]
    size = sum(t.nbytes for file in checkpoint.path.glob("*.safetensors") for t in checkpoint.tensors(file.stem).values())
    assert known <= size < known * 1.01 + 1000, (known, size)


# ---------------------------------------------------------------- a disk that is read-only

@contextmanager
def read_only(folder:Path):
    "The folder, read-only for root too: mounted so, or its attribute `immutable`; where neither is allowed, every write is refused as such a disk refuses it."
    folder.mkdir(exist_ok=True)
    with ExitStack() as stack:
        if mount("--bind", str(folder), str(folder)):
            stack.callback(subprocess.run, ["umount", "-l", str(folder)], check=True)
            way = "mount" if mount("-o", "remount,ro,bind", str(folder)) else None
        elif subprocess.run(["chattr", "+i", str(folder)], capture_output=True).returncode == 0:
            way = stack.callback(subprocess.run, ["chattr", "-i", str(folder)], check=True) and "chattr"
        else: way = None
        if way is None: stack.enter_context(moments(folder, Full(1, error=errno.EROFS)))
        yield way or "injected"


def test_a_folder_that_is_read_only(tmp_path, monkeypatch, record):
    runs = tmp_path / "runs"
    checked = []
    monkeypatch.setattr(type(PRETRAIN), "check", lambda self: checked.append(self))
    with read_only(runs) as way: refuses(lambda: launch(PRETRAIN, machine=HERE), "make it writable", "VTP_RUNS", str(runs), error=OSError)
    monkeypatch.setenv("VTP_RUNS", str(tmp_path / "file" / "runs"))
    (tmp_path / "file").write_text("in its place")
    refuses(lambda: launch(PRETRAIN, machine=HERE), "VTP_RUNS", error=OSError)
    assert not checked, "the disk is the first thing that is looked at"
    record(fault=f"a read-only folder ({way})", promise="refused in the first second", tried=2)


def test_a_disk_that_becomes_read_only(world, monkeypatch, record):
    "As the kernel does when it meets errors: what is there stays."
    runs = world.fresh("pretrain", monkeypatch)
    run = run_of(PRETRAIN)
    with moments(runs, Full(world.writes("pretrain") // 2, error=errno.EROFS)), pytest.raises(OSError, match="Read-only file system.*VTP_RUNS"): launch(PRETRAIN, machine=EACH)
    assert whole(run) >= 1
    launch(PRETRAIN, machine=EACH)
    assert remains(run.path) == world.straight("pretrain")
    record(fault="a disk becomes read-only", promise="stopped with the way out; launched again, bitwise the uninterrupted run", tried=1)


def test_what_is_done_is_read_from_a_read_only_disk(world, monkeypatch):
    runs = world.fresh("dit", monkeypatch)
    with read_only(runs): assert launch(LATENTS, machine=HERE)[0].done
    assert PRETRAIN.load() is not None


# ---------------------------------------------------------------- owners

OWNER = """
import os, sys, time
from pathlib import Path
from vtp.run import Run, locked
if int(sys.argv[2]): os.setuid(int(sys.argv[2]))
with locked(Run(sys.argv[1])):
    if sys.argv[3] == "forks" and os.fork() == 0: time.sleep(60); os._exit(0)
    print("owns", flush=True)
    time.sleep(60)
"""


@contextmanager
def owner(run:Run, user:int=0, forks:str=""):
    "Another process, of that user, that owns the run."
    env = dict(os.environ, PYTHONPATH=str(Path(__file__).parent.parent))
    process = subprocess.Popen([sys.executable, "-c", OWNER, str(run.path), str(user), forks], env=env, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        assert process.stdout.readline() == "owns\n"
        yield process
    finally:
        process.kill()
        process.wait()
        try: os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError: pass


def test_a_run_has_one_owner(world, monkeypatch, record):
    "Who else launches it is told who the owner is, at once, and changes nothing; when the owner is killed, even with children left, the run is free."
    world.fresh("pretrain", monkeypatch)
    run = create(path_of(PRETRAIN), PRETRAIN, EACH)
    before = remains(run.path), (run.path / "launch.json").read_text()
    with owner(run, forks="forks") as process:
        for act in (lambda: launch(PRETRAIN, machine=HERE), lambda: work(str(run.path))):
            refuses(act, f"is being written by process {process.pid} on {socket.gethostname()}", error=RuntimeError)
        assert (remains(run.path), (run.path / "launch.json").read_text()) == before
        process.kill()
        process.wait()
        assert (run.path / "lock").read_text().startswith(f"{process.pid} ")              # what the dead have left says nothing
        launch(PRETRAIN, machine=EACH)
    assert remains(run.path) == world.straight("pretrain")
    record(fault="two launches of a run", promise="the second is refused, naming process and host", tried=2)
    record(fault="the lock of a run whose owner was killed", promise="free at once", tried=1)


@pytest.mark.skipif(os.getuid() != 0, reason="another user's process can be made by root only")
def test_an_owner_of_another_user(world, monkeypatch, tmp_path, record):
    with pytest.MonkeyPatch.context() as patch:
        folder = Path("/tmp") / f"vtp-owner-{os.getpid()}"
        folder.mkdir()
        try:
            patch.setenv("VTP_RUNS", str(folder))
            run = create(path_of(PRETRAIN), PRETRAIN, HERE)
            (run.path / "lock").chmod(0o666)
            with owner(run, user=65534) as process: refuses(lambda: launch(PRETRAIN, machine=HERE), f"process {process.pid} on", error=RuntimeError)
        finally: shutil.rmtree(folder)
    record(fault="a run that another user's process owns", promise="refused, naming process and host", tried=1)


def test_a_lock_file_that_the_dead_have_left(world, monkeypatch, record):
    world.fresh("pretrain", monkeypatch)
    run = create(path_of(PRETRAIN), PRETRAIN, EACH)
    for text in ("999999999 on elsewhere", "", "\0\0\0", "1 on " + socket.gethostname()):      # of a process that lives but owns nothing, too
        (run.path / "lock").write_text(text)
        with locked(Run(run.path)): assert (run.path / "lock").read_text() == f"{os.getpid()} on {socket.gethostname()}"
    record(fault="a lock file with the text of the dead", promise="taken over", tried=4)


def test_a_file_system_without_locks_is_named(monkeypatch, tmp_path):
    import fcntl

    def flock(file, how): raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
    monkeypatch.setattr(fcntl, "flock", flock)
    refuses(lambda: launch(job((rec(),), steps=2), machine=HERE), "mount its file system with locks", "VTP_RUNS", error=OSError, seconds=10)


RACE = """
import sys
from tiny import HERE
from test_bad_environment import EACH, PRETRAIN
from vtp.job import launch
try: launch(PRETRAIN, machine=EACH); print("done")
except RuntimeError as error: print(error)
"""


@pytest.mark.timeout(240)
def test_two_launches_at_the_same_moment(world, monkeypatch, record):
    runs = world.fresh("pretrain", monkeypatch)
    env = dict(os.environ, PYTHONPATH=os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parent.parent)]))
    both = [subprocess.Popen([sys.executable, "-c", RACE], env=env, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=200)[0].splitlines()[-1] for process in both]
    assert "done" in said and all(line == "done" or "is being written by process" in line for line in said), said     # or one after the other
    assert remains(run_of(PRETRAIN).path) == world.straight("pretrain"), runs
    record(fault="two launches at the same moment", promise="one owner, no state mixed", tried=1)


# ---------------------------------------------------------------- clocks

def test_a_clock_that_jumps(world, monkeypatch, record):
    "Days forwards and back, at every look; files from the future. Nothing is decided by the time of day."
    import tqdm.std

    dice, real = random.Random(3), time.time
    for kind in ("pretrain", "latents", "dit", "finetune"):
        with monkeypatch.context() as patch:
            world.fresh(kind, patch)
            for place in (time, tqdm.std): patch.setattr(place, "time", lambda: real() + dice.uniform(-10, 10) * 86400)
            run, = launch(JOBS[kind], machine=EACH)
            assert remains(run.path) == world.straight(kind), kind
    record(fault="a clock that jumps by days", promise="bitwise the uninterrupted run", tried=4)


def test_the_time_of_day_decides_on_no_checkpoint(monkeypatch):
    real, saved = time.time, []
    monkeypatch.setattr(time, "time", lambda: real() + 86400 * len(saved))
    save = Run.save
    monkeypatch.setattr(Run, "save", lambda self, step, *rest, **more: (saved.append(step), save(self, step, *rest, **more))[1])
    launch(job((rec(),), steps=4, keep=(2,)), machine=HERE)
    assert saved == [2, 4]


def test_files_from_the_future(world, monkeypatch, record):
    for days in (-4000, 4000):
        with monkeypatch.context() as patch:
            runs = world.fresh("pretrain", patch)
            with signals(runs, signal.SIGTERM, at=world.writes("pretrain") // 2), pytest.raises(InterruptedError): launch(PRETRAIN, machine=EACH)
            run = run_of(PRETRAIN)
            for number, path in enumerate(sorted(run.path.rglob("*"), reverse=days > 0)):          # and in the wrong order
                os.utime(path, (time.time() + 86400 * days + number,) * 2)
            newest = whole(run)
            assert run.latest().step == newest
            launch(PRETRAIN, machine=EACH)
            assert remains(run.path) == world.straight("pretrain")
    record(fault="files from the future or long ago", promise="bitwise the uninterrupted run", tried=2)


# ---------------------------------------------------------------- signals

STOPS = (signal.SIGTERM,), (signal.SIGUSR1,), (signal.SIGINT,), (signal.SIGTERM, signal.SIGTERM), (signal.SIGUSR1, signal.SIGTERM), (signal.SIGTERM, signal.SIGINT)


def signalled(world:World, kind:str, at:int, names:tuple) -> str:
    "Signals before write `at`; then the run goes on to the same end. How it was stopped."
    with pytest.MonkeyPatch.context() as patch:
        runs = world.fresh(kind, patch)
        run, how, story = run_of(JOBS[kind]), "came to its end", f"{kind}, {[name.name for name in names]} before write {at} ({world.known[kind][2][at - 1]})"
        with signals(runs, *names, at=at):
            try: launch(JOBS[kind], machine=EACH)
            except (InterruptedError, KeyboardInterrupt, Ended) as error: how = type(error).__name__
        whole(run)
        if how == "InterruptedError": assert not run.done, story
        if how == "InterruptedError" and hasattr(JOBS[kind], "optim"): assert run.latest() is not None, f"{story}: no state was saved"
        launch(JOBS[kind], machine=EACH)
        assert remains(run.path) == world.straight(kind), story
        shutil.rmtree(runs)
        return how


@pytest.mark.timeout(240)
@pytest.mark.parametrize("kind", JOBS)
def test_signals_at_some_writes(world, kind, record):
    "In checkpoint writing, between rows, in evaluation, before and after training."
    dice = random.Random(11)
    hows = [signalled(world, kind, dice.randint(1, world.writes(kind)), names) for names in STOPS]
    record(fault="SIGTERM, SIGUSR1, SIGINT, twice in a row, before a write", promise="stopped; launched again, bitwise the uninterrupted run", tried=len(hows))


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("kind", JOBS)
def test_signals_at_random_writes(world, kind, record):
    dice, count = random.Random(12), 20
    for number in range(count): signalled(world, kind, dice.randint(1, world.writes(kind)), STOPS[number % len(STOPS)])
    record(fault="SIGTERM, SIGUSR1, SIGINT, twice in a row, before a random write", promise="stopped; launched again, bitwise the uninterrupted run", tried=count)


def stopped_in(monkeypatch, place:str, names:tuple, number:int=1):
    "Have these signals come in the middle of `place`, a function of `vtp.pretrain` or `vtp.loop`, when it is called for the `number`-th time."
    import vtp.loop

    holder = package if hasattr(package, place) and place != "loader" else vtp.loop
    call, calls = getattr(holder, place), []
    def interrupted(*args, **more):
        calls.append(1)
        if len(calls) == number:
            for name in names: signal.raise_signal(name)
        return call(*args, **more)
    monkeypatch.setattr(holder, place, interrupted)


@pytest.mark.parametrize("place,names", [("train_step", (signal.SIGTERM,)), ("train_step", (signal.SIGUSR1, signal.SIGUSR1)), ("guarded_step", (signal.SIGTERM, signal.SIGUSR1)),
                                         ("loader", (signal.SIGTERM,)), ("seed_step", (signal.SIGUSR1,))])
def test_a_signal_in_the_middle_of_a_step_saves_that_step(world, monkeypatch, place, names, record):
    for workers in (0, 1):
        with monkeypatch.context() as patch:
            world.fresh("pretrain", patch)
            with monkeypatch.context() as inner:
                stopped_in(inner, place, names, number=1 if place == "loader" else 2)
                with pytest.raises(InterruptedError, match="was stopped and has saved its state: launch again"): launch(PRETRAIN, machine=replace(HERE, workers=workers))
            run = run_of(PRETRAIN)
            assert whole(run) == (1 if place == "loader" else 2) and not run.done
            launch(PRETRAIN, machine=replace(EACH, workers=1 - workers))
            assert (run.path / "metrics.jsonl").read_bytes() == (world.folder / "straight" / run.path.name / "metrics.jsonl").read_bytes()
            assert {k: v for k, v in remains(run.path).items() if "3/" in k} == {k: v for k, v in world.straight("pretrain").items() if "3/" in k}
    record(fault=f"signals in {place}", promise="that step is finished and saved; bitwise the uninterrupted run", tried=2)


@pytest.mark.parametrize("name", [signal.SIGTERM, signal.SIGUSR1, signal.SIGKILL])
def test_a_signal_to_a_loader_worker(world, monkeypatch, name, record):
    "Those that ask to stop are not for it; one that kills it ends the run with an error, and nothing is lost."
    world.fresh("pretrain", monkeypatch)
    step = package.train_step
    def hit(model, batch, opt, config, number):
        if number == 1:
            for child in multiprocessing.active_children(): os.kill(child.pid, name)
            time.sleep(.2)
        return step(model, batch, opt, config, number)
    with monkeypatch.context() as patch:
        patch.setattr(package, "train_step", hit)
        if name == signal.SIGKILL:
            with pytest.raises(RuntimeError, match="DataLoader worker"): launch(PRETRAIN, machine=replace(EACH, workers=1))
            assert whole(run_of(PRETRAIN)) >= 1
        else: launch(PRETRAIN, machine=replace(EACH, workers=1))
    launch(PRETRAIN, machine=EACH)
    assert remains(run_of(PRETRAIN).path) == world.straight("pretrain")
    record(fault=f"{name.name} to a loader's worker", promise="bitwise the uninterrupted run", tried=1)


# ---------------------------------------------------------------- what is missing, what is wrong

def test_a_checkpoint_of_another_job(world, monkeypatch, record):
    "Same shapes, other seed: without the digest in its state nobody would notice."
    runs = world.fresh("pretrain", monkeypatch)
    other = replace(PRETRAIN, seed=1)
    with signals(runs, signal.SIGTERM, at=world.writes("pretrain") // 2), pytest.raises(InterruptedError): launch(PRETRAIN, machine=EACH)
    mine, step = run_of(PRETRAIN), run_of(PRETRAIN).latest().step
    launch(replace(other, steps=3), machine=EACH)
    theirs = run_of(other).at(3).path
    shutil.copytree(theirs, mine.path / "checkpoints" / theirs.name)
    refuses(lambda: launch(PRETRAIN, machine=EACH), theirs.name, run_of(other).digest, "move it away", "vtp.adopt.adopt", seconds=10)
    shutil.rmtree(mine.path / "checkpoints" / theirs.name)
    assert mine.latest().step == step
    launch(PRETRAIN, machine=EACH)
    assert remains(mine.path) == world.straight("pretrain")
    record(fault="a checkpoint of another job in the run", promise="refused, naming it and the fix", tried=1)


@pytest.mark.parametrize("how,words", [("cut", "not a whole safetensors file"), ("pointer", "Git LFS pointer"), ("other", "start's"), ("missing", "without model.safetensors")])
def test_wrong_weights_to_start_from(tmp_path, monkeypatch, how, words, record):
    "Refused before the first step: a file that is cut, that is a pointer, of another model, or not there."
    from safetensors.torch import save_file

    from vtp.hub import release, save_pretrained

    folder = save_pretrained(PRETRAIN.build(), tmp_path / "model")
    weights, small = folder / "model.safetensors", job((rec(),), steps=2)
    start = At(release(folder))
    if how == "cut": weights.write_bytes(weights.read_bytes()[:-1000])
    if how == "pointer": weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    if how == "missing": weights.unlink()
    if how == "other": small = replace(small, tokenizer=replace(small.tokenizer, latent=4))
    started = replace(small, start=start)
    refuses(lambda: launch(started, machine=HERE), words, error=(ValueError, FileNotFoundError), seconds=10)
    assert not run_of(started).rows() and not run_of(started).checkpoints()
    if how == "other":
        save_file({"x": torch.zeros(1)}, weights)
        refuses(lambda: launch(replace(job((rec(),), steps=2), start=start), machine=HERE), str(folder), "does not fit", seconds=10)
    record(fault=f"weights to start from: {how}", promise="refused before the first step, naming file and fix", tried=1)


@pytest.mark.parametrize("what", ["shards", "LPIPS", "extractor", "DINO", "texts"])
def test_missing_assets(tmp_path, monkeypatch, what, record):
    "Found before anything is trained, with the fix."
    from vtp.data.pairs import Shards
    from vtp.evaluation.extractors import Inception
    from vtp.objectives.adversarial import DINO, Adversarial

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    here = job((rec(),), steps=2)
    wrong, words = {
        "shards": (replace(here, pairs=Shards("none/of-*.tar")), "none/of-"),
        "LPIPS": (replace(here, objectives=(rec(perceptual=PerceptualConfig(weights=str(tmp_path / "vgg16.pth"))),)), "vgg16"),
        "extractor": (Evaluate(At(here), (replace(QUALITY, extractor=Inception(weights=str(tmp_path / "inception.pth"))),)), "inception.pth"),
        "DINO": (stage2(here, adversarial=Adversarial(DINO(weights=str(tmp_path / "dino.pth")))), "dino"),
        "texts": (job((clip(), rec()), steps=2), "open_clip"),
    }[what]
    if what == "texts":
        import vtp.text

        def absent(*_): raise ImportError("tokenizing captions needs open_clip: pip install open_clip_torch")
        monkeypatch.setattr(vtp.text, "import_open_clip", absent)
        vtp.text._byte_pairs.cache_clear()
    refuses(lambda: launch(wrong, machine=HERE), words, error=(FileNotFoundError, ValueError, ImportError), seconds=10)
    for one in ordered([wrong]): assert not run_of(one).rows() and not run_of(one).checkpoints()
    record(fault=f"missing: {what}", promise="refused before anything is trained, naming the fix", tried=1)


# ---------------------------------------------------------------- a config that was changed

def test_a_config_that_was_changed_by_hand(world, monkeypatch, record):
    runs = world.fresh("pretrain", monkeypatch)
    with signals(runs, signal.SIGTERM, at=world.writes("pretrain") // 2), pytest.raises(InterruptedError): launch(PRETRAIN, machine=EACH)
    run = run_of(PRETRAIN)
    text, before = (run.path / "config.json").read_text(), whole(run)
    (run.path / "config.json").write_text(dumps(replace(PRETRAIN, log_every=2, bad_rate=.5)))
    refuses(lambda: launch(PRETRAIN, machine=EACH), "log_every: 1 → 2", "bad_rate: 0.01 → 0.5", "vtp.adopt.adopt")
    refuses(lambda: work(str(run.path)), "is named after", "vtp.adopt.adopt")
    said = subprocess.run([sys.executable, "-m", "vtp.worker", str(run.path)], capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert said.returncode != 0 and "is named after" in said.stderr
    (run.path / "config.json").write_text(text[:-40])
    refuses(lambda: launch(PRETRAIN, machine=EACH), "config.json can't be read", "put the file back")
    (run.path / "config.json").write_text(text)
    renamed = run.path.with_name(f"{PRETRAIN.kind}-{run_of(replace(PRETRAIN, seed=5)).path.name[-10:]}")
    shutil.copytree(run.path, renamed)
    refuses(lambda: launch(replace(PRETRAIN, seed=5), machine=EACH), "seed: 5 → 0")
    refuses(lambda: work(str(renamed)), "is named after")
    assert whole(run) == before
    launch(PRETRAIN, machine=EACH)
    assert remains(run.path) == world.straight("pretrain")
    record(fault="a config that was changed by hand, a directory that was renamed", promise="refused with the differences", tried=6)


def test_a_done_run_of_another_config_is_no_result(world, monkeypatch):
    world.fresh("latents", monkeypatch)
    path = path_of(PRETRAIN)
    (path / "config.json").write_text(dumps(replace(PRETRAIN, seed=3)))
    refuses(lambda: launch(LATENTS, machine=EACH), "seed: 0 → 3")


def test_a_label_may_change(world, monkeypatch):
    "The readable part of a name is decoration."
    world.fresh("pretrain", monkeypatch)
    run, = launch(PRETRAIN, machine=EACH)
    os.rename(run.path, run.path.with_name(f"my-best-{run.digest}"))
    assert launch(PRETRAIN, machine=EACH)[0].path.name.startswith("my-best-") and work(str(run_of(PRETRAIN).path))


CHANGES = dict(log_every=2, keep=(2, 5), bad_rate=.5, skips=9, probes=())


@pytest.mark.timeout(240)
def test_a_changed_job_begins_from_another_run(tmp_path, monkeypatch, record):
    "What changes no weight gives the weights of the uninterrupted run; whatever is not named is refused with the difference; the old run stays as it was."
    old = job(steps=6, log_every=1, keep=(4,), probes=(QUALITY,))
    new = replace(old, **CHANGES)
    monkeypatch.setenv("VTP_RUNS", str(tmp_path / "straight"))
    straight, unchanged = launch(new, old, machine=HERE)
    monkeypatch.setenv("VTP_RUNS", str(tmp_path / "adopted"))
    with monkeypatch.context() as patch:
        stopped_in(patch, "train_step", (signal.SIGTERM,), number=3)
        with pytest.raises(InterruptedError): launch(old, machine=EACH)
    first, allowed = run_of(old), tuple(CHANGES)
    before = remains(first.path)
    for field in CHANGES:
        rest = tuple(name for name in CHANGES if name != field)
        refuses(lambda: adopt(first, new, allow=rest), f"{field}", "allow")
    assert not path_of(new).exists()
    begun = adopt(first, new, allow=allowed)
    assert begun.adopted == dict(run=first.path.name, path=str(first.path), step=3, differences=differences(old, new), before=None)
    assert begun.at().step == 3 and [c.step for c in begun.checkpoints()] == [2, 3]                  # 2 is one that the new job keeps
    run, = launch(new, machine=HERE)
    assert run.path == begun.path and remains(first.path) == before
    for step in (5, 6):
        for group in ("model", "optim"):
            a, b = straight.at(step).tensors(group), run.at(step).tensors(group)
            assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert [row for row in run.rows() if row["step"] > 3] == [row for row in straight.rows() if row["step"] > 3]
    assert [row for row in run.rows() if row["step"] <= 3] == [row for row in unchanged.rows() if row["step"] <= 3]
    launch(old, machine=HERE)                                                                        # the old one goes its own way
    assert {k: v for k, v in remains(first.path).items() if "checkpoints" not in k} == {k: v for k, v in remains(unchanged.path).items() if "checkpoints" not in k}
    assert all(c.damage() is None for c in (*first.checkpoints(), *run.checkpoints()))
    refuses(lambda: adopt(first, new, allow=allowed), "has begun already")
    record(fault="a config changed on resume", promise="refused with the differences unless allowed by name; then bitwise the weights", tried=len(CHANGES) + 1)


def test_a_longer_training_from_a_finished_one(tmp_path, monkeypatch, record):
    "Adopted twice, the second time by name of a step; a full disk in between leaves nothing behind."
    short = job((rec(),), steps=3, keep=(2,), log_every=1)
    longer, longest = replace(short, steps=5), replace(short, steps=7)
    launch(short, machine=HERE)
    runs = path_of(short).parent
    with moments(runs, lambda number, name: None) as seen: adopt(run_of(short), longer, allow=("steps",))
    shutil.rmtree(path_of(longer))
    for first in range(1, len(seen.names) + 1):
        with moments(runs, Full(first)), pytest.raises(OSError, match="VTP_RUNS"): adopt(run_of(short), longer, allow=("steps",))
        if first < len(seen.names): assert [p.name for p in runs.iterdir()] == [path_of(short).name]
    shutil.rmtree(path_of(longer))                          # the last write comes when it is in its place
    adopt(run_of(short), longer, allow=("steps",))
    launch(longer, machine=HERE)
    adopt(run_of(longer), longest, allow=("steps",), step=2)
    run, = launch(longest, machine=HERE)
    assert run.done and run.at().step == 7 and run.adopted["before"]["step"] == 3 and run.adopted["step"] == 2
    assert [row["step"] for row in run.rows()] == list(range(1, 8)) and run_of(short).at().step == 3
    refuses(lambda: adopt(run, replace(short, steps=4), allow=("steps",)), "beyond the 4 steps")
    refuses(lambda: adopt(run, replace(short, steps=9, seed=1), allow=("steps",)), "seed: 0 → 1", "allow")
    record(fault="disk full while a run is begun from another", promise="nothing is left behind", tried=len(seen.names))


# ---------------------------------------------------------------- no network

@pytest.fixture
def offline(monkeypatch):
    "No connection can be made, and nobody was told."
    tried = []
    def refuse(*args, **more):
        tried.append(args)
        raise OSError(errno.ENETUNREACH, os.strerror(errno.ENETUNREACH))
    for name in ("connect", "connect_ex"): monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"): monkeypatch.delenv(name, raising=False)
    return tried


def test_nothing_needs_a_network(world, monkeypatch, offline, record):
    for kind in JOBS:
        with monkeypatch.context() as patch:
            world.fresh(kind, patch)
            run, = launch(JOBS[kind], machine=EACH)
            assert remains(run.path) == world.straight(kind)
    launch(job(steps=2), machine=HERE)                                  # with texts
    assert not offline
    record(fault="no network", promise="training, evaluation and the diffusion chain run as with it", tried=len(JOBS) + 1)


def test_a_hub_id_without_a_network(offline, tmp_path, monkeypatch, record):
    from vtp.hub import Published, load_training

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)        # read when the library is imported
    began = time.monotonic()
    with pytest.raises(FileNotFoundError, match="hf download nobody/nothing"): launch(replace(job((rec(),), steps=2), start=At(Published("nobody/nothing"))), machine=HERE)
    with pytest.raises(FileNotFoundError, match="hf download nobody/nothing"): load_training("nobody/nothing")
    assert time.monotonic() - began < 5 and 0 < len(offline) < 8        # each file is asked for once
    record(fault="a Hub id, no network", promise="refused with the commands to run", tried=2)
