"""The GPU's decoding kernel, interpreted on a CPU, beside what plain XLA computes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rounding
from flax import nnx
from test_attention import seen_in
from test_kv_cache import in_pages
from tiny import random_tokens, raw_config

from smollm3_jax import model as model_file
from smollm3_jax import nvidia, rope
from smollm3_jax.attention import decode_attention, decode_step, dispatch, paged_gpu
from smollm3_jax.config import ModelConfig
from smollm3_jax.kernels import rms_norm_gpu
from smollm3_jax.kv_cache import LayerCache, empty_cache, quantize_rows, rows, write
from smollm3_jax.rms_norm import rms_norm

CAPACITY = 128
# An empty row; one token; a block less one, exactly, and one more; one free place, and none.
LENGTHS = np.array([0, 1, 63, 64, 65, 127, 128])


def case(quantized=False, group=4, dtype=jnp.float32, width=32, lengths=LENGTHS, seed=0):
    """q, k, v, angles, lengths and the cache, of 2 key-value heads."""
    random, rows = np.random.RandomState(seed), len(lengths)

    def normal(*shape):
        return jnp.asarray(random.standard_normal(shape), dtype)

    q, k, v = (normal(rows, heads, width) for heads in (2 * group, 2, 2))
    angle = jnp.asarray(random.standard_normal((rows, width // 2)), jnp.float32)
    stored = [normal(2, rows, CAPACITY, width) for _ in range(2)]
    if quantized:
        (k8, k_scale), (v8, v_scale) = map(quantize_rows, stored)
        cache = LayerCache(k8, v8, k_scale, v_scale)
    else:
        cache = LayerCache(*stored)
    return q, k, v, (jnp.cos(angle), jnp.sin(angle)), jnp.asarray(lengths, jnp.int32), cache


def by_xla(q, k, v, angles, lengths, cache):
    """The same in separate steps: RoPE, the cache's write, attention."""
    turned = [rope.rotate(x[:, None], *(angle[:, None] for angle in angles), jnp.array(True)) for x in (q, k)]
    stored = write(cache, turned[1], v[:, None], lengths, None)
    return decode_attention(turned[0], stored, length_B=lengths)[:, 0], stored


def values(cache):
    """What a cache stands for, float64 [2, K, B, S, E]."""
    pairs = (cache.k, cache.k_scale), (cache.v, cache.v_scale)
    return np.array(
        [np.asarray(x, np.float64) * (1 if scale is None else np.asarray(scale)[..., None]) for x, scale in pairs]
    )


step = functools.partial(paged_gpu.step, interpret=True)


KINDS = [("float32", 4), ("float32", 3), ("int8", 4), ("int8", 3), ("bfloat16", 4), ("float16", 3)]


