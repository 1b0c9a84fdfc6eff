"""Decoding from long rows, read in blocks on a CPU, against all places at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smollm3_jax.attention import decode, dispatch
from smollm3_jax.kv_cache import LayerCache, quantize_rows

HEADS, KV_HEADS, WIDTH, PLACES = 6, 2, 8, 4096


def drawn(rows, places=PLACES, length=1, int8=False):
    draw = np.random.default_rng(0)
    q, k, v = (
        jnp.asarray(draw.standard_normal(shape), jnp.float32)
        for shape in ((rows, length, HEADS, WIDTH), *[(KV_HEADS, rows, places, WIDTH)] * 2)
    )
    if not int8:
        return q, LayerCache(k, v)
    (k, k_scale), (v, v_scale) = quantize_rows(k), quantize_rows(v)
    return q, LayerCache(k, v, k_scale, v_scale)


def at_once(q, cache, lengths, window=None):
    scores = decode.cache_scores(q, cache, lengths, window)
    return decode.cache_mix(jax.nn.softmax(scores, axis=-1), cache, q.dtype).reshape(q.shape)


@pytest.mark.parametrize("window", [None, 700])
@pytest.mark.parametrize(("length", "int8"), [(1, False), (3, False), (1, True)])
def test_blocks_are_all_places_at_once(length, int8, window):
    q, cache = drawn(4, length=length, int8=int8)
    lengths = jnp.array([0, 255, 1000, PLACES - length], jnp.int32)
    window = None if window is None else jnp.int32(window)
    got = dispatch.decode_attention(q, cache, length_B=lengths, window=window)
    expected = at_once(q, cache, lengths, window)
    assert np.abs(got - expected).max() < 2e-6  # of means of values up to 5
    assert np.abs(got - at_once(q, cache, lengths + 1, window)).max() > 1e-3


def test_what_other_rows_hold_changes_no_bit():
    q, cache = drawn(2)
    attend = jax.jit(lambda lengths: dispatch.decode_attention(q, cache, length_B=lengths))
    beside = [attend(jnp.array([300, other], jnp.int32))[0] for other in (0, 299, 2000, PLACES - 1)]
    assert all((one == beside[0]).all() for one in beside)
    assert (attend(jnp.array([301, 0], jnp.int32))[0] != beside[0]).any()


def test_rows_that_want_nothing_are_not_read():
    q, cache = drawn(2)
    cache = LayerCache(cache.k.at[:, 1, 300:].set(jnp.nan), cache.v)
    lengths = jnp.array([200, 4000], jnp.int32)
    both = dispatch.decode_attention(q, cache, length_B=lengths)
    one = dispatch.decode_attention(q, cache, length_B=lengths, segments_BT=jnp.array([[1], [0]], jnp.int32))
    assert np.isnan(both[1]).any() and np.isfinite(one).all() and (one[0] == both[0]).all()


def test_pages_are_rows():
    q, cache = drawn(2)
    pages = PLACES // decode.BLOCK
    table = np.random.default_rng(1).permutation(2 * pages + 3)[: 2 * pages].reshape(2, pages).astype(np.int32)

    def paged(x):
        pool = jnp.zeros((KV_HEADS, 2 * pages + 3, decode.BLOCK, *x.shape[3:]), x.dtype)
        return pool.at[:, table.reshape(-1)].set(x.reshape(KV_HEADS, 2 * pages, decode.BLOCK, *x.shape[3:]))

    lengths = jnp.array([100, 3000], jnp.int32)
    rows = dispatch.decode_attention(q, cache, length_B=lengths)
    pool = LayerCache(paged(cache.k), paged(cache.v))
    found = dispatch.decode_attention(q, pool, length_B=lengths, table_BN=jnp.asarray(table))
    assert (found == rows).all()
    other = dispatch.decode_attention(q, pool, length_B=lengths, table_BN=jnp.asarray(table[::-1]))
    assert (other != rows).any()


def test_short_rows_are_read_at_once():
    """Bit for bit what they were."""
    q, cache = drawn(2, places=decode.AT_ONCE)
    lengths = jnp.array([5, 1500], jnp.int32)
    assert (dispatch.decode_attention(q, cache, length_B=lengths) == at_once(q, cache, lengths)).all()
