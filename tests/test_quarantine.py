"""Broken samples are listed, counted and replaced while training goes on; too many stop it."""
import io
import tarfile

import numpy as np
import pytest
from PIL import Image
from tiny import HERE, job, rec

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


def test_a_source_of_nothing_but_rubbish(tmp_path):
    source = Shards(shard(tmp_path / "all.tar", {i: b"rubbish" for i in range(80)}))
    with pytest.raises(RuntimeError, match="samples in a row could not be read"):
        launch(job((rec(),), pairs=source, steps=2), machine=HERE)
