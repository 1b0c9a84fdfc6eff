"""Next-token cross-entropy that never holds the logits of a whole batch.

It takes the tokens a chunk at a time. Where gradients are wanted, each chunk's are computed at once,
while its logits are there: three products with the embedding, none of them twice. The embedding's gradient is
added up on every device by itself and summed over the devices once, after the loop. (Or, for the least memory,
`by_words`.)

Shapes: B rows, T tokens of a row, N tokens of a device, C chunks of t tokens, D model width, V vocabulary
(a device's part of it), pieces of v words.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.layout import Layout, with_layout_constraint

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


def _weighted(x: Array, weights: Array) -> Array:
    if weights.dtype == jnp.bool_:
        return jnp.where(weights, x, 0)
    return jnp.where(weights != 0, weights * x, 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _loss(z_loss: float, by_words: bool, sharding: Sharding | None, *arrays: Array) -> tuple[Array, Array]:
    return _everywhere(z_loss, by_words, sharding, False, *arrays)[0]


def _forward(z_loss: float, by_words: bool, sharding: Sharding | None, *arrays: Array) -> tuple[Any, tuple]:
    sums, *gradients = _everywhere(z_loss, by_words, sharding, True, *arrays)
    return sums, tuple(gradients)


def _backward(z_loss: float, by_words: bool, sharding: Sharding | None, gradients: tuple, cotangents: tuple) -> tuple:
    return *((cotangents[0] * x.astype(jnp.float32)).astype(x.dtype) for x in gradients), None, None


_loss.defvjp(_forward, _backward)


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
    by_platform = {"cpu": CPU_LOGIT_BYTES, "gpu": GPU_LOGIT_BYTES}
    logit_bytes = by_platform.get(platform_of(sharding), ACCELERATOR_LOGIT_BYTES)
    logit_bytes = logit_bytes // 4 if by_words else logit_bytes
    if sharding is None:
        arrays = (x_BTD, head_VD, labels_BT, weights_BT)
        return _on_device(z_loss, gradients, by_words, logit_bytes, (), lambda x: x, *arrays)
    batch, length = (sharding.fitting(a, n) for a, n in zip(("batch", "length"), labels_BT.shape, strict=True))
    vocab, embed = (sharding.fitting(a, n) for a, n in zip(("vocab", "embed"), head_VD.shape, strict=True))
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

    def part(*arrays: Array) -> tuple:
        vocab_axes = sharding.mesh_axes(vocab)
        sums, *found = _on_device(z_loss, gradients, by_words, logit_bytes, vocab_axes, settle, *arrays)
        return jax.lax.psum(sums, token_axes) if token_axes else sums, *found

    tokens, states = sharding.spec(batch, length), sharding.spec(batch, length, None)
    in_specs = (states, sharding.spec(vocab, None), tokens, tokens)
    out_specs = ((sharding.spec(), sharding.spec()), *([states, sharding.spec(vocab, embed)] if gradients else []))
    return sharding.shard_map(part, in_specs, out_specs)(x_BTD, head_VD, labels_BT, weights_BT)


def _on_device(
    z_loss: float,
    gradients: bool,
    by_words: bool,
    logit_bytes: int,
    vocab_axes: tuple[str, ...],
    settle: Callable[[Array], Array],
    x_BTD: Array,
    head_VD: Array,
    labels_BT: Array,
    weights_BT: Array,
) -> tuple:
    """((both sums), gradient of x, gradient of head) of these tokens; the gradients only if asked for.

    settle sums the parts of the head's gradient that the devices have. (Long, as all of its parts share the chunks and
    what is summed over the mesh's axes.)
    """
    words, width = head_VD.shape
    count = labels_BT.size
    chunks = min(count, math.ceil(4 * count * words / logit_bytes))
    size = math.ceil(count / chunks)

    def split(x: Array) -> Array:
        x = x.reshape(count, *x.shape[2:])
        return jnp.pad(x, [(0, chunks * size - count)] + [(0, 0)] * (x.ndim - 1)).reshape(chunks, size, *x.shape[1:])

    first = jax.lax.axis_index(vocab_axes) * words if vocab_axes else 0
    multiply = functools.partial(jax.lax.dot_general, preferred_element_type=jnp.float32)

    def over_words(reduce: Callable[[Array, tuple[str, ...]], Array], x: Array) -> Array:
        return reduce(x, vocab_axes) if vocab_axes else x

    def logit_gradient(
        logits_tV: Array, first: Array | int, normalizer_t: Array, labels_t: Array, weights_t: Array
    ) -> Array:
        said_tV = jnp.arange(logits_tV.shape[1], dtype=jnp.int32)[None] == (labels_t - first)[:, None]
        share_tV = jnp.exp(logits_tV - normalizer_t[:, None]) * (1 + 2 * z_loss * normalizer_t)[:, None]
        return _weighted(share_tV - said_tV.astype(jnp.float32), weights_t[:, None]).astype(x_BTD.dtype)

    def step(carry: Any, chunk: tuple) -> tuple:
        x_tD, labels_t, weights_t = chunk
        logits_tV = multiply(x_tD, head_VD, (((1,), (1,)), ((), ())))
        said_tV = jnp.arange(words, dtype=jnp.int32)[None] == (labels_t - first)[:, None]
        most_t = over_words(jax.lax.pmax, logits_tV.max(axis=1))
        total_t = over_words(jax.lax.psum, jnp.exp(logits_tV - most_t[:, None]).sum(axis=1))
        normalizer_t = most_t + jnp.log(total_t)
        nll_t = normalizer_t - over_words(jax.lax.psum, jnp.where(said_tV, logits_tV, 0).sum(axis=1))
        loss_t = nll_t + z_loss * normalizer_t**2
        sums = tuple(old + _weighted(new, weights_t).sum() for old, new in zip(carry[0], (loss_t, nll_t), strict=True))
        if not gradients or by_words:
            return (sums, None), normalizer_t
        gradient_tV = logit_gradient(logits_tV, first, normalizer_t, labels_t, weights_t)
        gradient_tD = over_words(jax.lax.psum, multiply(gradient_tV, head_VD, (((1,), (0,)), ((), ()))))
        gradient_VD = carry[1] + multiply(gradient_tV, x_tD, (((0,), (0,)), ((), ())))
        return (sums, gradient_VD), gradient_tD.astype(x_tD.dtype)

    zero = jnp.zeros((), jnp.float32)
    start: Any = ((zero, zero), jnp.zeros((words, width), jnp.float32) if gradients and not by_words else None)
    (sums, gradient_VD), found_Ct = jax.lax.scan(step, start, tuple(map(split, (x_BTD, labels_BT, weights_BT))))
    if not gradients:
        return (sums,)
    if not by_words:
        x_gradient_BTD = found_Ct.reshape(-1, width)[:count].reshape(x_BTD.shape)
        return sums, x_gradient_BTD, settle(gradient_VD.astype(head_VD.dtype))

    x_ND, labels_N, weights_N = x_BTD.reshape(count, width), labels_BT.reshape(count), weights_BT.reshape(count)
    normalizer_N = found_Ct.reshape(-1)[:count]
    pieces = next(n for n in range(min(words, chunks), words + 1) if words % n == 0)

    def piece_step(gradient_ND: Array, piece: tuple) -> tuple:
        head_vD, first = piece
        logits_Nv = multiply(x_ND, head_vD, (((1,), (1,)), ((), ())))
        gradient_Nv = logit_gradient(logits_Nv, first, normalizer_N, labels_N, weights_N)
        head_gradient_vD = multiply(gradient_Nv, x_ND, (((0,), (0,)), ((), ()))).astype(head_vD.dtype)
        return gradient_ND + multiply(gradient_Nv, head_vD, (((1,), (0,)), ((), ()))), settle(head_gradient_vD)

    firsts = first + jnp.arange(pieces, dtype=jnp.int32) * (words // pieces)
    gradient_ND, settled = jax.lax.scan(
        piece_step, jnp.zeros((count, width), jnp.float32), (head_VD.reshape(pieces, -1, width), firsts)
    )
    gradient_ND = over_words(jax.lax.psum, gradient_ND).astype(x_BTD.dtype)
    return sums, gradient_ND.reshape(x_BTD.shape), settled.reshape(words, -1)
