"""What all releases share: files found or named with the command that gets them, weights read strictly and as data, changed bytes noticed."""
import http.server
import json
import pickle
import random
import threading
import time
from dataclasses import dataclass, replace

import pytest
import torch
from safetensors.torch import save, save_file
from tiny import HERE

from vtp.config import allowed
from vtp.job import At, launch, load, run_of
from vtp import weights
from vtp.tokenizers.ldm_cnn import CNNConfig
from vtp.tokenizers.pretrained import Model, Released
from vtp.weights import Absent, fetched, fill, only_tensors, read_json, read_tensors, unpickled

CONFIG = CNNConfig(16, 4, 16, (1, 2), 1, (), 8)
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n"
PAGE = b"<!DOCTYPE html><html><body>403 Forbidden</body></html>"


@dataclass(frozen=True)
class Toy(Released):
    files = ("config.json", "a.safetensors", "b.safetensors")
    tokenizer = CONFIG

    def assemble(self):
        tensors = read_tensors(self.path("a.safetensors")) | read_tensors(self.path("b.safetensors"))
        return Model(fill(CONFIG.build(), tensors, self.source))


@pytest.fixture
def toy(tmp_path):
    allowed.add(__name__)
    folder, tensors = tmp_path / "toy", CONFIG.build().state_dict()
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    for i, name in enumerate("ab"): save_file({k: tensors[k] for k in sorted(tensors)[i::2]}, folder / f"{name}.safetensors")
    yield Toy(str(folder)), folder
    allowed.discard(__name__)


class Evil:
    def __reduce__(self): return print, ("code has run",)


def written(path, held):
    path.write_bytes(held) if isinstance(held, bytes) else torch.save(held, path)
    return path


@pytest.mark.parametrize("name", ["x.pth", "x.pt", "x.ckpt", "x.bin", "x.safetensors"])
@pytest.mark.parametrize("held", [POINTER, PAGE, json.dumps({"a": 1}).encode(), b"", b"hi", bytes(range(256)), b"\n\n\n"], ids=["pointer", "page", "json", "empty", "short", "bytes", "lines"])
def test_what_is_no_file_of_weights_is_called_so(tmp_path, name, held):
    kind = "safetensors" if name.endswith("safetensors") else "torch"
    with pytest.raises(ValueError, match=rf"{name} is not a {kind} file \(its first bytes are b.*is it a Git LFS pointer or an error page") as found: read_tensors(written(tmp_path / name, held))
    assert repr(held[:24]) in str(found.value) and "code" not in str(found.value)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("where", [lambda tensors: {"model": Evil()}, lambda tensors: tensors | {"x": Evil()}, lambda tensors: [Evil()]])
def test_a_malicious_pickle_does_not_run(tmp_path, capfd, zipped, where):
    file = tmp_path / "evil.pt"
    torch.save(where({"w": torch.ones(2)}), file, _use_new_zipfile_serialization=zipped)
    for reader in (unpickled, read_tensors):
        with pytest.raises(ValueError, match="evil.pt holds more than data.* would run code: it is refused.*safetensors"): reader(file)
    file.write_bytes(pickle.dumps(Evil(), protocol=2))                                          # a bare pickle; the oldest protocol has no mark, and is no torch file
    with pytest.raises(ValueError, match="is refused|not a whole torch file"): unpickled(file)
    file.write_bytes(pickle.dumps(Evil(), protocol=0))
    with pytest.raises(ValueError, match="not a torch file"): unpickled(file)
    assert "code has run" not in "".join(capfd.readouterr())


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.filterwarnings("ignore")
def test_damage_is_a_value_error_whatever_it_hits(tmp_path, zipped):
    "Cut and overwritten at random: read, or refused with the file's name – no other error."
    file, draw = tmp_path / "x.pt", random.Random(0)
    torch.save({"a": torch.rand(4, 4), "b": {"c": 1, "d": "x", "e": [1, 2]}}, file, _use_new_zipfile_serialization=zipped)
    whole, refused = file.read_bytes(), 0
    for trial in range(400):
        torn = bytearray(whole[:draw.randrange(len(whole))] if trial % 3 == 0 else whole)
        for _ in range(draw.choice((1, 3, 10)) if trial % 3 else 0): torn[draw.randrange(1, len(torn) if zipped else 400)] = draw.randrange(256)
        file.write_bytes(torn)
        try: unpickled(file)
        except ValueError as error:
            assert "x.pt" in str(error)
            refused += 1
    assert refused > 150


