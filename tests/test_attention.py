import functools
import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rounding
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel
from jax.sharding import Mesh

from sharding.mesh import make_mesh
from sharding.rules import Sharding
from smollm3_jax.attention import attention, decode_attention, dense, dispatch, tpu
from smollm3_jax.kv_cache import LayerCache, quantize_rows


def by_hand(q, k, v, q_segments, kv_segments, window=None):
    """The definition, one query at a time, in float64."""
    batch, length, heads, width = q.shape
    keys = k.shape[1]
    past, group = keys - length, heads // k.shape[2]
    out = np.zeros(q.shape)
    for b, t, h in np.ndindex(batch, length, heads):
        at = past + t
        seen = [
            s
            for s in range(at + 1)
            if kv_segments[b, s] == q_segments[b, t] != 0 and (window is None or at - s < window)
        ]
        if seen:
            scores = k[b, seen, h // group] @ q[b, t, h] / width**0.5
            weights = np.exp(scores - scores.max())
            out[b, t, h] = weights / weights.sum() @ v[b, seen, h // group]
    return out


def normal(seed, *shape):
    return np.random.RandomState(seed).standard_normal(shape)


def scalar(window):
    return None if window is None else jnp.array(window, jnp.int32)


def f32(*arrays) -> Any:
    return tuple(jnp.asarray(x, jnp.float32) for x in arrays)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([None, 1, 3]))
def test_equals_the_definition(seed, window):
    random = np.random.RandomState(seed)
    batch, length, heads, kv_heads, width = 2, 9, 4, 2, 6
    q = random.standard_normal((batch, length, heads, width))
    k, v = random.standard_normal((2, batch, length, kv_heads, width))
    segments = random.randint(0, 3, (batch, length))
    got = attention(*f32(q, k, v), segments_BT=jnp.asarray(segments), window=scalar(window))
    assert np.isfinite(got).all()
    real = segments != 0
    expected = by_hand(q, k, v, segments, segments, window)
    np.testing.assert_allclose(np.asarray(got)[real], expected[real], atol=1e-5)


def out_and_gradients(q, k, v, g, **masks):
    out, back = jax.vjp(lambda q, k, v: attention(q, k, v, **masks), q, k, v)
    return out, *back(g)


def seen_by(segments, window=None):
    """bool [B, T, T]: the definition's mask."""
    index = np.arange(segments.shape[1])
    distance, segments = index[:, None] - index[None], np.asarray(segments)
    own = (segments[:, :, None] == segments[:, None, :]) & (segments != 0)[:, :, None]
    return own & (distance >= 0) & (distance < (window or len(index)))


@pytest.mark.parametrize("length", [8, 11])
def test_a_few_queries_at_a_time(length, monkeypatch):
    q, k, v, g = f32(*(normal(i, 2, length, heads, 4) for i, heads in enumerate((4, 2, 2, 4))))
    segments = jnp.asarray(np.random.RandomState(3).randint(0, 3, (2, length)))
    real = (segments != 0)[:, :, None, None]
    masks = {"segments_BT": segments, "window": scalar(3)}
    monkeypatch.setattr(dense, "SCORE_BYTES", 4 * 2 * 4 * length * 3)  # three queries, of which it makes two
    out, *gradients = out_and_gradients(q, k, v, jnp.where(real, g, 0), **masks)
    bounded = rounding.attention(q, k, v, np.where(real, g, 0), seen_by(segments, 3))
    assert max(rounding.worst((np.where(real, out, 0), *gradients), bounded)) <= 1


def test_no_segments_are_one_document():
    q, k, v = f32(*(normal(i, 2, 6, heads, 4) for i, heads in enumerate((4, 2, 2))))
    ones = jnp.ones((2, 6), jnp.int32)
    np.testing.assert_array_equal(attention(q, k, v), attention(q, k, v, segments_BT=ones))
    # Padding at the end is hidden by causality alone.
    padded = jnp.asarray([[1] * 6, [1] * 4 + [0] * 2])
    got = attention(q, k, v, segments_BT=padded)
    # A score of 4 products is within 6 roundings of the sum of their sizes (at most `size`), which a weight has twice
    # as its relative error, beside those of 6 exponentials and their sum; each side of the comparison has them all.
    size = np.abs(np.asarray(q)).max() * np.abs(np.asarray(k)).max() * 4 / 4**0.5
    allowed = 2 * (2 * 6 * size + 6 + 4) * 2.0**-24 * np.abs(np.asarray(v)).max()
    np.testing.assert_allclose(got[1, :4], attention(q, k, v)[1, :4], atol=allowed)


def test_an_unlimited_window_is_no_window():
    q, k, v = f32(*(normal(i, 1, 4, 2, 4) for i in range(3)))
    full = attention(q, k, v)
    np.testing.assert_array_equal(full, attention(q, k, v, window=scalar(2**31 - 1)))
    assert np.abs(np.asarray(full - attention(q, k, v, window=scalar(2)))).max() > 1e-3


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_keeps_the_dtype(dtype):
    x = jnp.ones((1, 3, 2, 4), dtype)
    assert attention(x, x, x).dtype == dtype
    cache = LayerCache(x.transpose(2, 0, 1, 3), x.transpose(2, 0, 1, 3))
    assert decode_attention(x[:, :1], cache, length_B=jnp.array([2])).dtype == dtype


def decoded_by_hand(q, k, v, lengths, window=None):
    """The last T keys up to each row's length + T, through the definition."""
    steps = q.shape[1]
    rows = []
    for row, length in enumerate(lengths):
        ones = np.ones((1, length + steps))
        keys, values = (x[row : row + 1, : length + steps] for x in (k, v))
        rows.append(by_hand(q[row : row + 1], keys, values, ones[:, :steps], ones, window=window))
    return np.concatenate(rows)


@pytest.mark.parametrize(("steps", "window"), [(1, None), (3, None), (1, 4), (3, 4)])
@pytest.mark.parametrize("quantized", [False, True])
def test_decoding_equals_the_definition(steps, window, quantized):
    lengths, capacity = np.array([0, 5, 9 - steps]), 9
    q = normal(0, 3, steps, 4, 6)
    k, v = normal(1, 3, capacity, 2, 6), normal(2, 3, capacity, 2, 6)
    stored = [jnp.asarray(x.transpose(2, 0, 1, 3), jnp.float32) for x in (k, v)]
    if quantized:
        (k8, k_scale), (v8, v_scale) = map(quantize_rows, stored)
        cache = LayerCache(k8, v8, k_scale, v_scale)
        k, v = (
            (np.asarray(x) * np.asarray(scale)[..., None]).transpose(1, 2, 0, 3)
            for x, scale in ((k8, k_scale), (v8, v_scale))
        )
    else:
        cache = LayerCache(*stored)
    (q32,) = f32(q)
    got = decode_attention(q32, cache, length_B=jnp.asarray(lengths), window=scalar(window))
    np.testing.assert_allclose(got, decoded_by_hand(q, k, v, lengths, window), atol=1e-5)


@pytest.fixture
def as_on_tpu(monkeypatch):
    """Kernels are chosen as on TPU, and interpreted on the CPU."""
    monkeypatch.setattr(dispatch, "platform_of", lambda sharding: "tpu")
    # The interpreter that imitates a TPU's memories cannot take this kernel under vmap; the plain one can.
    interpreted = functools.partial(splash_attention_kernel.make_splash_mha, interpret=True)
    monkeypatch.setattr(splash_attention_kernel, "make_splash_mha", interpreted)
    tpu.splash_kernel.cache_clear()
    yield
    tpu.splash_kernel.cache_clear()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("length", "documents", "width", "dtype"),
    [
        (16, False, 64, "float32"),
        (256, True, 64, "float32"),
        (1000, True, 128, "bfloat16"),
    ],
)
def test_splash_equals_the_definition(length, documents, width, dtype, as_on_tpu):
    batch, heads, kv_heads = 2, 4, 2
    # Values that bfloat16 holds exactly.
    q, k, v = (
        np.asarray(jnp.asarray(normal(i, batch, n, h, width), jnp.bfloat16), np.float64)
        for i, (n, h) in enumerate([(length, heads), *[(length, kv_heads)] * 2])
    )
    segments = np.ones((batch, length), np.int32)
    masks = {}
    if documents:
        segments = np.sort(np.random.RandomState(3).randint(0, 3, segments.shape), axis=1)[:, ::-1].copy()
        masks = {"segments_BT": jnp.asarray(segments)}
    got = attention(*(jnp.asarray(x, dtype) for x in (q, k, v)), **masks)
    assert got.dtype == dtype and np.isfinite(np.asarray(got, np.float32)).all()
    real = segments != 0
    expected = by_hand(q, k, v, segments, segments)
    allowed = 1e-5 if dtype == "float32" else 0.02
    np.testing.assert_allclose(np.asarray(got, np.float64)[real], expected[real], atol=allowed)


