"""Two torchrun agents as two nodes: the same worker on the same run directory, a rank that dies, a node that is gone, a cable that is pulled, a scheduler's signal, the Slurm script."""
import os
import shutil
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import HERE, clip, job, ranks, rec, ssl, wait_for

import vtp.job
from vtp.job import launch, path_of
from vtp.ranks import FRESH, session
from vtp.run import Run, create

ROOT = Path(__file__).resolve().parent.parent
SMALL = job((clip(), ssl(), rec()), steps=8, log_every=2, keep=(3,))
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
RAISES = SCRIPT.format(what="if number == 5 and rank() == 1: raise ValueError('nothing in particular')")
KILLED = SCRIPT.format(what="if number == 5 and rank() == 1 and not mark.exists(): mark.touch(); os.kill(os.getpid(), signal.SIGKILL)")
SLOW = SCRIPT.format(what="time.sleep(.2)")


def nodes(run, folder, script=None, restarts=0, fresh=True, host="localhost", within=((), ()), addresses=()):
    "Two agents of one worker each; `within`: what runs the command of each, `addresses`: where each is found."
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    entry = ["-m", "vtp.worker"]
    if script:
        (folder / "worker.py").write_text(script)
        entry = [str(folder / "worker.py")]
    env = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1", **({FRESH: "1"} if fresh else {}))
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", "--max-restarts", str(restarts), "--rdzv-backend", "c10d",
               "--rdzv-endpoint", f"{host}:{port}", "--rdzv-id", "vtp", "--rdzv-conf", "join_timeout=60,last_call_timeout=1", *entry, str(run.path)]
    agents = []
    for number in range(2):
        said = open(folder / f"node{number}.txt", "w")
        if addresses:                    # torchrun looks for an address among those of the machine's name, which both share
            mine = [*command[:3], "--local-addr", addresses[number], *command[3:]]
            mine[mine.index("--rdzv-conf") + 1] += f",is_host={int(number == 0)}"
        agents.append(subprocess.Popen([*within[number], *(mine if addresses else command)], env=env, stdout=said, stderr=subprocess.STDOUT, start_new_session=True))
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


def state(run):
    return {group: run.at().tensors(group) for group in ("model", "optim")}, (run.path / "metrics.jsonl").read_bytes()


def same(a, b):
    return a[1] == b[1] and all(a[0][g].keys() == b[0][g].keys() and all(torch.equal(a[0][g][n], b[0][g][n]) for n in a[0][g]) for g in a[0])


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    "What two ranks of one machine make, started by `launch`."
    patch = pytest.MonkeyPatch()
    patch.setenv("VTP_RUNS", str(tmp_path_factory.mktemp("straight")))
    patch.setattr(vtp.job, "start", ranks)
    run, = launch(SMALL, machine=NODES)
    patch.undo()
    return run


@pytest.mark.timeout(300)
def test_a_rank_that_dies_is_started_anew_with_all_others(tmp_path, straight, record):
    run = create(path_of(SMALL), SMALL, NODES)
    codes, said = ended(nodes(run, tmp_path, KILLED, restarts=1), tmp_path)
    assert codes == [0, 0] and (run.path / "mark").exists() and run.done, said[-3000:]
    assert same(state(run), state(straight))
    record(fault="kill -9 of a rank, two nodes", promise="max_restarts resumes it, bitwise", tried=1)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("script,error", [(KILLED, "Signal 9 (SIGKILL)"), (RAISES, "nothing in particular")], ids=["killed", "raises"])
def test_without_restarts_the_job_ends_with_the_error_of_the_dead_rank(script, error, tmp_path, record):
    "On both nodes, long before anybody's patience is at an end (a minute): the one says what killed its rank, the other that it has lost one."
    run = create(path_of(SMALL), SMALL, NODES)
    codes, said = ended(nodes(run, tmp_path, script), tmp_path)
    assert 0 not in codes and not run.done and run.at().step == 3
    assert error in said, said[-3000:]
    assert "rank 0 lost another rank" in said and "timeout_minutes" in said or "Signal 15 (SIGTERM)" in said, said[-3000:]      # it noticed, or its agent heard of it first and ended it
    lost = run.path / "mark"
    assert error != "Signal 9 (SIGKILL)" or (tmp_path / "node0.txt").stat().st_mtime - lost.stat().st_mtime < 55
    record(fault="a rank is killed or raises, two nodes", promise="the job ends with that rank's error", tried=1)


