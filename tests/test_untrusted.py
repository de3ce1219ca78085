"""Untrusted files: whatever somebody else has written, no code in it runs, nothing is written outside, nothing else is read or fetched, and what it claims is not believed.

Here: pickles in every container, safetensors, JSON and configs, published models, names in archives, and a campaign of changed bytes. Beside it: damage to weights, failed downloads and
their names in test_pretrained.py; lists of a published training (names that lead away, runs it does not need) in test_hub.py; links, devices and bombs in shards in test_bad_data.py."""
import ast
import io
import json
import os
import pickle
import random
import resource
import struct
import subprocess
import sys
import tarfile
import zipfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save
from tiny import TOKENIZER, clip, job, rec

from vtp.config import allowed, dumps, find, loads, shown
from vtp.data.pairs import Shards
from vtp.data.samples import Bad, Pair, summary
from vtp.hub import Parts, from_pretrained
from vtp.objectives.adversarial import DINO
from vtp.tokenizers.discriminative import network_of, words
from vtp.tokenizers.representation import TimmRepresentation
from vtp.tokenizers.vila_u import shards
from vtp.weights import read_json, read_tensors, unpickled

ROOT = Path(__file__).resolve().parent.parent
PROMISE = "a file of somebody else's runs no code and writes nothing outside"


# ---------------------------------------------------------------- what a process does while it reads

class Watch:
    "What the interpreter reports (PEP 578) while `on`: acts that reading a file never needs, files opened to be read, files opened to be written."
    on, acts, read, written = False, [], set(), []
    forbidden = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "subprocess.Popen", "socket.connect", "socket.getaddrinfo", "socket.bind", "pickle.find_class", "os.remove", "os.rename", "os.mkdir", "os.rmdir",
                 "os.symlink", "os.link", "os.chmod", "os.chown", "os.truncate", "os.utime", "shutil.", "builtins.input", "webbrowser.open", "marshal.loads")


def _heard(event, args):
    if not Watch.on: return
    said = str(args)[:300]
    if "__pycache__" in said or event == "marshal.loads" and not isinstance(args[0], str): return                           # an import that nobody has made before
    if event == "open":
        path, mode, flags = args
        if isinstance(path, int): return
        writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
        if writes: Watch.written.append(os.fsdecode(path))
        else: Watch.read.add(os.fsdecode(path))
    elif event.startswith(Watch.forbidden): Watch.acts.append((event, said))


sys.addaudithook(_heard)


@contextmanager
def watched(*places):
    "Nothing is run, asked of a network, or changed; below `places`, every file is what it was."
    def state(): return {p: (s := p.lstat()).st_mode and (s.st_mode, s.st_size, s.st_mtime_ns, os.readlink(p) if p.is_symlink() else None) for place in places for p in sorted(Path(place).rglob("*"))}
    before = state()
    Watch.acts.clear(), Watch.read.clear(), Watch.written.clear()
    Watch.on = True
    try: yield Watch
    finally: Watch.on = False
    assert not Watch.acts and not Watch.written, (Watch.acts, Watch.written)
    assert state() == before


def test_the_watch_sees_what_it_must(tmp_path):
    for act in (lambda: os.system("true"), lambda: pickle.loads(pickle.dumps(os.system)), lambda: (tmp_path / "x").write_text("x"), lambda: (tmp_path / "d").mkdir(), lambda: subprocess.run(["true"]), lambda: os.symlink("a", tmp_path / "b")):
        with pytest.raises(AssertionError), watched(tmp_path): act()


@pytest.fixture
def world(tmp_path):
    "A folder for the evil file, and one beside it with something to lose."
    (tmp_path / "in").mkdir(), (tmp_path / "home").mkdir()
    (tmp_path / "home/secret.txt").write_text("mine")
    return tmp_path


# ---------------------------------------------------------------- pickles

def call(module, name, *args, protocol=2):
    "A pickle that calls a global, without importing anything here."
    strings = b"".join(b"X" + struct.pack("<I", len(a.encode())) + a.encode() if isinstance(a, str) else b"J" + struct.pack("<i", a) for a in args)
    return bytes([0x80, protocol]) + b"}X\1\0\0\0w" + f"c{module}\n{name}\n".encode() + b"(" + strings + b"tRs."


def stacked(module, name):
    "The same by protocol 4's opcode, that takes the names from the stack."
    push = lambda s: b"\x8c" + bytes([len(s)]) + s.encode()
    return b"\x80\4}" + push("w") + push(module) + push(name) + b"\x93" + b"(" + push("touch home/pwned") + b"tRs."


