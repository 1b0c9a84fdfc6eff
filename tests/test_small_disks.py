"""E4: next to no room for temporary files. Commands work all the same, since what they write lies beside its place."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import talking_checkpoint

pytestmark = pytest.mark.slow

# In a mount namespace of its own, with TMPDIR and /dev/shm full.
FILL = """
for folder in "$TMPDIR" /dev/shm; do
    mount -t tmpfs -o size=16k none $folder
    head -c 16384 /dev/zero > $folder/fill
done
exec "$@"
"""
COMMANDS = """
import sys
from smollm3_jax.commands.main import main

model, out = sys.argv[1:]
for words in (
    ["convert", model, f"{out}/safetensors"],
    ["convert", model, f"{out}/torch", "--format", "torch"],
    ["quantize", model, f"{out}/int8", "--weights", "int8"],
    ["generate", "--model", model, "--prompt", "w1 w2", "--chat", "--max-new-tokens", "2"],
):
    try:
        assert main(words) == 0, words
    except SystemExit as end:
        assert not end.code, words
"""


@pytest.mark.torch
def test_no_room_for_temporary_files(tmp_path):
    pytest.importorskip("torch")
    unshare = shutil.which("unshare")
    if unshare is None or subprocess.run([unshare, "-rm", "true"], capture_output=True).returncode:
        pytest.skip("no mount namespaces here")
    model = talking_checkpoint(tmp_path / "model")
    for name in ("small", "out"):
        (tmp_path / name).mkdir()
    variables = {"TMPDIR": str(tmp_path / "small"), "SMOLLM3_JAX_CACHE": str(tmp_path / "cache")}
    variables |= {"PYTHONPATH": str(Path(__file__).parents[1]), "JAX_PLATFORMS": "cpu"}
    command = [unshare, "-rm", "sh", "-ec", FILL, "sh", sys.executable, "-c", COMMANDS, model, tmp_path / "out"]
    done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"safetensors", "torch", "int8"}
