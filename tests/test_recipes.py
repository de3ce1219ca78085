"""Recipes keep their names: a changed default or a renamed field shows here before it orphans runs."""

import pytest

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