@pytest.mark.parametrize("programs", [1, 2**16], ids=["whole", "split"])
@pytest.mark.parametrize(("kind", "group"), KINDS)
def test_equals_the_definition(kind, group, programs, monkeypatch):
    """On pairs that RoPE turns by a quarter or more of them, which is exact. The cache is of the kind, and in all but
    int8 the rest too."""
    monkeypatch.setattr(paged_gpu, "PROGRAMS", programs)
    dtype = "float32" if kind == "int8" else kind
    q, k, v, _, lengths, cache = case(kind == "int8", group, dtype)
    turns = np.random.RandomState(1).randint(0, 4, (len(q), q.shape[-1] // 2))
    cos, sin = (jnp.asarray(np.array(x, dtype)[turns]) for x in ([1, 0, -1, 0], [0, 1, 0, -1]))
    out, cache = step(q, k, v, (cos, sin), lengths, cache)
    assert out.dtype == dtype and cache.k.dtype == kind
    q = rope.rotate(q[:, None], cos[:, None], sin[:, None], jnp.array(True))
    held = values(cache).transpose(0, 2, 3, 1, 4)
    # A full row looks at what it has. Two blocks of 64, and the new token.
    for wrong in (0, 1):
        seen = seen_in(CAPACITY, np.maximum(np.minimum(LENGTHS, CAPACITY - 1) - wrong, 0), 1)
        off = rounding.within(out[:, None], rounding.attended(q, *held, seen, dtype, parts=3))
        assert off > 1 if wrong else off <= 1


@pytest.mark.parametrize("quantized", [False, True], ids=["float32", "int8"])
def test_writes_what_xla_writes(quantized):
    q, k, v, angles, lengths, cache = case(quantized)
    got = values(step(q, k, v, angles, lengths, cache)[1])
    _, expected = by_xla(q, k, v, angles, lengths, cache)
    _, without_rope = by_xla(q, k, v, (jnp.ones_like(angles[0]), jnp.zeros_like(angles[1])), lengths, cache)
    # x cos - y sin has two roundings of each product on either side, |x| + |y| is at most twice the largest number that
    # was turned, and that comes out again. So does a scale's relative error; and where a number lies near the middle
    # of two whole ones, it may move by a step, which is the scale.
    allowed = 8 * rounding.FLOAT32 * np.abs(values(expected)).max()
    if quantized:
        allowed = 4 * allowed + np.array([expected.k_scale, expected.v_scale])[..., None]
    assert (np.abs(got - values(expected)) <= allowed).all()
    assert (np.abs(got - values(without_rope)) > allowed).any()


def test_writes_one_token_a_row_and_none_into_a_full_one():
    arguments = case()
    changed = (values(step(*arguments)[1]) != values(arguments[-1])).all(axis=(0, 1, -1))
    np.testing.assert_array_equal(changed, np.arange(CAPACITY) == LENGTHS[:, None])


def test_an_empty_row_sees_its_own_token_alone():
    q, k, v, angles, lengths, cache = case(lengths=np.array([0]))
    # Times a weight of exactly 1.
    np.testing.assert_array_equal(step(q, k, v, angles, lengths, cache)[0], jnp.repeat(v, 4, axis=1))


@pytest.mark.parametrize("quantized", [pytest.param(False, marks=pytest.mark.slow), True], ids=["float32", "int8"])
def test_pages_may_lie_anywhere(quantized, monkeypatch):
    q, k, v, angles, lengths, cache = case(quantized)
    monkeypatch.setattr(paged_gpu, "BLOCKS", (16,))  # the same sums in the same order, for a page of 32 and of 128
    page, rows = 32, len(lengths)
    pages = CAPACITY // page
    table = np.random.RandomState(1).permutation(rows * pages).reshape(rows, pages)

    def scattered(x):
        pool = x.reshape(x.shape[0], rows * pages, page, *x.shape[3:])
        return jnp.zeros_like(pool).at[:, table.reshape(-1)].set(pool)

    expected, expected_cache = step(q, k, v, angles, lengths, cache)
    pool = jax.tree.map(scattered, cache)
    out, pool = step(q, k, v, angles, lengths, pool, jnp.asarray(table, jnp.int32))
    np.testing.assert_array_equal(out, expected)
    for got, whole in zip(jax.tree.leaves(pool), jax.tree.leaves(expected_cache), strict=True):
        np.testing.assert_array_equal(got, scattered(whole))


def test_a_row_without_a_page_writes_nothing(monkeypatch):
    """Nor does it read outside of the pool, whatever it says that it holds."""
    q, k, v, angles, lengths, cache = case()
    table = jnp.full((len(lengths), CAPACITY // 32), 4, jnp.int32)
    pool = jax.tree.map(lambda x: x.reshape(2, -1, 32, x.shape[-1])[:, :4], cache)
    out, after = step(q, k, v, angles, lengths, pool, table)
    jax.tree.map(np.testing.assert_array_equal, after, pool)
    assert np.isfinite(np.asarray(out)[1:]).all()


@pytest.mark.parametrize("programs", [1, 2**16], ids=["whole", "split"])
def test_reads_nothing_after_what_a_row_holds(programs, monkeypatch):
    monkeypatch.setattr(paged_gpu, "PROGRAMS", programs)
    *others, cache = case()
    free = jnp.arange(CAPACITY)[None] >= LENGTHS[:, None]
    poisoned = jax.tree.map(lambda x: jnp.where(free[..., None], jnp.nan, x), cache)
    np.testing.assert_array_equal(step(*others, poisoned)[0], step(*others, cache)[0])


def test_rounds_halves_to_even():
    x = jnp.arange(-512.0, 513.0) / 4
    np.testing.assert_array_equal(paged_gpu._rounded(x), jnp.round(x))


def test_few_rows_are_split_and_many_are_not():
    of_3b = functools.partial(paged_gpu.Tiles.of, group=4, page=8192, pages=1)
    assert [of_3b(4 * rows).splits for rows in (1, 3, 8, 64, 200)] == [64, 16, 8, 1, 1]
    assert paged_gpu.Tiles.of(4, 4, 64, 2).splits == 2  # two blocks in all


@pytest.fixture
def as_on_gpu(monkeypatch):
    """Kernels are chosen as on an H100, and interpreted on the CPU."""
    for module in (dispatch, model_file):
        monkeypatch.setattr(module, "platform_of", lambda sharding: "gpu")
    monkeypatch.setattr(nvidia, "compute_capability", lambda sharding: (9, 0))
    monkeypatch.setattr(nvidia, "kernels_fit", lambda: True)
    monkeypatch.setattr(paged_gpu, "step", step)
    monkeypatch.setattr(rms_norm_gpu, "rms_norm", functools.partial(rms_norm_gpu.rms_norm, interpret=True))
    dispatch.say_once.cache_clear()


def dispatched(q, k, v, angles, lengths, cache, **more):
    """Through `decode_step`, whose arrays have a T."""
    angles = tuple(x[:, None] for x in angles)
    return decode_step(*(x[:, None] for x in (q, k, v)), angles, cache, length_B=lengths, **more)


def test_a_gpu_gets_the_kernel(as_on_gpu):
    arguments = case(dtype=jnp.bfloat16)
    out, cache = dispatched(*arguments)
    expected, expected_cache = step(*arguments)
    jax.tree.map(np.testing.assert_array_equal, (out[:, 0], cache), (expected, expected_cache))
    pool, table = in_pages(arguments[-1], 64)
    out, pool = dispatched(*arguments[:-1], pool, table_BN=table)
    jax.tree.map(np.testing.assert_array_equal, (out[:, 0], rows(pool, None, None, table)), (expected, cache))


def test_what_the_kernel_does_not_take_is_said(as_on_gpu, monkeypatch, caplog):
    arguments = case(width=8, dtype=jnp.bfloat16)
    odd = dataclasses.replace(arguments[-1], **{name: getattr(arguments[-1], name)[:, :, :100] for name in "kv"})
    monkeypatch.setattr(nvidia, "compute_capability", lambda sharding: (7, 5))
    with caplog.at_level("INFO"):
        assert dispatched(*arguments[:-1], odd, window=jnp.array(4)) is None
    assert [record.getMessage() for record in caplog.records if record.name == dispatch.__name__] == [
        "paged attention does not take a window or heads of width 8 or a capacity of 100 or a device older than "
        "compute capability 8.0: plain XLA computes attention, which is slower"
    ]


def test_other_platforms_get_none():
    assert dispatched(*case()) is None


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 2])
def test_a_model_decodes_the_same(rows, as_on_gpu, monkeypatch):
    raw = {**raw_config("interval_2"), "head_dim": 16, "num_hidden_layers": 2}
    model = model_file.SmolLM3(ModelConfig.from_hf(raw), rngs=nnx.Rngs(0))
    tokens = jnp.asarray(random_tokens(raw, rows, 6), jnp.int32)
    cache = empty_cache(model.config, rows, 32, jnp.dtype(jnp.float32))

    def run():
        """As one program, of the platform that is chosen when it is traced."""
        return jax.jit(lambda model, tokens, cache: model.hidden(tokens, cache=cache))

    with monkeypatch.context() as on_cpu:
        on_cpu.setattr(dispatch, "platform_of", lambda sharding: "cpu")
        on_cpu.setattr(model_file, "platform_of", lambda sharding: "cpu")
        plain = run()
        bounded = rounding.shaken(
            lambda model: plain(model, tokens[:, 5:], plain(model, tokens[:, :5], cache)[1]), model
        )
        _, before = plain(model, tokens[:, :5], cache)
    out, after = run()(model, tokens[:, 5:], before)
    assert max(rounding.worst(jax.tree.leaves((out, after)), bounded)) <= 1
    assert rounding.within(run()(model, tokens[:, :1], before)[0], bounded[0]) > 1  # another token


@pytest.mark.parametrize("width", [64, 256])
def test_rms_norm_equals_the_models(width):
    random = np.random.RandomState(0)
    x, y = (jnp.asarray(random.standard_normal((1, 1, width)), jnp.float32) for _ in range(2))
    weight = jnp.asarray(random.standard_normal(width), jnp.float32)
    got = rms_norm_gpu.rms_norm(x, weight, 1e-6, interpret=True)
    # A sum of `width` squares, in any order, is within width roundings, its root within half as many; 4 on either side
    # are left for the mean, the root and the products.
    np.testing.assert_allclose(got, rms_norm(x, weight, 1e-6), rtol=(width + 8) * 2.0**-24)
    # Given what x is the sum of, it adds that up, and does not look at x.
    of_sum = rms_norm_gpu.rms_norm(jnp.full_like(x, jnp.nan), weight, 1e-6, (x, y), interpret=True)
    np.testing.assert_array_equal(of_sum, rms_norm_gpu.rms_norm(x + y, weight, 1e-6, interpret=True))
