import errno
import io
import json
import logging
import math
import os
import re
import sys
import time

import pytest
from etils import epath

from smollm3_jax.train.run import backends, monitor
from smollm3_jax.train.run.metrics import read_lines
from smollm3_jax.train.run.monitor import Monitor
from smollm3_jax.train.settings_file import parse

ABOUT = {"parameters": 1, "devices": 1, "steps": 9, "tokens_per_step": 8, "weights": {"a": 1.0}, "documents": {"a": 1}}


@pytest.fixture
def watch(tmp_path):
    """Makes the monitor of a run in the same folder, begun at a step."""

    def begin(step=0, **guard):
        data = {"sources": {"a": {"path": "corpus<1>"}}}
        settings = parse({"run": {"dir": str(tmp_path), "steps": 9}, "data": data, "guard": guard})
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


def test_a_disk_that_was_full_for_a_while_lacks_no_line(watch, tmp_path, monkeypatch, caplog):
    it, own, full = watch(), monitor.append, {2, 3}

    def append(path, text):
        if step in full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        own(path, text)

    monkeypatch.setattr(monitor, "append", append)
    for step in range(1, 5):
        it.step(line(step))
    assert [x["step"] for x in read_lines(epath.Path(tmp_path) / "metrics.jsonl")] == [1, 2, 3, 4]
    assert caplog.text.count("metrics.jsonl could not be written: [Errno 28] No space left on device") == 2


def test_it_does_not_grow_with_the_steps(watch):
    it = watch(window=20)
    for step in range(1, 2000):
        it.step(line(step))
    assert len(it._losses) == 20 and len(it._seconds) == 50


def test_a_jump_of_the_loss_is_trouble_and_a_rollback_forgets_it(watch):
    """T6."""
    it = watch(spike=4.0, window=30)
    losses = [1.0 + 0.01 * (i % 3) for i in range(30)]
    assert not any(it.step(line(step, loss)) for step, loss in enumerate(losses, 1))
    assert "jumped to 2" in it.step(line(31, 2.0))
    it.back_to(30)
    assert it.step(line(31, 1.0)) is None


def test_steps_without_an_update_are_counted_in_a_row(watch):
    """T6."""
    it = watch(skips=2)
    said = [it.step(line(step, loss, bad=1)) for step, loss in enumerate([math.nan, 1.0, math.nan, math.nan], 1)]
    assert said[:3] == [None] * 3 and "2 steps in a row were not finite" in said[3]
    assert it.summary()["skipped"] == 4


@pytest.mark.parametrize(
    "line",
    [
        *(b"\xff\xfe", b"[1]", b'{"x": 1}', b"3", b"null", b"[" * 100_000, b'{"step": "3"}', b'{"step": true}'),
        *(b'{"step": 2}', b'{"step": 1.5, "loss": 1}', b'{"step": -1}', b'{"step": ' + b"9" * 5000 + b"}"),
        *(b'{"step": 2, "held_out": 5}', b'{"step": 2, "held_out": {"a": [1]}}', b'{"step": 2, "held_out": {"a": {}}}'),
        *(b'{"step": 2, "loss": "x", "seconds": 1, "bad": 0, "tokens": 1}',),
        *(b'{"step": 2, "loss": 1, "seconds": 1, "bad": 0, "tokens": null}',),
        *(b'{"step": 2, "loss": 1' + b"0" * 400 + b', "seconds": 1, "bad": 0, "tokens": 1}',),
    ],
)
def test_lines_that_no_run_wrote_prevent_no_resume(watch, tmp_path, caplog, line):
    """T11: metrics.jsonl is not all that it should be."""
    first = watch()
    for step in (1, 2, 3):
        first.step(globals()["line"](step))
    file = tmp_path / "metrics.jsonl"
    one, *others = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(one + line + b"\n" + b"".join(others) + b'{"step": 4, "lo')
    again = watch(step=3)
    assert "metrics.jsonl: 1 lines that are no run's are left out" in caplog.text
    assert file.read_bytes() == one + b"".join(others) and again.summary()["loss"] == 1.0


def test_a_clock_that_jumps_is_told_of_and_changes_nothing(watch, caplog, monkeypatch):
    """T12."""
    it, now = watch(), monitor.time.time
    for step in range(1, 4):
        it.step(line(step))
    for jump in (86_400, -86_400):
        monkeypatch.setattr(monitor.time, "time", lambda jump=jump: now() + jump)
        for step in range(4, 8):
            assert it.step(line(step)) is None
        assert 0 <= it.summary()["seconds"] < 100
    assert caplog.text.count("clock jumped by") == 2 and "took" not in caplog.text


