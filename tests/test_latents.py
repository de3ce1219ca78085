"""Latents: the same bytes with any ranks, workers and interruptions; bad images skipped; the wrong pair refused."""
import io
import json
import signal
import tarfile
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tiny import HERE, job, rec

import vtp.generation.latents as package
from vtp.checkpoint import write_checkpoint
from vtp.data.pairs import Shards
from vtp.data.shapes import Shapes
from vtp.generation.latents import CacheLatents, encode, open_latents
from vtp.job import At, launch, run_of
from vtp.tokenizers.vit import ViTTokenizer

PRETRAIN = job((rec(),), pairs=Shapes(count=64, size=16), steps=3)


def latents(**changes):
    return CacheLatents(**{**dict(of=At(PRETRAIN), data=Shapes(count=90, size=16), batch=8, shard=20, dtype="fp32"), **changes})


def contents(run):
    "Every byte that must not depend on how the run went."
    return {path.name: path.read_bytes() for path in (*(run.path / "latents").iterdir(), run.path / "metrics.jsonl", run.path / "quarantine.jsonl")}


def again(run):
    "Forget a run, keep the tokenizer it belongs to."
    before = contents(run)
    for path in (*(run.path / "latents").iterdir(), run.path / "done"):
        path.unlink()
    return before


@pytest.mark.timeout(240)
def test_two_ranks_write_the_same_bytes():
    small = latents()
    before = again(launch(small, machine=HERE)[0])
    assert contents(launch(small, machine=replace(HERE, procs=2, workers=1))[0]) == before
    assert [row["images"] for row in run_of(small).rows()] == [20, 40, 60, 80, 90]


@pytest.mark.timeout(240)
def test_stopped_and_torn_end_with_the_same_bytes(monkeypatch):
    small = latents(dtype="bf16")
    run = launch(small, machine=HERE)[0]
    before, written, writer = again(run), [], package.write_shard

    def stop_after_two(folder, number, *rest):
        writer(folder, number, *rest)
        written.append(number)
        if len(written) == 2:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(package, "write_shard", stop_after_two)
    with pytest.raises(InterruptedError, match="launch again"):
        launch(small, machine=replace(HERE, workers=2))
    assert written == [0, 1] and not run.done
    torn = run.path / "latents" / "shard-00001.safetensors"
    torn.write_bytes(torn.read_bytes()[:-1] + b"?")                # of the same length
    (run.path / "latents" / ".shard-00002.safetensors").write_bytes(b"half")
    launch(small, machine=HERE)
    assert written == [0, 1, 1, 2, 3, 4] and contents(run) == before


def test_neither_batch_nor_shard_size_moves_the_statistics(monkeypatch):
    launch(PRETRAIN, machine=HERE)
    monkeypatch.setattr(ViTTokenizer, "encode", lambda self, image: F.conv2d(F.avg_pool2d(image, 4), torch.eye(8, 3)[..., None, None].to(image)) + image[:, :1, ::4, ::4])     # exact row by row
    jobs = [latents(batch=b, shard=s) for b, s in ((8, 20), (64, 20), (3, 90))]
    launch(*jobs, machine=HERE)
    found = [open_latents(small) for small in jobs]
    assert np.array_equal(found[0].mean, found[1].mean) and np.array_equal(found[0].std, found[1].std)
    assert np.allclose(found[0].mean, found[2].mean, rtol=1e-13) and np.allclose(found[0].std, found[2].std, rtol=1e-13)
    z, _ = found[2].latents(np.arange(90), np.zeros(90, bool))
    assert np.allclose(found[0].std, z.double().numpy().std((0, 2, 3)), rtol=1e-12)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_the_dtype_is_that_of_computing_too(dtype):
    tokenizer, image = PRETRAIN.build().tokenizer.eval(), torch.rand(4, 3, 16, 16)
    with torch.no_grad():
        wide, z = tokenizer.encode(image), encode(tokenizer, image, dtype)
        with torch.autocast("cpu", torch.bfloat16):
            half = tokenizer.encode(image).bfloat16()
    assert torch.equal(z, {"bf16": half, "fp32": wide}[dtype]) and not torch.equal(half, wide.bfloat16())


