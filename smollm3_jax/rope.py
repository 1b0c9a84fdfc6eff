"""Rotary position embedding: inverse frequencies, their scalings, and the rotation.

Shapes: B batch, T length, N heads, E head width.
"""

import math

import jax.numpy as jnp
import numpy as np
from jax import Array

from .config import ModelConfig, RopeScaling


def inverse_frequencies(config: ModelConfig) -> tuple[np.ndarray, float]:
    """The angle that each pair of a head's dimensions turns by per position.

    Computed in float32 in the order of operations of transformers' modeling_rope_utils.py: at
    position 100,000 one unit in the last place is an angle of 0.006.

    Returns:
      float32 [E/2], and the factor by which cos and sin are multiplied (1 except for YaRN).
    """
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    powers = np.float32(config.rope_theta) ** exponents
    plain = np.float32(1) / powers
    scaling = config.rope_scaling
    if scaling is None:
        return plain, 1.0
    if scaling.rope_type == "linear":
        return plain / np.float32(scaling.factor), 1.0
    if scaling.rope_type == "llama3":
        return _llama3(plain, scaling), 1.0
    assert scaling.rope_type == "yarn"
    return _yarn(powers, scaling, config)


def _llama3(plain: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    """Llama 3.1's rule: long wavelengths are divided by the factor, short ones kept, the rest blended."""
    assert scaling.original_max_position_embeddings and scaling.low_freq_factor and scaling.high_freq_factor
    low, high = np.float32(scaling.low_freq_factor), np.float32(scaling.high_freq_factor)
    original = np.float32(scaling.original_max_position_embeddings)
    factor = np.float32(scaling.factor)
    wavelengths = np.float32(2 * math.pi) / plain
    smooth = (original / wavelengths - low) / (high - low)
    blended = (1 - smooth) * plain / factor + smooth * plain
    scaled = np.where(wavelengths > original / low, plain / factor, blended)
    return np.where(wavelengths < original / high, plain, scaled).astype(np.float32)


def _yarn(powers: np.ndarray, scaling: RopeScaling, config: ModelConfig) -> tuple[np.ndarray, float]:
    """YaRN (arXiv:2309.00071): interpolate the slow dimensions, keep the fast, blend between."""
    original, width = scaling.original_max_position_embeddings, config.head_dim
    assert original is not None

    def dimension_of(rotations: float) -> float:
        """The dimension that makes this many rotations over the original context."""
        periods = original / (rotations * 2 * math.pi)
        return width * math.log(periods) / (2 * math.log(config.rope_theta))

    low, high = dimension_of(scaling.beta_fast or 32), dimension_of(scaling.beta_slow or 1)
    if scaling.truncate is not False:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    if low == high:
        high += 0.001  # as transformers does, against a division by zero
    steps = (np.arange(width // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low)
    kept = 1 - np.clip(steps, 0, 1)
    interpolated = 1 / (np.float32(scaling.factor) * powers)
    frequencies = interpolated * (1 - kept) + (1 / powers) * kept

    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(scaling.factor) + 1.0 if scaling.factor > 1 else 1.0

    if scaling.attention_factor is not None:
        factor = scaling.attention_factor
    elif scaling.mscale and scaling.mscale_all_dim:
        factor = mscale(scaling.mscale) / mscale(scaling.mscale_all_dim)
    else:
        factor = mscale(1.0)
    return frequencies.astype(np.float32), factor


def cos_sin(config: ModelConfig, positions_BT: Array) -> tuple[Array, Array]:
    """cos and sin of every angle, float32 [B, T, E/2] each."""
    frequencies, factor = inverse_frequencies(config)
    angles = positions_BT[..., None].astype(jnp.float32) * frequencies[None, None]
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def of_layer(cos_BTe: Array, sin_BTe: Array, use_rope: Array) -> tuple[Array, Array]:
    """cos and sin for a layer: those of no angle where use_rope (a bool scalar) is False."""
    # NoPE is data: turning by no angle is exact (x*1 - y*0), so both kinds of layer are one program.
    return jnp.where(use_rope, cos_BTe, 1.0), jnp.where(use_rope, sin_BTe, 0.0)


def rotate(x_BTNE: Array, cos_BTe: Array, sin_BTe: Array, use_rope: Array) -> Array:
    """Rotates the pairs (i, i + E/2) of every head; the identity where use_rope (a bool scalar) is False."""
    cos, sin = (x[:, :, None, :].astype(x_BTNE.dtype) for x in of_layer(cos_BTe, sin_BTe, use_rope))
    left, right = jnp.split(x_BTNE, 2, axis=-1)
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)