@pytest.mark.slow
def test_splash_has_the_gradients_of_the_definition(as_on_tpu):
    q, k, v, g = f32(*(normal(i, 1, 130, heads, 64) for i, heads in enumerate((4, 2, 2, 4))))
    segments = jnp.asarray([[1] * 60 + [2] * 50 + [0] * 20])
    g = jnp.where((segments != 0)[:, :, None, None], g, 0)
    got = out_and_gradients(q, k, v, g, segments_BT=segments)[1:]
    assert max(rounding.worst(got, rounding.attention(q, k, v, g, seen_by(segments))[1:])) <= 1


@pytest.mark.slow
@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("group", [4, 8])
def test_the_paged_kernels_equal_the_definition(group, quantized, as_on_tpu):
    capacity, lengths = 256, np.array([0, 100, 127, 128, 255, 256])
    q = np.asarray(jnp.asarray(normal(0, len(lengths), 1, 2 * group, 128), jnp.bfloat16), np.float64)
    k, v = (
        np.asarray(jnp.asarray(normal(i, len(lengths), capacity, 2, 128), jnp.bfloat16), np.float64) for i in (1, 2)
    )
    stored = [jnp.asarray(x.transpose(2, 0, 1, 3), jnp.bfloat16) for x in (k, v)]
    cache = LayerCache(*stored)
    if quantized:
        (k8, k_scale), (v8, v_scale) = map(quantize_rows, stored)
        cache = LayerCache(k8, v8, k_scale, v_scale)
        k, v = (
            (np.asarray(x) * np.asarray(scale)[..., None]).transpose(1, 2, 0, 3)
            for x, scale in ((k8, k_scale), (v8, v_scale))
        )
    with pltpu.force_tpu_interpret_mode():
        got = decode_attention(jnp.asarray(q, jnp.bfloat16), cache, length_B=jnp.asarray(lengths, jnp.int32))
    # A full row had no room for the new token: it looks at what it has.
    expected = decoded_by_hand(q, k, v, np.minimum(lengths, capacity - 1))
    np.testing.assert_allclose(np.asarray(got, np.float64), expected, atol=0.01, rtol=2**-8)


