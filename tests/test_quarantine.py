"""Broken samples are listed, counted and replaced while training goes on; too many stop it."""
import io
import tarfile

import numpy as np
import pytest
from PIL import Image
from tiny import HERE, job, rec, stop_at

from vtp.data.pairs import Shards
from vtp.job import launch, run_of


def shard(path, broken, count=80):
    "A tar of noise images with captions; those in `broken` (index -> bytes) have these bytes for an image."
    noise = np.random.default_rng(0)
    with tarfile.open(path, "w") as tar:
        for i in range(count):
            data = io.BytesIO()
            Image.fromarray(noise.integers(0, 255, (20, 24, 3), np.uint8)).save(data, "PNG")
            for name, content in ((f"{i:04}.png", broken.get(i, data.getvalue())), (f"{i:04}.txt", f"number {i}".encode())):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return str(path)


@pytest.mark.parametrize("workers", [0, 2])
def test_training_goes_on(tmp_path, workers):
    from dataclasses import replace

    source = Shards(shard(tmp_path / "some.tar", {3: b"not an image", 40: b"\x89PNG torn"}))
    run, = launch(job(pairs=source, steps=10), machine=replace(HERE, workers=workers))
    listed = run.rows("quarantine")
    assert run.done and {row["key"] for row in listed} == {"0003", "0040"}
    assert all(row["shard"] and row["reason"] for row in listed)
    assert run.rows()[-1]["bad"] == len(listed) == 4                 # 10 steps of 16 are two epochs of 80: each was met twice
    assert [row["step"] for row in listed] == sorted(row["step"] for row in listed)


def test_too_many_stop_the_run(tmp_path):
    source = Shards(shard(tmp_path / "many.tar", {i: b"rubbish" for i in range(0, 80, 2)}))
    small = job(pairs=source, steps=10, bad_rate=0.1)
    with pytest.raises(RuntimeError, match="more than bad_rate=0.1.*quarantine.jsonl"):
        launch(small, machine=HERE)
    assert not run_of(small).done and len(run_of(small).rows("quarantine")) > 10


def test_the_list_says_key_shard_and_reason_and_its_sum_says_what_prevails(tmp_path):
    from vtp.data.samples import Bad, summary

    for name, broken in (("a.tar", {i: b"rubbish" for i in range(0, 80, 2)}), ("b.tar", {1: b"\x89PNG torn"})): shard(tmp_path / name, broken)
    small = job((rec(),), pairs=Shards(str(tmp_path / "?.tar")), steps=20, bad_rate=0.1)
    with pytest.raises(RuntimeError, match="more than bad_rate"): launch(small, machine=HERE)
    told = summary(Bad(row["key"], row["shard"], row["reason"]) for row in run_of(small).rows("quarantine"))
    assert told.startswith("by reason: ") and "image: of no known format" in told.split(";")[0] and told.partition("By shard: ")[2].split(";")[0].endswith("a.tar")


def test_a_source_of_nothing_but_rubbish(tmp_path):
    source = Shards(shard(tmp_path / "all.tar", {i: b"rubbish" for i in range(80)}))
    with pytest.raises(RuntimeError, match="samples in a row could not be read"):
        launch(job((rec(),), pairs=source, steps=2), machine=HERE)


def test_what_the_index_rejects_is_listed_too(tmp_path):
    path = shard(tmp_path / "pairs.tar", {})
    with tarfile.open(path, "a") as tar:                     # two images that nobody captioned
        for name in ("x1.png", "x2.png"):
            info = tarfile.TarInfo(name)
            info.size = 4
            tar.addfile(info, io.BytesIO(b"\x89PNG"))
    run, = launch(job(pairs=Shards(path), steps=5), machine=HERE)
    assert {row["key"]: row["step"] for row in run.rows("quarantine")} == {"x1": 0, "x2": 0}
    assert run.rows()[-1]["bad"] == 2


def test_a_source_that_is_mostly_unusable_is_refused_at_once(tmp_path):
    path = shard(tmp_path / "pairs.tar", {})
    with tarfile.open(path, "a") as tar:
        for i in range(40):
            info = tarfile.TarInfo(f"x{i}.png")
            info.size = 4
            tar.addfile(info, io.BytesIO(b"\x89PNG"))
    small = job(pairs=Shards(path))
    with pytest.raises(ValueError, match="40 of 120 samples can't be used"):
        launch(small, machine=HERE)
    assert not run_of(small).path.exists()


def test_other_shards_on_resume_are_refused(tmp_path, monkeypatch):
    shard(tmp_path / "a.tar", {})
    small = job(pairs=Shards(str(tmp_path / "*.tar")))
    with monkeypatch.context() as patched:
        stop_at(patched, 2)
        with pytest.raises(InterruptedError):
            launch(small, machine=HERE)
    shard(tmp_path / "b.tar", {}, count=20)
    with pytest.raises(ValueError, match="began on other data"):
        launch(small, machine=HERE)
    (tmp_path / "b.tar").unlink()
    assert launch(small, machine=HERE)[0].done
