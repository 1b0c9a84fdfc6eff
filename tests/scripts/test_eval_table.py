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


def write(folder: Path, task: str, samples: list[dict[str, Any]], **about: Any) -> None:
    """As lm-eval writes them."""
    folder.mkdir(parents=True, exist_ok=True)
    model = {"pretrained": "demo", **about}
    results = {"n-samples": {task: {}}, "config": {"model_args": model}, "chat_template": "{{ messages }}"}
    (folder / "results_2026-11-28.json").write_text(json.dumps(results))
    lines = [json.dumps(sample | {"metrics": list(sample)}) + "\n" for sample in samples]
    (folder / f"samples_{task}_2026-11-28.jsonl").write_text("".join(lines))


def test_rows_of_all_kinds(tmp_path):
    write(tmp_path / "a", "needles", [{"512": 1.0}, {"1024": 0.0}] * 10, thinking=False)
    first, second = eval_table.rows(tmp_path / "a")
    assert first | {"low": 0, "high": 0} == {
        "model": "demo",
        "mode": "no_think",
        "task": "needles",
        "metric": "512",
        "value": 1.0,
        "low": 0,
        "high": 0,
        "questions": 10,
    }
    # Wilson's interval of ten of ten, and of none of ten: 10 / (10 + 1.96^2), and what is left of 1.
    assert (first["low"], first["high"]) == pytest.approx((0.7225, 1.0), abs=1e-4)
    assert (second["low"], second["high"]) == pytest.approx((0.0, 0.2775), abs=1e-4)


def test_texts_weigh_by_their_bytes():
    texts = [[-100.0, 50], [-300.0, 250]]
    value, low, high = eval_table.scored("bits_per_byte", texts)
    assert value == pytest.approx(400 / 300 / math.log(2))
    assert (low, high) == pytest.approx((1.2 / math.log(2), 2 / math.log(2)))  # one text, drawn twice


def test_intervals_of_shares_and_of_several_instructions():
    random = np.random.default_rng(1)
    shares = random.random(400).tolist()
    value, low, high = eval_table.scored("1024", shares)
    error = 1.96 * np.std(shares) / 20
    assert (value, value - low, high - value) == pytest.approx((np.mean(shares), error, error), abs=3e-3)
    value, low, high = eval_table.scored("inst_level_strict_acc", [[True, False], [True]] * 50)
    assert value == pytest.approx(2 / 3) and 0.6 < low < value < high < 0.74


def test_the_command(tmp_path, monkeypatch, capsys):
    write(tmp_path / "x" / "demo", "texts", [{"word_perplexity": [-9.0, 2], "bits_per_byte": [-9.0, 9]}])
    monkeypatch.setattr(sys, "argv", ["eval_table", str(tmp_path), "--out", str(tmp_path / "rows.json")])
    eval_table.main()
    (row,) = json.loads((tmp_path / "rows.json").read_text())
    assert (row["task"], row["mode"], row["metric"]) == ("texts", "chat", "bits_per_byte")
    assert "1.443" in capsys.readouterr().out
