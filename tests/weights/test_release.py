"""The release's exact layout at its full size: 326 tensors in two shards, 6.15 GB of random numbers."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from smollm3_jax.commands.main import main

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_the_released_layout_loads_within_its_memory_and_comes_back(full_release, tmp_path, capsys):
    code = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import bench_load
bench_load.write_random_release(Path(sys.argv[2]), Path(sys.argv[3]))
"""
    release = tmp_path / "release"
    release.mkdir()
    scripts, source = ROOT / "scripts", full_release
    subprocess.run([sys.executable, "-c", code, scripts, source, release], check=True)
    assert main(["inspect", str(release)]) == 0
    assert "3,075,098,624 parameters, 6,150,197,248 bytes" in capsys.readouterr().out

    # A process of its own, so that what other tests left in memory does not count.
    code = """
import json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import bench_load, smollm3_jax as s3
from smollm3_jax.evaluate.parity import _different_weights
from smollm3_jax.weights.load import open_checkpoint
release, copy = Path(sys.argv[2]), Path(sys.argv[3])
with bench_load.Peak() as peak:
    model = s3.from_pretrained(release)
    s3.save_pretrained(model, copy)
stored = [open_checkpoint(folder).tensors for folder in (release, copy)]
print(json.dumps({"peak": peak.bytes, "different": _different_weights(*stored)}))
"""
    copy = tmp_path / "copy"
    done = subprocess.run(
        [sys.executable, "-c", code, scripts, release, copy], check=True, stdout=subprocess.PIPE, text=True
    )
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["different"] == []
    largest = 128256 * 2048 * 2
    assert result["peak"] <= 6_150_197_248 + 2 * largest + 0.6 * 2**30

    index = "model.safetensors.index.json"
    ours, theirs = (json.loads((folder / index).read_text()) for folder in (copy, source))
    assert ours == theirs  # the same shards, the same totals
    config = json.loads((copy / "config.json").read_text())
    released = json.loads((source / "config.json").read_text())
    assert {key: config[key] for key in released} == released
