"""Next-token cross-entropy, and log-probabilities of tokens, that never hold the logits of a whole batch.

The cross-entropy takes the tokens a chunk at a time. Where gradients are wanted, each chunk's are computed at once,
while its logits are there: three products with the embedding, none of them twice. The embedding's gradient is
added up on every device by itself and summed over the devices once, after the loop. (Or, for the least memory,
`by_words`.) Of log-probabilities it is not known beforehand what comes back to each: they compute the logits twice.

Shapes: B rows, T tokens of a row, N tokens of a device, C chunks of t tokens, D model width, V vocabulary
(a device's part of it), pieces of v words.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import PartitionSpec

from sharding.rules import Sharding, platform_of

# What one chunk's float32 logits may take on a device. Every chunk reads and writes the embedding's whole
# gradient, so an accelerator wants few of them, a GPU a single one for a row of 4,096 tokens; a CPU's caches want small
# ones.
CPU_LOGIT_BYTES = 2**25
GPU_LOGIT_BYTES = 2**31
ACCELERATOR_LOGIT_BYTES = 2**29


def next_tokens(tokens_BT: Array, segment_ids_BT: Array) -> tuple[Array, Array]:
    """(labels int32, mask bool), each [B, T]: what follows each token, and whether that is of its own document."""
    labels_BT = jnp.roll(tokens_BT, -1, axis=1)
    next_BT = jnp.roll(segment_ids_BT, -1, axis=1).at[:, -1].set(0)
    return labels_BT, (segment_ids_BT == next_BT) & (segment_ids_BT != 0)


def cross_entropy(
    x_BTD: Array,
    head_VD: Array,
    labels_BT: Array,
    weights_BT: Array,
    *,
    z_loss: float = 0.0,
    by_words: bool = False,
    sharding: Sharding | None = None,
) -> tuple[Array, Array]:
    """Sums over the tokens, weighted.

    Args:
      x_BTD: final hidden states.
      head_VD: the unembedding, in x's dtype.
      labels_BT: int32.
      weights_BT: bool, where a token counts; or float32, by what it counts. They are not differentiated; a token of
        weight 0 has no part in sums and gradients, whatever its logits are.
      z_loss: weight of the squared log-normalizers that keep logits near zero (PaLM, arXiv 2204.02311, section 5).
      by_words: compute the gradients a part of the vocabulary at a time, from logits computed again: a fourth
        product, for no gradient of the whole embedding on any device.
      sharding: where the arrays lie; None on one device.

    Returns:
      float32 scalars: cross-entropy (nats) and z-loss together, which can be differentiated; and the
      cross-entropy alone, which cannot. Logits and sums are float32; the logits' gradient is rounded to x's
      dtype for its two products.
    """
    return _loss(z_loss, by_words, sharding, x_BTD, head_VD, labels_BT, weights_BT)


def token_logps(x_BTD: Array, head_VD: Array, labels_BT: Array, *, sharding: Sharding | None = None) -> Array:
    """The log-probability of each label, float32 [B, T]; the arguments are `cross_entropy`'s.

    It can be differentiated: a token to which 0 comes back has no part in the gradients, whatever its logits are. The
    backward pass computes the logits again, a part of the vocabulary at a time, and rounds their gradient to x's dtype.
    """
    return _logps(sharding, x_BTD, head_VD, labels_BT)


def _weighted(x: Array, weights: Array) -> Array:
    if weights.dtype == jnp.bool_:
        return jnp.where(weights, x, 0)
    return jnp.where(weights != 0, weights * x, 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _loss(z_loss: float, by_words: bool, sharding: Sharding | None, *arrays: Array) -> tuple[Array, Array]:
    return _everywhere(z_loss, by_words, sharding, False, *arrays)[0]


def _forward(
    z_loss: float, by_words: bool, sharding: Sharding | None, *arrays: Array
) -> tuple[tuple[Array, Array], tuple]:
    sums, *gradients = _everywhere(z_loss, by_words, sharding, True, *arrays)
    return sums, tuple(gradients)


def _backward(z_loss: float, by_words: bool, sharding: Sharding | None, gradients: tuple, cotangents: tuple) -> tuple:
    return *((cotangents[0] * x.astype(jnp.float32)).astype(x.dtype) for x in gradients), None, None


_loss.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _logps(sharding: Sharding | None, *arrays: Array) -> Array:
    return _logps_forward(sharding, *arrays)[0]


def _logps_forward(sharding: Sharding | None, x_BTD: Array, head_VD: Array, labels_BT: Array) -> tuple[Array, tuple]:
    at = _layout(sharding, labels_BT.shape, head_VD.shape)

    def part(x_BTD: Array, head_VD: Array, labels_BT: Array) -> tuple[Array, ...]:
        def step(carry: None, chunk: tuple[Array, ...]) -> tuple[None, tuple[Array, ...]]:
            _, normalizer_t, nll_t = _chunk(head_VD, at, *chunk)
            return carry, (-nll_t, normalizer_t)

        _, found = jax.lax.scan(step, None, _split(head_VD, at.logit_bytes, x_BTD, labels_BT))
        return tuple(x.reshape(-1)[: labels_BT.size].reshape(labels_BT.shape) for x in found)

    if sharding is not None:
        part = sharding.shard_map(part, (at.states, at.head, at.tokens), (at.tokens, at.tokens))
    logps_BT, normalizer_BT = part(x_BTD, head_VD, labels_BT)
    return logps_BT, (x_BTD, head_VD, labels_BT, normalizer_BT)


def _logps_backward(sharding: Sharding | None, kept: tuple, cotangent_BT: Array) -> tuple:
    x_BTD, head_VD, labels_BT, normalizer_BT = kept
    at = _layout(sharding, labels_BT.shape, head_VD.shape)
    part = functools.partial(_by_words, 0.0, at)
    if sharding is not None:
        in_specs = (at.states, at.head, at.tokens, at.tokens, at.tokens)
        part = sharding.shard_map(part, in_specs, (at.states, at.head_gradient))
    return *part(x_BTD, head_VD, labels_BT, -cotangent_BT, normalizer_BT), None


_logps.defvjp(_logps_forward, _logps_backward)


class _Layout(NamedTuple):
    """How a device computes its part.

    logit_bytes: what the logits of one chunk may take. tokens, states, head, head_gradient: what of the arrays it has
    (None on one device). token_axes, vocab_axes: the axes of the mesh that tokens and words are split over. settle:
    sums the parts of the head's gradient that the devices have.
    """

    logit_bytes: int
    tokens: PartitionSpec | None = None
    states: PartitionSpec | None = None
    head: PartitionSpec | None = None
    head_gradient: PartitionSpec | None = None
    token_axes: tuple[str, ...] = ()
    vocab_axes: tuple[str, ...] = ()
    settle: Callable[[Array], Array] = lambda x: x


def _layout(sharding: Sharding | None, shape: tuple[int, ...], head_shape: tuple[int, ...]) -> _Layout:
    """Of tokens [B, T] and a head [V, D]."""
    by_platform = {"cpu": CPU_LOGIT_BYTES, "gpu": GPU_LOGIT_BYTES}
    logit_bytes = by_platform.get(platform_of(sharding), ACCELERATOR_LOGIT_BYTES)
    if sharding is None:
        return _Layout(logit_bytes)
    batch, length = (sharding.fitting(a, n) for a, n in zip(("batch", "length"), shape, strict=True))
    vocab, embed = (sharding.fitting(a, n) for a, n in zip(("vocab", "embed"), head_shape, strict=True))
    token_axes = sharding.mesh_axes(batch) + sharding.mesh_axes(length)
    # Words on an axis of the mesh that tokens lie on as well: every device needs all words for its own tokens.
    vocab = None if set(sharding.mesh_axes(vocab)) & set(token_axes) else vocab
    # The gradient of the head goes where the head is kept: summed over some axes of the mesh, spread over others.
    embed = embed if set(sharding.mesh_axes(embed)) <= set(token_axes) else None
    spread_axes = sharding.mesh_axes(embed)
    summed_axes = tuple(axis for axis in token_axes if axis not in spread_axes)

    def settle(gradient_VD: Array) -> Array:
        if spread_axes:
            gradient_VD = jax.lax.psum_scatter(gradient_VD, spread_axes, scatter_dimension=1, tiled=True)
        if spread_axes and platform_of(sharding) == "gpu":
            # It is laid out by columns, and would stay so: see `_product_backward` in quantize.py.
            gradient_VD = with_layout_constraint(gradient_VD, Layout(major_to_minor=(0, 1)))
        return jax.lax.psum(gradient_VD, summed_axes) if summed_axes else gradient_VD

    return _Layout(
        logit_bytes,
        tokens=sharding.spec(batch, length),
        states=sharding.spec(batch, length, None),
        head=sharding.spec(vocab, None),
        head_gradient=sharding.spec(vocab, embed),
        token_axes=token_axes,
        vocab_axes=sharding.mesh_axes(vocab),
        settle=settle,
    )


def _everywhere(
    z_loss: float,
    by_words: bool,
    sharding: Sharding | None,
    gradients: bool,
    x_BTD: Array,
    head_VD: Array,
    labels_BT: Array,
    weights_BT: Array,
) -> tuple:
    """The sums and, if asked for, the gradients of x and head: each device its own tokens and words."""
    at = _layout(sharding, labels_BT.shape, head_VD.shape)

    def part(*arrays: Array) -> tuple:
        sums, *found = _on_device(z_loss, gradients, by_words, at, *arrays)
        return jax.lax.psum(sums, at.token_axes) if at.token_axes else sums, *found

    if sharding is not None:
        in_specs = (at.states, at.head, at.tokens, at.tokens)
        sums = (sharding.spec(), sharding.spec())
        part = sharding.shard_map(part, in_specs, (sums, *([at.states, at.head_gradient] if gradients else [])))
    return part(x_BTD, head_VD, labels_BT, weights_BT)


def _on_device(
    z_loss: float,
    gradients: bool,
    by_words: bool,
    at: _Layout,
    x_BTD: Array,
    head_VD: Array,
    labels_BT: Array,
    weights_BT: Array,
) -> tuple:
    """((both sums), gradient of x, gradient of head) of these tokens; the gradients only if asked for."""
    count, (words, width) = labels_BT.size, head_VD.shape

    def step(carry: tuple, chunk: tuple) -> tuple:
        x_tD, labels_t, weights_t = chunk
        logits_tV, normalizer_t, nll_t = _chunk(head_VD, at, x_tD, labels_t)
        loss_t = nll_t + z_loss * normalizer_t**2
        sums = tuple(old + _weighted(new, weights_t).sum() for old, new in zip(carry[0], (loss_t, nll_t), strict=True))
        if not gradients or by_words:
            return (sums, None), normalizer_t
        labels_t -= _first(at, words)
        gradient_tV = _logit_gradient(z_loss, logits_tV, normalizer_t, labels_t, weights_t).astype(x_tD.dtype)
        gradient_tD = _over(jax.lax.psum, at, _multiply(gradient_tV, head_VD, (((1,), (0,)), ((), ()))))
        gradient_VD = carry[1] + _multiply(gradient_tV, x_tD, (((0,), (0,)), ((), ())))
        return (sums, gradient_VD), gradient_tD.astype(x_tD.dtype)

    zero = jnp.zeros((), jnp.float32)
    start: Any = ((zero, zero), jnp.zeros((words, width), jnp.float32) if gradients and not by_words else None)
    logit_bytes = at.logit_bytes // 4 if by_words else at.logit_bytes
    chunks = _split(head_VD, logit_bytes, x_BTD, labels_BT, weights_BT)
    (sums, gradient_VD), found_Ct = jax.lax.scan(step, start, chunks)
    if not gradients:
        return (sums,)
    if by_words:
        normalizer_BT = found_Ct.reshape(-1)[:count].reshape(labels_BT.shape)
        return sums, *_by_words(z_loss, at, x_BTD, head_VD, labels_BT, weights_BT, normalizer_BT)
    x_gradient_BTD = found_Ct.reshape(-1, width)[:count].reshape(x_BTD.shape)
    return sums, x_gradient_BTD, at.settle(gradient_VD.astype(head_VD.dtype))


def _by_words(
    z_loss: float, at: _Layout, x_BTD: Array, head_VD: Array, labels_BT: Array, weights_BT: Array, normalizer_BT: Array
) -> tuple[Array, Array]:
    """The gradients of x and head on a device, from logits computed again, a part of the vocabulary at a time."""
    words, width = head_VD.shape
    x_ND = x_BTD.reshape(-1, width)
    labels_N, weights_N, normalizer_N = (x.reshape(-1) for x in (labels_BT, weights_BT, normalizer_BT))
    chunks = _chunk_count(labels_N.size, words, at.logit_bytes // 4)
    pieces = next(n for n in range(min(words, chunks), words + 1) if words % n == 0)

    def step(gradient_ND: Array, piece: tuple) -> tuple:
        head_vD, first = piece
        logits_Nv = _multiply(x_ND, head_vD, (((1,), (1,)), ((), ())))
        gradient_Nv = _logit_gradient(z_loss, logits_Nv, normalizer_N, labels_N - first, weights_N).astype(x_ND.dtype)
        head_gradient_vD = _multiply(gradient_Nv, x_ND, (((0,), (0,)), ((), ()))).astype(head_vD.dtype)
        return gradient_ND + _multiply(gradient_Nv, head_vD, (((1,), (0,)), ((), ()))), at.settle(head_gradient_vD)

    firsts = _first(at, words) + jnp.arange(pieces, dtype=jnp.int32) * (words // pieces)
    gradient_ND, settled = jax.lax.scan(
        step, jnp.zeros(x_ND.shape, jnp.float32), (head_VD.reshape(pieces, -1, width), firsts)
    )
    gradient_ND = _over(jax.lax.psum, at, gradient_ND).astype(x_BTD.dtype)
    return gradient_ND.reshape(x_BTD.shape), settled.reshape(words, -1)


def _chunk(head_VD: Array, at: _Layout, x_tD: Array, labels_t: Array) -> tuple[Array, Array, Array]:
    """(logits of a device's words, the log of what all words' exponentials add up to, -log p of labels), float32."""
    logits_tV = _multiply(x_tD, head_VD, (((1,), (1,)), ((), ())))
    said_tV = _said(logits_tV, labels_t - _first(at, len(head_VD)))
    most_t = _over(jax.lax.pmax, at, logits_tV.max(axis=1))
    total_t = _over(jax.lax.psum, at, jnp.exp(logits_tV - most_t[:, None]).sum(axis=1))
    normalizer_t = most_t + jnp.log(total_t)
    return logits_tV, normalizer_t, normalizer_t - _over(jax.lax.psum, at, jnp.where(said_tV, logits_tV, 0).sum(axis=1))


def _logit_gradient(z_loss: float, logits_tV: Array, normalizer_t: Array, labels_t: Array, weights_t: Array) -> Array:
    """Of the weighted loss; labels count from the first of these words."""
    share_tV = jnp.exp(logits_tV - normalizer_t[:, None]) * (1 + 2 * z_loss * normalizer_t)[:, None]
    return _weighted(share_tV - _said(logits_tV, labels_t).astype(jnp.float32), weights_t[:, None])


def _said(logits_tV: Array, labels_t: Array) -> Array:
    return jnp.arange(logits_tV.shape[1], dtype=jnp.int32)[None] == labels_t[:, None]


_multiply = functools.partial(jax.lax.dot_general, preferred_element_type=jnp.float32)


def _first(at: _Layout, words: int) -> Array | int:
    """The number of a device's first word."""
    return jax.lax.axis_index(at.vocab_axes) * words if at.vocab_axes else 0


def _over(reduce: Callable[[Array, tuple[str, ...]], Array], at: _Layout, x: Array) -> Array:
    """Over the devices that have the other words."""
    return reduce(x, at.vocab_axes) if at.vocab_axes else x


def _chunk_count(count: int, words: int, logit_bytes: int) -> int:
    return min(count, math.ceil(4 * count * words / logit_bytes))


def _split(head_VD: Array, logit_bytes: int, *arrays: Array) -> tuple[Array, ...]:
    """Arrays [B, T, ...] in chunks of tokens [C, t, ...], the last of them filled up with zeros."""
    count = arrays[0].shape[0] * arrays[0].shape[1]
    chunks = _chunk_count(count, len(head_VD), logit_bytes)
    size = math.ceil(count / chunks)

    def split(x: Array) -> Array:
        x = x.reshape(count, *x.shape[2:])
        return jnp.pad(x, [(0, chunks * size - count)] + [(0, 0)] * (x.ndim - 1)).reshape(chunks, size, *x.shape[1:])

    return tuple(map(split, arrays))
