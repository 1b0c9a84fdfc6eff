"""Grouped-query attention: of whole sequences, and of a few new tokens against the cache.

Shapes: B batch, T query length, S key length, H query heads, K key-value heads, G = H / K, E head width.
"""

from .cached import cached_attention
from .dispatch import attention, decode_attention, decode_step
from .piece import piece_attention, piece_over_length

__all__ = ["attention", "cached_attention", "decode_attention", "decode_step", "piece_attention", "piece_over_length"]
