"""Several processes that train as one."""

import fcntl
import socket
import subprocess

import pytest
import rounding
from proxies import FULL
from runs import checkpoint_digests, command, environment, losses, wait_for

pytestmark = pytest.mark.slow


def start_job(place, run, count, *words, of_last=()):
    """The processes of a job; of_last: words for the last alone."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = environment(JAX_NUM_CPU_DEVICES=str(4 // count))
    job = ["--coordinator", f"127.0.0.1:{port}", "--processes", str(count)]
    return [
        subprocess.Popen(
            command(place, run, *words, *(of_last if i == count - 1 else ()), *job, "--process", str(i)),
            env=env,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(count)
    ]


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=FULL)])
def test_several_processes_train_as_one(whole, place, bounded, count):
    """T2."""
    run = place / f"job{count}"
    for process in start_job(place, run, count, "--resume", "auto"):
        _, said = process.communicate(timeout=300)
        assert process.returncode == 0, said
    assert max(rounding.worst(losses(run).values(), bounded)) <= 1
    assert checkpoint_digests(run, 8)[1] == checkpoint_digests(whole, 8)[1]  # the data stand where they would for one


def test_processes_that_were_told_different_things_do_not_begin(place):
    """T14."""
    first, second = start_job(place, place / "odd", 2, of_last=["optimizer.learning_rate=1e-4"])
    for process in (first, second):
        _, said = process.communicate(timeout=100)
        assert process.returncode == 3 and "processes [1] have other settings" in said


def test_what_one_process_cannot_begin_none_begins(place):
    """T14: The first alone takes the lock, and cannot."""
    (place / "taken").mkdir()
    with (place / "taken" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for process in start_job(place, place / "taken", 2):
            _, said = process.communicate(timeout=100)
            assert process.returncode in (2, 3) and "another process trains in" in said, said


def test_a_process_that_never_comes_is_named(place):
    """T14."""
    first, second = start_job(place, place / "missing", 2, "--wait", "8")
    second.kill()
    _, said = first.communicate(timeout=100)
    second.communicate()
    assert first.returncode == 2 and "process 1 of 2 did not come" in said, said


def test_a_lost_process_ends_the_job_and_a_restart_goes_on(place):
    """T14."""
    run = place / "lost"
    first, second = start_job(place, run, 2, "--resume", "auto", "--heartbeat", "20", "run.steps=100000")
    wait_for(lambda: (run / "metrics.jsonl").exists() and len(losses(run)) >= 5, 200)
    second.kill()
    _, said = first.communicate(timeout=60)
    assert first.returncode not in (0, 75), said
    reached = max(losses(run))
    again = start_job(place, run, 2, "--resume", "auto", f"run.steps={reached + 4}", "checkpoint.every=0")
    for process in again:
        _, said = process.communicate(timeout=300)
        assert process.returncode == 0, said
        assert "going on from step" in said
    assert max(losses(run)) == reached + 4
    second.communicate()
