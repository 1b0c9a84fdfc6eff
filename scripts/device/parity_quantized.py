"""Whether quantized weights compute what their dequantized ones do, for as many rows as there are ways to compute."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.tree_util import KeyPath

from smollm3_jax.model import SmolLM3
from smollm3_jax.quantize import dequantize
from smollm3_jax.weights.key_map import abstract_model, parameters

from . import shape
from .parity import BFLOAT16, FLOAT32, cpu_logits, exact_logits, widened
from .run import Run, relative

# A CPU rounds activations to nearly 16 bits for int8's products.
AGAINST_CPU = 1e-2
ROWS, TINY_ROWS = (1, 64, 512), (1, 64)
EXACT_ROWS = 64


def part(run: Run) -> None:
    for scheme in ("int8", "int4", "int8-g64"):
        run.attempt(scheme, one, run, scheme)


def one(run: Run, scheme: str) -> None:
    model = shape.random_model(shape.config(run.tiny, shape.FEW_LAYERS, scheme))
    exact, plain = widened(model), dequantized_model(model)
    for rows in TINY_ROWS if run.tiny else ROWS:
        tokens = shape.random_tokens(model.config, 1, rows)
        expected = exact_logits(plain, tokens)
        name = f"{scheme}, {rows} {'row' if rows == 1 else 'rows'}"
        run.check(f"{name}, bfloat16: against dequantized in float32", relative(model(tokens), expected), BFLOAT16)
        if rows == EXACT_ROWS:
            found = exact_logits(exact, tokens)
            run.check(f"{name}, float32: against dequantized", relative(found, expected), FLOAT32)
            run.check(f"{name}, float32: device against CPU", relative(found, cpu_logits(exact, tokens)), AGAINST_CPU)


def dequantized_model(model: SmolLM3) -> SmolLM3:
    """The plain model, float32, whose weights the quantized ones stand for."""
    stored = {name: param[...] for name, param in parameters(model).items()}
    config = dataclasses.replace(model.config, quantization=None)
    plain = abstract_model(config, "float32", stacked=False)

    def filled(path: KeyPath, param: nnx.Variable) -> nnx.Variable:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        if name in stored:
            return param.replace(stored[name].astype(jnp.float32))
        parts = (stored[f"{name}.values"], stored[f"{name}.scale"], stored.get(f"{name}.minimum"))
        return param.replace(dequantize(*parts).reshape(param.shape))

    return jax.tree_util.tree_map_with_path(filled, plain, is_leaf=lambda x: isinstance(x, nnx.Variable))
