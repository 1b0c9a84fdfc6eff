import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smollm3_jax.attention import attention


def by_hand(q, k, v, q_segments, kv_segments, q_index, window):
    """The definition, one query at a time, in float64."""
    batch, length, heads, width = q.shape
    group = heads // k.shape[2]
    out = np.zeros(q.shape)
    for b, t, h in np.ndindex(batch, length, heads):
        seen = [
            s
            for s in range(k.shape[1])
            if kv_segments[b, s] == q_segments[b, t] != 0 and q_index[b, t] - window < s <= q_index[b, t]
        ]
        if seen:
            scores = k[b, seen, h // group] @ q[b, t, h] / width**0.5
            weights = np.exp(scores - scores.max())
            out[b, t, h] = weights / weights.sum() @ v[b, seen, h // group]
    return out


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([None, 1, 3]), st.sampled_from([0, 4]))
def test_equals_the_definition(seed, window, cached):
    random = np.random.RandomState(seed)
    batch, length, heads, kv_heads, width = 2, 5, 4, 2, 6
    keys = length + cached
    q = random.standard_normal((batch, length, heads, width))
    k, v = random.standard_normal((2, batch, keys, kv_heads, width))
    kv_segments = random.randint(0, 3, (batch, keys))
    q_segments = kv_segments[:, cached:]
    q_index = np.broadcast_to(np.arange(cached, keys), (batch, length))
    got = attention(
        *(jnp.asarray(x, jnp.float32) for x in (q, k, v)),
        q_segments_BT=jnp.asarray(q_segments),
        kv_segments_BS=jnp.asarray(kv_segments),
        q_index_BT=jnp.asarray(q_index),
        window=None if window is None else jnp.array(window, jnp.int32),
    )
    expected = by_hand(q, k, v, q_segments, kv_segments, q_index, window or 10**9)
    assert np.isfinite(got).all()
    real = q_segments != 0
    np.testing.assert_allclose(np.asarray(got)[real], expected[real], atol=1e-5)


def test_an_unlimited_window_is_no_window():
    random = np.random.RandomState(0)
    q, k, v = (jnp.asarray(random.standard_normal((1, 4, 2, 4)), jnp.float32) for _ in range(3))
    ones, index = jnp.ones((1, 4), jnp.int32), jnp.arange(4)[None]
    masks = {"q_segments_BT": ones, "kv_segments_BS": ones, "q_index_BT": index}
    full = attention(q, k, v, **masks)
    np.testing.assert_array_equal(full, attention(q, k, v, **masks, window=jnp.array(2**31 - 1, jnp.int32)))
    assert np.abs(np.asarray(full - attention(q, k, v, **masks, window=jnp.array(2, jnp.int32)))).max() > 1e-3


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_keeps_the_dtype(dtype):
    x = jnp.ones((1, 3, 2, 4), dtype)
    ones, index = jnp.ones((1, 3), jnp.int32), jnp.arange(3)[None]
    assert attention(x, x, x, q_segments_BT=ones, kv_segments_BS=ones, q_index_BT=index).dtype == dtype
