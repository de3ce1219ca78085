"""Two gloo ranks give the losses and gradients of one process, in double precision, for every objective."""
import os
import signal
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as torch_dist
from tiny import clip, job, one_step, ranks, rec, ssl

from vtp.config import dumps, loads
from vtp.dist import rank
from vtp.ranks import RankError, start

VARIANTS = {
    "clip": (clip(),),
    "siglip": (clip(loss="siglip"),),
    "rec": (rec(),),
    "ssl": (ssl(drop=0.3),),
    "ssl softmax centering": (ssl(drop=0.3, centering="softmax"),),
    "ssl on the latent": (ssl(drop=0.3, tap="latent"),),
    "all": (clip(), ssl(drop=0.3), rec(weight=0.1)),
}


def text_of(name):
    return dumps(job(VARIANTS[name], dtype="fp64"))


def every_step(texts):
    return [one_step(text) for text in texts]


@pytest.fixture(scope="module")
def two():
    "The steps of all variants on two ranks: one start, which is what takes the time."
    return dict(zip(VARIANTS, ranks(every_step, [text_of(name) for name in VARIANTS], nproc=2, jobs=[loads(text_of(name)) for name in VARIANTS]), strict=True))


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", VARIANTS)
def test_two_ranks_equal_one(name, two):
    losses, gradients, masked = one_step(text_of(name))
    losses2, gradients2, masked2 = two[name]
    assert losses.keys() == losses2.keys() and gradients.keys() == gradients2.keys() and gradients
    for key in losses:
        assert losses2[key] == pytest.approx(losses[key], rel=1e-10, abs=1e-12), key
    for key in gradients:
        assert torch.allclose(gradients2[key], gradients[key], rtol=1e-8, atol=1e-11), (key, (gradients2[key] - gradients[key]).abs().max())
    if "ssl" in losses:
        assert masked and masked2 * 2 != masked, "the ranks were meant to have unequal numbers of masked patches"


def test_a_gradient_is_not_zero_by_accident():
    _, gradients, _ = one_step(dumps(job(dtype="fp64")))
    for part in ("encoder.trunk", "decoder", "objectives.clip.text", "objectives.ssl.head"):
        assert sum(g.abs().sum() for name, g in gradients.items() if part in name) > 0, part


def fail(bad):
    "Fails on one rank while the other waits for it."
    if rank() == bad:
        raise RuntimeError(f"rank {bad} was told to fail")
    torch_dist.barrier()


@pytest.mark.parametrize("bad", [0, 1])
def test_the_error_of_a_rank_is_the_error_that_arrives(bad):
    with pytest.raises(Exception, match=f"rank {bad} was told to fail"):
        ranks(fail, bad, nproc=2)


def hang(rank_that_sleeps):
    "One rank does not answer."
    if rank() == rank_that_sleeps:
        time.sleep(600)
    torch_dist.barrier()


def test_a_rank_that_does_not_answer_is_not_waited_for_for_ever():
    began = time.monotonic()
    with pytest.raises(RankError, match=r"rank 0 lost another rank: it died, or did not answer within 4 s \(timeout_minutes"):
        ranks(hang, 1, nproc=2, timeout_s=4)
    assert time.monotonic() - began < 120


def die(number):
    "A rank is killed while another waits for it."
    if rank() == number:
        os.kill(os.getpid(), signal.SIGKILL)
    torch_dist.barrier()


@pytest.mark.parametrize("number", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_rank_that_was_killed_is_named(number):
    with pytest.raises(RankError, match=rf"^rank {number} \(process \d+\) was killed by SIGKILL.*no traceback.*launch again"):
        ranks(die, number, nproc=2)


def once(folder, procs):
    "The first time, the last rank is killed; afterwards it counts the times that it was started."
    file = Path(folder) / str(rank())
    times = len(file.read_text()) if file.exists() else 0
    file.write_text("x" * (times + 1))
    torch_dist.barrier() if procs > 1 else None
    if rank() == procs - 1 and times == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    torch_dist.barrier() if procs > 1 else None
    return times + 1


@pytest.mark.parametrize("procs,begin", [pytest.param(1, start, marks=pytest.mark.slow), (2, ranks)], ids=["spawned", "forked"])
def test_ranks_are_started_anew(procs, begin, tmp_path):
    assert begin(once, str(tmp_path), procs, nproc=procs, restarts=1) == 2
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {str(n): "xx" for n in range(procs)}
