"""How fast one row is multiplied with a weight on this machine: the part of decoding that a CPU spends its time in.

    python scripts/bench_products.py [--as FLAGS]
    python scripts/bench_products.py --token        # all of a token's, and with fewer, larger ones

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
from smollm3_jax.quantize import QuantizedWeight, linear, quantize_weight

# Outputs, inputs, and how many weights.
SHAPES = {
    "demo": [(1536, 576, 60), (576, 1536, 60), (576, 576, 100), (192, 576, 100)],
    "SmolLM3-3B": [(11008, 2048, 6), (2048, 11008, 6), (2048, 2048, 16), (512, 2048, 40)],
}
# The products of a layer, how many layers, and the last: a layer's in order.
TOKENS = {
    "demo": ([(576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536)], 30, (49152, 576)),
    "SmolLM3-3B": (
        [(2048, 2048), (512, 2048), (512, 2048), (2048, 2048), (11008, 2048), (11008, 2048), (2048, 11008)],
        *(36, (128256, 2048)),
    ),
}
ROUNDS = 8


def seconds(*programs: list, dtype: str) -> list[float]:
    """What one round of all products of each takes: the best of rounds in turn."""
    inputs = {weight.shape[1] for weights in programs for weight in weights}
    rows = {size: jnp.asarray(np.random.RandomState(0).normal(size=(1, size)), dtype) for size in inputs}

    @jax.jit
    def all_of_them(rows: dict[int, Array], weights: list) -> Array:
        after = jnp.zeros((), dtype)
        for weight in weights:
            out = linear(rows[weight.shape[1]] + after, weight)
            after = (out[0, 0] > 1e30).astype(dtype)  # one after the other
        return after

    times = []
    for turn in range(ROUNDS + 1):
        for weights in programs:
            begin = time.perf_counter()
            jax.block_until_ready(all_of_them(rows, weights))
            if turn:  # the first one compiles
                times.append(time.perf_counter() - begin)
    return [min(times[i :: len(programs)]) for i in range(len(programs))]


def joined(layer: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Queries, keys and values as one product, and gate and up."""
    q, k, v, o, gate, up, down = layer
    return [(q[0] + k[0] + v[0], q[1]), o, (gate[0] + up[0], gate[1]), down]


def tokens(kinds: tuple[str, ...]) -> Table:
    """What all products of a token take, apart and joined."""
    table = Table("model", "weights", "apart: ms", "GB/s", "joined: ms", "joined / apart")
    random = np.random.RandomState(0)
    for model, (layer, layers, last) in TOKENS.items():
        for kind in kinds:
            programs = []
            for shapes in (layer, joined(layer)):
                one = {shape: made(random, *shape, kind) for shape in [*shapes, last]}
                programs.append([jax.tree.map(jnp.array, one[shape]) for shape in [*shapes * layers, last]])
            size = sum(x.nbytes for x in jax.tree.leaves(programs[0]))
            apart, less = seconds(*programs, dtype="float32" if kind == "float32" else "bfloat16")
            row = f"{1e3 * apart:.1f}", f"{size / apart / 1e9:.1f}", f"{1e3 * less:.1f}", f"{less / apart:.2f}"
            table.add_row(model, kind, *row)
    return table


def made(random: np.random.RandomState, rows: int, columns: int, kind: str) -> nnx.Param | QuantizedWeight:
    """A weight of random numbers."""
    values = jnp.asarray(random.standard_normal((rows, columns)), "float32" if kind == "float32" else "bfloat16")
    plain = nnx.Param(values, axes=("mlp", "embed"))
    return plain if kind in ("float32", "bfloat16") else quantize_weight(plain, kind, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--as", dest="flags", metavar="FLAGS", help="separated by commas (default: this processor's)")
    parser.add_argument("--token", action="store_true", help="all products of a token, in bfloat16 and int8")
    args = parser.parse_args()
    if (flags := args.flags) is not None:
        xla_cpu.processor = lambda: frozenset(flags.split(","))
    if args.token:
        Console().print(tokens(("bfloat16", "int8")))
        return
    table = Table("model", "shape", "weights", "ms", "GB/s", "billion weights/s")
    random = np.random.RandomState(0)
    for model, (rows, columns, count) in ((model, shape) for model, shapes in SHAPES.items() for shape in shapes):
        for kind in ("float32", "bfloat16", "int8", "int8-g64", "int4"):
            weights = [made(random, rows, columns, kind) for _ in range(count)]
            size = sum(x.nbytes for x in jax.tree.leaves(weights)) / count
            (taken,) = seconds(weights, dtype="float32" if kind == "float32" else "bfloat16")
            taken /= count
            rate = rows * columns / taken / 1e9
            table.add_row(
                model, f"{rows} x {columns}", kind, f"{1e3 * taken:.3f}", f"{size / taken / 1e9:.1f}", f"{rate:.2f}"
            )
    Console().print(table)


if __name__ == "__main__":
    main()
