"""A real Slurm, of two nodes on this machine, that trains what `smollm3 launch slurm` prints."""

import getpass
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from runs import ROOT, losses, same_end, wait_for, wait_for_step, write_corpus

from smollm3_jax.commands.main import main

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "scontrol", "munged")
PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"
MISSING = [name for name in PROGRAMS if not shutil.which(name, path=PATH)]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"no {' '.join(MISSING)}: apt-get install slurmctld slurmd munge"),
    pytest.mark.skipif(
        subprocess.run(["unshare", "--uts", "--mount", "true"], capture_output=True).returncode != 0,
        reason="only root can give one machine two names",
    ),
]

# Both nodes are this machine, under a name each, in a namespace each: Debian's slurmd has no other way to be two.
CONF = """
ClusterName=test
SlurmctldHost=node1(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_min_interval=0,batch_sched_delay=0
GresTypes=gpu
ReturnToService=2
MpiDefault=none
KillWait=30
NodeName=node1 NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 Gres=gpu:1 State=UNKNOWN
NodeName=node2 NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 Gres=gpu:1 State=UNKNOWN
PartitionName=all Nodes=node1,node2 Default=YES MaxTime=INFINITE State=UP
"""
TOML = """
[run]
steps = 40
[model]
dtype = "float32"
[data]
length = 16
rows = 4
[optimizer]
learning_rate = 1e-3
warmup_steps = 2
[checkpoint]
every = 10
"""


def free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def as_host(name, folder):
    """What to put before a command that takes this machine for a host of that name."""
    there = f'hostname {name} && mount --bind {folder}/hosts /etc/hosts && exec "$@"'
    return ["unshare", "--uts", "--mount", "sh", "-c", there, "sh"]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """Runs Slurm's commands in a cluster of this machine's own, which ends with the tests."""
    folder = tmp_path_factory.mktemp("slurm")
    for name in ("state", "node1", "node2"):
        (folder / name).mkdir()
    (folder / "slurm.conf").write_text(CONF.format(ports=free_ports(3), user=getpass.getuser(), folder=folder))
    (folder / "gres.conf").write_text("Name=gpu File=/dev/null\n")
    (folder / "hosts").write_text("127.0.0.1 localhost node1 node2\n")
    (folder / "munge.key").write_bytes(os.urandom(1024))
    (folder / "munge.key").chmod(0o400)
    folder.chmod(0o755)  # munged wants that no other may write there
    env = {**os.environ, "PATH": PATH, "SLURM_CONF": str(folder / "slurm.conf")}
    files = [
        f"--{name}={folder}/munge.{name.split('-')[0]}" for name in ("socket", "pid-file", "log-file", "seed-file")
    ]
    daemons = [
        ["munged", "--foreground", "--force", f"--key-file={folder}/munge.key", *files],
        [*as_host("node1", folder), "slurmctld", "-D", "-c"],
        [*as_host("node1", folder), "slurmd", "-D"],
        [*as_host("node2", folder), "slurmd", "-D"],
    ]

    def run(*words, **more):
        done = subprocess.run(words, env={**env, **more}, cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, (words, done.stdout, done.stderr, (folder / "said.txt").read_text()[-3000:])
        return done.stdout

    started = []
    try:
        with (folder / "said.txt").open("w") as said:
            for daemon in daemons:
                started.append(subprocess.Popen(daemon, env=env, stdout=said, stderr=said))
                if daemon[0] == "munged":
                    wait_for(lambda: (folder / "munge.socket").exists(), 30)
        wait_for(lambda: run("sinfo", "-h", "-t", "idle", "-o", "%D").strip() == "2", 60)
        yield run
    finally:
        for process in reversed(started):
            process.terminate()
        for process in started:
            process.wait(30)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model, a corpus, settings, and the command `smollm3` of this checkout."""
    folder = tmp_path_factory.mktemp("place")
    tiny.talking_checkpoint(folder / "model")
    (folder / "run.toml").write_text(TOML)
    write_corpus(folder / "corpus.jsonl")
    (folder / "bin").mkdir()
    program(folder / "bin" / "smollm3", f'exec {sys.executable} -m smollm3_jax "$@"')
    return folder


def program(path, text):
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)


def submitted(slurm, place, run, capsys, *words, bin="bin", **env):
    """The number of the job that the printed script becomes, on two nodes of one GPU each."""
    settings = [f"run.dir={run}", f"model.path={place / 'model'}", f"data.path={place / 'corpus.jsonl'}", *words]
    launch = ["launch", "slurm", "--topology", "h100:2", "--gpus-per-node", "1", "--no-plan", "--grace", "60"]
    capsys.readouterr()
    assert main([*launch, "--config", str(place / "run.toml"), *settings]) == 0
    script = run.with_suffix(".sh")
    script.write_text(capsys.readouterr().out)
    env = {"PATH": f"{place / bin}:{PATH}", "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", **env}
    return slurm("sbatch", "--parsable", script, JAX_DISABLE_MOST_OPTIMIZATIONS="true", **env).strip()


def about(slurm, job):
    return dict(re.findall(r"(\w+)=(\S*)", slurm("scontrol", "show", "job", job)))


def wait_for_state(slurm, job, state, seconds):
    wait_for(lambda: about(slurm, job)["JobState"] == state, seconds)


def test_a_job_on_two_nodes_is_stopped_goes_back_to_the_queue_and_ends_as_if_nothing_had_been(slurm, place, capsys):
    whole = submitted(slurm, place, place / "whole", capsys)
    wait_for_state(slurm, whole, "COMPLETED", 300)
    stopped = submitted(slurm, place, place / "stopped", capsys)
    wait_for_step(place / "stopped", 3, 200)
    slurm("scancel", "--signal=TERM", stopped)  # as Slurm does --grace seconds before a job's time is up
    wait_for_state(slurm, stopped, "PENDING", 100)
    reached = max(losses(place / "stopped"))
    assert 3 <= reached < 40
    wait_for_state(slurm, stopped, "COMPLETED", 300)
    ended = about(slurm, stopped)
    assert (ended["Restarts"], ended["NumNodes"], ended["ExitCode"]) == ("1", "2", "0:0")
    said = Path(ended["StdOut"]).read_text()
    assert "process 0 (this)" in said and "process 1 (this)" in said and f"going on from step {reached}" in said
    same_end(place / "stopped", place / "whole", 40)


# Stands in for a run that saves when it is told to.
SAVES = """
trap 'exit 75' TERM
touch begun.$SLURM_JOB_ID.$SLURM_PROCID
while true; do sleep 0.1; done
"""


def test_a_job_that_is_cancelled_stays_so(slurm, place, capsys):
    """Its processes save and exit 75 all the same."""
    (place / "saves").mkdir()
    program(place / "saves" / "smollm3", f"cd {place}\n{SAVES}")
    job = submitted(slurm, place, place / "cancelled", capsys, bin="saves")
    wait_for(lambda: len(list(place.glob(f"begun.{job}.*"))) == 2, 60)
    slurm("scancel", job)
    wait_for_state(slurm, job, "CANCELLED", 60)
    wait_for(lambda: not slurm("squeue", "-h", "-j", job).strip(), 60)
    assert about(slurm, job)["JobState"] == "CANCELLED"
