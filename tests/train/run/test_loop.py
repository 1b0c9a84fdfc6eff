"""Runs that end, are stopped or killed, and go on."""

import json
import random
import shlex
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import rounding
from proxies import FULL
from runs import command, environment, losses, same_end, start, train, wait_for, wait_for_step

from smollm3_jax.weights.load import open_checkpoint

pytestmark = pytest.mark.slow


def test_a_run_leaves_what_it_promises(whole, place, bounded):
    assert list(losses(whole)) == list(range(1, 9)) and max(rounding.worst(losses(whole).values(), bounded)) <= 1
    assert {"settings.json", "environment.json", "report.html"} <= {file.name for file in whole.iterdir()}
    assert sorted(file.name for file in (whole / "checkpoints").iterdir()) == ["00000004", "00000006", "00000008"]
    assert train(place, whole, "--resume", "auto")["step"] == 8  # done: nothing is left to do


def test_a_termination_saves_and_says_so(whole, place):
    """T3."""
    run = place / "terminated"
    process = start(place, run, "checkpoint.every=0")
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 75, said
    (saved,) = (run / "checkpoints").iterdir()
    assert int(saved.name) == max(losses(run))
    summary = (run / "report.html").read_text().partition("<svg")[0]
    assert "stopped by a signal" in summary and f"{int(saved.name):,} of 100,000" in summary
    # What it says of going on is a command that does.
    begin = "smollm3: to go on: smollm3 "
    (words,) = (shlex.split(line.removeprefix(begin)) for line in said.splitlines() if line.startswith(begin))
    again = [sys.executable, "-m", "smollm3_jax", *words, f"run.steps={int(saved.name) + 2}"]
    subprocess.run(again, env=environment(), check=True, capture_output=True)
    assert max(losses(run)) == int(saved.name) + 2


def test_a_termination_before_the_first_step_is_one_too(place):
    """T3."""
    run = place / "early"
    process = subprocess.Popen(command(place, run), env=environment(), stderr=subprocess.PIPE, text=True)
    wait_for(lambda: (run / "lock").exists())
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 75, said
    assert train(place, run, "--resume", "auto")["step"] == 8


@FULL
def test_terminations_at_random_points(whole, place):
    """T3: In compilation, steps, evaluations and saves: nothing is lost, and the end is that of the whole run."""
    run, draw = place / "terminations", random.Random(0)
    words = ["--resume", "auto", "checkpoint.every=1", "eval.every=1", "eval.tokens=500"]
    words.append(f"data.eval_path={place / 'corpus.jsonl'}")
    for _ in range(5):
        (run / "lock").unlink(missing_ok=True)
        process = subprocess.Popen(command(place, run, *words), env=environment(), stderr=subprocess.DEVNULL)
        wait_for(lambda: (run / "lock").exists())
        time.sleep(draw.uniform(0, 5))
        process.send_signal(signal.SIGTERM)
        code = process.wait(timeout=60)
        saved = [int(step.name) for step in (run / "checkpoints").iterdir()] if (run / "checkpoints").is_dir() else []
        assert max(saved, default=0) == max(losses(run), default=0)
        assert code in (0, 75) or (saved and max(saved) == 8)  # done, and on its way out
    train(place, run, *words)
    same_end(run, whole)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert sorted(line["step"] for line in lines if "held_out" in line) == list(range(9))


def test_another_end_is_refused_where_the_learning_rate_depends_on_it(place):
    run, words = place / "linear", ["optimizer.schedule=linear", "--resume", "auto"]
    train(place, run, *words, "run.steps=4")
    said = train(place, run, *words, code=3)
    assert "run.steps: 4 then, 8 now, on which the learning rate of the steps so far depends" in said


def test_a_process_that_is_frozen_for_a_while_says_so_and_goes_on(whole, place):
    """T12."""
    run = place / "frozen"
    process = start(place, run, "checkpoint.every=0", steps=20)
    for _ in range(3):  # one may fall between two steps
        process.send_signal(signal.SIGSTOP)
        time.sleep(2)
        process.send_signal(signal.SIGCONT)
        wait_for_step(run, max(losses(run)) + 5)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 75 and " s, others " in said
    assert [losses(run)[step] for step in range(1, 9)] == list(losses(whole).values())


