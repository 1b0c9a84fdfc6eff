"""The float32 products of a training step, XLA's beside torch's: what bounds a step on a CPU.

    python scripts/bench_training_products.py

Those of one layer of the demo model at 4 x 512 tokens: forward, and both of the backward pass. The engines take turns;
what counts is the median of nine rounds.
"""

import os
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

TOKENS = 2048
SHAPES = {"q, o": (576, 576, 2), "k, v": (576, 192, 2), "gate, up": (576, 1536, 2), "down": (1536, 576, 1)}
ROUNDS = 9


def seconds(*runs: Callable[[], object]) -> list[float]:
    """The median of each, taken in turn."""
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(ROUNDS + 1):
        for run, taken in zip(runs, times, strict=True):
            begin = time.perf_counter()
            for _ in range(5):
                jax.block_until_ready(run())
            taken.append((time.perf_counter() - begin) / 5)
    return [statistics.median(taken[1:]) for taken in times]


def main() -> None:
    torch.set_num_threads(os.cpu_count() or 1)
    random = np.random.RandomState(0)
    table = Table("product", "XLA, GFLOP/s", "torch, GFLOP/s", "XLA / torch")
    totals = [0.0, 0.0]
    for name, (width, out, count) in SHAPES.items():
        x, w, y = (
            random.standard_normal(shape).astype(np.float32) for shape in ((TOKENS, width), (out, width), (TOKENS, out))
        )
        # (a, b, what is contracted of each): x w', y w and y' x.
        for kind, a, b, ca, cb in (("forward", x, w, 1, 1), ("into x", y, w, 1, 0), ("into the weight", y, x, 0, 0)):
            contract = (((ca,), (cb,)), ((), ()))
            ours = jax.jit(lambda a, b, contract=contract: jax.lax.dot_general(a, b, contract))
            ja, jb, ta, tb = jnp.asarray(a), jnp.asarray(b), torch.tensor(a), torch.tensor(b)
            ta, tb = ta if ca == 1 else ta.T, tb if cb == 0 else tb.T
            found = seconds(lambda f=ours, a=ja, b=jb: f(a, b), lambda a=ta, b=tb: a @ b)
            rates = [2e-9 * TOKENS * width * out / s for s in found]
            totals = [total + count * s for total, s in zip(totals, found, strict=True)]
            table.add_row(f"{name}: {kind}", *(f"{rate:.0f}" for rate in rates), f"{rates[0] / rates[1]:.2f}")
    table.add_row("all of a layer", "", "", f"{totals[1] / totals[0]:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
