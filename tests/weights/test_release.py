"""The release's exact layout: 326 tensors in two shards, 6.15 GB of random numbers; with fewer layers, a part of it."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from proxies import FULL

from smollm3_jax.commands.main import main
from smollm3_jax.config import ModelConfig
from smollm3_jax.weights.key_map import count_parameters
from smollm3_jax.weights.safetensors import INDEX

ROOT = Path(__file__).resolve().parents[2]


def shortened(source, folder, layers):
    """The release's description, of its first layers alone."""
    folder.mkdir()
    for file in source.iterdir():
        (folder / file.name).symlink_to(file)
    config = json.loads((source / "config.json").read_text()) | {"num_hidden_layers": layers}
    for name in ("no_rope_layers", "layer_types"):
        config[name] = config[name][:layers]
    index = json.loads((source / INDEX).read_text())
    left_out = [name for name in index["weight_map"] if int((re.findall(r"layers\.(\d+)\.", name) or [0])[0]) >= layers]
    for name in left_out:
        del index["weight_map"][name]
    index["metadata"]["total_size"] = 2 * count_parameters(ModelConfig.from_hf(config))
    for name, content in (("config.json", config), (INDEX, index)):
        (folder / name).unlink()
        (folder / name).write_text(json.dumps(content, indent=2))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layers", "parameters"), [(4, 575_162_368), pytest.param(36, 3_075_098_624, marks=FULL)], ids=["4", "36"]
)
def test_the_released_layout_loads_within_its_memory_and_comes_back(full_release, tmp_path, capsys, layers, parameters):
    code = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import bench_load
bench_load.write_random_release(Path(sys.argv[2]), Path(sys.argv[3]))
"""
    release = tmp_path / "release"
    release.mkdir()
    scripts = ROOT / "scripts"
    source = full_release if layers == 36 else shortened(full_release, tmp_path / "source", layers)
    subprocess.run([sys.executable, "-c", code, scripts, source, release], check=True)
    assert main(["inspect", str(release)]) == 0
    assert f"{parameters:,} parameters, {2 * parameters:,} bytes" in capsys.readouterr().out

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
    assert result["peak"] <= 2 * parameters + 2 * largest + 0.6 * 2**30

    if layers == 36:
        ours, theirs = (json.loads((folder / INDEX).read_text()) for folder in (copy, source))
        assert ours == theirs  # the same shards, the same totals
    config = json.loads((copy / "config.json").read_text())
    released = json.loads((source / "config.json").read_text())
    assert {key: config[key] for key in released} == released
