"""What a CPU spends a token and a prompt on, of a tiny model."""

import subprocess
import sys
from pathlib import Path

import pytest
from proxies import FULL
from tiny import talking_checkpoint

SCRIPT = Path(__file__).resolve().parents[2] / "scripts/profile_generation.py"


@FULL
@pytest.mark.parametrize("program", ["decode", "prefill"])
def test_products_are_found_in_the_profile(program, tmp_path):
    command = [sys.executable, SCRIPT, program, "--model", talking_checkpoint(tmp_path / "m")]
    command += ["--held", "8", "--new", "17", "--slots", "2", "--capacity", "64"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    *rows, whole = [line.split("│")[1:5] for line in done.stdout.splitlines() if line.startswith("│")]
    counts = {name.strip(): int(count) for name, count, _, _ in rows}
    assert any(name.startswith(("ynn_fusion", "dot", "convolution")) and count for name, count in counts.items())
    assert sum(float(share.strip().rstrip("%")) for *_, share in rows) <= 100.5
    assert float(whole[2]) > 0