def test_a_slow_step_is_told_of(watch, caplog):
    """T12."""
    it = watch()
    with caplog.at_level(logging.WARNING):
        for step in range(1, 13):
            it.step(line(step))
        it.step(line(13, seconds=2.0))
    assert "step 13 took 2.0 s, others 0.1" in caplog.text


def test_backends_that_fail_are_left_alone(watch, caplog):
    """T11."""
    it = watch()
    seen = []

    def write(step, values):
        seen.append(step)
        raise ConnectionError("down")

    it._backends = [backends._forgiving("wandb", write)]
    with caplog.at_level(logging.WARNING):
        for step in (1, 2, 3):
            assert it.step(line(step)) is None
    assert seen == [1] and "wandb failed, training goes on without it: down" in caplog.text


def test_what_is_left_does_not_count_compilation(watch, capsys, monkeypatch):
    now = time.monotonic()
    it = watch()
    monkeypatch.setattr(monitor.time, "monotonic", lambda: now + 1000)  # the step has been compiled
    it.step(line(1) | {"seconds": 2.0})
    monkeypatch.setattr(monitor.time, "monotonic", lambda: now + 1100)
    it.step(line(2))
    left = re.findall(r"step (\d+) of (\d+):.*, ([\d,]+) s left", capsys.readouterr().err)
    steps = int(left[0][1])
    assert [(int(step), float(seconds)) for step, _, seconds in left] == [(1, 2 * (steps - 1)), (2, 51 * (steps - 2))]


def test_logs_are_lines_of_json(watch, tmp_path):
    watch().step(line(1, loss=math.inf, bad=1))
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["loss"] is None


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_shows_names_as_they_are_and_log_lines_above_the_bar(watch, monkeypatch):
    """Names of sources are no markup, and steer no terminal."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    handler = logging.StreamHandler()
    logging.getLogger().addHandler(handler)
    try:
        name = "[/x] \x1b[31m"
        monkeypatch.setitem(ABOUT, "weights", {name: 1.0})
        it = watch()
        assert handler.stream is not screen
        with it.busy(f"held-out text of {name}"):
            it._bar.refresh()
        it.held_out(0, {name: {"nats_per_token": 1.0, "tokens": 3}})
        logging.getLogger("smollm3_jax").warning("told of [/x]")
        for step in range(1, 5):
            it.step(line(step))
        it.close("done", 4)
        assert handler.stream is screen
    finally:
        logging.getLogger().removeHandler(handler)
    assert "held out, nats a token: [/x] \\x1b[31m 1.0000" in screen.getvalue()
    assert "\x1b[31m" not in screen.getvalue()
    # The log's line begins at the left, where the bar was wiped away.
    before = screen.getvalue().split("told of [/x]")[0]
    assert before.endswith("\x1b[2K") or before.endswith("\n"), repr(before[-40:])


@pytest.mark.parametrize("state", ["done", "ended by an error: <it>"])
def test_the_report_begins_with_what_it_came_to(watch, tmp_path, state):
    it = watch()
    for step in range(1, 5):
        it.step(line(step, loss=5.0 - step))
    it.held_out(4, {"a": {"nats_per_token": math.nan, "tokens": 3}, "<b>": {"nats_per_token": 2.0, "tokens": 3}})
    it.close(state, 4)
    page = (tmp_path / "report.html").read_text()
    summary = page[: page.index("<svg")]
    said = [state.replace("<", "&lt;").replace(">", "&gt;"), "4 of 9", "100 %: 1 documents, corpus&lt;1&gt;"]
    said += ["held out: &lt;b&gt;", "at first 4.0000 (step 1), lowest 1.0000 (step 4), last 1.0000 (step 4)"]
    assert [words for words in said if words not in summary] == []
    assert page.count(">step</text>") == page.count("<svg") > 0 and ">loss, nats a token</text>" in page
    assert "<it>" not in page and "nan" not in page


def test_a_run_that_does_not_begin_leaves_the_report(tmp_path):
    (tmp_path / "report.html").write_text("of before")
    Monitor(epath.Path(tmp_path), parse({"run": {"dir": str(tmp_path), "steps": 9}}), {}).close("ended by an error", 0)
    assert (tmp_path / "report.html").read_text() == "of before"
