"""Room 33 against DINOv2's own code, when the environment variable DINOV2_REFERENCE names a checkout of it.

    git clone https://github.com/facebookresearch/dinov2
    DINOV2_REFERENCE=$PWD/dinov2 python -m pytest tests/test_reference_ssl.py

Compared with commit b8931f7. The files are loaded one by one, so that none of DINOv2's dependencies is needed.
"""
import importlib.util
import os
import random
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as torch_dist
from einops import rearrange

from vtp.data.augment import block_masks, mask_bounds
from vtp.data.samples import mix
from vtp.objectives.self_supervised import (DINOHead, centred, cosine, dino_loss, ibot_loss, koleo, masked_list,
                                            mean_logits, sinkhorn)

warnings.filterwarnings("ignore", category=FutureWarning)      # the reference's old weight_norm and autocast
CHECKOUT = os.environ.get("DINOV2_REFERENCE")
pytestmark = pytest.mark.skipif(not CHECKOUT, reason="DINOV2_REFERENCE does not name a checkout of facebookresearch/dinov2")
K, B, LOCALS, TEMPERATURE = 32, 6, 8, .05


def reference(path):
    "One file of the checkout as a module."
    spec = importlib.util.spec_from_file_location(Path(path).stem, Path(CHECKOUT) / "dinov2" / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)


@pytest.fixture
def group(tmp_path):
    "A process group of one: the reference's iBOT Sinkhorn can't do without."
    torch_dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    torch_dist.destroy_process_group()


@pytest.fixture
def dino():
    return reference("loss/dino_clstoken_loss.py").DINOLoss(K)


@pytest.fixture
def ibot():
    return reference("loss/ibot_patch_loss.py").iBOTPatchLoss(K)


def cosines(*shape):
    return torch.rand(*shape) * 2 - 1


def largest(ours, theirs):
    "Largest relative difference, for `pytest -s`."
    difference = ((ours - theirs).abs() / (theirs.abs() + 1e-8)).max().item()
    print(f"{os.environ['PYTEST_CURRENT_TEST'].split('::')[1].split(' ')[0]}: {difference:.1e}")
    return difference


def test_sinkhorn_of_class_tokens(dino):
    logits = cosines(2 * B, K)
    assert largest(sinkhorn(logits, TEMPERATURE), dino.sinkhorn_knopp_teacher(logits, TEMPERATURE)) < 1e-5


def test_sinkhorn_of_patches_with_padding(ibot, group):
    logits, count = cosines(40, K), 31
    theirs = ibot.sinkhorn_knopp_teacher(logits[:count], TEMPERATURE, torch.tensor([count]))
    ours = sinkhorn(logits, TEMPERATURE, weight=(torch.arange(40) < count).float())
    assert largest(ours[:count], theirs) < 1e-5 and not ours[count:].any()


def test_centring_over_three_steps(dino, ibot):
    centers = torch.zeros(2, K)
    for _ in range(3):
        cls, patches = cosines(2 * B, K), cosines(20, K)
        assert largest(centred(cls, TEMPERATURE, centers[0]), dino.softmax_center_teacher(cls, TEMPERATURE)) < 1e-5
        assert largest(centred(patches, TEMPERATURE, centers[1]), ibot.softmax_center_teacher(patches[None], TEMPERATURE)[0]) < 1e-5
        dino.update_center(cls)
        ibot.update_center(patches[None])
        centers = .9 * centers + .1 * torch.stack([mean_logits(cls), mean_logits(patches)])


@pytest.mark.parametrize("locals_", [0, 2, LOCALS])
def test_dino_loss_and_gradient(dino, locals_):
    "The two terms as DINOv2's training step scales and adds them."
    student, teacher = cosines(2 + locals_, B, K).requires_grad_(), cosines(2, B, K).softmax(-1)
    pairs = 2 + 2 * locals_
    swapped = teacher.flip(0).flatten(0, 1)                        # crop 2 first
    theirs = dino([student[:2].flatten(0, 1)], [swapped]) * 2 / pairs
    if locals_: theirs = theirs + dino(list(student[2:]), list(teacher)) / pairs
    ours = dino_loss(student, teacher)
    assert largest(ours, theirs) < 1e-5
    gradients = [torch.autograd.grad(loss, student)[0] for loss in (ours, theirs)]
    assert torch.allclose(*gradients, atol=1e-7)


