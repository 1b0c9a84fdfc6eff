"""How fast one row is multiplied with a weight on this machine: the part of decoding that a CPU spends its time in.

    python scripts/bench_products.py [--as FLAGS]

For the matrices of a layer, of the demo model and of SmolLM3-3B, through the code that decoding calls. `--as` takes
the forms of a processor that has these flags, such as amx_tile or avx512_vnni, or "" for one that has neither. Weights
go by in turn, more of them than fit in the caches; what counts is the best of eight rounds. GB/s beside float32's says
whether a format is bound by reading its weights or by converting them.
"""

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from rich.console import Console
from rich.table import Table

from smollm3_jax import xla_cpu
from smollm3_jax.quantize import linear, quantize_weight

# Outputs, inputs, and how many weights.
SHAPES = {
    "demo": [(1536, 576, 60), (576, 1536, 60), (576, 576, 100), (192, 576, 100)],
    "SmolLM3-3B": [(11008, 2048, 6), (2048, 11008, 6), (2048, 2048, 16), (512, 2048, 40)],
}
ROUNDS = 8


def seconds(weights: list, x: Array) -> float:
    """What one product takes."""

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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--as", dest="flags", metavar="FLAGS", help="separated by commas (default: this processor's)")
    flags = parser.parse_args().flags
    if flags is not None:
        xla_cpu.processor = lambda: frozenset(flags.split(","))
    table = Table("model", "shape", "weights", "ms", "GB/s", "billion weights/s")
    random = np.random.RandomState(0)
    for model, (rows, columns, count) in ((model, shape) for model, shapes in SHAPES.items() for shape in shapes):
        for kind in ("float32", "bfloat16", "int8", "int8-g64", "int4"):
            dtype = "float32" if kind == "float32" else "bfloat16"
            values = jnp.asarray(random.normal(size=(rows, columns)), dtype)
            plain = [nnx.Param(jnp.array(values), axes=("mlp", "embed")) for _ in range(count)]
            weights = plain if kind == dtype else [quantize_weight(param, kind, 1) for param in plain]
            size = sum(x.nbytes for x in jax.tree.leaves(weights)) / count
            taken = seconds(weights, jnp.asarray(random.normal(size=(1, columns)), dtype))
            rate = rows * columns / taken / 1e9
            table.add_row(
                model, f"{rows} x {columns}", kind, f"{1e3 * taken:.3f}", f"{size / taken / 1e9:.1f}", f"{rate:.2f}"
            )
    Console().print(table)


if __name__ == "__main__":
    main()
