"""A real Slurm, of two nodes on this machine, that trains what `smollm3 launch slurm` prints."""

import contextlib
import getpass
import io
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
from runs import TOML, environment, losses, same_end, wait_for, wait_for_step, write_corpus

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
KillWait=10
NodeName=node1 NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 Gres=gpu:1 State=UNKNOWN
NodeName=node2 NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 Gres=gpu:1 State=UNKNOWN
PartitionName=all Nodes=node1,node2 Default=YES MaxTime=INFINITE State=UP
"""
STEPS = 40  # enough to be stopped on the way


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
                # (In a session of their own: Ctrl-C is for the tests, which end them.)
                started.append(subprocess.Popen(daemon, env=env, stdout=said, stderr=said, start_new_session=True))
                if daemon[0] == "munged":
                    wait_for(lambda: (folder / "munge.socket").exists(), 30)
        wait_for(lambda: run("sinfo", "-h", "-t", "idle", "-o", "%D").strip() == "2", 60)
        yield run
        run("scancel", "--user", getpass.getuser())  # what a test that failed has left would go on without daemons
        wait_for(lambda: not run("squeue", "-h").strip(), 60)
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


def submitted(slurm, place, run, bin="bin"):
    """The number of the job that the printed script becomes, on two nodes of one GPU each."""
    settings = [f"run.dir={run}", f"model.path={place / 'model'}", f"data.path={place / 'corpus.jsonl'}"]
    settings += [f"run.steps={STEPS}", "checkpoint.every=10"]
    launch = ["launch", "slurm", "--topology", "h100:2", "--gpus-per-node", "1", "--no-plan", "--grace", "60"]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert main([*launch, "--config", str(place / "run.toml"), *settings]) == 0
    run.with_suffix(".sh").write_text(printed.getvalue())
    env = environment(JAX_NUM_CPU_DEVICES="1") | {"PATH": f"{place / bin}:{PATH}"}
    return slurm("sbatch", "--parsable", run.with_suffix(".sh"), **env).strip()


def about(slurm, job):
    return dict(re.findall(r"(\w+)=(\S*)", slurm("scontrol", "show", "job", job)))


def wait_for_state(slurm, job, state, seconds):
    def there():
        time.sleep(0.2)  # each question is a process
        return about(slurm, job)["JobState"] == state

    wait_for(there, seconds)


def finished(slurm, job, restarts):
    """What a job that has ended well on both nodes has said."""
    wait_for_state(slurm, job, "COMPLETED", 400)
    ended = about(slurm, job)
    assert (ended["Restarts"], ended["NumNodes"], ended["ExitCode"]) == (restarts, "2", "0:0")
    return Path(ended["StdOut"]).read_text()


@pytest.fixture(scope="module")
def whole(slurm, place):
    """A run that nothing disturbs, and what it has said."""
    return place / "whole", finished(slurm, submitted(slurm, place, place / "whole"), "0")


def test_a_job_trains_on_two_nodes(whole):
    run, said = whole
    assert "process 0 (this)" in said and "process 1 (this)" in said
    assert max(losses(run)) == STEPS


def test_a_job_that_is_stopped_goes_back_to_the_queue_and_ends_as_if_nothing_had_been(slurm, place, whole):
    job, run = submitted(slurm, place, place / "stopped"), place / "stopped"
    wait_for_step(run, 3, 200)
    slurm("scancel", "--signal=TERM", job)  # as Slurm does --grace seconds before a job's time is up
    wait_for_state(slurm, job, "PENDING", 100)
    reached = max(losses(run))
    assert 3 <= reached < STEPS
    assert f"going on from step {reached}" in finished(slurm, job, "1")
    same_end(run, whole[0], STEPS)


# Stands in for a run that saves when it is told to.
SAVES = """
trap 'exit 75' TERM
touch begun.$SLURM_JOB_ID.$SLURM_PROCID
while true; do sleep 0.1; done
"""


def test_a_job_that_is_cancelled_stays_so(slurm, place):
    """Its processes save and exit 75 all the same."""
    (place / "saves").mkdir()
    program(place / "saves" / "smollm3", f"cd {place}\n{SAVES}")
    job = submitted(slurm, place, place / "cancelled", "saves")
    wait_for(lambda: len(list(place.glob(f"begun.{job}.*"))) == 2, 60)
    slurm("scancel", job)
    wait_for_state(slurm, job, "CANCELLED", 60)
    wait_for(lambda: not slurm("squeue", "-h", "-j", job).strip(), 60)
    assert about(slurm, job)["JobState"] == "CANCELLED"
