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
from proxies import FULL
from test_kv_cache import in_pages

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
    q, k, v = f32(q, k, v)
    segments = random.randint(0, 3, (batch, length))
    got = attention(q, k, v, segments_BT=jnp.asarray(segments), window=scalar(window))
    assert np.isfinite(got).all()
    bounded = rounding.attended(q, k, v, rounding.seen_by(segments, window=window))
    assert rounding.within(np.where((segments != 0)[:, :, None, None], got, 0), bounded) <= 1
    # What other bounds are of is the definition too: float64's roundings are 2**29 times as small as those it allows.
    by_one = by_hand(*(np.asarray(x, np.float64) for x in (q, k, v)), segments, segments, window)
    assert rounding.within(by_one, bounded) <= 2.0**-27


def out_and_gradients(q, k, v, g, **masks):
    out, back = jax.vjp(lambda q, k, v: attention(q, k, v, **masks), q, k, v)
    return out, *back(g)


@pytest.mark.parametrize("length", [8, 11])
def test_a_few_queries_at_a_time(length, monkeypatch):
    q, k, v, g = f32(*(normal(i, 2, length, heads, 4) for i, heads in enumerate((4, 2, 2, 4))))
    segments = jnp.asarray(np.random.RandomState(3).randint(0, 3, (2, length)))
    real = (segments != 0)[:, :, None, None]
    masks = {"segments_BT": segments, "window": scalar(3)}
    monkeypatch.setattr(dense, "SCORE_BYTES", 4 * 2 * 4 * length * 3)  # three queries, of which it makes two
    out, *gradients = out_and_gradients(q, k, v, jnp.where(real, g, 0), **masks)
    bounded = rounding.attention(q, k, v, np.where(real, g, 0), rounding.seen_by(segments, window=3))
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


def seen_in(capacity, lengths, steps, window=None):
    """bool [B, T, S]: the keys up to each row's length and the query's own place."""
    distance = (np.asarray(lengths)[:, None] + np.arange(steps))[:, :, None] - np.arange(capacity)
    return (distance >= 0) & (distance < (window or capacity + 1))


def stored(k, v, quantized):
    """A cache of float32 or bfloat16 keys and values [B, S, K, E], and what it holds, in float64."""
    turned = [x.transpose(2, 0, 1, 3) for x in (k, v)]
    if not quantized:
        return LayerCache(*turned), *(np.asarray(x, np.float64) for x in (k, v))
    (k8, k_scale), (v8, v_scale) = map(quantize_rows, turned)
    held = (np.asarray(x, np.float64) * np.asarray(scale)[..., None] for x, scale in ((k8, k_scale), (v8, v_scale)))
    return LayerCache(k8, v8, k_scale, v_scale), *(x.transpose(1, 2, 0, 3) for x in held)


