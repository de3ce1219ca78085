"""gFD of a generator: the same on one rank and on two, in any batches; its card; what is refused."""
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiny import job, rec

from vtp.data.shapes import Shapes
from vtp.dist import world
from vtp.evaluation.extractors import Inception, MobileNet, MobileNetV1, ShapesEvaluator
from vtp.evaluation.generation import GenerationQuality, sample_sheet
from vtp.evaluation.protocol import PROTOCOLS
from vtp.finetune_decoder import FinetuneDecoder
from vtp.generation.dit import DiT, DiTConfig
from vtp.generation.flow import SamplerConfig
from vtp.generation.latents import CacheLatents
from vtp.generation.train import Generator, TrainDiT
from vtp.job import At
from vtp.ranks import start
from vtp.tokenizers.vit import ViTTokenizerConfig
from vtp.vit import ViTConfig

QUALITY = GenerationQuality(reference=Shapes(count=150, size=16), samples=60, sampler=SamplerConfig("heun", 4), extractor=ShapesEvaluator(), batch=16, dtype="fp64", bootstrap=10)


def generator():
    "Random weights in double precision."
    torch.manual_seed(0)
    part = ViTConfig(width=32, depth=1, heads=2, patch=4)
    tokenizer, dit = ViTTokenizerConfig(16, part, part, latent=4).build().double(), DiT(DiTConfig(32, 1, 2, channels=4, grid=4, classes=3)).double()
    for p in (*tokenizer.parameters(), *dit.parameters()): torch.nn.init.normal_(p, std=.2)
    return Generator(tokenizer, dit, np.zeros(4), np.ones(4)).requires_grad_(False).eval()


def measured(cache, batch, sampler=QUALITY.sampler):
    import os
    os.environ["VTP_CACHE"] = cache
    return world(), list(replace(QUALITY, batch=batch, sampler=sampler).rows(generator(), torch.device("cpu")))


@pytest.mark.timeout(120)
def test_batches_and_ranks_do_not_matter(tmp_path, monkeypatch):
    monkeypatch.setenv("VTP_CACHE", str(tmp_path))     # put back afterwards
    _, one = measured(str(tmp_path / "one"), 16)
    assert [r["metric"] for r in one] == ["gFD", "precision", "recall", "IS_like"] and one[0]["value"] > 0
    for found in (measured(str(tmp_path / "one"), 7), start(measured, str(tmp_path / "two"), 11, nproc=2)):
        for a, b in zip(one, found[1]):
            assert a.keys() == b.keys()     # the extractor is in fp32, whose last bits depend on the batch
            for key in a: assert a[key] == (pytest.approx(b[key], rel=1e-6) if isinstance(b[key], float) else b[key]), key
    assert found[0] == 2


def test_the_card(tmp_path, monkeypatch):
    monkeypatch.setenv("VTP_CACHE", str(tmp_path))
    found, *_ = replace(QUALITY, sampler=SamplerConfig("dopri5", control="batch", guidance=2.), labels="balanced", batch=30).rows(generator(), torch.device("cpu"))
    expected = dict(metric="gFD", images=60, size=16, resize="center_crop", quantise="truncate", dtype="fp64", labels="balanced", dit="32x1", sampler="dopri5", rtol=1e-3, atol=1e-6, control="batch", batch=30,
                    guidance=2., interval="0-1", channels="all", seed=0)
    assert {key: found.get(key) for key in expected} == expected and not {"steps", "shift", "decoder"} & found.keys()
    assert found["extractor"].startswith("shapes_cnn:") and found["reference"].startswith("shapes:") and found["nfe"] >= 6 and found["low"] < found["value"] < found["high"]
    fewer, *_ = replace(QUALITY, reference_samples=100).rows(generator(), torch.device("cpu"))
    assert fewer["reference"] not in (found["reference"], "") and found["protocol"] not in PROTOCOLS


def test_the_sheet_shows_what_is_measured():
    quality = replace(QUALITY, labels="balanced")
    few, more = (sample_sheet(generator(), quality, n) for n in (5, 500))
    assert few.shape == (5, 3, 16, 16) and len(more) == 60 and torch.allclose(few, more[:5], atol=1e-12)


