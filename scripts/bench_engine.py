"""What reading a call's results one call late could gain an engine at most: the host's work between two calls.

    python scripts/bench_engine.py [--model demo] [--dtype float32] [--slots 16] [--steps 4 16] [--calls 20]

Two engines of one shape decode the same requests, with text, stop texts and log-probabilities. One makes its steps; of
the other only its compiled calls run, one after the other, and nothing is read before the last. In turn, so that what
else the machine does meets both; the gain is what the second saves of a call of the first.
"""

import argparse
import statistics
import time

import jax
import numpy as np
from rich.console import Console

from smollm3_jax import from_pretrained
from smollm3_jax.generation.device_loop import decode
from smollm3_jax.generation.engine import Engine
from smollm3_jax.generation.prompts import SERVING_PIECES
from smollm3_jax.generation.requests import Request
from smollm3_jax.generation.sampling import SamplingParams
from smollm3_jax.model import SmolLM3


def started(model: SmolLM3, slots: int, steps: int, calls: int) -> Engine:
    """An engine all slots of which decode, for as many calls."""
    new = steps * (calls + 4)
    engine = Engine(model, slots=slots, context=64 + new, steps=steps, prefill_tokens=None, piece_sizes=SERVING_PIECES)
    for seed in range(slots):
        sampled = {"temperature": 1.0, "top_p": 0.95, "seed": seed, "max_new_tokens": new, "ignore_eos": True}
        params = SamplingParams(**sampled, logprobs=5, stop=("never said",))
        engine.submit(Request(f"Slot {seed} tells a story of", params))
    engine.step()
    return engine


def main() -> None:
    """Prints a line for each number of steps a call."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--steps", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--calls", type=int, default=20)
    arguments = parser.parse_args()
    console = Console()
    model = from_pretrained(arguments.model, arguments.dtype)
    for steps in arguments.steps:
        whole, bare = (started(model, arguments.slots, steps, arguments.calls) for _ in range(2))
        of_step, of_call = [], []
        for _ in range(arguments.calls // 4):
            begin = time.perf_counter()
            for _ in range(4):
                whole.step()
            of_step.append((time.perf_counter() - begin) / 4)
            begin = time.perf_counter()
            for _ in range(4):
                bare._cache, bare._state, _ = decode(bare.model, bare._cache, bare._state, np.int32(steps))
            jax.block_until_ready(bare._state)
            of_call.append((time.perf_counter() - begin) / 4)
        step, call = statistics.median(of_step), statistics.median(of_call)
        gains = [1 - y / x for x, y in zip(of_step, of_call, strict=True)]
        console.print(
            f"{arguments.slots} slots, {steps} tokens a call: a step {step * 1e3:.1f} ms, its call {call * 1e3:.1f} "
            f"ms; at most {statistics.median(gains):.1%} to gain ({min(gains):.1%} to {max(gains):.1%})"
        )


if __name__ == "__main__":
    main()
