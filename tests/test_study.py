"""A study stops when its minutes are over, several jobs or processes at once included, loses nothing, and goes on."""
from dataclasses import replace

import pytest
from tiny import job, rec

from vtp.job import Machine, launch, run_of
from vtp.plan import plan
from vtp.recipes import VTP, at
from vtp.study import forecast, study, will_fit

STEPS = 80
TWO, RANKS = Machine(jobs=2, workers=0, device="cpu"), Machine(procs=2, workers=0, device="cpu")


def stopped_at(jobs, machine):
    "Studies with ever more time, until one is stopped in a training; the steps that were saved."
    for minutes in (.06 + .03 * i for i in range(20)):
        with pytest.raises(InterruptedError, match=f"minutes are over: 0 of {len(jobs)} jobs are done"): study(*jobs, scale="smoke", machine=machine, minutes=minutes)
        steps = [c.step for one in jobs for c in run_of(one).checkpoints()]
        if steps: return steps
    pytest.fail("no training was begun in .6 minutes")


@pytest.mark.timeout(300)
@pytest.mark.parametrize("number, machine", [(2, TWO), pytest.param(1, RANKS, marks=pytest.mark.slow)], ids=["two jobs", "two processes"])
def test_what_runs_at_once_stops_together_and_goes_on(tmp_path, monkeypatch, number, machine):
    jobs = [replace(at(VTP, "smoke"), steps=STEPS, seed=seed, log_every=STEPS // 2) for seed in range(number)]      # seconds of training, so that there is a middle
    assert all(0 < step < STEPS for step in stopped_at(jobs, machine))
    assert all(run.done for run in study(*jobs, scale="smoke", machine=machine, minutes=60))
    rows = [run_of(one).rows() for one in jobs]
    monkeypatch.setenv("VTP_RUNS", str(tmp_path / "again"))
    assert rows == [run.rows() for run in launch(*jobs, machine=machine)]


def test_a_stop_that_is_not_the_deadline_stays_one(monkeypatch):
    def stopped(*jobs, machine): raise InterruptedError("pretrain-x was stopped and has saved its state")
    monkeypatch.setattr("vtp.study.launch", stopped)
    with pytest.raises(InterruptedError, match="^pretrain-x"): study(job((rec(),)), scale="smoke", minutes=60)


def test_nothing_to_forecast():
    assert plan([]) == () and "nothing is forecast" in will_fit(forecast(plan([]), {}, []), 1, {})