def test_a_second_signal_ends_at_once_and_breaks_nothing(place):
    """T4."""
    run = place / "twice"
    process = start(place, run)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode in (130, 143)
    train(place, run, "--resume", "auto", "run.steps=100", "checkpoint.every=50")


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=FULL) for seed in (1, 2, 3))])
def test_kills_at_random_points(whole, place, seed):
    """C4: Five kills in each run, when a step's save has begun or is over; then the end is that of the run that nothing
    disturbs."""
    run, draw = place / f"killed{seed}", random.Random(seed)
    for kill in range(5):
        process = subprocess.Popen(
            command(place, run, "--resume", "auto", "checkpoint.every=1"), env=environment(), stderr=subprocess.DEVNULL
        )
        wait_for_step(run, 1 + kill)
        time.sleep(draw.uniform(0, 0.2))
        process.kill()
        assert process.wait() == -9 or max(losses(run)) == 8
    train(place, run, "--resume", "auto", "checkpoint.every=1")
    same_end(run, whole)


def test_a_run_is_not_overwritten(whole, place):
    assert "--resume auto" in train(place, whole, code=2)


def test_the_data_may_end_before_the_steps(place):
    """T9."""
    result = train(place, place / "short", "data.epochs=1", "run.steps=1000")
    assert 3 < result["step"] < 1000 and result["checkpoint"] == result["step"]


def test_the_folder_that_comes_out_loads(whole, place):
    out = place / "exported"
    export = [sys.executable, "-m", "smollm3_jax", "export", whole.name, out]
    subprocess.run([*export, "--average", "3"], env=environment(), check=True, cwd=place)
    assert {"tokenizer.json", "config.json"} <= {file.name for file in out.iterdir()}
    average = open_checkpoint(out).tensors["model.embed_tokens.weight"].read()
    parts = []
    for step in (4, 6, 8):
        subprocess.run([*export, "--step", str(step), "--force"], env=environment(), check=True, cwd=place)
        parts.append(open_checkpoint(out).tensors["model.embed_tokens.weight"].read())
    # In float64, and per number: a running mean of three takes three roundings for each after the first, the last
    # among them of the result.
    assert (
        np.abs(average - np.mean(np.asarray(parts, np.float64), axis=0)) <= 6 * 2.0**-24 * 2 * np.abs(parts).max(axis=0)
    ).all()
    refused = subprocess.run([*export, "--dtype", "bfloat16"], env=environment(), capture_output=True, cwd=place)
    assert refused.returncode == 2 and b"--force" in refused.stderr
    subprocess.run([*export, "--dtype", "bfloat16", "--force"], env=environment(), check=True, cwd=place)
    assert open_checkpoint(out).config.dtype == "bfloat16"


@pytest.mark.parametrize("meshes", [1, pytest.param(3, marks=FULL)])
def test_checkpoints_move_between_meshes(place, bounded, meshes):
    """C7, T2: One device -> four, split one way -> two ways -> another -> one: the losses are those of one device."""
    run = place / f"meshes{meshes}"
    train(place, run, "run.steps=2")
    each = (4, "fsdp_tp", "fsdp=2,tensor=2"), (6, "fsdp", "fsdp=4"), (7, "tp", "tensor=4")
    for steps, rules, axes in each[:meshes]:
        env = environment(JAX_NUM_CPU_DEVICES="4")
        train(place, run, "--resume", "auto", f"run.steps={steps}", f"mesh.rules={rules}", f"mesh.axes={axes}", env=env)
    train(place, run, "--resume", "auto")
    assert max(rounding.worst(losses(run).values(), bounded)) <= 1


def test_logs_that_cannot_be_written_stop_nothing(place):
    """T11."""
    run = place / "nologs"
    (run / "metrics.jsonl").mkdir(parents=True)
    assert train(place, run, "log.profile=3-4")["step"] == 8
    assert list((run / "profile").rglob("*.xplane.pb"))


def test_tokens_made_beforehand_train_the_same(whole, place):
    out = place / "tokens"
    tokenize = [sys.executable, "-m", "smollm3_jax", "tokenize", place / "corpus.jsonl", out]
    subprocess.run([*tokenize, "--model", place / "model", "--workers", "2"], env=environment(), check=True)
    run = place / "from-tokens"
    train(place, run, f"data.path={out}")
    assert losses(run) == losses(whole)
