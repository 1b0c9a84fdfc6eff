"""The cache against arrays of numpy's that are written in loops."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from tiny import raw_config

from sharding.arrays import shardings, total_bytes
from sharding.rules import Sharding
from smollm3_jax import xla_cpu
from smollm3_jax.config import ModelConfig
from smollm3_jax.kv_cache import (
    KVCache,
    LayerCache,
    advance,
    cache_specs,
    copy_row,
    empty_cache,
    quantize_rows,
    read,
    rows,
    write,
)

CONFIG = ModelConfig.from_hf(raw_config("one_layer"))
K, E = CONFIG.num_key_value_heads, CONFIG.head_dim
B, S = 3, 12
DTYPES = ("float32", "bfloat16", "float16", "int8")


def normal(seed: int, *shape: int) -> jax.Array:
    """Values that float16 and bfloat16 hold exactly, so that what comes back is what went in."""
    values = np.random.RandomState(seed).standard_normal(shape).astype(jnp.bfloat16)
    return jnp.asarray(values, jnp.float32)


def allowed(dtype: str, new: jax.Array | np.ndarray) -> np.ndarray:
    """How far a value read may lie from the one written: in int8, half a step of its own head's scale."""
    if dtype != "int8":
        return np.zeros(())
    half = np.abs(np.asarray(new)).max(axis=-1, keepdims=True) / 127 / 2
    # And the roundings of numbers of up to 127 steps, or 254 halves: of the scale, a quotient and a product.
    return half * (1 + 3 * 254 * 2.0**-24)


@functools.cache
def filled(dtype: str) -> KVCache:
    """Every row holds S tokens of its own."""
    cache = empty_cache(CONFIG, B, S, jnp.dtype(dtype))
    layers = tuple(
        write(layer, normal(10 + i, B, S, K, E), normal(20 + i, B, S, K, E), cache.length, None)
        for i, layer in enumerate(cache.layers)
    )
    return KVCache(layers, jnp.asarray([4, 0, 9], jnp.int32))


def whole(layer, length=S, dtype="float32"):
    """Keys and values [B, length, K, E] of all rows."""
    zero, rows = jnp.asarray(0), layer.k.shape[1]
    found = [read(layer, jnp.asarray(row), zero, length, jnp.dtype(dtype)) for row in range(rows)]
    return tuple(jnp.concatenate(x) for x in zip(*found, strict=True))