def test_ibot_loss_with_the_reference_collation(ibot):
    "Masks made, listed and weighted by the reference; the same masks listed by us, padded."
    generator = reference("data/masking.py").MaskingGenerator((6, 6), max_num_patches=18)
    samples = [({"global_crops": [torch.zeros(3, 2, 2)] * 2, "local_crops": [torch.zeros(3, 1, 1)]},) for _ in range(B)]
    theirs = reference("data/collate.py").collate_data_and_cast(samples, (.1, .5), .5, torch.float32, 36, generator)
    count, most = len(theirs["mask_indices_list"]), theirs["upperbound"]
    index, weight = masked_list(theirs["collated_masks"], most)
    assert torch.equal(index[:count], theirs["mask_indices_list"]) and torch.equal(weight[:count], theirs["masks_weight"])
    assert most == mask_bounds(2 * B, 36).sum()
    student, teacher = cosines(most, K).requires_grad_(), cosines(most, K).softmax(-1)
    ours = ibot_loss(student, teacher, weight, 2 * B)
    reference_loss = ibot.forward_masked(student, teacher, theirs["collated_masks"], count, theirs["masks_weight"])
    assert largest(ours, reference_loss) < 1e-5
    gradients = [torch.autograd.grad(loss, student)[0] for loss in (ours, reference_loss)]
    assert torch.allclose(*gradients, atol=1e-7)


def test_koleo_and_gradient():
    features = torch.randn(8, 24, requires_grad=True)
    losses = koleo(features, "local"), reference("loss/koleo_loss.py").KoLeoLoss()(features)
    assert largest(*losses) < 1e-5
    assert torch.allclose(*(torch.autograd.grad(loss, features)[0] for loss in losses), atol=1e-6)


def test_head_and_gradients():
    "The reference's state loads under its own names."
    theirs = reference("layers/dino_head.py").DINOHead(24, K, nlayers=3, hidden_dim=40, bottleneck_dim=16)
    ours = DINOHead(24, K, hidden=40, bottleneck=16)
    ours.load_state_dict(theirs.state_dict())
    tokens, direction = torch.randn(9, 24), torch.randn(9, K)
    assert torch.allclose(ours(tokens), theirs(tokens), atol=1e-6)
    for head in (ours, theirs): (head(tokens) * direction).sum().backward()
    expected = dict(theirs.named_parameters())
    assert all(torch.allclose(p.grad, expected[name].grad, atol=1e-5) for name, p in ours.named_parameters())


def test_law_of_the_masks():
    "Counts, perimeter and the frequency of every position, over 60 batches of 64 images."
    groups, crops, side = 60, 128, 16
    generator = reference("data/masking.py").MaskingGenerator((side, side), max_num_patches=side * side / 2)
    samples = [({"global_crops": [torch.zeros(1)] * 2, "local_crops": [torch.zeros(1)]},) for _ in range(crops // 2)]
    collate = reference("data/collate.py").collate_data_and_cast
    theirs = np.stack([collate(samples, (.1, .5), .5, torch.float32, side * side, generator)["collated_masks"] for _ in range(groups // 4)])
    ours = block_masks(mix(np.arange(groups), 1), crops, (side, side))
    counts = [np.sort(masks.sum(-1), 1)[:, crops // 2:].mean(0) for masks in (ours, theirs)]
    print(f"hidden patches: ours {counts[0].mean():.2f}, reference {counts[1].mean():.2f}")
    assert np.abs(counts[0] - counts[1]).max() < 1. and abs(counts[0].mean() - counts[1].mean()) < .1
    assert all(((masks.any(-1)).sum(1) == crops // 2).all() for masks in (ours, theirs))
    frequency = [masks.reshape(-1, side * side).mean(0) for masks in (ours, theirs)]
    assert np.abs(frequency[0] - frequency[1]).max() < 5 * np.sqrt(.13 / theirs[..., 0].size)
    borders = [rearrange(masks, "g c (h w) -> (g c) h w", h=side) for masks in (ours, theirs)]
    borders = [(m[:, 1:] != m[:, :-1]).sum((1, 2)) + (m[:, :, 1:] != m[:, :, :-1]).sum((1, 2)) for m in borders]
    borders = [b[b > 0] for b in borders]
    print(f"border: ours {borders[0].mean():.2f} ± {borders[0].std():.2f}, reference {borders[1].mean():.2f} ± {borders[1].std():.2f}")
    assert abs(borders[0].mean() - borders[1].mean()) < 4 * borders[1].std() / np.sqrt(len(borders[1]))


def test_momentum_schedule():
    "Ours at progress i / steps is the reference's iteration i."
    schedule = reference("utils/utils.py").CosineScheduler(.994, 1., 50)
    assert np.allclose([cosine((.994, 1.), i / 50) for i in range(51)], [schedule[i] for i in range(51)], atol=1e-12)
