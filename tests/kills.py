"""Jobs in processes that SIGKILL ends, at a random moment or at a named instant, and what their runs have left in the end.

`python tests/kills.py` is a zygote: it has imported the package and forks a process, the head of a group of its own, for every plan it reads. A plan may name an
instant at which that process kills its whole group. Instants are called by what happens next: each change of a file in the run directory that Python announces
("open metrics.jsonl", "rename checkpoints/.step-#": numbers are left out), each fsync, the middle of writing a file of tensors or a row ("half …"), and some places in the computation."""
import functools
import hashlib
import importlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path

HERE = Path(__file__).resolve().parent
PLACES = {                                             # in the computation: what is called there → what the instant is called
    "vtp.pretrain:guarded_step": "update", "vtp.finetune_decoder:guarded_step": "update", "vtp.generation.train:guarded_step": "update",
    "vtp.generation.latents:encode_crops": "encode", "vtp.generation.sample:sample": "sample",
    "vtp.evaluation.reconstruction:roundtrip": "reconstruct", "vtp.evaluation.linear_probe:Heads.step": "probe",
}
STEPS = {"vtp.pretrain:train_step": 1, "vtp.finetune_decoder:finetune_step": 3, "vtp.generation.train:train_step": 2}      # where a step finds its images
FILES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "open"}                                        # what Python announces of files that change
FOLDER = {"os.rename": 2, "os.remove": 1, "os.rmdir": 1, "os.mkdir": 2}                                                   # where an event says relative to which folder


# ---------------------------------------------------------------- in the process that is killed

def die():
    os.killpg(0, signal.SIGKILL)


