"""The comparison systems keep their names, and models that lack a part stand in one table with those that have it."""
from dataclasses import replace

import pytest
from official_cases import CHANGES, write
from tiny import HERE

from vtp.chains import MARKS, with_data, with_latent
from vtp.comparisons import autoencoders, models, systems
from vtp.config import digest, dumps, loads
from vtp.data.shapes import Shapes
from vtp.evaluation.reconstruction import ReconstructionQuality
from vtp.generation.latents import CacheLatents
from vtp.job import At, launch
from vtp.recipes import AE, SCALES, VTP, at, measure, sources
from vtp.results import collect, overview

PINNED = {
    "smoke": {"CNN": "193e1390ef", "VA-VAE": "26e0674845", "RAE": "c95e47853f"},
    "cpu": {"CNN": "7c4bffb002", "VA-VAE": "955ebd7254", "RAE": "1bb03f8e5b"},
    "mini": {"CNN": "fc23ebccbe", "VA-VAE": "4a70039f82", "RAE": "e4ae8b1dec"},
    "paper": {"CNN": "c12fc4d5a2", "VA-VAE": "0f71ec8e21", "RAE": "c007d16a08"},
}


@pytest.mark.parametrize("scale", PINNED)
def test_digests(scale):
    found = systems(scale, SCALES[scale].pairs)
    assert {name: digest(found[name]) for name in PINNED[scale]} == PINNED[scale], "a comparison system has changed: its runs are not found any more"
    assert all(loads(dumps(job)) == job for job in found.values())


@pytest.mark.parametrize("scale", PINNED)
def test_our_own_are_the_runs_of_every_experiment(scale):
    "AE and VTP keep the scale's checkpoints, whole data and the scale's latent leave them as they are, and nobody else keeps any."
    found = systems(scale, SCALES[scale].pairs, seed=2)
    for name, recipe in (("AE", AE), ("VTP", VTP)):
        own = found[name]
        assert replace(own, keep=()) == replace(at(recipe, scale), seed=2)
        assert [step / own.steps for step in (*own.keep, own.steps)] == pytest.approx(MARKS[scale], abs=1 / own.steps)
        assert with_latent(own, own.tokenizer.latent) == own
    assert found["AE-small"].keep == found["AE"].keep and found["AE-small"].tokenizer.latent * 2 == found["AE"].tokenizer.latent
    assert not any(getattr(found[name], "keep", ()) for name in PINNED[scale])
    assert autoencoders(found["AE"], scale)["CNN"] == found["CNN"], "Table 1's CNN is another run than Table 2's"
    if scale != "paper": assert with_data(found["VTP"], found["VTP"].pairs.count) == found["VTP"]


def test_what_a_release_lacks_is_not_asked_of_it(tmp_path):
    "An official checkpoint without decoder, one without text tower and a whole one: in one table, at their size."
    folders = {name: write(tmp_path / name, CHANGES[case]) for name, case in (("whole", "released"), ("blind", "no_decoder"), ("mute", "no_text"))}
    train, val = Shapes(count=2400, size=32), Shapes(count=400, size=32, split="val")
    jobs = models([str(folder) for folder in folders.values()], "smoke", train)
    assert list(jobs) == list(folders)
    rows = {name: measure(job, val, "smoke", train=train) for name, job in jobs.items()}
    rows = {name: replace(e, evaluators=tuple(replace(m, train_samples=300, val_samples=100, steps=20) if hasattr(m, "train_samples") else replace(m, samples=100) for m in e.evaluators)) for name, e in rows.items()}
    launch(*rows.values(), machine=HERE)
    table = collect(rows)
    measured = {name: set(table[table.series == name].metric) for name in jobs}
    assert "rPSNR" in measured["whole"] and "zero_shot" in measured["whole"] and "probe" in measured["whole"]
    assert measured["blind"] == measured["whole"] - {m for m in measured["whole"] if m in ("rPSNR", "SSIM", "rFD", "colour_shift") or "random" in m}
    assert measured["mute"] == measured["whole"] - {"zero_shot", "zero_shot_top5"}
    assert set(overview(table, by=("metric", "protocol", "size")).reset_index()["size"]) == {32}
    blind = At(jobs["blind"])
    with pytest.raises(ValueError, match="has no decoder"): ReconstructionQuality(data=val, samples=50).check(jobs["blind"])
    CacheLatents(blind, val, samples=100).check()               # what it encodes can still be generated


def test_names():
    train, _ = sources("smoke")
    assert list(models(["AE", "UniTok=somewhere", "VTP-L-d64"], "smoke", train)) == ["AE", "UniTok", "VTP-L-d64"]
    with pytest.raises(ValueError, match="name each once"): models(["UniTok", "UniTok=somewhere"], "smoke", train)
