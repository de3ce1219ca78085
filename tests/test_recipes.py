"""Recipes keep their names: a changed default or a renamed field shows here before it orphans runs."""

import pytest

from vtp.chains import TAILS, dit, finetune
from vtp.config import digest, dumps, loads
from vtp.recipes import AE, CLIP_AE, SCALES, SSL_AE, VTP, at, measure, sources

RECIPES = dict(AE=AE, CLIP_AE=CLIP_AE, SSL_AE=SSL_AE, VTP=VTP)
PINNED = {
    ("AE", "smoke"): "1202d3db14",
    ("AE", "cpu"): "26ffe75f79",
    ("AE", "mini"): "67d78430fe",
    ("AE", "paper"): "2b4d332a8a",
    ("CLIP_AE", "smoke"): "ad83d3d06d",
    ("CLIP_AE", "cpu"): "3f988489c3",
    ("CLIP_AE", "mini"): "e64e6129a9",
    ("CLIP_AE", "paper"): "1f46953cc2",
    ("SSL_AE", "smoke"): "7fb1ead5a4",
    ("SSL_AE", "cpu"): "86fa053cff",
    ("SSL_AE", "mini"): "4b4f0a7c7d",
    ("SSL_AE", "paper"): "09f1e0dc83",
    ("VTP", "smoke"): "ee9ca71f4c",
    ("VTP", "cpu"): "c09af3cfa9",
    ("VTP", "mini"): "95b9490da0",
    ("VTP", "paper"): "38ce6531fc",
}


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", RECIPES)
def test_round_trip_and_digest(name, scale):
    job = at(RECIPES[name], scale)
    assert loads(dumps(job)) == job
    assert digest(job) == PINNED[name, scale], "the recipe has changed: runs made before are not found any more. New behaviour is a new recipe, or a field made with config.added"


@pytest.mark.parametrize("scale", ["smoke", "cpu", "mini"])
def test_evaluations_round_trip(scale):
    train, val = sources(scale)
    for job in RECIPES.values():
        evaluation = measure(at(job, scale), val, scale)
        assert loads(dumps(evaluation)) == evaluation


def test_paper_defaults():
    weights = {o.name: (o.weight, o.batch) for o in VTP.objectives}
    assert weights == {"clip": (1.0, 16384), "ssl": (1.0, 4096), "rec": (0.1, 2048)}
    assert VTP.tokenizer.name == "f16d64" and VTP.tokenizer.image_size == 256
    assert {o.tap for o in VTP.objectives if o.name != "rec"} == {"trunk"}


TAIL_PINNED = {                     # the second stage and the DiT behind a recipe
    ("AE", "smoke"): ("4863139e6b", "e9955c3a13"),
    ("VTP", "smoke"): ("cb3d84603b", "6147e7ba98"),
    ("AE", "cpu"): ("4ae2ac12b2", "ab6e56d10a"),
    ("VTP", "cpu"): ("bc470f6e1c", "d8f5db1cf9"),
    ("AE", "paper"): ("2a7d92c841", "0c77f67379"),
    ("VTP", "paper"): ("e06a178307", "3fa39df06a"),
}


@pytest.mark.parametrize("name,scale", TAIL_PINNED)
def test_chains_keep_their_names(name, scale):
    job = at(RECIPES[name], scale)
    jobs = finetune(job, scale), dit(job, scale)
    assert tuple(map(digest, jobs)) == TAIL_PINNED[name, scale] and all(loads(dumps(each)) == each for each in jobs)


def test_paper_evaluator():
    judge = dit(VTP, "paper")
    assert (judge.dit.width, judge.dit.depth, judge.dit.heads, judge.dit.channels, judge.dit.grid, judge.dit.classes) == (768, 12, 12, 64, 16, 1000)
    assert (judge.steps, judge.batch, judge.ema, judge.drop_labels) == (100_000, 1024, 0.9999, 0.1)
    assert (judge.optim.lr, judge.optim.betas, judge.optim.weight_decay, judge.optim.warmup_steps, judge.optim.final, judge.optim.clip) == (2e-4, (0.9, 0.95), 0.0, 0, 1.0, None)
    assert TAILS["paper"].generation["samples"] == 10_000 and TAILS["paper"].budgets == (100_000,)
