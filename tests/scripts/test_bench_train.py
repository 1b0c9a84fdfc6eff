"""Training steps timed in turn, of a tiny model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from proxies import FULL
from tiny import talking_checkpoint

SCRIPT = Path(__file__).resolve().parents[2] / "scripts/bench_train.py"


@FULL
def test_steps_of_post_training_are_compared_in_one_run(tmp_path):
    folder = talking_checkpoint(tmp_path / "m", num_hidden_layers=1)
    words = ["--model", folder, "--post-training", "--rows", "2", "--length", "32", "--rounds", "2", "--json"]
    done = subprocess.run([sys.executable, SCRIPT, *words], capture_output=True, text=True, check=True)
    report = json.loads(done.stdout)
    assert list(report["engines"]) == ["smollm3_jax", "sft", "preference", "lora"]
    assert list(report["ratios"]) == ["sft / smollm3_jax", "preference / sft", "lora / sft"]
    losses = {name: row["first_loss"] for name, row in report["engines"].items()}
    # An adapter changes nothing yet; half of the tokens have another mean loss than all of them; no completion is as
    # likely as a reference's that has a log-probability of 0.
    assert losses["lora"] == pytest.approx(losses["sft"], rel=1e-5) and losses["sft"] != losses["smollm3_jax"]
    assert abs(losses["preference"] - 0.6931) > 1e-3
    assert all(row["peak_bytes"] > 0 for row in report["engines"].values())
