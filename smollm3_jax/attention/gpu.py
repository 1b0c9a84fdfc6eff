"""Attention of whole sequences on GPUs, by cuDNN: packed documents, a past, rows split along their length.

No array of scores is in memory, forward or backward. What a query sees may be several calls' work, put together by
their normalizers in float32; then each call's backward pass is given the output and normalizers of all calls.

Shapes: B batch, T query length, S key length, H query heads, K key-value heads, E head width, N documents of a call.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from sharding.rules import PyTree, Sharding

from .. import nvidia
from . import cudnn
from .cudnn import Ranges
from .parts import Part

# Documents that one call of the kernel takes, for each row; what a batch has beyond that takes further calls. The
# kernel's normalizers take 4 T H bytes for each.
DOCUMENTS = 64
# A normalizer beside which every exponential is nothing.
HUGE = 1e30


class Past(NamedTuple):
    """Keys and values [B, S, K, E] that lie before those of a call, and which queries see which of them: one
    range a row, and then as many empty ones."""

    k: Array
    v: Array
    ranges: Ranges


def causal(q_BTHE: Array, k_BTKE: Array, v_BTKE: Array, *segments: Array) -> Array:
    """Causal attention of rows, within documents if there are segments (of queries and of keys, which are the same)."""
    if not segments:
        if nvidia.kernels_fit():
            return _attend(q_BTHE, k_BTKE, v_BTKE, None, None)
        out_BTHE = jax.nn.dot_product_attention(q_BTHE, k_BTKE, v_BTKE, is_causal=True, implementation="cudnn")
        return checkpoint_name(out_BTHE, "attention")
    segments_BT = segments[0]
    return _attend(q_BTHE, _refused(k_BTKE, segments_BT), v_BTKE, document_numbers(segments_BT), None)


def cudnn_part(
    q_BTHE: Array,
    k_BSKE: Array,
    v_BSKE: Array,
    seen: Array | None,
    distance: Array | None,
    window: Array | None,
) -> Part:
    """As `dense_part`, by cuDNN, which takes no window."""
    assert window is None
    (batch, length), keys, ranges = q_BTHE.shape[:2], k_BSKE.shape[1], None
    if seen is not None:
        ranges = Ranges(jnp.full(batch, length, jnp.int32), jnp.broadcast_to(jnp.minimum(seen, keys), batch))
    out_BTHE, norm_BHT = cudnn.forward(q_BTHE, k_BSKE, v_BSKE, seen is None, ranges)
    return Part(out_BTHE.astype(jnp.float32), norm_BHT.swapaxes(1, 2)[..., None])


def causal_over_length(
    q_BTHE: Array,
    k_BTKE: Array,
    v_BTKE: Array,
    segments_BT: Array,
    kv_axis: str,
    sharding: Sharding,
) -> Array:
    """Causal attention of rows whose tokens lie on several devices, in the order of `sharding.row_order`.

    Each device has two pieces of a row. A piece sees itself; and its first document, if that goes on from before, sees
    what came before of it, among the keys of the whole row: these, which a few heads make small, are gathered.
    """
    batch = sharding.fitting("batch", q_BTHE.shape[0])
    mesh_axes, pieces = sharding.mesh_axes("length"), 2 * sharding.parts("length")
    order = sharding.row_order(q_BTHE.shape[1])
    assert order is not None
    back = np.argsort(order)

    def whole(x: Array) -> Array:
        return jax.lax.all_gather(x, mesh_axes, axis=1, tiled=True)[:, back]

    def part(q_BTHE: Array, k_BTKE: Array, v_BTKE: Array, segments_BT: Array) -> Array:
        row_BS = whole(segments_BT)
        k_BTKE = _refused(k_BTKE, row_BS)
        row_k_BSKE, row_v_BSKE = whole(k_BTKE), whole(v_BTKE)
        device = jax.lax.axis_index(mesh_axes)
        out = []
        for x, number in enumerate((device, pieces - 1 - device)):
            q, k, v, piece_BT = (jnp.split(x_B, 2, axis=1)[x] for x_B in (q_BTHE, k_BTKE, v_BTKE, segments_BT))
            past = Past(row_k_BSKE, row_v_BSKE, _continued(piece_BT, row_BS, number * piece_BT.shape[1]))
            out.append(_attend(q, k, v, document_numbers(piece_BT), past))
        return jnp.concatenate(out, axis=1)

    q_spec, kv_spec = (sharding.spec(batch, "length", axis, None) for axis in ("heads", kv_axis))
    specs = (q_spec, kv_spec, kv_spec, sharding.spec(batch, "length"))
    return sharding.shard_map(part, specs, q_spec)(q_BTHE, k_BTKE, v_BTKE, segments_BT)


def document_numbers(segments_BT: Array) -> Array:
    """int32 [B x T]: of which document each token is, counted from 0 over all rows.

    A document is a run of equal ids; so is a run of padding: it costs little, and its values are finite.
    """
    before_BT = jnp.pad(segments_BT, ((0, 0), (1, 0)))[:, :-1]
    begins_BT = (segments_BT != before_BT) | (jnp.arange(segments_BT.shape[1]) == 0)[None]
    number_X = jnp.cumsum(begins_BT.reshape(-1), dtype=jnp.int32) - 1
    return checkpoint_name(number_X, "attention_residuals")


def _refused(k_BTKE: Array, segments_BS: Array) -> Array:
    """The keys; those of a row in which an id is not above all before it, so that it may name a document in two parts,
    are not numbers, and nothing that comes of the row is."""
    highest_BS = jax.lax.cummax(segments_BS, axis=1)
    wrong_BS = (segments_BS[:, 1:] != segments_BS[:, :-1]) & (segments_BS[:, 1:] <= highest_BS[:, :-1])
    wrong_B = checkpoint_name((wrong_BS & (segments_BS[:, 1:] != 0)).any(axis=1), "attention_residuals")
    return jnp.where(wrong_B[:, None, None, None], jnp.nan, k_BTKE)


def _continued(piece_BT: Array, row_BS: Array, start: Array) -> Ranges:
    """Of each row the queries of a piece, from `start` on, whose document began before, and its keys there."""
    (batch, length), keys = piece_BT.shape, row_BS.shape[1]
    before_B = jnp.take(row_BS, jnp.maximum(start - 1, 0), axis=1)
    goes_on_B = (start > 0) & (before_B == piece_BT[:, 0])
    other_BT = piece_BT != piece_BT[:, :1]
    q_length_B = jnp.where(goes_on_B, jnp.where(other_BT, jnp.arange(length)[None], length).min(axis=1), 0)
    index_1S = jnp.arange(keys)[None]
    other_BS = (row_BS != before_B[:, None]) & (index_1S < start)
    first_B = jnp.where(other_BS, index_1S + 1, 0).max(axis=1)
    row_B = jnp.arange(batch)
    kv_length_B, first_B = (jnp.where(goes_on_B, x, 0) for x in (start - first_B, first_B))

    def padded(x_B: Array, end: int = 0) -> Array:
        """cuDNN has ranges anywhere where a row may have two: as many again, empty ones."""
        return jnp.pad(x_B.astype(jnp.int32), (0, batch), constant_values=end)

    return Ranges(
        padded(q_length_B),
        padded(kv_length_B),
        padded(row_B * length, batch * length),
        padded(row_B * keys + first_B, batch * keys),
    )


@jax.custom_vjp
def _attend(q_BTHE: Array, k_BTKE: Array, v_BTKE: Array, number_X: Array | None, past: Past | None) -> Array:
    """Causal attention within documents, whose numbers `document_numbers` gives, and to a past that all of it sees."""
    return _forward(q_BTHE, k_BTKE, v_BTKE, number_X, past)[0]


def _forward(
    q_BTHE: Array, k_BTKE: Array, v_BTKE: Array, number_X: Array | None, past: Past | None
) -> tuple[Array, Array]:
    """The output, and float32 normalizers [B, H, T]."""
    if number_X is None:
        out_BTHE, normalizer_BHT = cudnn.forward(q_BTHE, k_BTKE, v_BTKE, True, None)
    else:
        out_BTHE, normalizer_BHT = _documents_forward(q_BTHE, k_BTKE, v_BTKE, number_X)
    if past is None:
        return out_BTHE, normalizer_BHT
    past_out_BTHE, past_normalizer = cudnn.forward(q_BTHE, past.k, past.v, False, past.ranges)
    seen_BT = _looks(q_BTHE, past)
    past_normalizer_BHT = jnp.where(seen_BT[:, None], past_normalizer[: len(seen_BT)], -jnp.inf)
    total_BHT = jnp.logaddexp(normalizer_BHT, past_normalizer_BHT)
    share, past_share = (
        jnp.exp(x - total_BHT).swapaxes(1, 2)[..., None] for x in (normalizer_BHT, past_normalizer_BHT)
    )
    merged = out_BTHE.astype(jnp.float32) * share
    merged += jnp.where(seen_BT[:, :, None, None], past_out_BTHE.astype(jnp.float32), 0) * past_share
    return merged.astype(q_BTHE.dtype), total_BHT


def _kept(q_BTHE: Array, k_BTKE: Array, v_BTKE: Array, number_X: Array | None, past: Past | None) -> tuple:
    result = _forward(q_BTHE, k_BTKE, v_BTKE, number_X, past)
    out_BTHE, normalizer_BHT = (checkpoint_name(x, "attention_residuals") for x in result)
    return out_BTHE, (q_BTHE, k_BTKE, v_BTKE, number_X, past, out_BTHE, normalizer_BHT)


def _backward(kept: tuple, gradient_BTHE: Array) -> tuple:
    q_BTHE, k_BTKE, v_BTKE, number_X, past, out_BTHE, normalizer_BHT = kept
    of_call = (normalizer_BHT, out_BTHE, gradient_BTHE)
    if number_X is None:
        gradients = cudnn.backward(q_BTHE, k_BTKE, v_BTKE, True, None, *of_call)
    else:
        gradients = _documents_backward(q_BTHE, k_BTKE, v_BTKE, number_X, *of_call)
    if past is None:
        return *gradients, None, None
    normalizer = jnp.concatenate([normalizer_BHT, jnp.full_like(normalizer_BHT, HUGE)])
    q_past, k_past, v_past = cudnn.backward(q_BTHE, past.k, past.v, False, past.ranges, normalizer, *of_call[1:])
    q_past = jnp.where(_looks(q_BTHE, past)[:, :, None, None], q_past.astype(jnp.float32), 0)
    q_gradient = (gradients[0].astype(jnp.float32) + q_past).astype(q_BTHE.dtype)
    seen_BS11 = _is_looked_at(past)[:, :, None, None]
    k_past, v_past = (jnp.where(seen_BS11, x, 0) for x in (k_past, v_past))
    return q_gradient, *gradients[1:], None, Past(k_past, v_past, None)  # pyright: ignore[reportArgumentType]


_attend.defvjp(_kept, _backward)


def _looks(q_BTHE: Array, past: Past) -> Array:
    """bool [B, T]: the queries that see some of the past."""
    batch, length = q_BTHE.shape[:2]
    return jnp.arange(length)[None] < past.ranges.q_length[:batch, None]


def _is_looked_at(past: Past) -> Array:
    """bool [B, S]: the keys of the past that some query sees."""
    batch, keys = past.k.shape[:2]
    assert past.ranges.kv_first is not None
    first_B = past.ranges.kv_first[:batch] - jnp.arange(batch) * keys
    index_BS = jnp.arange(keys)[None] - first_B[:, None]
    return (index_BS >= 0) & (index_BS < past.ranges.kv_length[:batch, None])


class _Documents(NamedTuple):
    """As many documents as one call takes. mine: bool [B, T], which tokens are of them; number, place: int32 [B, T], of
    which each token is and where in it, 0 if of none."""

    ranges: Ranges
    mine: Array
    number: Array
    place: Array

    def of_tokens(self, normalizer_NHT: Array) -> Array:
        """[B, H, T] of what the kernel gives by document."""
        head_H1 = jnp.arange(normalizer_NHT.shape[1])[:, None]
        return normalizer_NHT[self.number[:, None], head_H1, self.place[:, None]]

    def of_documents(self, normalizer_BHT: Array) -> Array:
        """[N, H, T] of each token's."""
        batch, heads, length = normalizer_BHT.shape
        place_1T = jnp.arange(length)[None]
        token_NT = jnp.minimum(self.ranges.q_first[:, None] + place_1T, batch * length - 1)  # pyright: ignore
        found = normalizer_BHT[(token_NT // length)[:, None], jnp.arange(heads)[:, None], (token_NT % length)[:, None]]
        return jnp.where((place_1T < self.ranges.q_length[:, None])[:, None], found, HUGE)


def _some_documents(number_X: Array, call: Array | int, batch: int) -> _Documents:
    """The documents that a call of the kernel takes, by the call's number."""
    count = batch * DOCUMENTS
    own_X = number_X - call * count
    # Where each begins, and the last one ends: as many tokens are of documents before it.
    edge = (own_X[:, None] < jnp.arange(count + 1)[None]).sum(axis=0, dtype=jnp.int32)
    length_N, first_N = edge[1:] - edge[:-1], edge[:-1]
    mine_X = (own_X >= 0) & (own_X < count)
    number_X = jnp.where(mine_X, own_X, 0)
    place_X = jnp.where(mine_X, jnp.arange(len(own_X)) - first_N[number_X], 0)
    by_row = (x.reshape(batch, -1) for x in (mine_X, number_X, place_X))
    return _Documents(Ranges(length_N, length_N, first_N, first_N), *by_row)


def _documents_forward(q_BTHE: Array, k_BTKE: Array, v_BTKE: Array, number_X: Array) -> tuple[Array, Array]:
    def some(call: Array | int) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
        documents = _some_documents(number_X, call, len(q_BTHE))
        out_BTHE, normalizer_NHT = cudnn.forward(q_BTHE, k_BTKE, v_BTKE, True, documents.ranges)
        mine = documents.mine[:, :, None, None], documents.mine[:, None]
        return (out_BTHE, documents.of_tokens(normalizer_NHT)), mine

    return _all_calls(some, number_X, len(q_BTHE))


def _documents_backward(
    q_BTHE: Array,
    k_BTKE: Array,
    v_BTKE: Array,
    number_X: Array,
    normalizer_BHT: Array,
    out_BTHE: Array,
    gradient_BTHE: Array,
) -> tuple[Array, Array, Array]:
    def some(call: Array | int) -> tuple[tuple[Array, Array, Array], tuple[Array, ...]]:
        documents = _some_documents(number_X, call, len(q_BTHE))
        of_call = (documents.of_documents(normalizer_BHT), out_BTHE, gradient_BTHE)
        gradients = cudnn.backward(q_BTHE, k_BTKE, v_BTKE, True, documents.ranges, *of_call)
        return gradients, (documents.mine[:, :, None, None],) * 3

    return _all_calls(some, number_X, len(q_BTHE))


def _all_calls(
    some: Callable[[Array | int], tuple[tuple[Array, ...], tuple[Array, ...]]], number_X: Array, batch: int
) -> PyTree:
    """What all calls give together: `some` maps a call's number to its arrays, and where they are the call's own.

    Nearly always the first is the only one: how many there are is known when the step runs.
    """
    count = batch * DOCUMENTS
    first, _ = some(0)
    if len(number_X) <= count:
        return first

    def more(state: tuple) -> tuple:
        call, old = state
        new, mine = some(call)
        return call + 1, tuple(jnp.where(*x) for x in zip(mine, new, old, strict=True))

    calls = number_X[-1] // count + 1
    return jax.lax.while_loop(lambda state: state[0] < calls, more, (jnp.int32(1), first))[1]
