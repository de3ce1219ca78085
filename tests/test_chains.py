"""The whole chain at its smallest: the second stage improves what it is for, the DiT makes something of noise, and what is shared is trained once."""
import pytest
import torch
from tiny import HERE

from vtp.chains import chain
from vtp.evaluation.protocol import Evaluate
from vtp.job import At, launch, load, run_of
from vtp.recipes import AE, at, sources


@pytest.mark.timeout(400)
def test_smoke(tmp_path, monkeypatch):
    monkeypatch.setenv("VTP_CACHE", str(tmp_path / "cache"))
    whole = chain(at(AE, "smoke"), sources("smoke")[1], "smoke")
    before = Evaluate(At(whole.tokenizer), whole.reconstruction.evaluators)
    launch(before, whole.reconstruction, whole.generation[-1], machine=HERE)
    first, second = ({row["metric"]: row for row in run_of(job).rows()} for job in (before, whole.reconstruction))
    assert second["rFD"]["value"] < first["rFD"]["value"] and second["rPSNR"]["value"] > first["rPSNR"]["value"]
    assert load(whole.decoder).tokenizer.encoder_hash() == load(whole.tokenizer).tokenizer.encoder_hash()

    judge = whole.generation[-1].evaluators[0]
    made = {row["metric"]: row for row in run_of(whole.generation[-1]).rows()}
    assert made["gFD"]["dit_samples"] == 6400 and made["gFD"]["low"] <= made["gFD"]["value"] <= made["gFD"]["high"]
    noise = load(whole.dit)
    noise.velocity = lambda x, t, labels: torch.zeros_like(x)
    noise = next(judge.rows(noise, torch.device("cpu")))
    assert noise["metric"] == "gFD" and made["gFD"]["value"] < .9 * noise["value"]
    stamps = [(run.path / "done").stat().st_mtime_ns for run in map(run_of, (whole.tokenizer, whole.dit, whole.generation[-1]))]
    launch(whole.generation[-1], machine=HERE)
    assert stamps == [(run.path / "done").stat().st_mtime_ns for run in map(run_of, (whole.tokenizer, whole.dit, whole.generation[-1]))]
