"""Every number carries its card; probes leave no trace in a training; unlike cards do not meet in a comparison."""
import json
import random
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import pytest
import torch
from tiny import HERE, clip, job, rec, stop_at
from torch import nn

import vtp.config
from vtp.config import digest, dumps, loads
from vtp.data.shapes import Shapes
from vtp.dist import start
from vtp.evaluation.linear_probe import LinearProbe
from vtp.evaluation.protocol import CARD, PROTOCOLS, Evaluate, comparable, compare
from vtp.evaluation.reconstruction import ReconstructionQuality
from vtp.evaluation.trunk_probe import TrunkProbe
from vtp.evaluation.zero_shot import Retrieval, ZeroShot
from vtp.job import At, launch
from vtp.perceptual import PerceptualConfig
from vtp.results import collect

VAL = Shapes(count=64, size=16, split="val")
STAND_IN = PerceptualConfig(kind="random_features")


class Features(nn.Module):
    "Random convolutions, drawn from the global generator: an extractor that would disturb a training if it were let."
    label, hash, official, dim = "random", "0", False, 6

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 6, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).requires_grad_(False)

    def forward(self, images):
        return self.net(images.float() / 255)


@dataclass(frozen=True)
class Careless:
    def build(self):
        return Features()


@pytest.fixture(autouse=True)
def known_here(monkeypatch):
    monkeypatch.setattr(vtp.config, "allowed", {"vtp", __name__})


def quality(**changes):
    return ReconstructionQuality(**{**dict(data=VAL, samples=48, batch=16, perceptual=STAND_IN), **changes})


def evaluators():
    train = Shapes(count=64, size=16)
    return (quality(extractor=Careless()), LinearProbe(train=train, val=VAL, steps=10, batch=32), ZeroShot(data=VAL), Retrieval(data=VAL, samples=40),
            TrunkProbe(train=train, val=VAL, epochs=2, epoch_steps=5, batch=16, size=16, resize=16, dtype="fp32", blocks=(1, 2)))


def split(run):
    "The rows of the training and those of its probes."
    rows = run.rows()
    return [row for row in rows if "metric" not in row], [row for row in rows if "metric" in row]


@pytest.mark.timeout(300)
def test_probes_leave_no_trace_in_a_training():
    plain, probed = job(steps=8, log_every=2, keep=(3, 6)), job(steps=8, log_every=2, keep=(3, 6), probes=evaluators())
    without, watched = launch(plain, probed, machine=HERE)
    for step in (3, 6, 8):
        for group in ("model", "optim"):
            tensors, others = without.at(step).tensors(group), watched.at(step).tensors(group)
            assert tensors.keys() == others.keys() and all(torch.equal(tensors[name], others[name]) for name in tensors), (step, group)
    training, found = split(watched)
    assert training == split(without)[0] and split(without)[1] == []
    assert [row["step"] for row in found] == sorted(row["step"] for row in found) and {row["step"] for row in found} == {3, 6, 8}


def test_an_evaluator_draws_no_random_number_and_changes_no_mode():
    model = job((clip(), rec())).build().train()
    model.tokenizer.decoder.eval()
    modes, weights = [m.training for m in model.modules()], {name: p.clone() for name, p in model.state_dict().items()}
    states = lambda: (torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist())
    before = states()
    for evaluator in evaluators():
        assert list(evaluator.rows(model, torch.device("cpu")))
        assert states() == before, type(evaluator).__name__
        assert [m.training for m in model.modules()] == modes, type(evaluator).__name__
        assert all(torch.equal(weights[name], p) for name, p in model.state_dict().items()), type(evaluator).__name__


@pytest.mark.timeout(300)
def test_probes_survive_an_interruption(tmp_path, monkeypatch):
    small = job((rec(),), steps=6, log_every=2, keep=(2, 4), probes=(quality(), LinearProbe(train=Shapes(count=64, size=16), val=VAL, steps=5, batch=32)))
    monkeypatch.setenv("VTP_RUNS", str(tmp_path / "straight"))
    straight, = launch(small, machine=HERE)
    monkeypatch.setenv("VTP_RUNS", str(tmp_path / "stopped"))
    stop_at(monkeypatch, 2, 4)
    for _ in range(2):
        with pytest.raises(InterruptedError, match="launch again"):
            launch(small, machine=HERE)
    assert (launch(small, machine=HERE)[0].path / "metrics.jsonl").read_bytes() == (straight.path / "metrics.jsonl").read_bytes()


@pytest.mark.timeout(300)
def test_a_probe_and_an_evaluation_of_one_checkpoint_are_one_number():
    small = job((clip(), rec()), steps=4, log_every=2, keep=(2,), probes=(quality(), ZeroShot(data=VAL)))
    training, evaluation = launch(small, Evaluate(At(small, 2), small.probes), machine=HERE)
    online = [row for row in split(training)[1] if row["step"] == 2]
    after = evaluation.rows()
    assert len(online) == len(after) == 6
    for a, b in zip(online, after):
        comparable([a, b])
        assert a["value"] == b["value"] and a["samples"] == b["samples"] == 32 and a["flops"] == b["flops"]
        assert b["train_seed"] == 0 and a["versions"] == b["versions"] and a["hardware"] == b["hardware"] == "CPU"


