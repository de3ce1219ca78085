"""Two torchrun agents as two nodes: the same worker on the same run directory, a rank that dies, a node that is gone, a scheduler's signal."""
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import HERE, clip, job, rec, ssl

from vtp.dist import FRESH
from vtp.job import launch, path_of
from vtp.run import Run, create

SMALL = job((clip(), ssl(drop=0.0), rec()), steps=8, log_every=2, keep=(3,))
NODES = replace(HERE, procs=2, sharding="fsdp", timeout_minutes=1)

SCRIPT = """
import os, signal, sys, time
from pathlib import Path
import vtp.pretrain as package
from vtp.dist import rank
from vtp.worker import main

mark, step = Path(sys.argv[1]) / "mark", package.train_step

def train_step(model, batch, opt, config, number):
    {what}
    return step(model, batch, opt, config, number)

package.train_step = train_step
main()
"""
KILLED = SCRIPT.format(what="if number == 5 and rank() == 1 and not mark.exists(): mark.touch(); os.kill(os.getpid(), signal.SIGKILL)")
SLOW = SCRIPT.format(what="time.sleep(.2)")


def nodes(run, folder, script=None, restarts=0, fresh=True):
    "Two agents of one worker each."
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    entry = ["-m", "vtp.worker"]
    if script:
        (folder / "worker.py").write_text(script)
        entry = [str(folder / "worker.py")]
    env = dict(os.environ, PYTHONPATH=str(Path(__file__).parent.parent), OMP_NUM_THREADS="1", **({FRESH: "1"} if fresh else {}))
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", "--max-restarts", str(restarts), "--rdzv-backend", "c10d",
               "--rdzv-endpoint", f"localhost:{port}", "--rdzv-id", "vtp", "--rdzv-conf", "join_timeout=60,last_call_timeout=1", *entry, str(run.path)]
    agents = []
    for number in range(2):
        said = open(folder / f"node{number}.txt", "w")
        agents.append(subprocess.Popen(command, env=env, stdout=said, stderr=subprocess.STDOUT, start_new_session=True))
    return agents


def ended(agents, folder, seconds=150):
    "Exit codes and what was said; nobody is left behind."
    try:
        codes = [agent.wait(seconds) for agent in agents]
    finally:
        for agent in agents:
            try:
                os.killpg(agent.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
    return codes, "".join((folder / f"node{number}.txt").read_text() for number in range(2))


def wait_for(condition, seconds=120):
    for _ in range(10 * seconds):
        if condition():
            return
        time.sleep(0.1)
    raise AssertionError("it did not happen in time")


def state(run):
    return {group: run.at().tensors(group) for group in ("model", "optim")}, (run.path / "metrics.jsonl").read_bytes()


def same(a, b):
    return a[1] == b[1] and all(a[0][g].keys() == b[0][g].keys() and all(torch.equal(a[0][g][n], b[0][g][n]) for n in a[0][g]) for g in a[0])


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    "What two ranks of one machine make, started by `launch`."
    patch = pytest.MonkeyPatch()
    patch.setenv("VTP_RUNS", str(tmp_path_factory.mktemp("straight")))
    run, = launch(SMALL, machine=NODES)
    patch.undo()
    return run


@pytest.mark.timeout(300)
def test_a_rank_that_dies_is_started_anew_with_all_others(tmp_path, straight):
    run = create(path_of(SMALL), SMALL, NODES)
    codes, said = ended(nodes(run, tmp_path, KILLED, restarts=1), tmp_path)
    assert codes == [0, 0] and (run.path / "mark").exists() and run.done, said[-3000:]
    assert same(state(run), state(straight))


@pytest.mark.timeout(300)
def test_without_restarts_the_job_ends_with_the_error_of_the_dead_rank(tmp_path):
    run = create(path_of(SMALL), SMALL, NODES)
    began = time.monotonic()
    codes, said = ended(nodes(run, tmp_path, KILLED), tmp_path)
    assert 0 not in codes and not run.done and run.at().step == 3
    assert "Signal 9 (SIGKILL)" in said and "rank 0 lost another rank" in said and "timeout_minutes" in said and time.monotonic() - began < 150


def test_the_addresses_of_dead_ranks_are_not_given_to_restarted_ones(tmp_path):
    run = create(path_of(SMALL), SMALL, NODES)
    codes, said = ended(nodes(run, tmp_path, restarts=1, fresh=False), tmp_path)
    assert 0 not in codes and f"export {FRESH}=1 before torchrun" in said


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_node_that_is_gone_is_not_waited_for_for_ever(tmp_path):
    long = replace(SMALL, steps=100000, log_every=100000)
    run = create(path_of(long), long, NODES)
    agents = nodes(run, tmp_path, SLOW)
    wait_for(run.checkpoints)
    os.killpg(agents[1].pid, signal.SIGKILL)
    worker = [int(p.name) for p in Path("/proc").iterdir() if p.name.isdigit() and str(agents[1].pid) == _parent(p)]
    for number in worker:
        os.kill(number, signal.SIGKILL)
    codes, said = ended(agents, tmp_path)
    assert codes[0] not in (0, None) and "lost another rank" in said and not run.done and run.at().step == 3


def _parent(process):
    try:
        return (process / "stat").read_text().rsplit(")", 1)[1].split()[1]
    except OSError:
        return ""


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("whom", ["the agents", "the workers"])
def test_a_scheduler_s_signal_saves_and_is_not_restarted(whom, tmp_path):
    "SIGTERM to the agents reaches their workers; SIGUSR1 to the workers of agents that ignore it (the trap in the Slurm script)."
    long = replace(SMALL, steps=100000, log_every=100000)
    run = create(path_of(long), long, NODES)
    agents = nodes(run, tmp_path, SLOW, restarts=3)
    wait_for(run.checkpoints)
    if whom == "the agents":
        for agent in agents:
            agent.send_signal(signal.SIGTERM)
    else:
        for process in Path("/proc").iterdir():
            if process.name.isdigit() and _parent(process) in map(str, (agent.pid for agent in agents)):
                os.kill(int(process.name), signal.SIGUSR1)
    codes, said = ended(agents, tmp_path)
    assert (whom == "the agents") or codes == [0, 0], said[-3000:]
    assert not run.done and run.at().step > 3 and Run(run.path).at().damage() is None
