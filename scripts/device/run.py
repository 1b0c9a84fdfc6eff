"""What a part of the measuring run is given: the size to measure, and a file for its results, a line each.

Every line of results.jsonl is an object with "part", "kind" and "case", and "tiny" where it is no result:

  machine   what was measured on: devices, versions, driver, clocks
  ceiling   copy and read (bytes/s), product (operations/s)
  parity    error, bound, passed
  speed     engine ("ours", "gpt-fast's way", "transformers"), ms, ms_min, ms_max, tokens_per_second, floor_ms
  modelled  ms, and which kernels the model did not know
  profile   the dearest kernels
  note      what else is worth knowing
  error     what a case failed with;  done  a case that did not
  part      how a part's process ended;  skipped  one that did not begin
"""

import dataclasses
import json
import statistics
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smollm3_jax import files

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

RESULTS = "results.jsonl"


@dataclasses.dataclass(frozen=True)
class Run:
    """One part's process.

    out: the folder of the results. tiny: on a small model, to try the run itself. cuda_graphs: False where a part is
    tried once more without them.
    """

    part: str
    out: Path
    tiny: bool = False
    cuda_graphs: bool = True

    def say(self, kind: str, case: str, **values: object) -> None:
        """Writes a line of results, at once, and prints it."""
        line: dict[str, Any] = {"part": self.part, "kind": kind, "case": case, **values}
        line |= {"tiny": True} if self.tiny else {}
        line |= {} if self.cuda_graphs else {"cuda_graphs": False}
        append(self.out, line)

    def attempt(self, case: str, function: Callable[..., None], *arguments: Any) -> bool:
        """Whether a case got through, now or in an earlier process of this part; if not, a line says why."""
        if any(x["kind"] == "done" and x["part"] == self.part and x["case"] == case for x in lines(self.out)):
            return True
        try:
            function(*arguments)
        except Exception as error:
            traceback.print_exc()
            self.say("error", case, error=f"{type(error).__name__}: {error}"[:600])
            return False
        self.say("done", case)
        return True

    def check(self, case: str, error: float, bound: float, **values: object) -> None:
        """A comparison: it passed if the error is at most the bound, which NaN never is."""
        self.say("parity", case, error=error, bound=bound, passed=bool(error <= bound), **values)

    def program(self, function: Any, *arguments: Any) -> Callable[..., Any]:
        """A jitted function; in a part that is tried without CUDA graphs, compiled for these arguments without those
        that it asks for by itself, which go above XLA_FLAGS."""
        if self.cuda_graphs:
            return function
        return function.lower(*arguments).compile({"xla_gpu_enable_command_buffer": ""})

    def ceiling(self, name: str) -> float | None:
        """What this machine was measured to do at most; None if that failed."""
        found = [x["value"] for x in lines(self.out) if x["kind"] == "ceiling" and x["case"] == name]
        return found[-1] if found else None


def append(out: Path, line: dict[str, Any]) -> None:
    text = json.dumps(line)
    files.append(out / RESULTS, text + "\n")
    print(text, flush=True)


def lines(out: Path) -> list[dict[str, Any]]:
    """The results so far."""
    file = out / RESULTS
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def timed(run: Callable[[], object], rounds: int, warm_up: int = 2, before: Callable[[], object] | None = None) -> dict:
    """ms, ms_min, ms_max: the median and the spread of what `run`, which waits for its result, takes.

    Args:
      before: called before each round, outside of its time.
    """
    taken = []
    for number in range(warm_up + rounds):
        if before is not None:
            before()
        begin = time.perf_counter()
        run()
        if number >= warm_up:
            taken.append(1e3 * (time.perf_counter() - begin))
    return {"ms": statistics.median(taken), "ms_min": min(taken), "ms_max": max(taken)}


def scaled(times: dict[str, float], factor: float) -> dict[str, float]:
    """The times of a part of what was timed."""
    return {name: value * factor for name, value in times.items()}


def relative(found: "ArrayLike", expected: "ArrayLike") -> float:
    """||found - expected|| / ||expected||, computed on the default device; NaN if anything in it is."""
    import jax.numpy as jnp

    found, expected = (jnp.asarray(x, jnp.float32) for x in (found, expected))
    return float(jnp.linalg.norm((found - expected).ravel()) / jnp.linalg.norm(expected.ravel()))
