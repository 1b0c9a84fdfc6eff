import json
import math

import pytest
from etils import epath

from smollm3_jax.train.run.metrics import as_text, known_lines, plain, read_lines

LINE = {"step": 1, "loss": 2.5, "seconds": 0.1, "bad": 0, "tokens": 8.0}


@pytest.fixture
def file(tmp_path):
    return epath.Path(tmp_path / "metrics.jsonl")


def test_numbers_that_are_not_finite_are_null_in_the_file_and_nan_when_read(file):
    held_out = {"step": 1, "held_out": {"a": {"nats_per_token": math.inf, "tokens": 3}}}
    file.write_text(as_text(LINE | {"loss": math.nan}) + as_text(held_out))
    assert "NaN" not in file.read_text() and "Infinity" not in file.read_text()
    step, evaluation = read_lines(file)
    assert math.isnan(step.pop("loss")) and step == {k: v for k, v in LINE.items() if k != "loss"}
    assert math.isnan(evaluation["held_out"]["a"]["nats_per_token"])


@pytest.mark.parametrize(
    ("of", "is_a_run_s"),
    [({"loss": 1.0, "pairs": 2, "tokens": 3}, True), ({"loss": 1.0}, False), ({"loss": "1", "tokens": 3}, False)],
)
def test_lines_of_held_out_pairs(file, of, is_a_run_s):
    line = {"step": 1, "held_out": {"a": of}}
    file.write_text(as_text(line))
    assert known_lines(file) == (([line], 0) if is_a_run_s else ([], 1))


def test_a_torn_last_line_is_passed_over_and_other_lines_are_counted(file):
    file.write_text(as_text(LINE) + '{"step": 2}\n\nnot JSON\n' + json.dumps(LINE)[:20])
    assert known_lines(file) == ([LINE], 2)


def test_no_file_has_no_lines(file):
    assert known_lines(file) == ([], 0)


def test_plain_leaves_all_else_as_it_is():
    assert plain({"a": {"b": -math.inf}, "c": "NaN", "d": None, "e": 3}) == {
        "a": {"b": None},
        "c": "NaN",
        "d": None,
        "e": 3,
    }
