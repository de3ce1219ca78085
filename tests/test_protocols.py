"""Every number carries its card; probes leave no trace in a training; unlike cards do not meet in a comparison."""
import json
import random
import signal
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
from vtp.ranks import start
from vtp.evaluation.linear_probe import LinearProbe
from vtp.evaluation.protocol import CARD, PROTOCOLS, Evaluate, comparable, compare, trained_card
from vtp.evaluation.reconstruction import ReconstructionQuality
from vtp.evaluation.trunk_probe import TrunkProbe
from vtp.evaluation.zero_shot import Retrieval, ZeroShot
from vtp.finetune_decoder import FinetuneDecoder
from vtp.generation.dit import DiTConfig
from vtp.generation.flow import FlowConfig
from vtp.generation.latents import CacheLatents
from vtp.generation.train import TrainDiT
from vtp.interfaces import Evaluator
from vtp.job import At, launch, run_of
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


CALLS, TROUBLE = [], {}


@dataclass(frozen=True, kw_only=True)
class Scripted(Evaluator):
    "Two rows; between them, once, whatever TROUBLE holds for its name."
    name: str

    def rows(self, model, device):
        CALLS.append(self.name)
        yield {"metric": f"{self.name} 1", "value": 1}
        TROUBLE.pop(self.name, lambda: None)()
        yield {"metric": f"{self.name} 2", "value": 2}


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


def fail():
    raise OSError("no disk")


@pytest.mark.timeout(120)
def test_an_evaluation_goes_on_behind_the_last_complete_evaluator():
    small = job((rec(),), steps=1)
    evaluation = Evaluate(At(small), tuple(Scripted(name=name) for name in "abcd"))
    CALLS.clear()
    TROUBLE.update(b=fail, c=lambda: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(OSError, match="no disk"):
        launch(evaluation, machine=HERE)
    assert CALLS == ["a", "b"] and [row["metric"] for row in run_of(evaluation).rows()] == ["a 1", "a 2", "b 1"]
    with pytest.raises(InterruptedError, match="launch again"):
        launch(evaluation, machine=HERE)
    assert CALLS == ["a", "b", "b", "c"]          # c, which the signal met, was finished
    run, = launch(evaluation, machine=HERE)
    assert CALLS == ["a", "b", "b", "c", "d"] and run.done
    assert [row["metric"] for row in run.rows()] == [f"{name} {i}" for name in "abcd" for i in (1, 2)]
    whole = Evaluate(At(small), tuple(Scripted(name=name) for name in "abc"))
    TROUBLE.update(c=lambda: signal.raise_signal(signal.SIGTERM))
    assert launch(whole, machine=HERE)[0].done    # a signal in the last one: there is nothing left to stop


@pytest.mark.timeout(120)
def test_torn_rows_are_measured_anew():
    evaluation = Evaluate(At(job((rec(),), steps=1, seed=7)), tuple(Scripted(name=name) for name in "ab"))
    CALLS.clear()
    TROUBLE.update(b=fail)
    with pytest.raises(OSError, match="no disk"):
        launch(evaluation, machine=HERE)
    rows = run_of(evaluation).path / "metrics.jsonl"
    rows.write_bytes(rows.read_bytes()[:20])
    run, = launch(evaluation, machine=HERE)
    assert CALLS == ["a", "b", "a", "b"] and [row["metric"] for row in run.rows()] == ["a 1", "a 2", "b 1", "b 2"]


def test_generators_of_other_data_laws_and_averages_do_not_meet():
    trained = TrainDiT(CacheLatents(At(job((rec(),))), Shapes(count=64, size=16)), DiTConfig(32, 1, 2, channels=8, grid=4, classes=48), steps=2)
    plain = {"metric": "gFD", "value": 2.0, "low": 1.0, "high": 3.0, "protocol": "mine", **trained_card(trained)}
    latents = trained.latents
    changed = {"dit_data": replace(trained, latents=replace(latents, data=Shapes(count=64, size=16, split="val"))), "flow": replace(trained, flow=FlowConfig(sigma=0.5)),
               "ema": replace(trained, ema=0.0), "dit_dtype": replace(trained, dtype="fp32")}
    for field, other in changed.items():
        with pytest.raises(ValueError, match=f"{field}: .* \\| [^;]*$"):
            compare(plain, plain | trained_card(other))
    assert {field for field in ("dit_data", "flow", "ema", "dit_dtype") if field in plain} == changed.keys() and trained_card(latents.of.job) == {}
    for others in (replace(latents, samples=32), replace(latents, flips=False), replace(latents, resize="squash"), replace(latents, dtype="fp32")):
        assert trained_card(replace(trained, latents=others))["dit_data"] != plain["dit_data"]


def test_a_row_about_a_generator_says_how_it_was_trained():
    trained = TrainDiT(CacheLatents(At(job((rec(),), steps=2)), Shapes(count=64, size=16, classes=4)), DiTConfig(32, 1, 2, channels=8, grid=4, classes=4), steps=2, batch=8, ema=0.5, dtype="fp32")
    run, = launch(Evaluate(At(trained), (Scripted(name="a"),)), machine=HERE)
    for row in run.rows():
        assert trained_card(trained).items() <= row.items() and row["dit_samples"] == 16 and row["ema"] == 0.5


def test_what_can_not_be_measured_is_said_before_training():
    small, train = job((clip(), rec())), Shapes(count=64, size=16)
    linear, trunk = LinearProbe(train=train, val=VAL, steps=10, batch=32, tap="trunk", pool="cls+mean", blocks=(1, 2)), TrunkProbe(train=train, val=VAL, batch=16, size=16, resize=16, blocks=(1, 2))
    zero_shot, retrieval = ZeroShot(data=VAL), Retrieval(data=VAL)
    for fine in (linear, trunk, zero_shot, retrieval):
        fine.check(small)
        fine.check(FinetuneDecoder(At(small), train, rec(), steps=100))
    for wrong, words in ((replace(linear, batch=58), "57 of 64 training samples"), (replace(linear, val_samples=65), "val_samples=65"), (replace(linear, train_samples=65), "train_samples=65"), (replace(linear, blocks=(3,)), "2 blocks"),
                         (replace(trunk, blocks=(3,)), "2 blocks"), (replace(trunk, size=14), "14"), (replace(trunk, val_samples=65), "val_samples=65"), (replace(zero_shot, samples=65), "samples=65"), (replace(retrieval, samples=65), "samples=65")):
        with pytest.raises(ValueError, match=words):
            wrong.check(small)
        with pytest.raises(ValueError, match=words):
            launch(Evaluate(At(small), (wrong,)), machine=HERE)


@pytest.mark.parametrize("evaluator", evaluators()[1:], ids=lambda e: type(e).__name__)
def test_the_precision_of_features_is_not_ignored(evaluator):
    "The tokenizer, and with it whatever reads it, runs under autocast in bf16 and without in fp32."
    for dtype in ("bf16", "fp32"):
        model, seen = job((clip(), rec())).build().eval(), set()
        for module in (model.tokenizer, model.tokenizer.encoder.trunk):
            for child in module.modules():
                child.register_forward_hook(lambda *_: seen.add(torch.is_autocast_enabled("cpu")))
        rows = list(replace(evaluator, dtype=dtype).rows(model, torch.device("cpu")))
        assert seen == {dtype == "bf16"} and all(row["dtype"] == dtype for row in rows)


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
