import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_a_cpu_is_measured_and_told_to_be_one(tmp_path):
    """Parity with itself, decoding, and a training step over two devices; nothing is modelled."""
    folder, out = tiny.tiny_checkpoint(tmp_path / "model"), tmp_path / "on_device.json"
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "on_device.py", "--model", folder, "--length", "64", "--out", out],
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "no TPU or GPU here" in done.stderr
    report = json.loads(out.read_text())
    assert report["accelerator"] is False and report["chip"] is None
    assert report["parity"]["argmax_agreement"] == 1.0
    assert report["inference"].keys() == {"decode_batch_1", "decode_batch_8", "prefill_64"}
    assert report["training"]["rows"] == 2 and report["training"]["seconds"] > 0
    assert "modelled_seconds" not in report["training"]
