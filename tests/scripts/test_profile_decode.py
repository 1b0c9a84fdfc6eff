"""What a CPU spends a token on, of a tiny model."""

import subprocess
import sys
from pathlib import Path

from proxies import FULL
from tiny import talking_checkpoint

SCRIPT = Path(__file__).resolve().parents[2] / "scripts/profile_decode.py"


@FULL
def test_products_are_found_in_the_profile(tmp_path):
    command = [sys.executable, SCRIPT, "--model", talking_checkpoint(tmp_path / "m"), "--held", "8", "--new", "17"]
    command += ["--slots", "2", "--capacity", "64"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    rows = [line.split("│")[1:5] for line in done.stdout.splitlines() if line.startswith("│")]
    counts = {name.strip(): int(count) for name, count, _, _ in rows}
    assert any(name.startswith(("ynn_fusion", "dot", "convolution")) and count for name, count in counts.items())
    assert sum(float(share.strip().rstrip("%")) for *_, share in rows) <= 100.5
