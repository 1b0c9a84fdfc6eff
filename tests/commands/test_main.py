"""What the command is before any of its subcommands runs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from smollm3_jax.commands.main import COMMANDS

ROOT = Path(__file__).parents[2]
HEAVY = ("jax", "jaxlib", "flax", "numpy", "rich", "optax", "tokenizers", "huggingface_hub", "safetensors")
LOADED = """
import json, sys
from smollm3_jax.commands.main import main
try:
    main(sys.argv[1:])
finally:
    print(json.dumps(sorted({name.split(".")[0] for name in sys.modules})), file=sys.stderr)
"""


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        [],
        ["fly"],
        *([name, "--help"] for name in COMMANDS),
        ["plan", "train", "--help"],
        ["generate", "--prompt"],
    ],
    ids=" ".join,
)
def test_help_and_usage_errors_load_nothing_heavy(arguments):
    done = subprocess.run([sys.executable, "-c", LOADED, *arguments], cwd=ROOT, capture_output=True, text=True)
    loaded = next(line for line in done.stderr.splitlines() if line.startswith("["))
    assert not set(json.loads(loaded)) & set(HEAVY)
    assert "usage: smollm3" in done.stdout + done.stderr
    assert done.returncode == (0 if "--help" in arguments else 2)


def test_python_m():
    done = subprocess.run([sys.executable, "-m", "smollm3_jax", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("usage: smollm3 ")
