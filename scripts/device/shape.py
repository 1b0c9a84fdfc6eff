"""The model that is measured: SmolLM3-3B's shape, or a tiny one, with random weights made on the device.

Shapes: B rows, T tokens, S tokens held before, as elsewhere.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from sharding.rules import PyTree, Sharding
from smollm3_jax.config import SMOLLM3_3B, ModelConfig
from smollm3_jax.model import SmolLM3
from smollm3_jax.train.state import state_shardings
from smollm3_jax.weights.key_map import abstract_model
from smollm3_jax.weights.quantized import with_scheme

TINY = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
TINY |= {"num_hidden_layers": 2, "vocab_size": 512, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
# Layers of a comparison, at the real width: with and without RoPE, and quickly computed by a CPU in float32.
PARITY_LAYERS = 4
# The same where many programs are compared.
FEW_LAYERS = 2


def raw_config(tiny: bool, layers: int | None = None) -> dict[str, Any]:
    """config.json's content, of the first `layers` layers or all."""
    raw = SMOLLM3_3B | (TINY if tiny else {})
    count = min(layers or raw["num_hidden_layers"], raw["num_hidden_layers"])
    interval = min(4, count)  # the last of a few layers has no RoPE, as every fourth one of many
    return raw | {
        "num_hidden_layers": count,
        "head_dim": raw["hidden_size"] // raw["num_attention_heads"],
        "no_rope_layer_interval": interval,
        "no_rope_layers": [int((layer + 1) % interval != 0) for layer in range(count)],
    }


def config(tiny: bool, layers: int | None = None, weights: str | None = None) -> ModelConfig:
    """weights: a scheme of quantize.py; None leaves the model plain."""
    plain = ModelConfig.from_hf(raw_config(tiny, layers))
    return plain if weights is None else with_scheme(plain, weights)


def random_model(
    config: ModelConfig, dtype: DTypeLike = "bfloat16", *, stacked: bool = False, sharding: Sharding | None = None
) -> SmolLM3:
    """A model with random weights of a trained one's size, made on the device array by array.

    Args:
      stacked: layers as one stack, for training, or one array a layer, as inference has them.
      sharding: where the arrays go; None leaves them on the default device.
    """
    abstract = abstract_model(config, dtype, stacked=stacked, sharding=sharding)
    flat, tree = jax.tree_util.tree_flatten_with_path(abstract)
    keys = jax.random.split(jax.random.key(1, impl="rbg"), len(flat))
    arrays = []
    places = [None] * len(flat) if sharding is None else jax.tree.leaves(state_shardings(abstract, sharding))
    for key, (path, leaf), place in zip(keys, flat, places, strict=True):
        name = jax.tree_util.keystr(path)
        role = next((role for role in ("norm", "scale", "minimum") if role in name), "weight")
        array = _random(key, role, leaf.shape, leaf.dtype)
        arrays.append(array if place is None else jax.device_put(array, place))
    return jax.block_until_ready(jax.tree_util.tree_unflatten(tree, arrays))


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _random(key: Array, role: str, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
    """Standard deviation 0.02, as SmolLM3's initializer has it; quantized weights too, once scaled.

    role: "norm", "scale", "minimum" or "weight"; each is compiled once a shape, not once a layer.
    """
    if jnp.issubdtype(dtype, jnp.integer):
        return jax.lax.bitcast_convert_type(jax.random.bits(key, shape, jnp.uint8), dtype)
    around_one = 1 + 0.1 * jax.random.normal(key, shape, jnp.bfloat16).astype(jnp.float32)
    if role == "norm":
        return around_one.astype(dtype)
    if role != "weight":
        # Steps from 0 to 15 have a standard deviation of 4.6 and the mean 7.5, those of int8 one of 73.9.
        step = 0.02 / 4.6 if dtype == jnp.float16 else 0.02 / 73.9
        return ((-7.5 if role == "minimum" else 1) * step * around_one).astype(dtype)
    return (0.02 * jax.random.normal(key, shape, jnp.bfloat16)).astype(dtype)


def random_tokens(config: ModelConfig, batch: int, length: int, seed: int = 0) -> Array:
    """int32 [batch, length] of ordinary tokens."""
    return jax.random.randint(jax.random.key(seed), (batch, length), 3, config.vocab_size, jnp.int32)


def packed_segments(batch: int, length: int, documents: int = 6, padding: int = 0) -> Array:
    """int32 [batch, length]: rows of documents whose ends differ from row to row, with padding at the end."""
    index_1T = jnp.arange(length)[None]
    ends = jnp.sort(jax.random.randint(jax.random.key(7), (batch, documents - 1), 1, length - padding), axis=1)
    segments = 1 + (index_1T[None] >= ends[..., None]).sum(axis=1)
    return jnp.where(index_1T < length - padding, segments, 0).astype(jnp.int32)


def held_bytes(tree: PyTree) -> int:
    """Of all arrays of a tree."""
    return sum(x.nbytes for x in jax.tree.leaves(tree))


def parameters(config: ModelConfig) -> int:
    return sum(math.prod(x.shape) for x in jax.tree.leaves(abstract_model(config, "bfloat16")))


def forward_flops(config: ModelConfig, tokens: int, past: int = 0) -> float:
    """Of a prompt's `tokens` after `past` others: products with all weights but the embedding, and causal attention."""
    weights = parameters(config) - config.vocab_size * config.hidden_size
    width = config.num_attention_heads * config.head_dim * config.num_hidden_layers
    return 2.0 * weights * tokens + 4.0 * tokens * (past + tokens / 2) * width


def training_flops(config: ModelConfig, rows: int, length: int) -> float:
    """Of a step: 6 a parameter and token, and causal attention three times; recomputation does not count."""
    width = config.num_attention_heads * config.head_dim * config.num_hidden_layers
    return rows * length * (6.0 * parameters(config) + 6.0 * length * width)
