"""Attention to some of the keys, and how parts are put together.

Shapes: B batch, T query length, H query heads, E head width.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array


class Part(NamedTuple):
    """What queries see in some keys, float32.

    out_BTHE: the mean of the values, by the weights of the softmax over these keys.
    norm_BTH1: the log of the sum of the exponentials of their scores; the lowest float where there are no keys.
    """

    out_BTHE: Array
    norm_BTH1: Array

    @classmethod
    def empty(cls, q_BTHE: Array) -> "Part":
        """Of no keys."""
        lowest = jnp.finfo(jnp.float32).min
        return cls(jnp.zeros(q_BTHE.shape, jnp.float32), jnp.full((*q_BTHE.shape[:3], 1), lowest, jnp.float32))


def merge(one: Part, other: Part) -> Part:
    """Of the keys of both. To a part that has keys an empty one adds nothing, to the bit."""
    most = jnp.maximum(one.norm_BTH1, other.norm_BTH1)
    shares = jnp.exp(one.norm_BTH1 - most), jnp.exp(other.norm_BTH1 - most)
    total = shares[0] + shares[1]
    return Part((one.out_BTHE * shares[0] + other.out_BTHE * shares[1]) / total, most + jnp.log(total))