def in_pages(layer, page, spare=2, seed=0):
    """The same rows in a pool [K, P, page, ...], and its table: in any order, among pages that are nobody's."""
    rows, capacity = layer.k.shape[1:3]
    used = rows * capacity // page
    table = np.random.RandomState(seed).permutation(used + spare)[:used].reshape(rows, -1)

    def scattered(x):
        pool = jnp.full((x.shape[0], used + spare, page, *x.shape[3:]), 99, x.dtype)
        return pool.at[:, table.reshape(-1)].set(x.reshape(x.shape[0], used, page, *x.shape[3:]))

    return jax.tree.map(scattered, layer), jnp.asarray(table, jnp.int32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_empty_cache_holds_zeros(dtype):
    cache = empty_cache(CONFIG, B, S, jnp.dtype(dtype))
    assert cache.capacity == S and len(cache.layers) == CONFIG.num_hidden_layers
    assert not cache.length.any() and cache.length.dtype == jnp.int32
    for layer in cache.layers:
        assert layer.k.shape == layer.v.shape == (K, B, S, E)
        assert layer.k.dtype == layer.v.dtype == xla_cpu.held_as(dtype, "cpu")
        assert (layer.k_scale is None) == (dtype != "int8")
    leaves = jax.tree.leaves(cache)
    assert not any(x.any() for x in leaves)
    assert total_bytes(cache_specs(CONFIG, B, S, dtype)) == sum(x.nbytes for x in leaves)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("steps", [1, 3])
def test_new_tokens_come_after_those_of_each_row(dtype, steps):
    """A row that is full keeps what it has, and so does one that takes only a part of the new tokens."""
    layer = filled(dtype).layers[0]
    length = np.array([0, S - 1, S], np.int32)
    new_k, new_v = normal(1, B, steps, K, E), normal(2, B, steps, K, E)
    written = write(layer, new_k, new_v, jnp.asarray(length), None)
    old, got = whole(layer), whole(written)
    for before, after, new in zip(old, got, map(np.asarray, (new_k, new_v)), strict=True):
        expected, error = np.array(before), np.zeros(before.shape)
        bound = np.broadcast_to(allowed(dtype, new), new.shape)
        for b, t in np.ndindex(B, steps):
            if length[b] + t < S:
                expected[b, length[b] + t] = new[b, t]
                error[b, length[b] + t] = bound[b, t]
        assert (np.abs(np.asarray(after) - expected) <= error).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("slot", [0, 2])
def test_one_row_is_written_alone(dtype, slot):
    layer = filled(dtype).layers[0]
    new_k, new_v = normal(1, 1, 5, K, E), normal(2, 1, 5, K, E)
    written = write(layer, new_k, new_v, jnp.asarray([6], jnp.int32), jnp.asarray(slot))
    old, got = whole(layer), whole(written)
    for before, after, new in zip(old, got, (new_k, new_v), strict=True):
        bound = np.broadcast_to(allowed(dtype, new), new.shape)
        assert (np.abs(np.asarray(after[slot, 6:11] - new[0])) <= bound[0]).all()
        rest = np.asarray(after).copy()
        rest[slot, 6:11] = before[slot, 6:11]
        np.testing.assert_array_equal(rest, before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_is_read_as_it_lies_among_all(dtype):
    layer = filled(dtype).layers[0]
    everything = whole(layer)
    for slot in range(B):
        place = jnp.asarray(slot), jnp.asarray(2)
        for one, all_rows in zip(read(layer, *place, 5, jnp.dtype("float32")), everything, strict=True):
            np.testing.assert_array_equal(one[0], all_rows[slot, 2:7])
        for one, all_rows in zip(
            jax.tree.leaves(rows(layer, jnp.asarray(slot))), jax.tree.leaves(rows(layer, None)), strict=True
        ):
            np.testing.assert_array_equal(one[:, 0], all_rows[:, slot])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("source", "target"), [(0, 2), (2, 0), (1, 1)])
def test_a_row_is_copied_whole_with_its_length(dtype, source, target):
    cache = filled(dtype)
    copied = copy_row(cache, jnp.asarray(source), jnp.asarray(target))
    order = np.arange(B)
    order[target] = source
    np.testing.assert_array_equal(copied.length, cache.length[order])
    for before, after in zip(jax.tree.leaves(cache.layers), jax.tree.leaves(copied.layers), strict=True):
        np.testing.assert_array_equal(after, before[:, order])


@pytest.mark.parametrize("rules", ["serve_tp", "serve_tp_long"])
def test_rows_of_several_devices_are_copied_alike(rules):
    sharding = Sharding.of(Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("data", "tensor")), rules)
    random = np.random.RandomState(0)
    alone = jax.tree.map(
        lambda x: jnp.asarray(random.randint(0, 99, x.shape), x.dtype),
        empty_cache(CONFIG, 4, 32, jnp.dtype("float32")),
    )
    spread = jax.device_put(alone, shardings(cache_specs(CONFIG, 4, 32, "float32"), sharding))
    copied = jax.jit(copy_row, static_argnums=3)
    for source, target in ((0, 3), (3, 0), (1, 0), (2, 2)):
        got, expected = (
            copied(x, jnp.array(source), jnp.array(target), y) for x, y in ((spread, sharding), (alone, None))
        )
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(got), jax.device_get(expected))


def of_pages(layer, table):
    return rows(layer, None, None, table)


