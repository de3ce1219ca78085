"""Faults at named moments of a job that runs in this process: a disk that is full from some write on, a signal, a moment to do anything.

What Python announces about files below a folder (opened for writing, renamed, made, cut) is a moment; so are each fsync, each row, each small file and each file of tensors: these fail with half of their bytes written, as a full disk has it.
TensorBoard writes when its thread likes to: its files fail with the others, and are not counted."""
import errno
import os
import signal
import sys
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

from safetensors import SafetensorError

WATCHED = {"os.rename", "os.mkdir", "os.truncate", "open"}
_now = None


def _hook(event, args):
    if _now is None or event not in WATCHED: return
    if event == "open" and (isinstance(args[0], int) or not args[2] & (os.O_WRONLY | os.O_RDWR)): return
    if event == "os.mkdir" and os.path.isdir(args[0]): return          # nothing is written
    _now.meet(event.removeprefix("os."), args[1] if event == "os.rename" else args[0])


sys.addaudithook(_hook)


class Moments:
    "Counts the writes below `folder`; `at` is told the number and the name of each, and may raise."
    def __init__(self, folder:Path, at):
        self.folder, self.at, self.names, self.busy = str(folder), at, [], False

    def meet(self, what:str, path, half=None):
        "A write is about to happen; where it fails, `half` is done first."
        path = os.fsdecode(path) if not isinstance(path, int) else os.readlink(f"/proc/self/fd/{path}")
        if not path.startswith(self.folder) or self.busy: return
        if "/tb" in path: return self.at(None, path)
        self.names.append(f"{what} {path[len(self.folder):]}")
        self.busy = True                                          # what happens in here is no moment of its own
        try: self.at(len(self.names), self.names[-1])
        except (OSError, SafetensorError):
            if half: half()
            raise
        finally: self.busy = False


@contextmanager
def moments(folder:Path, at):
    "Inside, `at(number, name)` is called before every write below the folder."
    global _now
    import vtp.checkpoint as checkpoint
    import vtp.run as run

    seen, fsync, append, save, write = Moments(folder, at), os.fsync, run._append, checkpoint.save_file, Path.write_text

    def synced(handle):
        seen.meet("fsync", handle)
        fsync(handle)

    def within(call):
        "The call, whose opening of its file is not counted again."
        seen.busy = True
        try: return call()
        finally: seen.busy = False

    def appended(path, row):
        def half():
            append(path, row)
            os.truncate(path, path.stat().st_size - 5)
        seen.meet("row", path, half)
        within(lambda: append(path, row))

    def saved(tensors, path, *rest):
        def half():
            save(tensors, path, *rest)
            os.truncate(path, Path(path).stat().st_size // 2)
        try: seen.meet("tensors", path, half)
        except OSError as error: raise SafetensorError(f"Error while serializing: I/O error: {error.strerror} (os error {error.errno})") from None
        save(tensors, path, *rest)

    def written(self, text, *rest, **more):
        if not str(self).startswith(seen.folder): return write(self, text, *rest, **more)
        seen.meet("text", self, lambda: write(self, text[:len(text) // 2], *rest, **more))
        within(lambda: write(self, text, *rest, **more))

    with mock.patch.object(os, "fsync", synced), mock.patch.object(run, "_append", appended), mock.patch.object(checkpoint, "save_file", saved), mock.patch.object(Path, "write_text", written):
        _now = seen
        try: yield seen
        finally: _now = None


class Full:
    "A disk that takes no byte from the `first` write on (not `stays`: only then)."
    def __init__(self, first:int, stays:bool=True, error:int=errno.ENOSPC): self.first, self.stays, self.error, self.reached = first, stays, error, False

    def __call__(self, number, name):
        if number is not None: self.reached = number >= self.first if self.stays else number == self.first
        if self.reached and (self.stays or number): raise OSError(self.error, os.strerror(self.error), name.split(" ")[-1])


class Ended(BaseException):
    "The process would have ended: a signal came while nobody listened."


@contextmanager
def signals(folder:Path, *names:signal.Signals, at:int):
    "Inside, the process is sent these signals, one after the other, before the write of that number. While nobody listens, a signal ends the process, which here is an exception."
    def ended(number, frame): raise Ended(number)
    before = {name: signal.signal(name, ended) for name in {*names} - {signal.SIGINT}}

    def send(number, name):
        if number == at:
            for each in names: signal.raise_signal(each)
    try:
        with moments(folder, send) as seen: yield seen
    finally:
        for name, handler in before.items(): signal.signal(name, handler)
