"""Memory without a compiler: bytes of the weights by format, and of the cache by context."""

import contextlib
import math
from collections.abc import Iterable
from typing import Any

import jax

from sharding.arrays import total_bytes

from ..config import WEIGHT_SCHEMES, ModelConfig
from ..errors import ConfigError
from ..kv_cache import cache_specs
from ..weights.key_map import abstract_model, count_parameters
from ..weights.quantized import with_scheme

CONTEXTS = (4096, 8192, 16384, 32768, 65536, 131072)
FORMATS = ("float32", "bfloat16", "int8", "int4")


def plan_memory(config: ModelConfig, batch: int = 1, contexts: Iterable[int] = CONTEXTS) -> dict[str, Any]:
    """Bytes of the weights in each format, and of the cache of `batch` rows at each context: exact.

    Contexts beyond the model's own want YaRN. A format whose groups do not divide the model's dimensions is left out.
    """
    contexts = list(contexts)
    weights = {}
    for name in FORMATS:
        with contextlib.suppress(ConfigError):
            weights[name] = weight_bytes(config, name)
    caches = {
        name: {str(n): total_bytes(cache_specs(config, batch, n, name)) for n in contexts}
        for name in ("bfloat16", "int8")
    }
    return {
        "parameters": count_parameters(config),
        "batch": batch,
        "weights": weights,
        "cache": caches,
        "own_context": config.max_position_embeddings,
    }


def weight_bytes(config: ModelConfig, weights: str) -> int:
    """What a model takes whose weights are of a dtype or of a scheme of quantize.py (then the rest is bfloat16)."""
    scheme = weights in WEIGHT_SCHEMES
    model = abstract_model(with_scheme(config, weights) if scheme else config, "bfloat16" if scheme else weights)
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(model))
