"""Two gloo ranks give the losses and gradients of one process, in double precision, for every objective."""
import pytest
import torch
import torch.distributed as torch_dist
from tiny import clip, job, one_step, rec, ssl

from vtp.config import dumps
from vtp.dist import rank, start

VARIANTS = {
    "clip": (clip(),),
    "siglip": (clip(loss="siglip"),),
    "rec": (rec(),),
    "ssl": (ssl(drop=0.0),),
    "ssl softmax centering": (ssl(drop=0.0, centering="softmax"),),
    "ssl on the latent": (ssl(drop=0.0, tap="latent"),),
    "all": (clip(), ssl(drop=0.0), rec(weight=0.1)),
}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", VARIANTS)
def test_two_ranks_equal_one(name):
    text = dumps(job(VARIANTS[name], dtype="fp64"))
    losses, gradients, masked = one_step(text)
    losses2, gradients2, masked2 = start(one_step, text, nproc=2)
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
        start(fail, bad, nproc=2)
