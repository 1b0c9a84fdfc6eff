import json
import logging
import math

import pytest
from etils import epath

from smollm3_jax.train import monitor
from smollm3_jax.train.monitor import Monitor, read_lines
from smollm3_jax.train.settings import parse

ABOUT = {"parameters": 1, "devices": 1, "steps": 9, "tokens_per_step": 8, "weights": {"a": 1.0}, "documents": {"a": 1}}


@pytest.fixture
def watch(tmp_path):
    """Makes the monitor of a run in the same folder, begun at a step."""

    def begin(step=0, **guard):
        settings = parse({"run": {"dir": str(tmp_path), "steps": 9}, "guard": guard})
        of_run = Monitor(epath.Path(tmp_path), settings, {})
        of_run.begin(step, step > 0, ABOUT)
        return of_run

    return begin


def line(step, loss=1.0, seconds=0.1, bad=0):
    numbers = {"learning_rate": 1e-3, "tokens_per_second": 8.0, "grad_norm": 1.0, "tokens": 8.0}
    return {"step": step, "loss": loss, "seconds": seconds, "bad": bad, **numbers}


def test_a_restart_forgets_what_it_computes_again(watch, tmp_path):
    first = watch()
    for step in range(1, 6):
        first.step(line(step))
    first.held_out(4, {"a": {"nats_per_token": math.nan, "tokens": 3}})
    first.held_out(5, {"a": {"nats_per_token": 2.0, "tokens": 3}})
    again = watch(step=4)
    assert again.has_held_out(4) and not again.has_held_out(5)
    assert [x["step"] for x in read_lines(epath.Path(tmp_path) / "metrics.jsonl")] == [1, 2, 3, 4, 4]
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()
    again.step(line(5, loss=3.0))
    assert {k: again.summary()[k] for k in ("loss", "tokens", "skipped")} == {"loss": 3.0, "tokens": 8, "skipped": 0}


def test_it_does_not_grow_with_the_steps(watch):
    it = watch(window=20)
    for step in range(1, 2000):
        it.step(line(step))
    assert len(it._losses) == 20 and len(it._seconds) == 50


def test_a_jump_of_the_loss_is_trouble_and_a_rollback_forgets_it(watch):
    it = watch(spike=4.0, window=30)
    losses = [1.0 + 0.01 * (i % 3) for i in range(30)]
    assert not any(it.step(line(step, loss)) for step, loss in enumerate(losses, 1))
    assert "jumped to 2" in it.step(line(31, 2.0))
    it.back_to(30)
    assert it.step(line(31, 1.0)) is None


def test_steps_without_an_update_are_counted_in_a_row(watch):
    it = watch(skips=2)
    said = [it.step(line(step, loss, bad=1)) for step, loss in enumerate([math.nan, 1.0, math.nan, math.nan], 1)]
    assert said[:3] == [None] * 3 and "2 steps in a row were not finite" in said[3]
    assert it.summary()["skipped"] == 4


def test_a_slow_step_is_told_of(watch, caplog):
    it = watch()
    with caplog.at_level(logging.WARNING):
        for step in range(1, 13):
            it.step(line(step))
        it.step(line(13, seconds=2.0))
    assert "step 13 took 2.0 s, others 0.1" in caplog.text


def test_backends_that_fail_are_left_alone(watch, caplog):
    it = watch()
    seen = []

    def write(step, values):
        seen.append(step)
        raise ConnectionError("down")

    it._backends = [monitor._forgiving("wandb", write)]
    with caplog.at_level(logging.WARNING):
        for step in (1, 2, 3):
            assert it.step(line(step)) is None
    assert seen == [1] and "wandb failed, training goes on without it: down" in caplog.text


def test_logs_are_lines_of_json(watch, tmp_path):
    watch().step(line(1, loss=math.inf, bad=1))
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["loss"] is None
