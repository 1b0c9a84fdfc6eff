"""What is said of work that takes long, where no terminal is."""

from types import SimpleNamespace

import pytest

from smollm3_jax import progress


def reported(times: list[float], monkeypatch: pytest.MonkeyPatch, fails: bool = False) -> None:
    """One report more for each of these times, the first of which is the beginning."""
    clock = iter(times)
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    with progress.tally("texts", len(times) - 1) as report:
        for done in range(1, len(times)):
            report(done, 8 * done)
        if fails:
            raise KeyboardInterrupt


def test_the_last_line_has_the_full_count(monkeypatch, capsys):
    reported([0.0, 4.0, 11.0, 12.0, 16.0], monkeypatch)
    lines = ["smollm3: 2 of 4 texts, 1.5 tokens/s", "smollm3: 4 of 4 texts, 2.0 tokens/s"]
    assert capsys.readouterr().err.splitlines() == lines


def test_it_is_said_once(monkeypatch, capsys):
    reported([0.0, 1.0, 16.0], monkeypatch)
    assert capsys.readouterr().err == "smollm3: 2 of 2 texts, 1.0 tokens/s\n"


def test_what_takes_a_moment_and_who_wants_no_lines_get_none(monkeypatch, capsys):
    reported([0.0, 1.0, 9.0], monkeypatch)
    monkeypatch.setattr(progress, "shown", False)
    reported([0.0, 11.0, 12.0], monkeypatch)
    assert capsys.readouterr().err == ""


def test_work_that_was_stopped_has_no_last_line(monkeypatch, capsys):
    """What ended it says what was done."""
    with pytest.raises(KeyboardInterrupt):
        reported([0.0, 11.0, 12.0], monkeypatch, fails=True)
    assert capsys.readouterr().err == "smollm3: 1 of 2 texts, 0.7 tokens/s\n"
