"""How fast one row is multiplied with a weight on this machine: the part of decoding that a CPU spends its time in.

    python scripts/bench_products.py

For the largest matrix of a layer, of the demo model and of SmolLM3-3B, through the code that decoding calls. Weights
go by in turn, more of them than fit in the caches; what counts is the best of eight rounds. GB/s beside float32's says
whether a format is bound by reading its weights or by converting them.
"""

import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from rich.console import Console
from rich.table import Table

from smollm3_jax.quantize import linear, quantized

SHAPES = {"demo": (1536, 576, 60), "SmolLM3-3B": (11008, 2048, 6)}  # rows, columns, how many
ROUNDS = 8


def seconds(weights: list, x: Array) -> float:
    """Of one product."""

    @jax.jit
    def all_of_them(x: Array, weights: list) -> Array:
        for weight in weights:
            out = linear(x, weight)
            x = x + (out[0, 0] > 1e30).astype(x.dtype)  # one after the other
        return x

    jax.block_until_ready(all_of_them(x, weights))
    times = []
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        jax.block_until_ready(all_of_them(x, weights))
        times.append(time.perf_counter() - begin)
    return min(times) / len(weights)


def main() -> None:
    table = Table("model", "weights", "ms", "GB/s", "billion weights/s")
    random = np.random.RandomState(0)
    for model, (rows, columns, count) in SHAPES.items():
        for kind in ("float32", "bfloat16", "int8", "int8-g64", "int4"):
            dtype = "float32" if kind == "float32" else "bfloat16"
            values = jnp.asarray(random.normal(size=(rows, columns)), dtype)
            plain = [nnx.Param(jnp.array(values), axes=("mlp", "embed")) for _ in range(count)]
            weights = plain if kind == dtype else [quantized(param, kind, 1) for param in plain]
            size = sum(x.nbytes for x in jax.tree.leaves(weights)) / count
            taken = seconds(weights, jnp.asarray(random.normal(size=(1, columns)), dtype))
            rate = rows * columns / taken / 1e9
            table.add_row(model, kind, f"{1e3 * taken:.3f}", f"{size / taken / 1e9:.1f}", f"{rate:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