def test_safetensors_damage(tmp_path):
    whole = save({"a": torch.rand(4, 4)})
    for torn in (whole[:-1], whole[:20], whole + b"x"):
        with pytest.raises(ValueError, match="x.safetensors is not a whole safetensors file"): read_tensors(written(tmp_path / "x.safetensors", torn))


@pytest.mark.parametrize("held, inside, says", [
    ({"model": {"w": torch.ones(1)}, "epoch": 3}, (), r"more than tensors: \['model', 'epoch'\]"),
    ({"model": {"w": torch.ones(1)}}, ("ema",), r"no 'ema': it holds \['model'\]"),
    ({"model": [torch.ones(1)]}, ("model",), "holds a list under model where"),
    ({"model": {"ema": None}}, ("model", "ema"), "holds a NoneType under model/ema where"),
    ({"model": 3}, ("model", "ema"), "holds a int under model where"),
    ({0: torch.ones(1)}, (), r"more than tensors: \[0\]"),
    ([1, 2], (), "holds a list, not a state dict"),
])
def test_what_is_no_state_dict_is_refused(tmp_path, held, inside, says):
    with pytest.raises(ValueError, match="x.pt.*" + says): read_tensors(written(tmp_path / "x.pt", held), inside)


def test_the_way_in(tmp_path):
    tensors = {"w": torch.arange(3.0)}
    assert read_tensors(written(tmp_path / "x.pt", {"a": {"b": tensors}, "c": 1}), ("a", "b"))["w"].equal(tensors["w"])
    save_file(tensors, tmp_path / "x.safetensors")
    assert read_tensors(tmp_path / "x.safetensors", ("a", "b"))["w"].equal(tensors["w"])       # nothing is wrapped there
    assert only_tensors({"a": tensors}, "x", ("a",)) is tensors


def test_json(tmp_path):
    file = tmp_path / "config.json"
    for held, says in ((b"\x80\x02", "not JSON"), (b"{", "not JSON"), (b"[1]", "holds a list, not a JSON object"), (b"3", "holds a int"), (b"[" * 100_000, "not JSON"), (b'{"a": "' + b"x" * 10_000_000 + b'"}', "10 MB")):
        with pytest.raises(ValueError, match=f"{file}.*{says}"): read_json(written(file, held))
    assert read_json(written(file, '{"ä": [1]}'.encode())) == {"ä": [1]}


def test_every_missing_file_is_named_at_once(toy, monkeypatch):
    release, folder = toy
    for name in ("a", "b"): (folder / f"{name}.safetensors").unlink()
    with pytest.raises(FileNotFoundError) as found: release.check()
    assert str(found.value).count("folder without") == 2 and "a.safetensors" in str(found.value) and "b.safetensors" in str(found.value)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(Absent) as found: Toy("nobody/no-such-toy", "v1").check()
    assert [line.strip() for line in str(found.value).splitlines() if "hf download" in line] == [f"hf download nobody/no-such-toy {name} --revision v1 --local-dir no-such-toy" for name in Toy.files]
    assert str(pickle.loads(pickle.dumps(found.value))) == str(found.value)                    # it crosses processes
    assert str(found.value).endswith("then give that folder as the source.")
    def path(self, name): raise Absent(f"no {name}", f"get {name}", "source" if name == "config.json" else "encoder")
    monkeypatch.setattr(Toy, "path", path)
    with pytest.raises(Absent) as found: Toy("x").check()
    assert str(found.value) == "no config.json\nno a.safetensors\nno b.safetensors. Where there is a network:\n    get config.json\n    get a.safetensors\n    get b.safetensors\nthen give that folder as the source and the encoder."


def test_something_local_has_no_revision(toy):
    release, folder = toy
    for call in (lambda: fetched(str(folder), "config.json", "main"), lambda: fetched(str(folder / "config.json"), "x", "main"), replace(release, revision="v1").check, replace(release, revision="v1").load):
        with pytest.raises(ValueError, match="revision='(main|v1)', but .* here, which has no revisions: leave revision out"): call()


def test_changed_bytes_are_noticed(toy):
    release, folder = toy
    first = load(release)                                           # never measured: nothing to compare with
    launch(release, machine=HERE)
    assert [row["file"] for row in run_of(release).rows()] == list(Toy.files)
    model = load(At(release))
    assert not model.training and all(a.equal(b) for a, b in zip(first.parameters(), model.parameters(), strict=True))
    (folder / "b.safetensors").write_bytes((folder / "b.safetensors").read_bytes()[:-4] + b"\0\0\0\0")
    with pytest.raises(ValueError, match=f"{folder}: b.safetensors changed since released-toy"): release.load()


