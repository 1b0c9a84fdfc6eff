"""Attention of whole sequences in plain XLA, with a backward pass that keeps no scores.

Shapes: B batch, T query length, S key length, H query heads, K key-value heads, G = H / K, E head width.
"""

import itertools
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from .parts import Part

T = TypeVar("T")

# What the float32 scores of one call may take; longer sequences go through a few queries at a time.
SCORE_BYTES = 2**28
# A row is cut into at most this number of pieces, of at least this number of queries; a piece looks at no key after
# its end.
PIECES = 8
PIECE_QUERIES = 64


def dense(
    q_BTHE: Array,
    k_BTKE: Array,
    v_BTKE: Array,
    segments: tuple[Array, ...],
    window: Array | None,
    order: np.ndarray | None,
) -> Array:
    """Plain XLA; `attention` without a kernel. order: which token of the row each query is."""
    return _in_pieces(_softmax_mix, q_BTHE, k_BTKE, v_BTKE, segments, window, order)


def dense_part(
    q_BTHE: Array,
    k_BSKE: Array,
    v_BSKE: Array,
    seen: Array | None,
    distance: Array | None,
    window: Array | None,
) -> Part:
    """What rows see of one document's keys: causally of their own if `seen` is None, else all of the first `seen`.

    distance: int32 [T], from the first key to each query, for the window.
    """
    if seen is None or distance is None:
        return Part(*_in_pieces(_mix, q_BTHE, k_BSKE, v_BSKE, (), window, None))
    length, keys = q_BTHE.shape[1], k_BSKE.shape[1]
    key_1S = jnp.arange(keys, dtype=jnp.int32)[None]
    seen_TS = jnp.broadcast_to(key_1S < seen, (length, keys))
    if window is not None:
        seen_TS &= distance[:, None] - key_1S < window
    q_BKGTE, k_BKSE, v_BKSE = _by_head(q_BTHE, k_BSKE, v_BSKE)
    return Part(*(_by_token(x) for x in _mix(q_BKGTE, k_BKSE, v_BKSE, seen_TS[None])))


def _by_head(q_BTHE: Array, k_BSKE: Array, v_BSKE: Array) -> tuple[Array, Array, Array]:
    batch, length, _, width = q_BTHE.shape
    q_BKGTE = q_BTHE.reshape(batch, length, k_BSKE.shape[2], -1, width).transpose(0, 2, 3, 1, 4)
    return q_BKGTE, k_BSKE.swapaxes(1, 2), v_BSKE.swapaxes(1, 2)


def _by_token(x_BKGTx: Array) -> Array:
    """[B, T, H, x]."""
    batch, kv_heads, group, length, last = x_BKGTx.shape
    return x_BKGTx.transpose(0, 3, 1, 2, 4).reshape(batch, length, kv_heads * group, last)


