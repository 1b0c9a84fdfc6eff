"""The parts of the measuring run, and how they are run: each in a process of its own, with a limit.

Only this process must not touch JAX: a GPU's memory belongs to one process at a time.
"""

import dataclasses
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from smollm3_jax import files

from .run import append

SCRIPTS = Path(__file__).resolve().parents[1]
# What is left must do for a start and a result, or a part does not begin.
LEAST_SECONDS = 25
# XLA without CUDA graphs, for a part that failed with them.
NO_GRAPHS = "--xla_gpu_enable_command_buffer="
LOG_BYTES = 20_000  # of each part's output
PATIENCE = 4  # times a limit, where all is tiny: on a CPU that others may use too


@dataclasses.dataclass(frozen=True)
class Part:
    """name: of a module beside this one, whose `part(run)` it is; half: of the run; limit: seconds; memory: the share
    of a GPU's memory that JAX takes ahead, the rest being torch's."""

    name: str
    half: str
    limit: int
    memory: float = 0.93


# In each half the most telling parts come first; the ceilings, which the others are held against, begin both.
PARTS = (
    Part("machine", "first", 60),
    Part("parity", "first", 110),
    Part("decode", "first", 140),
    Part("parity_cache", "first", 80),
    Part("profile_decode", "first", 50),
    Part("torch_parity", "first", 80, memory=0.45),
    Part("decode_quantized", "first", 100),
    Part("parity_quantized", "first", 80),
    Part("machine", "second", 60),
    Part("training", "second", 140),
    Part("torch_decode", "second", 90),
    Part("prefill", "second", 120),
    Part("torch_training", "second", 90),
    Part("parity_gradients", "second", 80),
    Part("profile_training", "second", 70),
    Part("torch_transformers", "second", 100),
    Part("training_deterministic", "second", 120),
    Part("decode_stacked", "second", 70),
)
HALVES = ("first", "second")


def chosen(half: str | None, only: Sequence[str]) -> list[Part]:
    """The parts of a half, or all, each once; of these the named ones, if any are."""
    found: dict[str, Part] = {}
    for part in PARTS:
        if half in (None, part.half) and (not only or part.name in only):
            found.setdefault(part.name, part)
    return list(found.values())


def environment(part: Part, folder: Path, graphs: bool, tiny: bool) -> dict[str, str]:
    """What a part's process gets: this checkout's packages, its share of memory, and caches to be thrown away."""
    given = {
        "PYTHONPATH": os.pathsep.join([str(SCRIPTS.parent), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "PYTHONUNBUFFERED": "1",
        "XLA_PYTHON_CLIENT_MEM_FRACTION": str(part.memory),
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1",
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        "TF_CPP_MIN_LOG_LEVEL": "2",
    }
    if tiny:  # whose programs take longer to compile than to run
        given |= {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    if not graphs:
        given["XLA_FLAGS"] = " ".join(filter(None, [os.environ.get("XLA_FLAGS"), NO_GRAPHS]))
    return os.environ | given


def run_parts(
    parts: Sequence[Part], out: Path, budget: float, command: Callable[[Part, bool], list[str]], tiny: bool = False
) -> bool:
    """Runs the parts one after the other, and what failed once more without CUDA graphs; whether all got through.

    Args:
      budget: seconds for everything; a part that cannot begin within them is skipped, one that is running is ended.
      command: of a part's process, with or without CUDA graphs.
    """
    begin, good = time.monotonic(), True
    queue = [(part, True) for part in parts]
    with tempfile.TemporaryDirectory(prefix="on_device-", ignore_cleanup_errors=True) as folder:
        while queue:
            part, graphs = queue.pop(0)
            left = budget - (time.monotonic() - begin)
            head = {"part": part.name, "case": part.name} | ({} if graphs else {"cuda_graphs": False})
            if left < LEAST_SECONDS:
                append(out, {**head, "kind": "skipped", "reason": f"{left:.0f} s of {budget:.0f} are left"})
                good = False
                continue
            started = time.monotonic()
            limit = min(part.limit * (PATIENCE if tiny else 1), left - 5)
            code = _process(command(part, graphs), environment(part, Path(folder), graphs, tiny), limit, out, part.name)
            seconds = round(time.monotonic() - started, 1)
            append(out, {**head, "kind": "part", "seconds": seconds, "ended": _ended(code)})
            if code != 0 and graphs:
                queue.append((part, False))
            elif code != 0:
                good = False
    return good


def _process(command: list[str], env: dict[str, str], limit: float, out: Path, name: str) -> int | None:
    """The exit code of a process, whose output goes to logs.txt; None if it was killed at its limit."""
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        process = subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        log.seek(max(0, log.seek(0, os.SEEK_END) - LOG_BYTES))
        files.append(out / "logs.txt", f"\n===== {name}: {_ended(code)}\n{log.read()}")
    return code


def _ended(code: int | None) -> str:
    return "past its limit" if code is None else f"exit code {code}"


def part_command(script: Path, out: Path, tiny: bool) -> Callable[[Part, bool], list[str]]:
    """The command of a part's process: the script itself, told which part."""

    def command(part: Part, graphs: bool) -> list[str]:
        flags = [*(["--tiny"] if tiny else []), *([] if graphs else ["--without-graphs"])]
        return [sys.executable, str(script), "--part", part.name, "--out", str(out), *flags]

    return command