class Instants:
    "Counts the instants as they come, notes them in the file `trace`, and dies at the one that the plan names."
    def __init__(self, run:Path, name="", number=1, trace=None):
        self.run, self.name, self.left = str(run), name, number
        self.trace = os.open(trace, os.O_WRONLY | os.O_CREAT | os.O_APPEND) if trace else None

    def due(self, name:str) -> bool:
        if self.trace: os.write(self.trace, f"{name}\n".encode())
        self.left -= name == self.name
        return name == self.name and self.left == 0

    def meet(self, name:str):
        if self.due(name): die()

    def below(self, path, folder=-1) -> str|None:
        "A path's name within the run, without numbers; None if it is elsewhere."
        path = os.readlink(f"/proc/self/fd/{path}") if isinstance(path, int) else os.fsdecode(path)
        if not os.path.isabs(path): path = os.path.join(os.readlink(f"/proc/self/fd/{folder}") if folder >= 0 else os.getcwd(), path)
        return re.sub(r"\d+", "#", path[len(self.run):].lstrip("/") or ".").removesuffix(".#") if path.startswith(self.run) else None

    def hook(self, event:str, args:tuple):
        if event not in FILES or event == "open" and (isinstance(args[0], int) or not args[2] & (os.O_WRONLY | os.O_RDWR)): return
        where = self.below(args[0], args[FOLDER[event]] if event in FOLDER else -1)
        if where is not None: self.meet(f"{event.removeprefix('os.')} {where}")

    def watch(self):
        "Have every instant come by here."
        import vtp.checkpoint as checkpoint
        import vtp.run as run

        fsync, append, save = os.fsync, run._append, checkpoint.save_file

        def synced(handle):
            if (where := self.below(handle)) is not None: self.meet(f"fsync {where}")
            fsync(handle)

        def appended(path, row):
            if self.due(f"half {self.below(path)}"):
                append(path, row)
                os.truncate(path, path.stat().st_size - len(json.dumps(row)) // 2)
                die()
            append(path, row)

        def saved(tensors, path, *rest):
            due = self.due(f"half {self.below(path)}")
            save(tensors, path, *rest)
            if due:
                os.truncate(path, path.stat().st_size // 2)
                die()

        os.fsync, run._append, checkpoint.save_file = synced, appended, saved
        for place, name in PLACES.items(): patch(place, lambda call, name=name: lambda *a, **k: (self.meet(name), call(*a, **k))[1])
        sys.addaudithook(self.hook)


def patch(place:str, wrapped):
    "Put `wrapped(what is there)` at 'module:name.attribute'."
    module, names = place.split(":")
    holder = importlib.import_module(module)
    *path, last = names.split(".")
    for name in path: holder = getattr(holder, name)
    call = getattr(holder, last)
    setattr(holder, last, functools.wraps(call)(wrapped(call)))


def poison(steps:list[int]):
    "Make one number of the images, or latents, of these steps nan: they are called off, and listed."
    def wrapped(call, at):
        def step(*args):
            images = args[at]["rec"]["image"] if isinstance(args[at], dict) else args[at]
            if args[-1] in steps: images.view(-1)[0] = float("nan")
            return call(*args)
        return step
    for place, at in STEPS.items(): patch(place, functools.partial(wrapped, at=at))


def hashed(tensor) -> str:
    return hashlib.sha256(tensor.detach().contiguous().numpy().tobytes()).hexdigest()[:16]


def note_order(path:str):
    "A line for every step whose update is made: its number, its keys, a hash of each image, and one of all that the step was given."
    import vtp.loop as loop

    handle, place, ledger = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), loop.to_device, loop.Ledger.add
    seen = {}

    def flat(value, name=""):
        return [pair for key, part in value.items() for pair in flat(part, f"{name}/{key}")] if isinstance(value, dict) else [(name, value)]

    def placed(batch, *rest):
        if isinstance(batch, dict) and not hasattr(placed, "inside"):
            placed.inside = True
            tensors = dict(flat(batch))
            image = next((tensors[name] for name in ("/clip/image", "/rec/image", "/z", "/image") if name in tensors))
            seen.update(images=[hashed(one) for one in image], all=hashlib.sha256("".join(f"{k}{hashed(v)}" for k, v in sorted(tensors.items())).encode()).hexdigest()[:16])
            found = place(batch, *rest)
            del placed.inside
            return found
        return place(batch, *rest)

    def added(self, step, keys, *rest):
        os.write(handle, (json.dumps({"step": step, "keys": keys, **seen}) + "\n").encode())
        ledger(self, step, keys, *rest)

    loop.to_device, loop.Ledger.add = placed, added


def broken(how:str):
    "Resuming as it must not be: what the comparison has to notice."
    import vtp.checkpoint as checkpoint
    import vtp.loop as loop
    import vtp.run as run

    if how == "rows are not cut":
        patch("vtp.run:os.truncate", lambda call: lambda path, size: None if str(path).endswith("metrics.jsonl") else call(path, size))
    elif how == "moments are forgotten":
        loop.load_optim = lambda opt, tensors: None
    elif how == "the place in the data is forgotten":
        loader = loop.loader
        loop.loader = lambda batches, start, *rest, **more: loader(batches, start) if not start else _shifted(loader, batches, start)
    elif how == "the ledger is forgotten":
        patch("vtp.pretrain:resume", lambda call: lambda run, state: (call(run, state), state.ledger.state.update(bad=0, skipped=0))[0])
    elif how == "named before it is written":
        def write(folder, step, groups, state):
            checkpoint._begin(final := folder / f"step-{step:09d}", step, groups)
            (final / "state.json").write_text(json.dumps(state))
            checkpoint._write(final, groups)
            return checkpoint.Checkpoint(final)
        run.write_checkpoint, checkpoint.Checkpoint.damage = write, lambda self: None
    else: raise ValueError(how)


def _shifted(loader, batches, start):
    "The batches of a training that begins its data anew."
    return (batch for step, batch in zip(range(start, batches.steps), loader(batches, 0)))


def live(plan:dict):
    "What the forked process does: what `launch` does, in this process, or what a rank does under torchrun."
    from vtp.config import loads
    from vtp.run import create
    from vtp.worker import main
    import vtp.ranks as ranks

    os.environ.update(plan["env"])
    ranks.GIVE_WAY = 0.                                                                          # there is no agent to give way to
    if plan.get("broken"): broken(plan["broken"])
    if plan.get("poison"): poison(plan["poison"])
    if plan.get("order"): note_order(plan["order"])
    Instants(plan["path"], *plan.get("die", ()), trace=plan.get("trace")).watch()
    if "RANK" not in plan["env"]: create(Path(plan["path"]), loads(plan["job"]), loads(plan["machine"]))
    sys.argv = ["vtp.worker", plan["path"]]
    main()


def serve():
    "Read a line, answer with a line: a plan → the process that follows it; a process → its exit status, once it has ended; a job → it is known, and what counting its steps took is remembered."
    import vtp.worker, vtp.pretrain, vtp.finetune_decoder, vtp.generation.train, vtp.generation.sample, vtp.evaluation.generation, vtp.evaluation.linear_probe      # noqa: E401, F401
    import torch.utils.tensorboard  # noqa: F401
    from vtp.config import loads

    for line in sys.stdin:
        asked = json.loads(line)
        if isinstance(asked, int): answer = os.waitpid(asked, 0)[1]
        elif isinstance(asked, str): answer = sorted(loads(asked).spent()) and 0
        elif not (answer := os.fork()):
            code = 1
            try:
                os.setsid()
                said = os.open(asked["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                for stream in (1, 2): os.dup2(said, stream)
                os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
                live(asked)
                code = 0
            except SystemExit as error: code = 0 if error.code is None else 1
            except BaseException: traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        print(json.dumps(answer), flush=True)


# ---------------------------------------------------------------- in the test

class Zygote:
    "Starts processes that have imported the package already."
    def __init__(self):
        env = dict(os.environ, PYTHONPATH=os.pathsep.join([str(HERE), str(HERE.parent)]), OMP_NUM_THREADS="1")
        self.process = subprocess.Popen([sys.executable, str(HERE / "kills.py")], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.known = set()

    def ask(self, what):
        print(json.dumps(what), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())

    def close(self):
        self.process.stdin.close()
        self.process.wait(30)


def kill(process:int):
    "SIGKILL to a process and its group."
    for send in (os.killpg, os.kill):
        try: send(process, signal.SIGKILL)
        except ProcessLookupError: pass


def read_order(starts:list[list[Path]]) -> dict[int, tuple]:
    """What each step was given, (keys, hashes of the images, hash of everything); of `starts`, each a list of its ranks' notes. The last is None where ranks shared the step.

    A step that was made again must have been given the same."""
    steps = {}
    for ranks in starts:
        parts = [{row["step"]: row for row in map(json.loads, path.read_text().splitlines())} if path.exists() else {} for path in ranks]
        for step in sorted(set.intersection(*map(set, parts))):
            found = tuple(sum((part[step][name] for part in parts), []) for name in ("keys", "images")) + (parts[0][step]["all"] if len(parts) == 1 else None,)
            before = steps.setdefault(step, found)
            assert before[:2] == found[:2] and (None in (before[2], found[2]) or before[2] == found[2]), f"step {step} was given other samples when it was made again"
    return steps


HERE_ONLY = {"lock", "launch.json", "timing.jsonl", "env.json"}      # how it went, and where


def remains(run:Path) -> dict[str, str]:
    "Every file that a run has left but those that say how it went: name → hash."
    found = {str(file.relative_to(run)): file for file in sorted(run.rglob("*")) if file.is_file()}
    return {name: hashlib.sha256(file.read_bytes()).hexdigest() for name, file in found.items() if name not in HERE_ONLY and not name.startswith("tb/")}


class Victim:
    "A job in a folder of runs of its own, that is started and killed until it is done."
    def __init__(self, zygote:Zygote, job, runs:Path, machine, cache:Path, **plan):
        from vtp.config import digest, dumps

        self.zygote, self.job, self.runs, self.machine, self.plan = zygote, job, runs, machine, plan
        self.path, self.text = runs / f"{job.kind}-{digest(job)}", dumps(job)
        self.env, self.log, self.orders, self.kills = {"VTP_RUNS": str(runs), "VTP_CACHE": str(cache)}, runs / "said.txt", [], []
        runs.mkdir(parents=True, exist_ok=True)
        if hasattr(job, "steps") and self.text not in zygote.known:
            zygote.ask(self.text)
            zygote.known.add(self.text)

    def start(self, machine=None, ranks:int=1, **plan) -> list[int]:
        "The processes of a start: the worker, or with several `ranks` what torchrun would start."
        from vtp.config import dumps
        from vtp.run import create

        notes = [self.runs / f"order.{self.path.name}.{len(self.orders)}.{rank}" for rank in range(ranks)]
        self.orders.append(notes)
        plan = {"path": str(self.path), "job": self.text, "machine": dumps(machine or self.machine), "log": str(self.log), **self.plan, **plan}
        if ranks == 1: return [self.zygote.ask({**plan, "env": self.env, "order": str(notes[0])})]
        create(self.path, self.job, machine or self.machine)
        with socket.socket() as free:
            free.bind(("localhost", 0))
            group = dict(WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks), MASTER_ADDR="localhost", MASTER_PORT=str(free.getsockname()[1]))
        die, victim = plan.pop("die", None), plan.pop("victim", 0)
        return [self.zygote.ask({**plan, "env": {**self.env, **group, "RANK": str(rank), "LOCAL_RANK": str(rank)}, "order": str(note), **({"die": die} if die and rank == victim else {})})
                for rank, note in enumerate(notes)]

    def ended(self, process:int, failing:bool=False) -> bool:
        "Wait for a process: whether it came to the end of its work; False if it was killed. It must not fail, but where another rank was killed (`failing`)."
        status = self.zygote.ask(process)
        kill(process)                                                   # whoever is left of its group
        if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL or failing and os.WEXITSTATUS(status) == 1: return False
        assert status == 0, f"{self.path.name} failed after the kills {self.kills}: {self.log.read_text()[-3000:]}"
        return True

    def killed_at(self, name:str, number:int=1, alone:bool=False, **start) -> bool:
        "Run until an instant comes for the `number`-th time; whether it came. Of several ranks, the one that is named `victim` is killed there, the others after it, or not at all (`alone`)."
        processes = self.start(die=(name, number), **start)
        first = processes.pop(start.get("victim", 0))
        found = not self.ended(first)
        if found: self.kills.append((name, number))
        for process in processes:
            if found and not alone: kill(process)
            self.ended(process, failing=found)
        return found

    def killed_after(self, seconds:float, **start) -> bool:
        "Run for so long; whether it was not done by then."
        processes = self.start(**start)
        time.sleep(seconds)
        for process in processes: kill(process)
        found = not all([self.ended(process) for process in processes])
        if found: self.kills.append(round(seconds, 3))
        return found

    def finish(self, **start) -> "Victim":
        assert all([self.ended(process) for process in self.start(**start)]) and (self.path / "done").exists()
        return self

    def order(self) -> dict[int, tuple]: return read_order(self.orders)


def unlike(one:Victim, other:Victim, whole:bool=True) -> list[str]:
    "What differs between two victims: names of files, and the order of samples, of which `other` has noted the `whole` or a part. Nothing must."
    a, b = remains(one.path), remains(other.path)
    found, steps, again = sorted(name for name in a.keys() | b.keys() if a.get(name) != b.get(name)), one.order(), other.order()
    return found + ["the order of samples"] * ((again if whole else {**steps, **again}) != steps)


if __name__ == "__main__": serve()
