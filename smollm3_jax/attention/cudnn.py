"""cuDNN's flash attention, forward and backward, with the normalizers of its softmax going out and in.

JAX's public function gives normalizers in the dtype of the output, too coarse to merge by, has no documents, and no
backward pass for normalizers that came of several calls. So these are the primitives below it: a private interface of
JAX, which is used here alone, and only in the versions that `nvidia.py` names.

Shapes: B batch, T query length, S key length, H query heads, K key-value heads, E head width, M ranges of a row.
"""

from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array


class Ranges(NamedTuple):
    """Which queries see which keys, int32: range i of queries sees range i of keys and nothing else.

    q_length, kv_length: [B], the first tokens of each row; or, where the others are given, [B x M]: ranges anywhere
    in the batch, in the order of their places, the unused ones last and empty.
    q_first, kv_first: [B x M], where each range begins, counted over all rows; None for the first tokens of each row.
    """

    q_length: Array
    kv_length: Array
    q_first: Array | None = None
    kv_first: Array | None = None


def forward(q_BTHE: Array, k_BSKE: Array, v_BSKE: Array, causal: bool, ranges: Ranges | None) -> tuple[Array, Array]:
    """Attention without an array of scores, bfloat16 or float16.

    Args:
      causal: query t of a row or range sees keys 0 to t of it; otherwise all.
      ranges: None is whole rows.

    Returns:
      (output [B, T, H, E], float32 normalizers): the normalizer of a query is the log of the sum of the exponentials of
      its scores; [B, H, T], or [B x M, H, T] for ranges anywhere: of range i in order, from index 0 on. What no
      range covers is left as it was in memory, which may be anything.
    """
    from jax._src.cudnn import fused_attention_stablehlo as private

    options = _options(private, q_BTHE, causal, ranges) | {"is_training": True}
    out, normalizer = private._dot_product_attention_fwd_p.bind(
        q_BTHE, k_BSKE, v_BSKE, *_operands(q_BTHE, k_BSKE, ranges), **options
    )
    return out, normalizer


def backward(
    q_BTHE: Array,
    k_BSKE: Array,
    v_BSKE: Array,
    causal: bool,
    ranges: Ranges | None,
    normalizer: Array,
    out_BTHE: Array,
    gradient_BTHE: Array,
) -> tuple[Array, Array, Array]:
    """The gradients of q, k and v, in their dtype, through the keys of this call.

    Where a query saw keys of other calls too, normalizer and out are those of all of them together: then each call
    gives its share (as in ring attention, arXiv 2310.01889). What no range covers is left as it was in memory.
    """
    from jax._src.cudnn import fused_attention_stablehlo as private

    operands = _operands(q_BTHE, k_BSKE, ranges)
    options = _options(private, q_BTHE, causal, ranges)
    q_gradient, k_gradient, v_gradient = private._dot_product_attention_bwd_p.bind(
        q_BTHE, k_BSKE, v_BSKE, *operands, normalizer, out_BTHE, gradient_BTHE, **options
    )
    return q_gradient, k_gradient, v_gradient


def _operands(q_BTHE: Array, k_BSKE: Array, ranges: Ranges | None) -> tuple[Array, ...]:
    """bias, lengths and offsets of queries and of keys, page tables of keys and of values; empty is none."""
    none = jnp.zeros(0, q_BTHE.dtype)
    if ranges is None:
        return (none,) * 7
    if ranges.q_first is None or ranges.kv_first is None:
        return none, ranges.q_length, ranges.kv_length, *(none,) * 4
    batch = q_BTHE.shape[0]

    def offsets(first: Array, x: Array) -> Array:
        """[B, M + 1], in values instead of tokens; cuDNN wants one more than there are ranges, JAX one a row."""
        first = jnp.pad(first, (0, batch), constant_values=batch * x.shape[1]).reshape(batch, -1)
        return first * (x.shape[2] * x.shape[3])

    lengths = (x.reshape(batch, -1) for x in (ranges.q_length, ranges.kv_length))
    return none, *lengths, offsets(ranges.q_first, q_BTHE), offsets(ranges.kv_first, k_BSKE), none, none


def _options(private: ModuleType, q_BTHE: Array, causal: bool, ranges: Ranges | None) -> dict[str, Any]:
    kind = ("NO_MASK", "CAUSAL", "PADDING", "PADDING_CAUSAL")[2 * (ranges is not None) + causal]
    options = {
        "scale": q_BTHE.shape[-1] ** -0.5,
        "seed": 0,
        "dropout_rate": 0.0,
        "variadic_args": (False, False),  # no bias, none of its gradient
        "mask_type": private.MaskType[kind],
        "layout": private.AttentionLayout.BTNH.value,
        "sliding_window_length": None,
    }
    if jax.__version_info__ >= (0, 12):
        options |= {"score_mod_name": None, "score_mod_jaxpr": None}
    return options