@pytest.mark.parametrize(("steps", "window"), [(1, None), (3, None), (1, 4), (3, 4)])
@pytest.mark.parametrize("quantized", [False, True])
def test_decoding_equals_the_definition(steps, window, quantized):
    lengths, capacity = np.array([0, 5, 9 - steps]), 9
    q, k, v = f32(normal(0, 3, steps, 4, 6), normal(1, 3, capacity, 2, 6), normal(2, 3, capacity, 2, 6))
    cache, k, v = stored(k, v, quantized)

    def off(lengths, window):
        """Of what rows with these lengths may say."""
        got = decode_attention(q, cache, length_B=jnp.asarray(lengths), window=scalar(window))
        return rounding.within(got, bounded)

    bounded = rounding.attended(q, k, v, seen_in(capacity, lengths, steps, window))
    assert off(lengths, window) <= 1
    # A key that is not to be seen, or one that is not seen.
    assert off(lengths + np.array([0, 1, 0]), window) > 1 and off(lengths, (window or 9) - 1) > 1


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("steps", [1, 3])
def test_decoding_against_pages_is_decoding_against_rows(steps, quantized):
    q, k, v = f32(normal(0, 3, steps, 4, 6), normal(1, 3, 12, 2, 6), normal(2, 3, 12, 2, 6))
    cache, *_ = stored(k, v, quantized)
    pool, table = in_pages(cache, 4)
    length = jnp.array([0, 5, 12 - steps])
    got = decode_attention(q, pool, length_B=length, table_BN=table)
    np.testing.assert_array_equal(got, decode_attention(q, cache, length_B=length))


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
        pytest.param(1000, True, 128, "bfloat16", marks=FULL),
    ],
)
def test_splash_equals_the_definition(length, documents, width, dtype, as_on_tpu):
    batch, heads, kv_heads = 2, 4, 2
    q, k, v = (
        jnp.asarray(normal(i, batch, length, h, width), dtype) for i, h in enumerate((heads, kv_heads, kv_heads))
    )
    segments = np.ones((batch, length), np.int32)
    masks: Any = {}
    if documents:
        segments = np.sort(np.random.RandomState(3).randint(0, 3, segments.shape), axis=1)[:, ::-1].copy()
        masks = {"segments_BT": jnp.asarray(segments)}
    got = attention(q, k, v, **masks)
    assert got.dtype == dtype and np.isfinite(np.asarray(got, np.float32)).all()
    got = np.where((segments != 0)[:, :, None, None], got, 0)
    # A tile of 128 keys or more at a time. q is scaled first, by 1 / 8 where heads have a width of 64, which is exact.
    allowed = functools.partial(rounding.attended, q, k, v, dtype=dtype, parts=-(-length // 128), scaled=width == 128)
    assert rounding.within(got, allowed(rounding.seen_by(segments))) <= 1
    # Without the furthest key of the last query, or across documents.
    other = rounding.seen_by(np.where(segments, 1, 0), window=length if documents else length - 1)
    assert rounding.within(got, allowed(other)) > 1


@pytest.mark.slow
def test_splash_has_the_gradients_of_the_definition(as_on_tpu):
    q, k, v, g = f32(*(normal(i, 1, 130, heads, 64) for i, heads in enumerate((4, 2, 2, 4))))
    segments = jnp.asarray([[1] * 60 + [2] * 50 + [0] * 20])
    g = jnp.where((segments != 0)[:, :, None, None], g, 0)
    got = out_and_gradients(q, k, v, g, segments_BT=segments)[1:]
    assert max(rounding.worst(got, rounding.attention(q, k, v, g, rounding.seen_by(segments))[1:])) <= 1


@pytest.mark.slow
@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize(("group", "page"), [(4, None), (8, None), (4, 128)])
def test_the_paged_kernels_equal_the_definition(group, page, quantized, as_on_tpu):
    capacity, lengths = 256, np.array([0, 100, 127, 128, 255, 256])
    rows = len(lengths)
    q = jnp.asarray(normal(0, rows, 1, 2 * group, 128), jnp.bfloat16)
    cache, k, v = stored(*(jnp.asarray(normal(i, rows, capacity, 2, 128), jnp.bfloat16) for i in (1, 2)), quantized)
    table = None
    if page is not None:
        cache, table = in_pages(cache, page)
        table = table.at[0].set(cache.k.shape[1])  # an empty row has none
    with pltpu.force_tpu_interpret_mode():
        got = decode_attention(q, cache, length_B=jnp.asarray(lengths, jnp.int32), table_BN=table)
    if page is not None:  # what an empty row sees is its new token, and that is lost with it
        got, q, k, v, lengths = (x[1:] for x in (got, q, k, v, lengths))
    # A full row had no room for the new token: it looks at what it has. Keys go by in blocks of 128 or more.
    for wrong in (0, 1):
        seen = seen_in(capacity, np.minimum(lengths, capacity - 1 - wrong), 1)
        off = rounding.within(got, rounding.attended(q, k, v, seen, "bfloat16", parts=2))
        assert off > 1 if wrong else off <= 1


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
def test_output_and_gradients_are_those_of_the_definition(dtype, window):
    """Three documents, of which padding is one; nothing of the scores' size is kept for the backward pass."""
    batch, length, heads, kv_heads, width = 2, 40, 4, 2, 16
    q, g = (jnp.asarray(normal(i, batch, length, heads, width), dtype) for i in range(2))
    k, v = (jnp.asarray(normal(i, batch, length, kv_heads, width), dtype) for i in (2, 3))
    segments = jnp.asarray([[1] * 17 + [2] * 23, [1] * 9 + [2] * 21 + [0] * 10])
    real = (segments != 0)[:, :, None, None]
    g = jnp.where(real, g, 0)

    def ours(q, k, v, segments=segments, window=window):
        return attention(q, k, v, segments_BT=segments, window=scalar(window))

    def off(factor=1.0, **masks):
        """How far off output and gradients are, 1 being allowed, with other masks, or q, k and v times a factor."""
        changed = [x * jnp.asarray(factor, dtype) for x in (q, k, v)]
        out, back = jax.vjp(functools.partial(ours, **masks), *changed)
        return rounding.worst((jnp.where(real, out, 0), *back(g)), bounded)

    bounded = rounding.attention(q, k, v, g, rounding.seen_by(segments, window=window), dtype)
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
def test_kernels_on_several_devices(square, as_on_tpu):
    sharding = Sharding.of(square, "serve_tp")
    q, k, v = f32(*(normal(i, 2, 40, heads, 64) for i, heads in enumerate((4, 2, 2))))
    segments = jnp.asarray([[1] * 40, [1] * 22 + [2] * 18])
    masks: dict[str, Any] = {"segments_BT": segments}
    cache = LayerCache(*(jnp.asarray(normal(i, 2, 2, 128, 128), jnp.bfloat16) for i in (3, 4)))
    new = jnp.asarray(normal(5, 2, 1, 4, 128), jnp.bfloat16)
    length = jnp.array([3, 127], jnp.int32)
    got = attention(q, k, v, **masks, sharding=sharding), attention(q[:1], k[:1], v[:1], sharding=sharding)
    with pltpu.force_tpu_interpret_mode():
        decoded = decode_attention(new, cache, length_B=length, sharding=sharding)
    whole = rounding.attended(q, k, v, rounding.seen_by(np.ones((2, 40))))
    by_document = rounding.attended(q, k, v, rounding.seen_by(segments))
    assert rounding.within(got[0], by_document) <= 1 < rounding.within(got[0], whole)
    assert rounding.within(got[1], (whole[0][:1], whole[1][:1])) <= 1
    held = (x.transpose(1, 2, 0, 3) for x in (cache.k, cache.v))
    assert rounding.within(decoded, rounding.attended(new, *held, seen_in(128, length, 1), "bfloat16")) <= 1


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

    bounded = rounding.attention(*qkvg, rounding.seen_by(documents))
    if kernels:
        request.getfixturevalue("as_on_tpu")
    in_order = [x[:, order] for x in (*qkvg, documents)]
    got = jax.jit(forward_and_back, static_argnums=5)(*in_order, sharding)
    assert max(rounding.worst(got, tuple((exact[:, order], allowed[:, order]) for exact, allowed in bounded))) <= 1