def test_the_addresses_of_dead_ranks_are_not_given_to_restarted_ones(monkeypatch):
    "What torchrun says to a rank of a job that it may restart, and which is to meet the others in the agents' store."
    for name, value in dict(WORLD_SIZE="2", TORCHELASTIC_USE_AGENT_STORE="True", TORCHELASTIC_MAX_RESTARTS="3").items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=f"export {FRESH}=1 before torchrun"), session():
        raise AssertionError


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_torchrun_is_refused_without_the_variable(tmp_path):
    run = create(path_of(SMALL), SMALL, NODES)
    codes, said = ended(nodes(run, tmp_path, restarts=1, fresh=False), tmp_path)
    assert 0 not in codes and f"export {FRESH}=1 before torchrun" in said


@pytest.fixture
def namespaces():
    "Two network namespaces with a cable between them: how a command is run in each, and the first one's address. Only root can have them."
    ip = shutil.which("ip")
    names = [f"vtp{os.getpid()}{side}" for side in "ab"]
    made = [["netns", "add", names[0]], ["netns", "add", names[1]], ["link", "add", "vtp0", "netns", names[0], "type", "veth", "peer", "name", "vtp0", "netns", names[1]]]
    made += [["-n", name, *what] for number, name in enumerate(names) for what in (["addr", "add", f"10.77.0.{number + 1}/24", "dev", "vtp0"], ["link", "set", "vtp0", "up"], ["link", "set", "lo", "up"])]
    try:
        for what in made if ip else []:
            found = subprocess.run([ip, *what], capture_output=True, text=True)
            if found.returncode:
                pytest.skip(f"no network namespaces here: ip {' '.join(what)}: {found.stderr.strip()}")
        if not ip:
            pytest.skip("no network namespaces here: there is no ip command")
        yield names, "10.77.0.1"
    finally:
        for name in names if ip else []:
            subprocess.run([ip, "netns", "del", name], capture_output=True)


def apart(names):
    "Each node in its own network, where it knows itself by its address there."
    return [["ip", "netns", "exec", name, "env", "GLOO_SOCKET_IFNAME=vtp0"] for name in names]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_nodes_with_a_network_between_them(tmp_path, straight, namespaces, record):
    "The agents have nothing in common but a cable and a folder; a rank is killed on the way."
    names, host = namespaces
    run = create(path_of(SMALL), SMALL, NODES)
    codes, said = ended(nodes(run, tmp_path, KILLED, restarts=1, host=host, within=apart(names), addresses=("10.77.0.1", "10.77.0.2")), tmp_path)
    assert codes == [0, 0] and (run.path / "mark").exists() and run.done, said[-3000:]
    assert same(state(run), state(straight))
    record(fault="kill -9 of a rank, two network namespaces", promise="max_restarts resumes it, bitwise", tried=1)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_cable_that_is_pulled(tmp_path, namespaces, record):
    "Nobody is dead, nobody answers: the ranks of both nodes end after the timeout. (The second node's agent may wait on for the first's: Slurm ends it, --kill-on-bad-exit.)"
    names, host = namespaces
    long, machine = replace(SMALL, steps=100000, log_every=100000), replace(NODES, timeout_minutes=0.2)
    run = create(path_of(long), long, machine)
    agents = nodes(run, tmp_path, SLOW, host=host, within=apart(names), addresses=("10.77.0.1", "10.77.0.2"))
    wait_for(run.checkpoints)
    subprocess.run(["ip", "-n", names[1], "link", "set", "vtp0", "down"], check=True)
    try:
        wait_for(lambda: all("did not answer within 12 s" in (tmp_path / f"node{number}.txt").read_text() for number in range(2)), 60)
    finally:
        agents[1].kill()
        codes, said = ended(agents, tmp_path)
    assert 0 not in codes and not run.done and run.at().step >= 3 and run.at().damage() is None
    record(fault="the network between two nodes is cut", promise="the job ends after timeout_minutes, its last checkpoint intact", tried=1)


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
    "SIGTERM to the agents reaches their workers; SIGUSR1 comes to the workers of agents that ignore it."
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


