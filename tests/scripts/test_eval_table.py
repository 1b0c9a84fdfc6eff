"""A table of what evaluations have written."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
import eval_table


def write(folder: Path, tasks: dict[str, list[dict[str, Any]]], group: str | None = None, **about: Any) -> None:
    """What tasks' questions have of each metric, as lm-eval writes it."""
    folder.mkdir(parents=True, exist_ok=True)
    results = {"config": {"model_args": {"pretrained": "demo", **about}}, "chat_template": "{{ messages }}"}
    of_tasks = {task: {f"{name},none": 0.0 for sample in samples for name in sample} for task, samples in tasks.items()}
    if group:
        results["group_subtasks"] = {group: list(tasks)}
        of_tasks[group] = next(iter(of_tasks.values()))
    results |= {"n-samples": dict.fromkeys(tasks), "results": of_tasks}
    (folder / "results_2026-11-28.json").write_text(json.dumps(results))
    for task, samples in tasks.items():
        lines = [json.dumps(sample | {"metrics": list(sample)}) + "\n" for sample in samples]
        (folder / f"samples_{task}_2026-11-28.jsonl").write_text("".join(lines))


def test_lengths_are_apart_and_a_group_is_its_parts_together(tmp_path):
    needles = {"one": [{"512": 1.0}, {"1024": 0.0}] * 10, "two": [{"512": 0.0}, {"1024": 0.0}] * 10}
    write(tmp_path, needles, "both", thinking=False)
    found = {(row["task"], row["metric"]): row for row in eval_table.rows(tmp_path)}
    first = found["one", "512"]
    about = {"model": "demo", "mode": "no_think", "task": "one", "metric": "512", "score": 1.0, "questions": 10}
    assert first == about | {"low": first["low"], "high": first["high"]} and len(found) == 6
    # Wilson's interval of ten of ten, and of none of ten: 10 / (10 + 1.96^2), and what is left of 1.
    assert (first["low"], first["high"]) == pytest.approx((0.7225, 1.0), abs=1e-4)
    assert (found["one", "1024"]["low"], found["one", "1024"]["high"]) == pytest.approx((0.0, 0.2775), abs=1e-4)
    both = found["both", "512"]
    assert (both["score"], both["questions"]) == (0.5, 20)
    assert (both["low"], both["high"]) == pytest.approx((0.2993, 0.7007), abs=1e-4)


def test_texts_weigh_by_their_bytes_and_languages_alike():
    texts, others = [[-100.0, 50], [-300.0, 250]], [[-80.0, 20]]
    bits = 1 / math.log(2)
    one = eval_table.scored("bits_per_byte", [texts])
    assert one["score"] == pytest.approx(400 / 300 * bits)
    assert (one["low"], one["high"]) == pytest.approx((1.2 * bits, 2 * bits))  # one text, drawn twice
    both = eval_table.scored("bits_per_byte", [texts, others])
    assert both["score"] == pytest.approx((400 / 300 + 4) / 2 * bits)
    assert (both["low"], both["high"]) == pytest.approx((2.6 * bits, 3 * bits))


def test_intervals_of_shares_and_of_several_instructions():
    shares = np.random.default_rng(1).random(400).tolist()
    found, error = eval_table.scored("1024", [shares]), 1.96 * np.std(shares) / 20
    expected = np.mean(shares), np.mean(shares) - error, np.mean(shares) + error
    assert (found["score"], found["low"], found["high"]) == pytest.approx(expected, abs=3e-3)
    found = eval_table.scored("inst_level_strict_acc", [[[True, False], [True]] * 50])
    assert found["score"] == pytest.approx(2 / 3) and 0.6 < found["low"] < found["score"] < found["high"] < 0.74


def test_the_command(tmp_path, monkeypatch, capsys):
    write(tmp_path / "x" / "demo", {"texts": [{"word_perplexity": [-9.0, 2], "bits_per_byte": [-9.0, 9]}]})
    monkeypatch.setattr(sys, "argv", ["eval_table", str(tmp_path), "--out", str(tmp_path / "rows.json")])
    eval_table.main()
    (row,) = json.loads((tmp_path / "rows.json").read_text())
    assert (row["task"], row["mode"], row["metric"]) == ("texts", "chat", "bits_per_byte")
    assert "1.443" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["eval_table", str(tmp_path / "nowhere")])
    with pytest.raises(SystemExit):
        eval_table.main()
    assert "no results_" in capsys.readouterr().err
