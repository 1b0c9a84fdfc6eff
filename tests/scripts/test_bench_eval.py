"""Evaluation timed beside lm-eval's HFLM, of a tiny model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from proxies import FULL
from tiny import chat_checkpoint

SCRIPT = Path(__file__).resolve().parents[2] / "scripts/bench_eval.py"


@FULL
@pytest.mark.torch
def test_both_are_timed_and_a_slower_one_is_said(tmp_path, release):
    pytest.importorskip("torch")
    pytest.importorskip("lm_eval")
    folder = chat_checkpoint(tmp_path / "m", release / "chat_template.jinja", max_position_embeddings=4096)
    words = ["--model", folder, "--questions", "4", "--rounds", "1", "--out", tmp_path / "figures.json"]
    done = subprocess.run([sys.executable, SCRIPT, *words], capture_output=True, text=True)
    figures = json.loads((tmp_path / "figures.json").read_text())["figures"]
    assert list(figures) == ["loglikelihood", "loglikelihood_rolling", "generate_until"], done.stderr
    for of in figures.values():
        assert of["ratio"] == pytest.approx(of["HFLM"] / of["smollm3_jax"]) and of["smollm3_jax"] > 0
    assert done.returncode == int(min(of["ratio"] for of in figures.values()) < 1)