def test_what_a_kernel_does_not_take_is_said_once(as_on_tpu, caplog):
    dispatch.say_once.cache_clear()
    x = jnp.ones((1, 3, 2, 4), jnp.float16)
    cache = LayerCache(x.transpose(2, 0, 1, 3), x.transpose(2, 0, 1, 3))
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            attention(x, x, x, window=scalar(2))
            decode_attention(x, cache, length_B=jnp.array([0]))
    assert [record.getMessage() for record in caplog.records if record.name == dispatch.__name__] == [
        "splash attention does not take a window or float16 values or heads of width 4: "
        "plain XLA computes attention, which is slower",
        "paged attention does not take several tokens at a time or a cache of float16 or heads of width 4 or "
        "a capacity of 3: plain XLA computes attention, which is slower",
    ]


def test_no_kernel_no_word(caplog):
    dispatch.say_once.cache_clear()
    x = jnp.ones((1, 3, 2, 4), jnp.float16)
    with caplog.at_level(logging.INFO):
        attention(x, x, x, window=scalar(2))
    assert not caplog.records


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_are_those_of_the_definition(dtype, window):
    """Three documents, of which padding is one; nothing of the scores' size is kept for the backward pass."""
    batch, length, heads, kv_heads, width = 2, 40, 4, 2, 16
    q, g = (jnp.asarray(normal(i, batch, length, heads, width), dtype) for i in range(2))
    k, v = (jnp.asarray(normal(i, batch, length, kv_heads, width), dtype) for i in (2, 3))
    segments = jnp.asarray([[1] * 17 + [2] * 23, [1] * 9 + [2] * 21 + [0] * 10])
    g = jnp.where((segments != 0)[:, :, None, None], g, 0)

    def ours(q, k, v, segments=segments, window=window):
        return attention(q, k, v, segments_BT=segments, window=scalar(window))

    def off(factor=1.0, **masks):
        """By how much of what is allowed each gradient is off, with other masks, or q, k and v times a factor."""
        changed = [x * jnp.asarray(factor, dtype) for x in (q, k, v)]
        return rounding.worst(jax.vjp(functools.partial(ours, **masks), *changed)[1](g), bounded)

    bounded = rounding.attention(q, k, v, g, seen_by(segments, window), dtype)[1:]
    assert max(off()) <= 1
    # What is a little wrong is not: a key out of sight, a token in another document, a third of the bits.
    assert min(off(window=(window or 18) - 1)) > 1 and min(off(segments=segments.at[0, 17].set(1))) > 1
    assert min(off(1 + 2.0 ** (-12 if dtype == "float32" else -3))) > 1
    _, back = jax.vjp(ours, q, k, v)
    kept = [x for x in jax.tree.leaves(back) if x.dtype != bool]
    assert max(x.size for x in kept) == q.size < batch * heads * length * length


