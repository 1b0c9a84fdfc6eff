"""Standard output and error on a full disk (/dev/full), and with a reader that has left."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import pytest

ROOT = Path(__file__).parents[1]
TELL = """
import logging, sys
from smollm3_jax.streams import end_now, give_up_stdout, go_on_without_stderr

go_on_without_stderr()
for _ in range(3):
    print("x" * 100_000, file=sys.stderr, flush=True)
    logging.warning("nobody hears it")
"""
END = "print('left in the buffer')\nend_now(75)\n"
READY = "from smollm3_jax.commands.serve import _tell\n_tell('ready http://127.0.0.1:1')\nsys.exit(0)\n"


@contextlib.contextmanager
def deaf(kind: str) -> Iterator[IO[Any]]:
    if kind == "full":
        with open("/dev/full", "wb") as file:
            yield file
        return
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as file:
        yield file


@pytest.mark.parametrize("kind", ["full", "left"])
@pytest.mark.parametrize(("code", "ended"), [(END, 75), (READY, 0)])
def test_what_nobody_can_read_ends_nothing(kind, code, ended):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""}  # else nothing is left in a buffer
    with deaf(kind) as file:
        command = [sys.executable, "-c", TELL + code]
        assert subprocess.run(command, env=environment, stdout=file, stderr=file).returncode == ended
        told = subprocess.run(command, env=environment, stdout=file, stderr=subprocess.PIPE, text=True).stderr
    assert told.count("nobody hears it") == told.count("x" * 100_000) == 3 and "Traceback" not in told
    assert ("ready http://127.0.0.1:1" in told) == (code == READY)


def test_what_is_written_arrives(tmp_path):
    with open(tmp_path / "log", "wb") as file:
        subprocess.run(
            [sys.executable, "-c", TELL + "print('\\u00e4', 1, file=sys.stderr)"],
            env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"},
            stderr=file,
            check=True,
        )
    lines = (tmp_path / "log").read_text("utf-8").splitlines()
    assert [len(line) for line in lines[::2]] == [100_000] * 3 + [3] and lines[-1] == "\u00e4 1"