CALLS = {
    "os.system": call("os", "system", "touch home/pwned"), "posix.system": call("posix", "system", "touch home/pwned"), "nt.system": call("nt", "system", "x"),
    "eval": call("builtins", "eval", "open('home/pwned', 'w')"), "exec": call("builtins", "exec", "open('home/pwned', 'w')"), "python 2": call("__builtin__", "eval", "open('home/pwned', 'w')"), "getattr": call("builtins", "getattr", "x", "y"),
    "open": call("builtins", "open", "home/pwned", "w"), "import": call("importlib", "import_module", "antigravity"), "Popen": call("subprocess", "Popen", "touch home/pwned"), "pty": call("pty", "spawn", "touch"),
    "runpy": call("runpy", "run_path", "home/secret.txt"), "torch.load": call("torch", "load", "home/secret.txt"), "torch.hub": call("torch.hub", "load", "someone/model", "x"), "torch.save": call("torch", "save", "x", "home/pwned"),
    "dotted": call("torch", "serialization.os.system", "touch home/pwned"), "through torch": call("torch.serialization", "os.system", "touch home/pwned"), "stack": stacked("os", "system"), "stack, dotted": stacked("torch", "os.system"),
    "our own": call("vtp.weights", "unpickled", "home/secret.txt"), "ours, through": call("vtp.run", "os.system", "touch home/pwned"), "numpy": call("numpy", "fromfile", "home/secret.txt"), "jit": call("torch.jit", "load", "home/secret.txt"),
    "obj": b"\x80\2(cos\nsystem\nX\x10\0\0\0touch home/pwnedo.", "inst": b"\x80\2(X\x10\0\0\0touch home/pwnedios\nsystem\n.", "build": b"\x80\2ctorch.nn.modules.container\nModuleList\n)\x81}X\x0c\0\0\0__setstate__cos\nsystem\nsb.",
    "newobj": b"\x80\2ctorch._utils\n_rebuild_tensor_v2\n)\x81.", "dict's update": b"\x80\2ccollections\nOrderedDict\n)R}X\6\0\0\0updatecos\nsystem\nsb.", "persistent": b"\x80\2X\4\0\0\0evilQ.", "extension": b"\x80\2\x82\1.", "allowed, with nonsense": call("torch._utils", "_rebuild_tensor_v2", "a", "b"),
    "allowed codecs": call("_codecs", "encode", "x", "zlib"), "allowed device": call("torch", "device", "home/secret.txt"), "deep": b"\x80\2" + b"(" * 200_000 + b".", "memo": b"\x80\2r\xff\xff\xff\xff.", "frame": b"\x80\4\x95" + b"\xff" * 8 + b".",
    "long": b"\x80\2\x8b\xff\xff\xff\x7f.", "string": b"\x80\2X\xff\xff\xff\xff.", "bytes 8": b"\x80\4\x8e" + b"\xff" * 7 + b"\x7f.",
}


def zipped(data, compression=zipfile.ZIP_STORED, **more):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in {"archive/data.pkl": data, "archive/byteorder": b"little", "archive/version": b"3\n", **more}.items(): archive.writestr(name, content)
    return file.getvalue()


def legacy(data):
    "torch's format of before 1.6: magic number, protocol, machine, then the object and its storages."
    head = (0x1950a86a20f9469cfc6c, 1001, {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}})
    return b"".join(pickle.dumps(part, protocol=2) for part in head) + data + pickle.dumps([], protocol=2)


def tarred(data, first=b"\x80\2.pkl"):
    "torch's oldest format, a tar of pickles, whose first bytes look like one; with links that lead outside."
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT, encoding="latin-1") as archive:
        for name, content in ((first.decode("latin-1"), b""), ("storages", data), ("tensors", data), ("pickle", data), ("sys_info", pickle.dumps({"protocol_version": 1001}, protocol=2))):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        link = tarfile.TarInfo("storages")
        link.type, link.linkname = tarfile.SYMTYPE, "../../home/secret.txt"
        archive.addfile(link)
    return file.getvalue()


CONTAINERS = {"zip": zipped, "legacy": legacy, "bare": bytes, "tar": tarred, "package": lambda data: zipped(data, **{"archive/.data/extern_modules": b"os\n", "archive/model/model.pkl": data, "archive/model.py": b"import os; os.system('touch home/pwned')"}),
              "script": lambda data: zipped(data, **{"archive/constants.pkl": data, "archive/code/__torch__.py": b"import os"}), "in a pickle": lambda data: legacy(b"\x80\2C" + bytes([len(data) % 256]) + data[:255] + b"."), "after a tensor": lambda data: legacy(pickle.dumps({}, protocol=2)) + data}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("container", CONTAINERS)
def test_no_pickle_runs_whatever_it_is_packed_in(world, container, monkeypatch, record):
    monkeypatch.chdir(world)
    unpickled_first = world / "in/warm.pt"
    torch.save({"w": torch.ones(1)}, unpickled_first), read_tensors(unpickled_first)      # what is imported lazily is imported now
    file = world / "in/evil.pt"
    for name, data in CALLS.items():
        file.write_bytes(CONTAINERS[container](data))
        with watched(world) as watch:
            try: found = unpickled(file)
            except ValueError as error: assert "evil.pt" in str(error), name
            else: assert container in ("in a pickle", "after a tensor") and all(isinstance(v, (bytes, torch.Tensor)) for v in found.values()), (name, found)
        assert not [path for path in watch.read if "secret" in path], name
    record(promise=PROMISE, fault=f"pickle that calls, packed as {container}", tried=len(CALLS), skipped=len(CALLS))


@pytest.mark.filterwarnings("ignore")
def test_real_packages_scripts_and_modules_are_refused(world):
    from torch.package import PackageExporter
    with PackageExporter(world / "in/package.pt") as exporter: exporter.save_source_string("evil", "raise SystemExit"), exporter.save_pickle("model", "model.pkl", {"a": 1})
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)), world / "in/script.pt")
    torch.save(torch.nn.Linear(2, 2), world / "in/module.pt")
    torch.save({"w": np.ones(3), "o": np.array([os.system], object)}, world / "in/numpy.pt")
    (world / "in/pickled.safetensors").write_bytes((world / "in/module.pt").read_bytes())
    (world / "in/array.npy.pt").write_bytes(b"\x93NUMPY" + bytes(200))
    for file in sorted((world / "in").iterdir()):
        with watched(world), pytest.raises(ValueError, match=file.name): read_tensors(file)


