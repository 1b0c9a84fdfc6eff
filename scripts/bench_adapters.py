"""What adapters beside a model cost its decoding: two engines of one shape, with them and without, in turn.

    python scripts/bench_adapters.py [--model demo] [--dtype float32] [--slots 8] [--adapters 4] [--rank 16]
        [--calls 10]

The adapters are random ones on all seven projections; slots use them by turns, the base among them.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from smollm3_jax import from_pretrained
from smollm3_jax.config import ModelConfig
from smollm3_jax.generation.device_loop import MAX_STEPS, decode
from smollm3_jax.generation.engine import Engine
from smollm3_jax.generation.prompts import SERVING_PIECES
from smollm3_jax.generation.requests import Request
from smollm3_jax.generation.sampling import SamplingParams
from smollm3_jax.model import SmolLM3
from smollm3_jax.tokenizer import Tokenizer, tokenizer_of
from smollm3_jax.weights.key_map import PROJECTIONS, hf_tensors
from smollm3_jax.weights.peft import adapter_config, write_adapter
from smollm3_jax.weights.served import attach, read_served


def write_random(folder: Path, config: ModelConfig, rank: int, seed: int) -> str:
    random, parts = np.random.default_rng(seed), {}
    for name, hf in hf_tensors(config).items():
        if name.split(".")[-2] in PROJECTIONS:
            n, k = hf.shape
            draw = (random.standard_normal(shape, np.float32) * 0.02 for shape in ((rank, k), (n, rank)))
            parts[name] = dict(zip("ab", draw, strict=True))
    write_adapter(folder, adapter_config("base", tuple(PROJECTIONS), rank, rank), parts, {})
    return str(folder)


def started(model: SmolLM3, tokenizer: Tokenizer | None, slots: int, calls: int) -> Engine:
    """An engine all slots of which decode, for as many calls."""
    new, names = MAX_STEPS * (calls + 2), (None, *model.adapters)
    shape: dict[str, Any] = {"slots": slots, "context": 64 + new, "piece_sizes": SERVING_PIECES}
    engine = Engine(model, tokenizer=tokenizer, prefill_tokens=None, **shape)
    params = SamplingParams(temperature=0, max_new_tokens=new, ignore_eos=True)
    for slot in range(slots):
        engine.submit(Request(f"Slot {slot} tells a story of", params, adapter=names[slot % len(names)]))
    engine.step()
    return engine


def main() -> None:
    """Prints a line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--dtype", default="float32")
    for name, default in (("slots", 8), ("adapters", 4), ("rank", 16), ("calls", 10)):
        parser.add_argument(f"--{name}", type=int, default=default)
    arguments = parser.parse_args()
    model = from_pretrained(arguments.model, arguments.dtype)
    with tempfile.TemporaryDirectory() as folder:
        own = (Path(folder) / f"adapter-{i}" for i in range(arguments.adapters))
        words = [write_random(path, model.config, arguments.rank, i) for i, path in enumerate(own)]
        several = attach(model, read_served(words, "base"))
    engines = [started(one, tokenizer_of(model), arguments.slots, arguments.calls) for one in (model, several)]
    seconds: list[list[float]] = [[], []]
    for _ in range(arguments.calls):
        for engine, taken in zip(engines, seconds, strict=True):
            begin = time.perf_counter()
            engine._cache, engine._state, _ = decode(engine.model, engine._cache, engine._state, np.int32(MAX_STEPS))
            jax.block_until_ready(engine._state)
            taken.append(time.perf_counter() - begin)
    ratios = [with_ / without for without, with_ in zip(*seconds, strict=True)]
    without, with_ = (statistics.median(taken) / MAX_STEPS * 1e3 for taken in seconds)
    Console().print(
        f"{arguments.slots} slots, {arguments.dtype}, {arguments.adapters} adapters of rank {arguments.rank}: a token "
        f"of each slot takes {with_:.1f} ms, without them {without:.1f} ms; median ratio "
        f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    )


if __name__ == "__main__":
    main()
