import dataclasses
import json
import math

import pytest
from etils import epath

from smollm3_jax.train.run.metrics import as_text
from smollm3_jax.train.run.report import HELD_OUT, LOSS, PAIRS, curves, summary, write_report
from smollm3_jax.train.settings_file import parse


def test_curves_and_what_the_run_came_to(tmp_path):
    lines = [{"step": step, "loss": loss, "seconds": 0.1, "bad": 0, "tokens": 8.0} for step, loss in ((1, 3), (2, 2))]
    lines += [{"step": 3, "loss": math.nan, "seconds": 0.1, "bad": 1, "tokens": 8.0}]
    lines += [{"step": 2, "held_out": {"a": {"nats_per_token": 2.5, "tokens": 3}}}]
    (tmp_path / "metrics.jsonl").write_text("".join(map(as_text, lines)))
    found = curves(epath.Path(tmp_path))
    assert found[LOSS] == {"training": [(1, 3), (2, 2)]} and found[HELD_OUT] == {"a": [(2, 2.5)]}
    settings = dataclasses.asdict(parse({"run": {"steps": 9}, "data": {"path": "corpus"}}))
    rows = summary(found, settings, {"state": "done", "step": 3, "skipped": 1, "tokens": 24, "seconds": 1.0})
    assert rows["steps"] == "3 of 9" and rows["last call"] == "24 tokens in 1 s"
    assert rows["loss"] == "at first 3.0000 (step 1), lowest 2.0000 (step 2), last 2.0000 (step 2)"
    assert rows["data"] == "corpus" and "model" not in rows


def test_curves_of_held_out_pairs(tmp_path):
    of = {"loss": 0.75, "rewards/accuracies": 0.5, "rewards/margins": 0.25, "pairs": 4, "tokens": 3}
    (tmp_path / "metrics.jsonl").write_text(as_text({"step": 2, "held_out": {"a": of}}))
    found = curves(epath.Path(tmp_path))
    assert found[HELD_OUT] == {} and {key: found[title] for key, title in PAIRS.items()} == {
        key: {"a": [(2, of[key])]} for key in PAIRS
    }
    rows = summary(found, dataclasses.asdict(parse({"run": {"steps": 9}, "data": {"path": "corpus"}})), {})
    assert rows["held-out pairs, loss: a"] == "at first 0.7500 (step 2), lowest 0.7500 (step 2), last 0.7500 (step 2)"


def test_a_picture_where_there_is_matplotlib(tmp_path):
    pytest.importorskip("matplotlib")
    lines = [{"step": step, "loss": 9 / step, "seconds": 0.1, "bad": 0, "tokens": 8.0} for step in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("".join(map(as_text, lines)))
    settings = dataclasses.asdict(parse({"run": {"steps": 3}, "data": {"path": "corpus"}}))
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    (tmp_path / "environment.json").write_text("{}")
    write_report(epath.Path(tmp_path))
    assert "<svg" in (tmp_path / "report.html").read_text()
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
