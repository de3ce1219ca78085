"""A study stops when its minutes are over, several jobs at once included, loses nothing, and goes on."""
from dataclasses import replace

import pytest
from tiny import job, rec

from vtp.job import Machine, launch, run_of
from vtp.plan import plan
from vtp.study import forecast, study, will_fit

TWO = Machine(jobs=2, workers=0)


@pytest.mark.timeout(300)
def test_two_jobs_at_once_stop_together_and_go_on(tmp_path, monkeypatch):
    jobs = [replace(job((rec(),)), steps=40, seed=seed, keep=()) for seed in (1, 2)]
    with pytest.raises(InterruptedError, match="minutes are over: 0 of 2 jobs are done"): study(*jobs, scale="smoke", machine=TWO, minutes=.02)
    stopped = [[c.step for c in run_of(one).checkpoints()] for one in jobs]
    assert all(not steps or 0 < steps[-1] < 40 for steps in stopped)
    assert all(run.done for run in study(*jobs, scale="smoke", machine=TWO, minutes=60))
    rows = [run_of(one).rows() for one in jobs]
    monkeypatch.setenv("VTP_RUNS", str(tmp_path / "again"))
    assert rows == [run.rows() for run in launch(*jobs, machine=TWO)]


def test_a_stop_that_is_not_the_deadline_stays_one(monkeypatch):
    def stopped(*jobs, machine): raise InterruptedError("pretrain-x was stopped and has saved its state")
    monkeypatch.setattr("vtp.study.launch", stopped)
    with pytest.raises(InterruptedError, match="^pretrain-x"): study(job((rec(),)), scale="smoke", minutes=60)


def test_nothing_to_forecast():
    assert plan([]) == () and "nothing is forecast" in will_fit(forecast(plan([]), {}), 1, {})