def _in_pieces(
    mix: Callable[[Array, Array, Array, Array], T],
    q_BTHE: Array,
    k_BTKE: Array,
    v_BTKE: Array,
    segments: tuple[Array, ...],
    window: Array | None,
    order: np.ndarray | None,
) -> T:
    """mix(q_BKGtE, k_BKsE, v_BKsE, seen_Bts) of all queries, some at a time: its arrays [B, K, G, t, x] by token."""
    batch, length, heads, _ = q_BTHE.shape
    q_BKGTE, k_BKSE, v_BKSE = _by_head(q_BTHE, k_BTKE, v_BTKE)

    def some(keys: int, q_BKGtE: Array, index_t: Array, *q_segments_Bt: Array) -> T:
        kv_index_1S = jnp.arange(keys, dtype=jnp.int32)[None]
        seen_BtS = (kv_index_1S <= index_t[:, None])[None]
        for segments_Bt in q_segments_Bt:
            own_BtS = segments_Bt[:, :, None] == segments[1][:, None, :keys]
            seen_BtS &= own_BtS & (segments_Bt != 0)[:, :, None]
        if window is not None:
            seen_BtS &= (index_t[:, None] - kv_index_1S)[None] < window
        return mix(q_BKGtE, k_BKSE[:, :, :keys], v_BKSE[:, :, :keys], seen_BtS)

    def piece(first: int, end: int) -> T:
        """Of the queries of a piece of the row: as few at a time as their scores allow."""
        # What comes after a piece's end is hidden from it. Where queries lie in another order, they see any key.
        keys = end if order is None else length
        index_T = jnp.array(np.arange(first, end) if order is None else order[first:end], jnp.int32)
        parts = (q_BKGTE[:, :, :, first:end], index_T, *(x[:, first:end] for x in segments[:1]))
        axes = (3, 0, 1)[: len(parts)]
        count = end - first
        step = max(1, SCORE_BYTES // (4 * batch * heads * keys))
        if count <= step:
            return some(keys, *parts)
        step = 1 << (step.bit_length() - 1)
        pad = -count % step

        def split(x: Array, axis: int) -> Array:
            x = jnp.pad(x, [(0, pad if i == axis else 0) for i in range(x.ndim)])
            return jnp.moveaxis(x.reshape(*x.shape[:axis], -1, step, *x.shape[axis + 1 :]), axis, 0)

        split_up = tuple(split(x, axis) for x, axis in zip(parts, axes, strict=True))
        out = jax.lax.map(lambda x: some(keys, *x), split_up)

        def joined(x_nBKGtx: Array) -> Array:
            x_BKGntx = jnp.moveaxis(x_nBKGtx, 0, 3)
            return x_BKGntx.reshape(*x_BKGntx.shape[:3], count + pad, -1)[:, :, :, :count]

        return jax.tree.map(joined, out)

    ends = np.linspace(0, length, max(1, min(PIECES, length // PIECE_QUERIES)) + 1).astype(int).tolist()
    pieces = [piece(first, end) for first, end in itertools.pairwise(ends)]
    return jax.tree.map(lambda *x: _by_token(jnp.concatenate(x, axis=3)), *pieces)


@jax.custom_vjp
def _softmax_mix(q_BKGTE: Array, k_BKSE: Array, v_BKSE: Array, mask_BTS: Array) -> Array:
    """Scores and softmax in float32, probabilities cast back, as transformers' eager path.

    The backward pass keeps each query's normalizer and computes the scores again (FlashAttention, arXiv
    2205.14135): nothing of their size is kept, and a recomputed layer does not go through the softmax twice.
    """
    return _mix(q_BKGTE, k_BKSE, v_BKSE, mask_BTS)[0].astype(q_BKGTE.dtype)


def _mix(q_BKGTE: Array, k_BKSE: Array, v_BKSE: Array, mask_BTS: Array) -> tuple[Array, Array]:
    """The output, and the log of what each query's exponentials add up to, [B, K, G, T, 1]; float32."""
    scores_BKGTS = _scores(q_BKGTE, k_BKSE, mask_BTS)
    weights_BKGTS = jax.nn.softmax(scores_BKGTS, axis=-1).astype(v_BKSE.dtype)
    out = _batched(_flat(weights_BKGTS), v_BKSE, 3, 2).reshape(q_BKGTE.shape)
    return out, jax.nn.logsumexp(scores_BKGTS, axis=-1, keepdims=True)


def _mix_forward(*arrays: Array) -> tuple[Array, tuple]:
    out, normalizer_BKGT1 = _mix(*arrays)
    return out.astype(arrays[0].dtype), (*arrays, checkpoint_name(normalizer_BKGT1, "attention_residuals"))


def _mix_backward(kept: tuple, gradient_BKGTE: Array) -> tuple:
    q_BKGTE, k_BKSE, v_BKSE, mask_BTS, normalizer_BKGT1 = kept
    weights_BKGTS = jnp.exp(_scores(q_BKGTE, k_BKSE, mask_BTS) - normalizer_BKGT1)
    weights_BKGTS = jnp.where(mask_BTS[:, None, None], weights_BKGTS, 0)  # also of a query that sees nothing
    gradient_BKXE = _flat(gradient_BKGTE)
    into_weights_BKGTS = _batched(gradient_BKXE, v_BKSE, 3, 3).reshape(weights_BKGTS.shape)
    mean_BKGT1 = (weights_BKGTS * into_weights_BKGTS).sum(axis=-1, keepdims=True)
    into_scores_BKGTS = weights_BKGTS * (into_weights_BKGTS - mean_BKGT1) * q_BKGTE.shape[-1] ** -0.5
    into_scores_BKXS = _flat(into_scores_BKGTS.astype(q_BKGTE.dtype))
    q_gradient = _batched(into_scores_BKXS, k_BKSE, 3, 2).reshape(q_BKGTE.shape)
    k_gradient = _batched(into_scores_BKXS, _flat(q_BKGTE), 2, 2)
    v_gradient = _batched(_flat(weights_BKGTS.astype(v_BKSE.dtype)), gradient_BKXE, 2, 2)
    return *(x.astype(q_BKGTE.dtype) for x in (q_gradient, k_gradient, v_gradient)), None


_softmax_mix.defvjp(_mix_forward, _mix_backward)


def _scores(q_BKGTE: Array, k_BKSE: Array, mask_BTS: Array) -> Array:
    *heads, width = q_BKGTE.shape
    scores = (_batched(_flat(q_BKGTE), k_BKSE, 3, 3) * width**-0.5).reshape(*heads, -1)
    # The lowest finite number, not -inf: a row that sees nothing must not become NaN.
    return jnp.where(mask_BTS[:, None, None], scores, jnp.finfo(jnp.float32).min)


def _flat(x_BKGTE: Array) -> Array:
    """All query heads of a key head as rows of one product: nothing of the scores' size is transposed."""
    batch, kv_heads, group, length, width = x_BKGTE.shape
    return x_BKGTE.reshape(batch, kv_heads, group * length, width)


def _batched(a: Array, b: Array, contract_a: int, contract_b: int) -> Array:
    """A product of matrices for each row and key head, added up in float32."""
    return jax.lax.dot_general(
        a, b, (((contract_a,), (contract_b,)), ((0, 1), (0, 1))), preferred_element_type=jnp.float32
    )