# Each device on its own part


@pytest.fixture(scope="module")
def square():
    """Four devices."""
    return Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("data", "tensor"))


@pytest.mark.slow
def test_kernels_on_several_devices(square, as_on_tpu, monkeypatch):
    sharding = Sharding.of(square, "serve_tp")
    q, k, v = f32(*(normal(i, 2, 40, heads, 64) for i, heads in enumerate((4, 2, 2))))
    segments = jnp.asarray([[1] * 40, [1] * 22 + [2] * 18])
    masks: dict[str, Any] = {"segments_BT": segments}
    cache = LayerCache(*(jnp.asarray(normal(i, 2, 2, 128, 128), jnp.bfloat16) for i in (3, 4)))
    new = jnp.asarray(normal(5, 2, 1, 4, 128), jnp.bfloat16)
    length = jnp.array([3, 127], jnp.int32)
    with monkeypatch.context() as plain:
        plain.setattr(dispatch, "platform_of", lambda sharding: "cpu")
        expected = attention(q, k, v, **masks), attention(q[:1], k[:1], v[:1])
        expected_decoded = decode_attention(new, cache, length_B=length)
    got = attention(q, k, v, **masks, sharding=sharding), attention(q[:1], k[:1], v[:1], sharding=sharding)
    with pltpu.force_tpu_interpret_mode():
        decoded = decode_attention(new, cache, length_B=length, sharding=sharding)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), got, expected)
    decoded, expected_decoded = f32(decoded, expected_decoded)
    np.testing.assert_allclose(decoded, expected_decoded, atol=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("kernels", [False, True])
def test_a_row_on_several_devices_in_their_order(kernels, request):
    """Attention, and what comes back through it."""
    sharding = Sharding.of(make_mesh({"context": 2, "tensor": 2}, jax.devices()[:4]), "fsdp_tp_cp")
    order = sharding.row_order(512)
    qkvg = f32(*(normal(i, 1, 512, heads, 64) for i, heads in enumerate((4, 2, 2, 4))))
    documents = jnp.asarray(np.sort(np.random.RandomState(0).randint(1, 4, (1, 512)), axis=1), jnp.int32)

    def forward_and_back(q, k, v, g, documents, sharding):
        return out_and_gradients(q, k, v, g, segments_BT=documents, sharding=sharding)

    bounded = rounding.attention(*qkvg, seen_by(documents))
    if kernels:
        request.getfixturevalue("as_on_tpu")
    in_order = [x[:, order] for x in (*qkvg, documents)]
    got = jax.jit(forward_and_back, static_argnums=5)(*in_order, sharding)
    assert max(rounding.worst(got, tuple((exact[:, order], allowed[:, order]) for exact, allowed in bounded))) <= 1
