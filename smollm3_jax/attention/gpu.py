"""Attention kernels for GPUs.

Shapes: B batch, T query length, S key length, H query heads, K key-value heads, G = H / K, E head width.
"""

import jax
from jax import Array

from sharding.rules import Sharding


def is_ampere_or_later(sharding: Sharding | None) -> bool:
    device = jax.devices()[0] if sharding is None else sharding.mesh.devices.flat[0]
    major = str(getattr(device, "compute_capability", "")).split(".")[0]
    return major.isdecimal() and int(major) >= 8  # AMD's say gfx...


def cudnn(q_BTHE: Array, k_BSKE: Array, v_BSKE: Array) -> Array:
    return jax.nn.dot_product_attention(q_BTHE, k_BSKE, v_BSKE, is_causal=True, implementation="cudnn")