@pytest.mark.parametrize("dtype", DTYPES)
def test_pages_hold_what_rows_hold(dtype):
    """New tokens of all rows, of which one is full, and one has a part of the places; a piece; what is read."""
    dense, page = filled(dtype).layers[0], 4
    pool, table = in_pages(dense, page)
    same = functools.partial(jax.tree.map, np.testing.assert_array_equal)
    same(of_pages(pool, table), dense)
    for steps in (1, 3):
        new = normal(1, B, steps, K, E), normal(2, B, steps, K, E), jnp.asarray([3, S - 1, S], jnp.int32), None
        same(of_pages(write(pool, *new, None, table), table), write(dense, *new))
    new = normal(1, 1, 3, K, E), normal(2, 1, 3, K, E), jnp.asarray([page], jnp.int32), jnp.asarray(1)
    same(of_pages(write(pool, *new, None, table), table), write(dense, *new))
    for start, length in ((0, 12), (4, 4), (8, 4), (10, 2)):  # of several pages, one, and a part of one
        place = jnp.asarray(2), jnp.asarray(start), length, jnp.dtype("float32")
        same(read(pool, *place, table), read(dense, *place))
    same(rows(pool, jnp.asarray(1), None, table), rows(dense, jnp.asarray(1)))


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_nothing_is_written_where_there_is_no_page(dtype):
    pool, table = in_pages(filled(dtype).layers[0], 4)
    nobodys = pool.k.shape[1]
    new = normal(1, B, 1, K, E), normal(2, B, 1, K, E), jnp.asarray([1, 5, 9], jnp.int32), None
    written = write(pool, *new, None, table.at[0, 0].set(nobodys).at[2, 2].set(nobodys))
    changed = np.asarray(written.k != pool.k).any(axis=(0, 3))
    assert np.argwhere(changed).tolist() == [[int(table[1, 1]), 1]]


def test_a_page_is_copied_and_no_length_changes():
    pool, table = in_pages(filled("int8").layers[0], 4)
    length = jnp.asarray([4, 0, 9], jnp.int32)
    copied = copy_row(KVCache((pool,), length, table), jnp.asarray(3), jnp.asarray(5))
    order = np.arange(pool.k.shape[1])
    order[5] = 3
    np.testing.assert_array_equal(copied.length, length)
    for before, after in zip(jax.tree.leaves(pool), jax.tree.leaves(copied.layers), strict=True):
        np.testing.assert_array_equal(after, before[:, order])


def test_a_pool_is_described_as_it_is():
    specs = cache_specs(CONFIG, 3, 32, "int8", (5, 8))
    assert specs.layers[0].k.shape == (K, 5, 8, E) and specs.layers[0].k_scale.shape == (K, 5, 8)
    assert specs.table.shape == (3, 4) and specs.length.shape == (3,) and specs.capacity == 32
    assert cache_specs(CONFIG, 3, 32, "int8").table is None


def test_heads_are_rounded_by_their_largest_magnitude():
    x = normal(3, 4, 5, E) * jnp.asarray(10.0) ** jnp.arange(-3, 1, dtype=jnp.float32)[:, None, None]
    values, scale = quantize_rows(x.at[1, 2].set(0))
    assert values.dtype == jnp.int8 and scale.dtype == jnp.float32 and scale.shape == x.shape[:-1]
    assert np.abs(np.asarray(values)).max(axis=-1)[np.asarray(scale) > 0].min() == 127
    back = np.asarray(values) * np.asarray(scale)[..., None]
    expected = np.asarray(x.at[1, 2].set(0))
    assert (np.abs(back - expected) <= allowed("int8", expected)).all()
    assert scale[1, 2] == 0 and not values[1, 2].any()


def test_padding_at_the_end_does_not_count():
    segments = jnp.asarray([[1, 1, 2, 2], [1, 1, 0, 0], [0, 0, 0, 0], [0, 3, 0, 0]], jnp.int32)
    np.testing.assert_array_equal(advance(jnp.asarray([0, 5, 7, 2], jnp.int32), segments), [4, 7, 7, 4])


def test_an_int8_layer_of_zeros_reads_as_zeros():
    layer = empty_cache(CONFIG, 1, 4, jnp.dtype("int8")).layers[0]
    zeros = jnp.zeros((1, 2, K, E))
    written = write(layer, zeros, zeros, jnp.asarray([1], jnp.int32), None)
    assert isinstance(written, LayerCache)
    assert not any(x.any() for x in whole(written, 4, "bfloat16"))
