"""Independent jobs at the same time: the same results, inputs first, and an error that arrives."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from dataclasses import replace
from tiny import HERE, clip, job, rec, wait_for

from vtp.evaluation.protocol import Evaluate
from vtp.evaluation.reconstruction import ReconstructionQuality
from vtp.data.shapes import Shapes
from vtp.job import At, Machine, launch, run_of
from vtp.perceptual import PerceptualConfig


def evaluation(of):
    data = Shapes(count=32, size=16, split="val")
    return Evaluate(At(of), (ReconstructionQuality(data=data, perceptual=PerceptualConfig(kind="random_features")),))


@pytest.mark.timeout(300)
def test_two_at_a_time_give_what_one_after_the_other_gives(tmp_path, monkeypatch):
    trainings = [job((rec(),), steps=4, log_every=2, seed=seed) for seed in range(3)]
    measures = [evaluation(of) for of in trainings]
    monkeypatch.setenv("VTP_RUNS", str(tmp_path / "alone"))
    alone = [(run.path / "metrics.jsonl").read_bytes() for run in launch(*trainings, *measures, machine=HERE)]
    monkeypatch.setenv("VTP_RUNS", str(tmp_path / "together"))
    runs = launch(*measures, *trainings, machine=replace(HERE, jobs=2))
    together = [(run.path / "metrics.jsonl").read_bytes() for run in runs]
    assert together[3:] == alone[:3] and together[:3] == alone[3:]
    assert all(run.done for run in runs)
    for of, measure in zip(trainings, measures):                 # an input is done before its user begins
        assert (run_of(of).path / "done").stat().st_mtime_ns <= (run_of(measure).path / "env.json").stat().st_mtime_ns


@pytest.mark.timeout(300)
def test_an_error_arrives_and_what_ran_beside_it_is_finished(tmp_path, monkeypatch):
    import vtp.job as package

    monkeypatch.setattr(package.Job, "check", lambda self: None)
    good = job((rec(),), steps=4)
    bad = job((clip(batch=15), rec(batch=5)), tokenizer=replace(good.tokenizer, image_size=32), steps=4)       # crops do not fit: without checks, the worker finds it
    monkeypatch.setattr(type(good), "check", lambda self: None)
    monkeypatch.setattr(type(good), "checkpoint_bytes", lambda self: None)             # it builds the model, too
    with pytest.raises(ValueError, match="must be the tokenizer's image_size, 32"):
        launch(good, bad, evaluation(good), machine=replace(HERE, jobs=2))
    assert run_of(good).done and not run_of(bad).done
    assert json.loads((run_of(good).path / "env.json").read_text())["world"] == 1


def test_jobs_must_be_a_number_of_jobs():
    with pytest.raises(ValueError, match="jobs=0 must be at least 1"):
        Machine(jobs=0)


ORPHANS = """
from dataclasses import replace
from tiny import HERE, job, rec
from vtp.job import launch
if __name__ == "__main__":
    launch(job((rec(),), steps=100000, log_every=100000, keep=(1,)), job((rec(),), steps=100000, log_every=100000, keep=(1,), seed=1), machine=replace(HERE, jobs=2))
"""


@pytest.mark.timeout(240)
def test_jobs_do_not_outlive_who_launched_them(tmp_path):
    (tmp_path / "run.py").write_text(ORPHANS)
    env = dict(os.environ, PYTHONPATH=os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parent.parent)]))
    process = subprocess.Popen([sys.executable, str(tmp_path / "run.py")], env=env, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    runs = [run_of(job((rec(),), steps=100000, log_every=100000, keep=(1,), seed=seed)) for seed in range(2)]
    wait_for(lambda: all(run.checkpoints() for run in runs), 120)          # both train
    process.kill()
    process.wait()
    owners = [int((run.path / "lock").read_text().split()[0]) for run in runs]
    wait_for(lambda: not any(Path(f"/proc/{owner}").exists() for owner in owners), 60)
    assert all(run.latest().step > 1 and not run.done for run in runs)      # saved, not lost