@pytest.mark.timeout(300)
def test_rows_are_scalars_with_a_card_and_unlike_ones_do_not_meet():
    small, other = job((clip(), rec()), steps=2), job((rec(),), steps=2, seed=1)
    few = (quality(), quality(quantise="round", extractor=Careless()))
    jobs = {"few": Evaluate(At(small), few), "other": Evaluate(At(other), few), "more": Evaluate(At(other), (quality(samples=64),)), "squashed": Evaluate(At(other), (quality(resize="squash"),))}
    runs = launch(*jobs.values(), machine=HERE)
    for row in (row for run in runs for row in run.rows()):
        assert all(value is None or isinstance(value, (str, int, float)) for value in row.values())
        assert {"metric", "value", "low", "high", "images", "reference", "protocol", "versions", "hardware", "train_seed", "step", "samples", "flops"} <= row.keys()
        assert row["protocol"] not in PROTOCOLS and json.loads(json.dumps(row)) == row
    table = collect(jobs)
    table = table[table.metric == "rPSNR"].drop_duplicates("series").set_index("series")
    assert len(comparable(table.loc[["few", "other"]])) == 2
    verdict = compare(table.loc["few"], table.loc["other"])
    assert verdict["difference"] == table.value["few"] - table.value["other"] and verdict["better"] in ("first", "second", "not distinguishable")
    with pytest.raises(ValueError, match=r"images: 48 \| 64"):
        compare(table.loc["few"], table.loc["more"])
    with pytest.raises(ValueError, match=r"resize: center_crop \| squash") as error:
        comparable(table)
    assert "images: 48 | 64" in str(error.value) and "reference" not in str(error.value)


def test_a_distance_needs_its_extractor_and_bytes_to_agree():
    model = job((rec(),)).build()
    model.eval()

    def distance(**changes):
        return list(quality(extractor=Careless(), **changes).rows(model, torch.device("cpu")))[-1]

    rounded, truncated = distance(quantise="round"), distance()
    assert rounded["metric"] == "rFD" and rounded["low"] <= rounded["value"] <= rounded["high"]
    with pytest.raises(ValueError, match=r"quantise: truncate \| round"):
        compare(truncated, rounded)
    with pytest.raises(ValueError, match=r"extractor: random:0 \| random:1"):
        compare(truncated, truncated | {"extractor": "random:1"})
    assert compare(truncated, truncated)["better"] == "not distinguishable"


def test_published_settings_are_those_of_the_evaluators():
    "What a protocol fixes and an evaluator can set has the published value, or is set by `settings`."
    rfid = quality(**{k: v for k, v in PROTOCOLS["rfid_val50k"].settings(ReconstructionQuality).items() if k != "extractor"})
    assert (rfid.encode_dtype, rfid.decode_dtype, rfid.quantise, rfid.resize) == ("bf16", "fp32", "truncate", "center_crop")
    assert ZeroShot(data=VAL, **PROTOCOLS["zero_shot_squash256"].settings(ZeroShot)).dtype == "bf16"
    trunk = TrunkProbe(train=VAL, val=VAL, **PROTOCOLS["probe_trunk_dinov2"].settings(TrunkProbe) | {"resize": 256})
    assert (trunk.epochs * trunk.epoch_steps, trunk.batch, trunk.size, trunk.blocks, trunk.scale) == (12_500, 1024, 224, (1, 4), (.08, 1.))
    assert all(set(protocol.fixed) <= set(CARD) for protocol in PROTOCOLS.values())


def test_evaluations_made_before_are_found_again():
    train = Shapes(count=64, size=16)
    assert digest(quality(samples=32, batch=50)) == "a0d6a16a5a"
    assert digest(LinearProbe(train=train, val=VAL, steps=10, batch=32)) == "338d1c820b"
    assert (digest(ZeroShot(data=VAL)), digest(Retrieval(data=VAL))) == ("1e6ef5a2e3", "c86e4e0e28")
    assert digest(quality(encode_dtype="bf16")) != digest(quality())
    for evaluator in (*evaluators(), quality(encode_dtype="bf16", quantise="round")):
        assert loads(dumps(evaluator)) == evaluator


def measured(texts):
    "In every rank: the rows of some evaluators on one untrained model."
    model = job((clip(), rec())).build().eval()
    return [row for text in texts for row in loads(text).rows(model, torch.device("cpu"))]


@pytest.mark.timeout(300)
def test_two_ranks_measure_what_one_does():
    texts = [dumps(e if not isinstance(e, ReconstructionQuality) else replace(e, extractor=None)) for e in evaluators()]
    one, two = pd.DataFrame(measured(texts)), pd.DataFrame(start(measured, texts, nproc=2))
    numbers = one.select_dtypes("number").columns
    assert np.allclose(one[numbers], two[numbers], rtol=1e-5, atol=1e-5, equal_nan=True)
    assert one.drop(columns=numbers).fillna("").equals(two.drop(columns=numbers).fillna(""))
