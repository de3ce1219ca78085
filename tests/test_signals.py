"""A scheduler's SIGTERM, sent to the whole process group, or SIGUSR1 to one rank alone, ends with a checkpoint."""
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny import job

from vtp.job import run_of

SCRIPT = """
from dataclasses import replace
from tiny import HERE, job
from vtp.job import launch
if __name__ == "__main__":
    launch(job(steps=100000, log_every=100000, keep=(1,)), machine=replace(HERE, procs={procs}, workers=1))
"""


@pytest.mark.timeout(240)
@pytest.mark.parametrize("procs,to", [(1, "group"), (2, "group"), (2, "one rank")])
def test_a_signal_to_the_group_or_to_one_rank_saves(procs, to, tmp_path, record):
    endless = job(steps=100000, log_every=100000, keep=(1,))
    (tmp_path / "run.py").write_text(SCRIPT.format(procs=procs))
    env = dict(os.environ, PYTHONPATH=os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parent.parent)]))
    process = subprocess.Popen([sys.executable, str(tmp_path / "run.py")], env=env, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    run = run_of(endless)
    for _ in range(600):                            # the checkpoint of step 1 shows that training has begun
        if run.checkpoints() or process.poll() is not None:
            break
        time.sleep(0.2)
    time.sleep(2)
    if to == "group": os.killpg(process.pid, signal.SIGTERM)
    else: os.kill(int((run.path / "lock").read_text().split()[0]), signal.SIGUSR1)      # rank 0; the other is not told
    said = process.communicate(timeout=120)[1]
    assert process.returncode != 0 and not run.done
    assert run.checkpoints() and run.latest().step > 1, said[-2000:]
    if to == "one rank": assert "was stopped and has saved its state: launch again" in said, said[-2000:]
    record(fault=f"a signal to {to} of {procs}", promise="the step is finished and saved, all ranks end", tried=1)