def test_what_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("VTP_CACHE", str(tmp_path))
    broken = generator()
    next(broken.tokenizer.decoder.parameters()).data.fill_(math.nan)
    with pytest.raises((ValueError, FloatingPointError), match="not finite"): list(QUALITY.rows(broken, torch.device("cpu")))
    with pytest.raises(ValueError, match="float64"): list(replace(QUALITY, dtype="fp32").rows(generator(), torch.device("cpu")))
    latents = CacheLatents(At(job((rec(),))), Shapes(count=64, size=16))
    trained = TrainDiT(latents, DiTConfig(32, 1, 2, channels=8, grid=4, classes=48), steps=2)
    with pytest.raises(ValueError, match="use dtype='fp32'"): QUALITY.check(trained)
    fp32 = replace(QUALITY, dtype="fp32")
    with pytest.raises(FileNotFoundError, match="curl -LO"): replace(fp32, reference=str(tmp_path / "none.npz")).check(trained)
    with pytest.raises(FileNotFoundError, match="curl -LO"): replace(fp32, extractor=Inception(str(tmp_path / "none.pth"))).check(trained)
    np.savez(tmp_path / "adm.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    with pytest.raises(ValueError, match="another extractor"): replace(fp32, reference=str(tmp_path / "adm.npz")).check(trained)
    save_file(MobileNetV1().state_dict(), tmp_path / "mobilenet.safetensors")
    with pytest.raises(ValueError, match="multiples of 32; give MobileNet a size"): replace(fp32, extractor=MobileNet(str(tmp_path / "mobilenet.safetensors"))).check(trained)
    replace(fp32, extractor=MobileNet(str(tmp_path / "mobilenet.safetensors"), size=32)).check(trained)
    fp32.check(trained), replace(fp32, dtype="bf16").check(trained), QUALITY.check(replace(trained, dtype="fp64"))
    guided = replace(fp32, sampler=SamplerConfig("heun", 4, guidance=2.))
    guided.check(trained)
    with pytest.raises(ValueError, match="drop_labels=0.1"): guided.check(replace(trained, drop_labels=0.))
    for n, words in ((3, "at least 4"), (151, "reference_samples=151")):
        with pytest.raises(ValueError, match=words): replace(fp32, reference_samples=n).check(trained)


def test_a_decoder_must_come_from_the_latents_very_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setenv("VTP_CACHE", str(tmp_path))
    data, pretrain = Shapes(count=64, size=16), job((rec(),), keep=(6,))
    trained = TrainDiT(CacheLatents(At(pretrain), data), DiTConfig(32, 1, 2, channels=8, grid=4, classes=48), steps=2)
    stage = FinetuneDecoder(At(pretrain), data, rec(), steps=100)
    fp32 = replace(QUALITY, dtype="fp32")
    for decoder in (At(stage), At(stage, 100), At(replace(stage, of=At(pretrain, 12))), At(replace(stage, of=At(stage), seed=1))):
        replace(fp32, decoder=decoder).check(trained)
    for decoder in (At(replace(stage, of=At(pretrain, 6))), At(replace(stage, of=At(replace(pretrain, seed=1)))), At(pretrain, 6)):
        with pytest.raises(ValueError, match="not made from the checkpoint of the latents.* at step 12"): replace(fp32, decoder=decoder).check(trained)


def test_precision_and_recall_compare_with_as_many_real_images(tmp_path, monkeypatch):
    monkeypatch.setenv("VTP_CACHE", str(tmp_path))
    extractor = QUALITY.extractor.build()
    for quality, total, kept in ((QUALITY, 150, 60), (replace(QUALITY, samples=500), 150, 150), (replace(QUALITY, reference_samples=100), 100, 60), (replace(QUALITY, reference_samples=40), 40, 40)):
        real, near = quality.references(extractor, 16, torch.device("cpu"))
        assert (real.stats.n, near.stats.n, len(near.features)) == (total, kept, kept)