SRUN = """#!/bin/bash
# The step's command on each of two nodes, which are this machine; 0 if all ended well.
shift                   # --kill-on-bad-exit=1
for node in 0 1; do SLURM_PROCID=$node setsid "$@" > "$VTP_SAID/node$node.txt" 2>&1 & pids="$pids $!"; done
code=0; for pid in $pids; do wait "$pid" || code=1; done; exit $code
"""
SCONTROL = """#!/bin/bash
if [ "$1 $2" = "show hostnames" ]; then echo localhost; echo localhost; else echo "$@" >> "$VTP_SAID/asked.txt"; fi
"""


def submitted(run, folder, restart=0):
    "The script as Slurm starts it, with a Slurm of two files in front of the real one."
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    slurm = dict(SLURM_JOB_ID=str(port % 20000 + 20000 * 7), SLURM_NNODES="2", SLURM_JOB_NODELIST="node[1-2]", SLURM_CPUS_ON_NODE="1", SLURM_GPUS_ON_NODE="1", SLURM_RESTART_COUNT=str(restart))
    env = dict(os.environ, PATH=f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}", PYTHONPATH=str(ROOT), VTP_SAID=str(folder), **slurm)
    return subprocess.Popen(["bash", str(ROOT / "tools" / "pretrain.slurm"), str(run.path)], env=env, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def step_of(folder):
    "The processes of the step: all that `srun` has started."
    mark, found = f"VTP_SAID={folder}".encode(), []
    for process in Path("/proc").iterdir():
        try:
            if process.name.isdigit() and mark in (read := (process / "environ").read_bytes()) and b"SLURM_PROCID=" in read:
                found.append(int(process.name))
        except OSError:
            pass
    return found


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_slurm_script(tmp_path, monkeypatch, record):
    "Its time is up in the middle: it saves and is put back into the queue, and is finished the next time, bitwise as if nothing had happened; a run that is done is left alone."
    long = replace(SMALL, steps=40, log_every=20)
    monkeypatch.setattr(vtp.job, "start", ranks)
    monkeypatch.setenv("VTP_RUNS", str(tmp_path / "straight"))
    whole, = launch(long, machine=NODES)
    monkeypatch.setenv("VTP_RUNS", str(tmp_path / "runs"))
    run = create(path_of(long), long, NODES)
    script = submitted(run, tmp_path)
    wait_for(run.checkpoints)
    for process in step_of(tmp_path):
        os.kill(process, signal.SIGUSR1)                                    # as Slurm does: to all of the step
    said, asked = script.communicate(timeout=150)[0], tmp_path / "asked.txt"
    nodes_said = "".join(file.read_text() for file in tmp_path.glob("node*.txt"))
    assert script.returncode == 0 and asked.exists(), said + nodes_said[-3000:]
    assert asked.read_text().startswith("requeue ") and not run.done and 3 <= run.at().step < 40
    script = submitted(run, tmp_path, restart=1)
    said = script.communicate(timeout=150)[0]
    assert script.returncode == 0 and run.done and same(state(run), state(whole)) and len(asked.read_text().splitlines()) == 1, said
    script = submitted(run, tmp_path, restart=2)
    assert "is done" in script.communicate(timeout=60)[0] and script.returncode == 0
    record(fault="the time of a Slurm job is up, two nodes", promise="saved, put back, finished bitwise", tried=1)


def test_the_slurm_script_wants_a_run_directory(tmp_path):
    for folder, text in ((tmp_path, "no run directory"), (tmp_path / "nowhere", "No such file")):
        script = submitted(Run(folder), tmp_path)
        assert text in script.communicate(timeout=60)[0] and script.returncode == 2
    assert subprocess.run(["bash", "-n", str(ROOT / "tools" / "pretrain.slurm")]).returncode == 0
