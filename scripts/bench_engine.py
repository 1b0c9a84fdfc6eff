"""What an engine's steps take beside their compiled calls, and with a cache of pages beside one of rows.

    python scripts/bench_engine.py [--model demo] [--dtype float32] [--slots 16] [--steps 4 16] [--calls 20]

Three engines decode the same requests, with text, stop texts and log-probabilities. One makes its steps; of another
only its compiled calls run, one after the other, and nothing is read before the last: what it saves of a step is what
reading results one call late could gain at most. The third makes its steps too, and has all that its slots can hold as
pages. In turn, so that what else the machine does meets all.
"""

import argparse
import statistics
import time
from typing import Any

import jax
import numpy as np
from rich.console import Console

from smollm3_jax import from_pretrained
from smollm3_jax.generation.device_loop import decode
from smollm3_jax.generation.engine import Engine
from smollm3_jax.generation.places import capacity_for
from smollm3_jax.generation.prompts import SERVING_PIECES
from smollm3_jax.generation.requests import Request
from smollm3_jax.generation.sampling import SamplingParams
from smollm3_jax.model import SmolLM3


def started(model: SmolLM3, slots: int, steps: int, calls: int, pages: bool = False) -> Engine:
    """An engine all slots of which decode, for as many calls."""
    new = steps * (calls + 4)
    shape: dict[str, Any] = {"slots": slots, "context": 64 + new, "piece_sizes": SERVING_PIECES, "steps": steps}
    page = SERVING_PIECES[-1]
    cache_tokens = slots * -(-capacity_for(shape["context"], 0) // page) * page if pages else None
    engine = Engine(model, **shape, prefill_tokens=None, cache_tokens=cache_tokens)
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
        shape = model, arguments.slots, steps, arguments.calls
        whole, bare, paged = started(*shape), started(*shape), started(*shape, pages=True)
        of_step, of_call, of_pages = [], [], []
        for _ in range(arguments.calls // 4):
            for engine, seconds in ((whole, of_step), (paged, of_pages)):
                begin = time.perf_counter()
                for _ in range(4):
                    engine.step()
                seconds.append((time.perf_counter() - begin) / 4)
            begin = time.perf_counter()
            for _ in range(4):
                bare._cache, bare._state, _ = decode(bare.model, bare._cache, bare._state, np.int32(steps))
            jax.block_until_ready(bare._state)
            of_call.append((time.perf_counter() - begin) / 4)
        step, call = statistics.median(of_step), statistics.median(of_call)
        gains = [1 - y / x for x, y in zip(of_step, of_call, strict=True)]
        ratios = [y / x for x, y in zip(of_step, of_pages, strict=True)]
        console.print(
            f"{arguments.slots} slots, {steps} tokens a call: a step {step * 1e3:.1f} ms, its call {call * 1e3:.1f} "
            f"ms; at most {statistics.median(gains):.1%} to gain ({min(gains):.1%} to {max(gains):.1%}); with pages a "
            f"step takes {statistics.median(ratios):.2f} as long ({min(ratios):.2f} to {max(ratios):.2f})"
        )


if __name__ == "__main__":
    main()