def test_moments_do_not_depend_on_the_batch_or_the_threads():
    z = torch.randn(130, 3, 16, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    whole, threads = package.moments(z), torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            for batch in (1, 3, 64, 130):
                assert torch.equal(torch.cat([package.moments(part) for part in z.split(batch)], 2), whole)
    finally:
        torch.set_num_threads(threads)
    values, mean, squares = package.pool(whole.numpy(), 256)
    exact = z.double().numpy()
    assert values == 130 * 256 and np.allclose(mean, exact.mean((0, 2, 3)), rtol=1e-11, atol=0) and np.allclose(squares / values, exact.var((0, 2, 3)), rtol=1e-12)


def tar(path, torn=(), unlabelled=False):
    "40 JPEG pairs, some of them torn."
    pairs = Shapes(count=40, size=24).open().read(np.arange(40), np.arange(40, dtype=np.uint64))
    with tarfile.open(path, "w") as out:
        for i, pair in enumerate(pairs):
            Image.fromarray(pair.image).save(file := io.BytesIO(), "JPEG", quality=95)
            data = file.getvalue()[:200] if i in torn else file.getvalue()
            for extension, content in (("jpg", data), *([] if unlabelled else [("cls", str(pair.label).encode())])):
                member = tarfile.TarInfo(f"{i:04}.{extension}")
                member.size = len(content)
                out.addfile(member, io.BytesIO(content))
    return str(path)


def test_bad_images_are_skipped_counted_and_listed(tmp_path, monkeypatch):
    monkeypatch.setenv("VTP_CACHE", str(tmp_path / "cache"))
    small = latents(data=Shards(tar(tmp_path / "some.tar", torn=(3, 17))), shard=15)
    run = launch(small, machine=HERE)[0]
    reader = open_latents(small)
    assert len(reader) == 38 and sorted(set(range(40)) - set(reader.positions.tolist())) == [3, 17]
    assert [(row["step"], row["key"]) for row in run.rows("quarantine")] == [(1, "0003"), (2, "0017")]
    assert run.rows()[-1]["images"] == 38 and run.rows()[-1]["skipped"] == 2 and reader.starts.tolist() == [0, 14, 28, 38]
    assert reader.labelled and [pair.label for pair in reader.read(np.arange(38), reader.keys)] == reader.labels.tolist()
    worse = latents(data=Shards(tar(tmp_path / "worse.tar", torn=range(2, 40, 3))), shard=40)
    with pytest.raises(RuntimeError, match="13 of 40 images were bad"):
        launch(worse, machine=HERE)


def test_unlabelled_images_have_no_label(tmp_path, monkeypatch):
    monkeypatch.setenv("VTP_CACHE", str(tmp_path / "cache"))
    small = latents(data=Shards(tar(tmp_path / "plain.tar", unlabelled=True)))
    launch(small, machine=HERE)
    reader = open_latents(small)
    assert not reader.labelled and (reader.labels == -1).all()


def change(part):
    "Add to a weight of the tokenizer on disk, as another training would have."
    run = run_of(PRETRAIN)
    last = run.at()
    tensors = {group: last.tensors(group) for group in ("model", "optim")}
    name = next(n for n in tensors["model"] if part in n and n.endswith("weight"))
    tensors["model"][name] += 0.1
    write_checkpoint(run.path / "checkpoints", last.step, tensors, last.state)


def test_another_encoder_is_refused_another_decoder_is_not():
    small = latents()
    run = launch(small, machine=HERE)[0]
    change("decoder")
    open_latents(small)
    change("encoder")
    with pytest.raises(ValueError, match="made with encoder .* put its checkpoint back"):
        open_latents(small)
    (run.path / "done").unlink()
    with pytest.raises(ValueError, match="made with encoder .* remove .* launch again"):      # nor are half of the shards made by another
        launch(small, machine=HERE)


@pytest.mark.parametrize("store", [True, False], ids=["stored", "statistics only"])
def test_a_shard_of_another_encoder_is_refused(store):
    "A file of the same name, shape and size, as a copy from another machine would leave."
    small = latents(store=store)
    run = launch(small, machine=HERE)[0]
    before, file = contents(run), run.path / "latents" / "shard-00002.safetensors"
    change("encoder")
    again(run)
    launch(small, machine=HERE)
    assert not torch.equal(torch.tensor(open_latents(small).mean), torch.tensor(json.loads(before["statistics.json"])["mean"]))
    after = contents(run)
    assert len(after[file.name]) == len(before[file.name])
    file.write_bytes(before[file.name])
    with pytest.raises(ValueError, match=f"{file.name} was made with encoder .*, the statistics with .*: remove it and .*done, and launch again"):
        open_latents(small)
    file.unlink()
    (run.path / "done").unlink()
    launch(small, machine=HERE)
    assert contents(run) == after and open_latents(small).starts.tolist() == [0, 20, 40, 60, 80, 90]


def test_a_shard_of_other_data_is_refused():
    small, other = latents(), latents(data=Shapes(count=90, size=16, split="val"))
    run, another = launch(small, other, machine=HERE)
    name = "latents/shard-00001.safetensors"
    (run.path / name).write_bytes((another.path / name).read_bytes())
    with pytest.raises(ValueError, match="shard-00001.safetensors was made with data"):
        open_latents(small)


def test_other_data_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("VTP_CACHE", str(tmp_path / "cache"))
    small = latents(data=Shards(tar(tmp_path / "some.tar")))
    launch(small, machine=HERE)
    open_latents(small)
    tar(tmp_path / "some.tar", unlabelled=True)
    with pytest.raises(ValueError, match="made with data .* put the data back"):
        open_latents(small)


def test_a_cut_file_is_noticed():
    small = latents()
    run = launch(small, machine=HERE)[0]
    reader, file = open_latents(small), run.path / "latents" / "shard-00004.safetensors"
    file.write_bytes(file.read_bytes()[:-9000])
    with pytest.raises(OSError, match="ends early"):
        reader.latents([89], [True])
    with pytest.raises(ValueError, match="not the file that was written"):
        open_latents(small)
    with pytest.raises(IndexError):
        reader.latents([90], [False])
    (run.path / "done").unlink()
    launch(small, machine=HERE)
    assert open_latents(small).latents([89], [True])[0].isfinite().all()


@pytest.mark.parametrize("what", ["nan", "constant"])
def test_latents_that_cannot_be_normalised_are_refused(monkeypatch, what):
    launch(PRETRAIN, machine=HERE)
    encode = ViTTokenizer.encode

    def poisoned(self, image):
        z = encode(self, image).clone()
        if what == "nan":
            z[-1, 0, 0, 0] = float("inf")
        else:
            z[:, 5] = 0.25
        return z

    monkeypatch.setattr(ViTTokenizer, "encode", poisoned)
    with pytest.raises(ValueError, match={"nan": "latent of shapes/train/00000007 is not finite", "constant": r"channels \[5\] never change"}[what]):
        launch(latents(), machine=HERE)
    assert not run_of(latents()).done and not (run_of(latents()).path / "latents" / "statistics.json").exists()


def test_statistics_name_what_they_belong_to():
    small = latents(samples=30, store=False)
    run = launch(small, machine=HERE)[0]
    stored = json.loads((run.path / "latents" / "statistics.json").read_text())
    source = small.data.open()
    assert stored["data"] == source.digest and stored["encoder"] == small.of.load().tokenizer.encoder_hash() and stored["images"] == 30
    reader = open_latents(small)
    assert reader.positions.tolist() == sorted(source.order(0, np.arange(30)).tolist())
    assert torch.equal(torch.from_numpy(reader.labels), torch.tensor([pair.label for pair in source.read(reader.positions, reader.keys)]))
    for wrong in (dict(samples=91), dict(of=At(PRETRAIN, 2))):
        with pytest.raises(ValueError, match="samples=91|not kept"):
            launch(latents(**wrong), machine=HERE)