def test_arrays_of_objects_are_refused(world, monkeypatch):
    "The two places that read numpy's files: published statistics, and our own indexes in a cache that anybody may write to."
    from vtp.data.index import _load
    from vtp.evaluation.fid import Stats
    class Evil:
        def __reduce__(self): return os.system, (f"touch {world}/home/pwned",)
    evil = np.array([Evil()], object)
    np.savez(world / "in/stats.npz", mu=evil, sigma=evil)
    np.savez(world / "in/index.npz", texts=evil, keys=evil)
    with watched(world):
        with pytest.raises(ValueError, match="allow_pickle|Object arrays"): Stats.load(world / "in/stats.npz")
        assert _load(world / "in/index.npz") is None                                          # indexed anew


# ---------------------------------------------------------------- safetensors

def tensors(header, data=b"", length=None):
    head = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(head) if length is None else length) + head + data


def entry(start, stop, shape=(2,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}


_A = json.dumps(entry(0, 8))
HEADERS = {
    "2^63": tensors(b"{}", length=2**63), "2^64 - 1": tensors(b"{}", length=2**64 - 1), "beyond the file": tensors(b"{}", length=999), "just too large": tensors(b"{}", length=10_000_001), "zero": tensors(b"{}", length=0),
    "overlapping": tensors({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12)), "negative": tensors({"a": entry(-8, 0)}, bytes(8)), "backwards": tensors({"a": entry(8, 0)}, bytes(8)), "beyond the end": tensors({"a": entry(0, 80, [20])}, bytes(8)), "hole": tensors({"a": entry(0, 8), "b": entry(12, 20)}, bytes(20)),
    "more behind": tensors({"a": entry(0, 8)}, bytes(99)), "shape lies": tensors({"a": entry(0, 8, [4])}, bytes(8)), "dtype lies": tensors({"a": entry(0, 8, [2], "F64")}, bytes(8)), "no dtype": tensors({"a": entry(0, 8, [2], "F33")}, bytes(8)), "dtype is a number": tensors({"a": entry(0, 8, [2], 3)}, bytes(8)),
    "shape overflows": tensors({"a": entry(0, 8, [2**32, 2**32])}, bytes(8)), "shape overflows to nothing": tensors({"a": entry(0, 0, [2**63, 2**63, 0])}), "negative shape": tensors({"a": entry(0, 8, [-2])}, bytes(8)), "fraction": tensors({"a": entry(0, 8, [2.5])}, bytes(8)), "huge number": tensors({"a": entry(0, 8, [10**400])}, bytes(8)),
    "twice": tensors(f'{{"a": {_A}, "a": {_A}}}'.encode(), bytes(8)), "field twice": tensors(b'{"a": {"dtype": "F32", "dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}', bytes(8)), "not UTF-8": tensors(b'{"\xff": ' + _A.encode() + b"}", bytes(8)), "deep": tensors(b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}", bytes(8)),
    "metadata is no text": tensors({"__metadata__": {"a": 3}, "a": entry(0, 8)}, bytes(8)), "metadata": tensors({"__metadata__": [], "a": entry(0, 8)}, bytes(8)), "list": tensors(b"[{}]"), "NaN": tensors(b'{"a": NaN}'), "infinite": tensors(b'{"a": 1e999}'), "nothing": b"", "seven bytes": bytes(7),
    "no offsets": tensors({"a": {"dtype": "F32", "shape": [2]}}, bytes(8)), "entry is a list": tensors({"a": [1]}, bytes(8)), "pickle": tensors(b"{" + CALLS["os.system"] + b"}"),
}


def test_headers_that_lie_are_refused(world, record):
    file = world / "in/x.safetensors"
    file.write_bytes(save({"a": torch.ones(2)})), read_tensors(file)
    for name, data in HEADERS.items():
        file.write_bytes(data)
        with watched(world), pytest.raises(ValueError, match="x.safetensors is not a") as found: read_tensors(file)
        assert str(found.value).isprintable() and len(str(found.value)) < 400, name
    record(promise=PROMISE, fault="header of safetensors that lies", tried=len(HEADERS), skipped=len(HEADERS))


BOMBS = """
import io, os, resource, struct, sys, zipfile
from pathlib import Path
import torch
from safetensors.torch import save
from vtp.weights import read_tensors
file, packed = Path(sys.argv[1]) / "x.safetensors", Path(sys.argv[1]) / "x.pt"
file.write_bytes(save({"a": torch.ones(2)})), read_tensors(file)
torch.save({"a": torch.ones(2)}, packed), read_tensors(packed)
size = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmSize")) * 1024
resource.setrlimit(resource.RLIMIT_AS, (size + 2**30,) * 2)                     # a gigabyte more than the libraries
def tried(name, path, head, *rest):
    with open(path, "wb") as out:
        for part in (head, *rest): out.write(part)
    try: read_tensors(path)
    except ValueError as error: print(name, "refused", flush=True)
    else: print(name, "read", flush=True)
def header(body): return struct.pack("<Q", len(body)) + body
entry = b'{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
tried("many tensors", file, header(b"{" + b",".join(b'"%d":' % i + entry for i in range(1_500_000)) + b"}"))
tried("long shape", file, header(b'{"a":{"dtype":"F32","shape":[' + b"1," * 4_900_000 + b'1],"data_offsets":[0,4]}}'), bytes(4))
tried("notes", file, header(b'{"__metadata__":{"a":"' + b"x" * 99_000_000 + b'"}}'))
def archive(compression, **members):
    with zipfile.ZipFile(held := io.BytesIO(), "w", compression) as out:
        for name, content in members.items(): out.writestr(f"archive/{name.replace('__', '/').replace('_', '.')}", content)
    return held.getvalue()
tried("deflated pickle", packed, archive(zipfile.ZIP_DEFLATED, data_pkl=b"\\x80\\2" + bytes(400_000_000) + b"."))
for name, opcode in (("string", b"X" + struct.pack("<I", 2**32 - 1)), ("bytes", b"\\x8e" + struct.pack("<Q", 2**62)), ("array of bytes", b"\\x96" + struct.pack("<Q", 2**40)), ("number", b"\\x8b" + struct.pack("<i", 2**31 - 1)), ("nesting", b"(" * 3_000_000), ("lists", b"]" * 5_000_000),
                     ("asked of bytearray", b"cbuiltins\\nbytearray\\n(\\x8a\\6" + (2**42).to_bytes(6, "little") + b"tR"), ("doubled", b"X\\1\\0\\0\\0a" + b"(h\\0h\\0tq\\0" * 50)):
    tried("pickle: " + name, packed, b"\\x80\\4" + opcode + b".")
    tried("zipped pickle: " + name, packed, archive(zipfile.ZIP_STORED, data_pkl=b"\\x80\\4" + opcode + b".", version=b"3\\n"))
storage = lambda count: b"\\x80\\2}X\\1\\0\\0\\0wctorch._utils\\n_rebuild_tensor_v2\\n((X\\7\\0\\0\\0storagectorch\\nFloatStorage\\nX\\1\\0\\0\\x000X\\3\\0\\0\\0cpu\\x8a\\6" + count.to_bytes(6, "little") + b"tQK\\0\\x8a\\6" + count.to_bytes(6, "little") + b"\\x85K\\1\\x85\\x89ccollections\\nOrderedDict\\n)RtRs."
tried("storage", packed, archive(zipfile.ZIP_STORED, data_pkl=storage(2**40), data__0=bytes(8), version=b"3\\n"))
tried("peak below a gigabyte", file, b"")
"""


@pytest.mark.slow
def test_bombs_take_no_memory(tmp_path, record):
    "Files that claim, or would expand to, gigabytes, in a process that may have one more than its libraries; the alarm is two minutes."
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", BOMBS, str(tmp_path)], capture_output=True, text=True, timeout=240, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert len(lines) == 22 and [line for line in lines if not line.endswith("refused")] in ([], ["long shape read"]), lines
    record(promise=PROMISE, fault="file of weights that claims or expands to gigabytes", tried=len(lines), skipped=len(lines))


# ---------------------------------------------------------------- JSON and configs

V = '{"_type": "vtp.vit:ViTConfig", '
JSONS = {
    "twice": V + '"width": 384, "width": 768}', "type twice": '{"_type": "vtp.vit:ViTConfig", "_type": "vtp.run:Run"}', "NaN": V + '"layer_scale": NaN}', "infinity": V + '"layer_scale": -Infinity}', "too large": V + '"layer_scale": 1e999}', "digits": V + '"width": ' + "9" * 5000 + "}", "lists": V + '"width": ' + "[" * 100_000 + "]" * 100_000 + "}",
    "objects": '{"_type": "vtp.hub:Parts", "tokenizer": ' * 3000 + "1" + "}" * 3000, "nine hundred objects": '{"_type": "vtp.hub:Parts", "tokenizer": ' * 900 + "1" + "}" * 900, "nine hundred lists": V + '"width": ' + "[" * 900 + "]" * 900 + "}", "text": V + '"width": "a"}', "list": "[]", "number": "3", "null": "null", "nothing": "", "no type": '{"a": 1}',
    "type is a list": '{"_type": ["vtp.vit:ViTConfig"]}', "type is null": '{"_type": null}', "half a character": V + '"\\ud800": 1}', "escape": V + '"\\u001b[2J": 1}', "private": V + '"__class__": 1}', "comment": V + "/* */}", "single quotes": "{'a': 1}", "two documents": V[:-2] + "}" * 2, "not UTF-8": b'{"\xff": 1}', "NUL": V + '"a\0": 1}',
    "negative": V + '"width": -1}', "heads": V + '"heads": 7}', "type of no config": '{"_type": "vtp.run:Run", "path": "/"}', "function": '{"_type": "vtp.run:runs"}', "unfrozen": '{"_type": "vtp.data.index:_Run", "key": "a", "at": 0}', "a tuple with names": '{"_type": "vtp.data.samples:Bad"}',
}
NAMES = ["os:system", "builtins:eval", "subprocess:Popen", "vtp.run:os.system", "vtp.run:os", "vtp.config:json", "vtp.config:json.loads", "vtp.config:dataclasses.Field", "vtp.config:find.__globals__", "vtp.vit:ViTConfig.__init__", "vtp.vit:ViTConfig.__class__", "vtp.vit:ViTConfig.__init__.__globals__", "vtp.dist:torch.utils._pytree.TreeSpec",
         "vtp", "vtp.", "vtp:", "vtp.run", "vtp..run:x", ".vtp:x", "vtp.vit.ViTConfig", "VTP.vit:ViTConfig", "vtp.\uff56it:ViTConfig", "vtp.vit:\uff36iTConfig", "vtp.vit:ViTConfig\n", " vtp.vit:ViTConfig", "vtp\0.vit:ViTConfig", "vtp/../os:system", "vtp.vit:ViTConfig:x", "vtpx.vit:ViTConfig", "", "vtp.vit:", "vtp.no:ViTConfig", "vtp.vit:No", "x" * 10**6,
         "vtp.vit:Tokens", "vtp.job:Path", "vtp.weights:nn.Module", 3, None, [], {}, True]


@pytest.mark.parametrize("name", JSONS)
def test_json_that_is_no_config_is_a_value_error(world, name):
    text, file = JSONS[name], world / "in/config.json"
    with watched(world), pytest.raises(ValueError): loads(text)
    file.write_bytes(text if isinstance(text, bytes) else text.encode(errors="surrogatepass"))
    with watched(world), pytest.raises(ValueError) as found: from_pretrained(world / "in")
    assert "\x1b" not in str(found.value) and len(str(found.value)) < 3000


def test_a_type_leads_to_our_own_configs_and_nowhere_else(record):
    for name in NAMES:
        with watched(), pytest.raises(ValueError, match="_type") as found: find(name)
        assert str(found.value).isprintable() and len(str(found.value)) < 400
    assert find("vtp.vit:ViTConfig").__name__ == "ViTConfig"
    record(promise=PROMISE, fault="_type that leads elsewhere", tried=len(NAMES), skipped=len(NAMES))


def test_a_package_is_allowed_by_name_and_no_more(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("import os\nfrom dataclasses import dataclass\nfrom json import JSONDecoder\n@dataclass(frozen=True)\nclass C:\n    a:int = 1\n    class Inner: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="outside the packages"): loads('{"_type": "mine:C"}')
    assert "mine" not in sys.modules                                     # refused before it is imported
    allowed.add("mine")
    try:
        assert loads('{"_type": "mine:C", "a": 2}').a == 2
        for name in ("mine:os.system", "mine:JSONDecoder", "mine:C.Inner", "mine:C.__dataclass_fields__"):
            with pytest.raises(ValueError): find(name)
    finally: allowed.discard("mine")


def test_what_is_shown_is_one_line_without_commands_to_the_terminal():
    assert shown("a\x1b[2J\nb\r\0\u202e\ud800é狗") == "a\\x1b[2J\\nb\\r\\x00\\u202e\\ud800é狗" and shown("x" * 99, 9) == "x" * 9 + "…" and shown(3) == "3"


# ---------------------------------------------------------------- published models

def published(folder, parts):
    "A folder with this config.json, and weights that nobody will get to."
    folder.mkdir()
    (folder / "config.json").write_text(parts if isinstance(parts, str) else dumps(parts))
    (folder / "model.safetensors").write_bytes(save({"a": torch.ones(2)}))
    return folder


def test_a_published_config_reads_no_file_and_asks_no_repository_but_its_own(world):
    "Whatever place its fields name: files of this machine are not opened, no name is looked up, before it is refused."
    secret, other = world / "home/model", "someone/else"
    secret.mkdir()
    for name in ("config.json", "model.safetensors", "weights.pth", "open_clip_config.json"): (secret / name).write_text("{}")
    own = dumps(Parts(TOKENIZER))
    def inside(name, value): return json.dumps(json.loads(own) | {"tokenizer": {"_type": "vtp.tokenizers.frozen:FrozenConfig", name: value}})
    def released(kind, source): return {"_type": kind, "source": str(source)}
    def trunk(job): return inside("representation", {"_type": "vtp.tokenizers.representation:OwnTrunk", "of": {"_type": "vtp.job:At", "job": job}})
    kinds = ["vtp.tokenizers.official:OfficialVTP", "vtp.hub:Published", "vtp.tokenizers.released_cnn:SDVAE", "vtp.tokenizers.discriminative:OpenCLIP", "vtp.tokenizers.unitok:UniTokRelease", "vtp.tokenizers.vila_u:VILAURelease", "vtp.tokenizers.released_rae:RAERelease"]
    cases = [trunk(released(kind, source)) for kind in kinds for source in (secret, other)]
    cases += [json.dumps(json.loads(own) | {"tokenizer": released(kind, secret)}) for kind in kinds] + [json.dumps(json.loads(own) | {"objectives": [released(kinds[0], other)]})]
    cases += [inside("representation", {"_type": "vtp.tokenizers.representation:TimmRepresentation", "model": name}) for name in (f"local-dir:{secret}", f"hf-hub:{other}", f"hf_hub:{other}", other, str(secret))]
    cases += [json.dumps(json.loads(own) | {"tokenizer": {"_type": kind, "weights": str(secret / "weights.pth")}}) for kind in ("vtp.evaluation.extractors:Inception", "vtp.evaluation.extractors:MobileNet", "vtp.objectives.adversarial:DINO")]
    cases += [inside("representation", {"_type": "vtp.evaluation.extractors:Inception", "weights": str(secret / "weights.pth")})]
    for number, text in enumerate(cases):
        folder = published(world / f"in/{number}", text)
        with watched(world) as watch, pytest.raises(ValueError): from_pretrained(folder)
        assert not [path for path in watch.read if str(world / "home") in path], text


def test_a_published_training_names_no_release_of_this_machine(world):
    from vtp.training_state import read_config
    (world / "home/model").mkdir()
    (world / "home/model/config.json").write_text("{}")
    file = world / "in/config.json"
    start = {"_type": "vtp.job:At", "job": {"_type": "vtp.tokenizers.official:OfficialVTP", "source": str(world / "home/model")}}
    plain = json.loads(dumps(job((rec(),)))) | {"start": start}
    for source in (str(world / "home/model"), "~/model", "./model", "../x", "/etc", "a/b/c", 3, None):
        start["job"]["source"] = source
        file.write_text(json.dumps(plain))
        with watched(world) as watch, pytest.raises(ValueError, match="only on the machine it comes from"): read_config(file)
        assert not [path for path in watch.read if "home" in path]


@pytest.mark.parametrize("name", ["hf-hub:someone/model", "local-dir:/etc", "someone/model", "/etc/passwd", 3])
def test_a_name_of_timm_s_is_a_name(name):
    for make in (TimmRepresentation, lambda model: DINO(model=model)):
        with watched(), pytest.raises(ValueError, match="names a place"): make(name)


@pytest.mark.parametrize("change, says", [({"tokenizer_kwargs": {"trust_remote_code": True}}, "tokenizer_kwargs may give"), ({"tokenizer_kwargs": {"bpe_path": "/etc/passwd"}}, "tokenizer_kwargs may give"), ({"tokenizer_kwargs": ["x"]}, "tokenizer_kwargs may give"), ({"tokenizer_kwargs": {"cache_dir": "/"}}, "tokenizer_kwargs may give"),
                                          ({"hf_tokenizer_name": "/etc"}, "no id of the Hub"), ({"hf_tokenizer_name": "../x"}, "no id of the Hub"), ({"hf_tokenizer_name": "a/b/c"}, "no id of the Hub"), ({"hf_tokenizer_name": ["x"]}, "no id of the Hub"), ({"hf_tokenizer_name": "a/b\x1b[2J"}, "no id of the Hub"), ({"hf_model_name": "someone/model"}, "hf_model_name"), ({}, "names a place")])
def test_an_open_clip_config_brings_no_code_and_names_no_file(change, says):
    text = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1} | change
    vision = {"image_size": 16, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8} if change else {"timm_model_name": "hf-hub:someone/model", "image_size": 16}
    with watched(), pytest.raises(ValueError, match=says): network_of({"embed_dim": 16, "vision_cfg": vision, "text_cfg": text})


def test_a_vocabulary_never_brings_code(monkeypatch, tmp_path):
    "What transformers is asked, and that it is told so."
    asked = []
    class Tokens:
        def __init__(self, where, **options): asked.append((where, options))
    monkeypatch.setattr("open_clip.tokenizer.HFTokenizer", Tokens)
    words({"hf_tokenizer_name": "timm/ViT-B-16-SigLIP", "tokenizer_kwargs": {"clean": "canonicalize"}}, tmp_path)
    assert asked == [("timm/ViT-B-16-SigLIP", dict(tokenizer_mode=None, trust_remote_code=False, context_length=77, clean="canonicalize"))]


def test_an_index_names_files_beside_it(tmp_path):
    file = tmp_path / "model.safetensors.index.json"
    for name in ("../x.safetensors", "/etc/x.safetensors", "a/b.safetensors", "x.bin", "x.safetensors\n", "", "\x1b[2J.safetensors", ".", "x.safetensors/..", "a\\b.safetensors"):
        file.write_text(json.dumps({"weight_map": {"a": "fine.safetensors", "b": name}}))
        with watched(tmp_path), pytest.raises(ValueError, match="shards are .safetensors files beside their index") as found: shards(file)
        assert "\x1b" not in str(found.value)


# ---------------------------------------------------------------- names in archives and lists

def pax(**records):
    body = b""
    for key, value in records.items():
        line = f" {key}={value}\n".encode("utf-8", "surrogateescape")
        size = len(line) + len(str(len(line)))
        body += str(size + (len(str(size)) > len(str(len(line))))).encode() + line
    info = tarfile.TarInfo("pax")
    info.type, info.size = tarfile.XHDTYPE, len(body)
    return info.tobuf(tarfile.USTAR_FORMAT) + body + bytes(-len(body) % 512)


def put(name, content=b"", kind=tarfile.REGTYPE, link=""):
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = len(content), kind, link
    return info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape") + content + bytes(-len(content) % 512)


def test_names_in_shards_lead_nowhere_and_move_no_cursor(world, monkeypatch, record):
    "Absolute names, steps upwards, links, devices, names that a longer header overrides, line ends and commands to a terminal: listed or read under their name, in one line each."
    from PIL import Image
    monkeypatch.setenv("VTP_CACHE", str(world / "cache"))
    Image.new("RGB", (5, 6)).save(file := io.BytesIO(), "PNG")
    picture, evil = file.getvalue(), str(world / "home")
    names = ["../home/a", f"{evil}/b", "a/../../home/c", "-rf", "~/d", "C:\\e", "new\nline {\"key\": 1}", "carriage\rreturn", "\x1b[2J\x1b]0;title\x07", "\x9b2J", "\u202egpj", "NUL\0hidden", "CON", "É", "é", "Case", "case", "CASE", "d" * 300, "tab\t"]
    parts = [pax(path=f"{name}.png") + put("innocent.png", picture) + pax(path=f"{name}.txt") + put("innocent.txt", b"a \x1b[31mred\x1b[0m dog") if "\0" not in name else put(f"{name}.png", picture) + put(f"{name}.txt", b"x") for name in names]
    parts += [put(f"link{i}.png", b"", kind, target) for i, (kind, target) in enumerate([(tarfile.SYMTYPE, f"{evil}/secret.txt"), (tarfile.LNKTYPE, "../home/secret.txt"), (tarfile.CHRTYPE, ""), (tarfile.BLKTYPE, ""), (tarfile.FIFOTYPE, ""), (tarfile.SYMTYPE, "/dev/zero")])]
    parts += [pax(path=f"{evil}/bad\x1b[31m.png", linkpath=f"{evil}/secret.txt") + put("x.png", b"no image"), pax(path="two\nlines.txt") + put("y.txt", b"\xff")]
    (world / "in/evil.tar").write_bytes(b"".join(parts) + bytes(1024))
    reader = Shards(str(world / "in/evil.tar")).open()                     # the index is written into the cache; from here on nothing is
    assert sorted(p.suffix for p in world.rglob("*") if p.is_file()) == [".npz", ".tar", ".txt"]
    with watched(world) as watch: found = reader.read(np.arange(len(reader)), reader.keys)
    assert not [path for path in watch.read if evil in path or "/dev" in path]
    good, bad = [s for s in found if isinstance(s, Pair)], reader.bad + [s for s in found if isinstance(s, Bad)]
    assert len(good) >= len(names) - 1 and {"Case", "case", "CASE", "../home/a", f"{evil}/b"} <= {s.key for s in good} and len(bad) >= 8
    assert summary(bad).isprintable() and all(b.reason.isprintable() for b in bad)
    for line in (text := "".join(json.dumps(b._asdict()) + "\n" for b in bad)).splitlines(): assert json.loads(line)["reason"] and line.isprintable()
    assert text.count("\n") == len(bad) and sorted(p.name for p in (world / "home").iterdir()) == ["secret.txt"]
    record(promise=PROMISE, fault="names, links and devices in a shard that lead outside", tried=len(names) + 8, skipped=len(bad))


def test_names_of_tensors_move_no_cursor(tmp_path):
    from vtp.weights import fill
    evil = "\x1b[2J\x1b]0;title\x07\nweight"
    for change in ({evil: torch.ones(1)}, {"weight": torch.ones(2, 2), evil: torch.ones(1)}):
        with pytest.raises(ValueError) as found: fill(torch.nn.Linear(2, 2), change, "a file")
        assert str(found.value).isprintable()


# ---------------------------------------------------------------- the source itself

def offences(text):
    "What code that reads files must not hold, as (line, what)."
    for node in ast.walk(ast.parse(text)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        for name in names:
            if name.split(".")[0] in ("dill", "cloudpickle", "joblib", "shelve", "marshal", "yaml", "subprocess", "pty", "runpy", "code") or isinstance(node, ast.ImportFrom) and name == "pickle": yield node.lineno, f"imports {name}"
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and (node.value.id, node.attr) != ("pickle", "UnpicklingError") and node.value.id == "pickle": yield node.lineno, f"pickle.{node.attr}"
        if not isinstance(node, ast.Call): continue
        called, options = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
        if called in ("eval", "exec", "compile", "__import__", "input", "os.system", "os.popen", "os.execv", "os.execvp", "pkgutil.resolve_name", "tarfile.open", "shutil.unpack_archive", "torch.hub.load", "torch.jit.load", "torch.package.PackageImporter") and ast.unparse(node) not in KNOWN: yield node.lineno, called
        if called.split(".")[-1] in ("extractall", "extract", "trust_remote_code"): yield node.lineno, called
        if called == "torch.load" and options.get("weights_only") != "True": yield node.lineno, "torch.load without weights_only=True"
        if called in ("np.load", "numpy.load") and options.get("allow_pickle") != "False": yield node.lineno, "np.load without allow_pickle=False"
        for option, must in (("shell", "False"), ("allow_pickle", "False"), ("trust_remote_code", "False"), ("weights_only", "True")):
            if option in options and options[option] != must: yield node.lineno, f"{option}={options[option]}"


KNOWN = {"pkgutil.resolve_name('vtp.worker:work')"}        # a constant, for an import that would run uphill


def test_no_room_reads_what_could_run():
    found = [(str(path.relative_to(ROOT)), *offence) for path in sorted((ROOT / "vtp").rglob("*.py")) for offence in offences(path.read_text())]
    assert not found
    imports = [str(path.relative_to(ROOT)) for path in (ROOT / "vtp").rglob("*.py") if "import_module" in path.read_text()]
    assert imports == ["vtp/config.py"]                                    # `find`, behind the list of allowed packages


@pytest.mark.parametrize("text", ["import yaml", "import pickle\npickle.load(f)", "from pickle import loads", "torch.load(f)", "torch.load(f, weights_only=False)", "torch.load(f, weights_only=safe)", "np.load(f)", "np.load(f, allow_pickle=True)", "eval(x)", "exec(x)", "import subprocess", "os.system(x)",
                                  "f(x, shell=True)", "tar.extractall(x)", "archive.extract(n)", "tarfile.open(f)", "AutoModel.from_pretrained(x, trust_remote_code=True)", "torch.jit.load(f)", "__import__(x)", "pkgutil.resolve_name(x)", "if x:\n    def f(): import dill"])
def test_the_check_sees_what_could_run(text):
    assert list(offences(text))


def test_the_check_lets_the_rest_be():
    assert not list(offences("import pickle\ntry: torch.load(f, weights_only=True)\nexcept pickle.UnpicklingError: model.eval()\nnp.load(f, allow_pickle=False)\nx.extractor(3)"))


# ---------------------------------------------------------------- changed bytes

SEED = 5


def changed(data, draw):
    "A few bytes overwritten, cut, doubled, moved, or numbers made large; the same draw, the same bytes."
    data = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 4, 9))):
        at, span = draw.randrange(len(data) or 1), draw.choice((1, 1, 2, 8, 40))
        kind = draw.randrange(9)
        if kind < 3: data[at:at + 1] = bytes([draw.randrange(256)])
        elif kind == 3: data[at:at + span] = b""
        elif kind == 4: data[at:at] = data[at:at + span]
        elif kind == 5: data[at:at + 8] = draw.choice((b"\xff" * 8, bytes(8), b"\x7f" + b"\xff" * 7, struct.pack("<q", draw.randrange(2**40))))
        elif kind == 6 and (digits := [i for i, b in enumerate(data[:4000]) if 48 <= b <= 57]): data[(i := draw.choice(digits)):i + 1] = str(draw.choice((0, 1, 7, -1, 2**31, 2**63, 10**30))).encode()
        elif kind == 7: data[at:at + 1] = draw.choice((b'"', b"{", b"}", b"[", b",", b":", b"\\", b"cos\nsystem\n", b"R", b".", b"\x00", b"\xff", b"../", b"null", b"1e999"))
        elif kind == 8: del data[draw.randrange(len(data) // 2, len(data) or 1):]
    return bytes(data)


def same(a, b):
    return isinstance(a, dict) and a.keys() == b.keys() and all(isinstance(a[k], torch.Tensor) and a[k].dtype == b[k].dtype and a[k].shape == b[k].shape and a[k].equal(b[k]) for k in b)


def fuzzed(folder, draw, count):
    "Changed files of each kind, read as any such file is: {kind: [tried, refused, read]}."
    truth = {"a": torch.arange(12.).reshape(3, 4), "b": torch.ones(2, dtype=torch.bfloat16), "c": torch.tensor([3])}
    torch.save(truth, zip_ := io.BytesIO()), torch.save(truth, old := io.BytesIO(), _use_new_zipfile_serialization=False)
    torch.save({"model": truth, "epoch": 3, "name": "x"}, more := io.BytesIO())
    config = dumps(Parts(TOKENIZER, (clip(),))).encode()
    index = json.dumps({"metadata": {"total_size": 99}, "weight_map": {f"block.{i}.weight": f"model-{i % 2:05}-of-00002.safetensors" for i in range(9)}}).encode()
    kinds = {"x.safetensors": (save(truth), read_tensors), "zip.pt": (zip_.getvalue(), read_tensors), "legacy.pt": (old.getvalue(), read_tensors), "training.pt": (more.getvalue(), lambda path: read_tensors(path, ("model",))),
             "config.json": (config, lambda path: loads(path.read_bytes())), "plain.json": (config, read_json), "model.safetensors.index.json": (index, shards)}
    counts = {}
    for name, (data, read) in kinds.items():
        counts[name] = [0, 0, 0]
        for trial in range(count):
            (folder / name).write_bytes(spoiled := changed(data, draw))
            try:
                with watched(folder): found = read(folder / name)
            except ValueError as error: counts[name][1] += 1; assert str(error), (name, trial)
            except Exception as error: raise AssertionError(f"seed {SEED}, {name}, trial {trial}: {type(error).__name__}: {error}") from error
            else:
                counts[name][2] += 1
                if name.endswith((".pt", ".safetensors")): assert all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in found.items()), (SEED, name, trial)      # a changed number is another tensor: no format of weights has a checksum
                if name.endswith((".pt", ".safetensors")) and spoiled == data: assert same(found, truth)
                if name.endswith("index.json"): assert all("/" not in shard and shard.endswith(".safetensors") for shard in found)
            counts[name][0] += 1
    return counts


@pytest.mark.filterwarnings("ignore")
@pytest.mark.timeout(300)
def test_changed_files_are_read_or_refused(tmp_path, record):
    (tmp_path / "in").mkdir()
    for name, (tried, refused, read) in fuzzed(tmp_path / "in", random.Random(SEED), 40).items():
        record(promise=PROMISE, fault=f"{name} with changed bytes", tried=tried, skipped=refused)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.timeout(1200)
def test_thousands_of_changed_files(tmp_path, record):
    "No crash, no other error, nothing run or written, and less than a gigabyte of memory."
    (tmp_path / "in").mkdir()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name, (tried, refused, read) in fuzzed(tmp_path / "in", random.Random(SEED + 1), 1500).items():
        assert refused > tried // 8, (name, refused)
        record(promise=PROMISE, fault=f"{name} with changed bytes", tried=tried, skipped=refused)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20             # kilobytes