@pytest.mark.parametrize("change, says", [(lambda t: t.pop("quant_conv.bias"), "1 missing: quant_conv.bias"), (lambda t: t.update(x=torch.ones(1)), "1 unexpected: x"),
                                          (lambda t: t.update({"quant_conv.bias": torch.ones(3)}), r"1 misshapen: quant_conv.bias \(3,\), not \(8,\)"),
                                          (lambda t: [t.pop(k) for k in list(t)[:9]], "9 missing: .* …$")])
def test_filling_is_strict(change, says):
    tensors = CONFIG.build().state_dict()
    change(tensors)
    with pytest.raises(ValueError, match="^a release does not fit CNNTokenizer: " + says): fill(CONFIG.build(), tensors, "a release")


class Hub(http.server.BaseHTTPRequestHandler):
    "As much of the Hub as a download of small files asks for."
    held = {"/someone/model/resolve/v1/sub/config.json": b'{"a": 1}'}
    asked = []

    def do_HEAD(self): self.do_GET()
    def log_message(self, *args): pass

    def do_GET(self):
        self.asked.append((self.command, self.path))
        body = self.held.get(self.path)
        self.send_response(404 if body is None else 200)
        for name, value in {"X-Repo-Commit": "c" * 40, "ETag": '"1234"', "Content-Length": str(len(body or b"")), **({"X-Error-Code": "EntryNotFound"} if body is None else {})}.items(): self.send_header(name, value)
        self.end_headers()
        if body and self.command == "GET": self.wfile.write(body)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    for name, value in {"HF_HUB_OFFLINE": False, "ENDPOINT": address, "HUGGINGFACE_CO_URL_TEMPLATE": address + "/{repo_id}/resolve/{revision}/{filename}", "HF_HUB_CACHE": str(tmp_path / "cache")}.items():
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"): monkeypatch.delenv(name, raising=False)
    Hub.asked.clear()
    monkeypatch.setattr(weights, "_COMMITS", {})
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.timeout(60)
def test_a_file_is_downloaded_once_and_then_found_without_a_network(hub):
    assert read_json(fetched("someone/model", "sub/config.json", "v1")) == {"a": 1}
    with pytest.raises(Absent, match="hf download someone/model more.json --revision c{40} "): fetched("someone/model", "more.json", "v1")
    asked = len(Hub.asked)
    assert ("GET", "/someone/model/resolve/v1/sub/config.json") in Hub.asked
    assert read_json(fetched("someone/model", "sub/config.json", "v1")) == {"a": 1} and len(Hub.asked) == asked      # from the cache


@pytest.mark.timeout(60)
def test_without_a_network_the_answer_is_quick(hub):
    hub.shutdown(), hub.server_close()                              # nobody listens there any more
    start = time.monotonic()
    with pytest.raises(Absent) as found: Toy("someone/model", "v1").check()
    assert str(found.value).count("hf download someone/model") == 3 and time.monotonic() - start < 10      # the client's own retries take longer for each file


def test_sources_that_are_neither(tmp_path):
    for source in ("./nowhere", "~/nowhere-at-all", "/no/where", "a/b/c", "name"):
        with pytest.raises(Absent, match="neither a file nor a folder here, nor an id"): fetched(source, "config.json")
    assert weights.fetched(str(written(tmp_path / "x.pt", b"x")), "any name") == tmp_path / "x.pt"


def test_all_files_of_a_release_are_of_one_commit(tmp_path, monkeypatch):
    "The description lies in the cache, of an older commit than the branch is at now: the weights come from that commit too."
    for commit in ("a" * 40, "b" * 40):
        (tmp_path / "snapshots" / commit).mkdir(parents=True)
        (tmp_path / "snapshots" / commit / "model.safetensors").write_text(commit)
    (tmp_path / "snapshots" / ("a" * 40) / "config.json").write_text("{}")
    asked = []

    def download(source, name, revision=None, local_files_only=False):
        asked.append((name, revision))
        commit = revision or ("a" if name == "config.json" else "b") * 40                 # what an unpinned branch would give
        return str(tmp_path / "snapshots" / commit / name)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setattr("vtp.weights._COMMITS", {})
    assert fetched("owner/moving", "config.json").parent.name == "a" * 40
    assert fetched("owner/moving", "model.safetensors").read_text() == "a" * 40 and asked[-1] == ("model.safetensors", "a" * 40)
    assert fetched("owner/moving", "model.safetensors", "b" * 40).read_text() == "b" * 40  # another revision is another release
