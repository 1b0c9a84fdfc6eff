"""A piece of a prompt after any past, against the definition: on one device and on several, by every kernel."""

import functools

import jax
import jax.numpy as jnp
import no_gpu
import numpy as np
import pytest
import rounding
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel
from jax.sharding import Mesh
from test_attention import normal, scalar, stored
from test_kv_cache import in_pages

from sharding.rules import STRATEGIES, Sharding
from smollm3_jax import nvidia
from smollm3_jax.attention import cudnn, piece, piece_attention, piece_over_length, tpu
from smollm3_jax.attention.parts import Part, merge
from smollm3_jax.kv_cache import LayerCache

SLOTS, CAPACITY, HEADS, KV_HEADS = 2, 32, 4, 2
# Jitted anew in each test: what computes a program is chosen when it is traced.


def worst(
    past,
    length,
    dtype="float32",
    width=8,
    window=None,
    quantized=False,
    capacity=CAPACITY,
    sharding=None,
    block=512,
    page=None,
):
    """How far from the definition a piece's output is, 1 being allowed, of the second slot; what lies after the past
    may be anything. block: how many keys of the past go by at a time; page: of a pool, whose rows are gathered nowhere.

    From the definition without every other key, a query's own among them, it is further than that.
    """
    q, own_k, own_v = (
        jnp.asarray(normal(i, 1, length, heads, width), dtype)
        for i, heads in ((0, HEADS), (3, KV_HEADS), (4, KV_HEADS))
    )
    layer, k, v = stored(*(jnp.asarray(normal(i, SLOTS, capacity, KV_HEADS, width), dtype) for i in (1, 2)), quantized)
    after = (jnp.arange(capacity) >= past)[:, None]
    layer = jax.tree.map(lambda x: jnp.where(after if x.ndim == 4 else after[:, 0], 100, x).astype(x.dtype), layer)
    keys, values = (
        np.concatenate([x[1:, :past], np.asarray(own, np.float64)], axis=1) for x, own in ((k, own_k), (v, own_v))
    )
    options = {"window": scalar(window), "sharding": sharding}
    if page is not None:
        layer, options["table_BN"] = in_pages(layer, page)

    order = None if sharding is None else sharding.row_order(length)

    def compute(arrays, slot, length):
        if order is None:
            return piece_attention(*arrays, slot=slot, length=length, **options)
        q, *others = arrays
        return piece_over_length(q[:, order], *others, slot=slot, length=length, **options)[:, np.argsort(order)]

    got = jax.jit(compute)((q, own_k, own_v, layer), np.int32(1), np.int32(past))
    assert got.dtype == dtype
    ones = np.ones((1, past + length))
    # The piece, blocks of the past, and what each device has.
    parts = 1 + -(-past // block) + (sharding.mesh.size if sharding is not None else 0)

    def off(seen):
        return rounding.within(got, rounding.attended(q, keys, values, seen, dtype, parts=parts))

    seen = rounding.seen_by(ones[:, past:], ones, window)
    assert off(seen & ((np.arange(past, past + length)[:, None] - np.arange(past + length)) % 2 == 1)) > 1
    return off(seen)


@settings(max_examples=10, deadline=None)  # each is compiled anew
@given(
    st.integers(0, 24),
    st.integers(1, 8),
    st.sampled_from([None, 1, 5]),
    st.booleans(),
    st.sampled_from([1, 8, 512]),
    st.sampled_from([None, 8, 16]),
)
def test_equals_the_definition(past, length, window, quantized, block, page):
    """Of no, some and all of the places, in any number of blocks, and of pages with one, several or a part of one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(piece, "DENSE_BLOCK", block)
        assert worst(past, length, window=window, quantized=quantized, block=block, page=page) <= 1


def test_blocks_may_be_cut_otherwise_than_pages():
    """Of 12 places, and 32 in all: 4 at a time."""
    assert worst(24, 8, capacity=48, page=12, block=4) <= 1


def test_no_past_adds_nothing():
    """To the bit."""
    x = [jnp.asarray(normal(i, 1, 3, 2, 1 if i else 4), jnp.float32) for i in range(2)]
    merged = merge(Part(*x), Part.empty(x[0]))
    jax.tree.map(np.testing.assert_array_equal, merged, Part(*x))


@pytest.mark.parametrize(("past", "page"), [(0, None), (7, None), (16, None), (24, None), (24, 4)])
def test_cudnn_equals_the_definition(past, page, monkeypatch):
    monkeypatch.setattr(piece, "platform_of", lambda sharding: "gpu")
    monkeypatch.setattr(nvidia, "compute_capability", lambda sharding: (9, 0))
    monkeypatch.setattr(nvidia, "kernels_fit", lambda: True)
    calls = []
    monkeypatch.setattr(cudnn, "forward", lambda *arguments: calls.append(arguments) or no_gpu.forward(*arguments))
    monkeypatch.setattr(piece, "BLOCK", 8)
    assert worst(past, 8, "float16", block=8, page=page) <= 1
    assert len(calls) == 2  # a program has one call for the piece, and one for every block


def test_merging_is_in_float32(monkeypatch):
    """Large scores, whose normalizers bfloat16 rounds to whole numbers: a past of one key beside one new key.

    Their products and sums are exact, and no normalizer is off by more than a rounding of a score, of 182 at most, or
    two: what is allowed beside the output's own rounding. bfloat16's would give a difference of 1 instead of 0.71.
    """
    q, k = jnp.full((1, 1, 1, 8), 8.0, jnp.bfloat16), jnp.full((1, 1, 1, 8), 8.0, jnp.bfloat16)
    scores = 8 * 64 / 8**0.5, 8 * 63.75 / 8**0.5
    layer = LayerCache(jnp.full_like(k, 7.96875), jnp.zeros_like(k))
    out = piece_attention(q, k, jnp.ones_like(k), layer, slot=jnp.int32(0), length=jnp.int32(1))
    expected, allowed = 1 / (1 + np.exp(scores[1] - scores[0])), 2.0**-8 + 8 * 182 * rounding.FLOAT32
    np.testing.assert_allclose(np.asarray(out, np.float64), expected, rtol=allowed)
    assert 1 / (1 + np.exp(-1)) > (1 + allowed) * expected


@pytest.fixture
def as_on_tpu(monkeypatch):
    """Kernels are chosen as on TPU, and interpreted on the CPU."""
    monkeypatch.setattr(piece, "platform_of", lambda sharding: "tpu")
    interpreted = functools.partial(splash_attention_kernel.make_splash_mha, interpret=True)
    monkeypatch.setattr(splash_attention_kernel, "make_splash_mha", interpreted)
    monkeypatch.setattr(piece, "BLOCK", 128)
    tpu.splash_kernel.cache_clear()
    yield
    tpu.splash_kernel.cache_clear()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("past", "dtype", "page"),
    [(0, "float32", None), (128, "float32", None), (300, "bfloat16", None), (256, "float32", 128)],
)
def test_splash_equals_the_definition(past, dtype, page, as_on_tpu):
    assert worst(past, 48, dtype, width=64, capacity=384, block=128, page=page) <= 1


# Rules, and the mesh: slots on other devices, heads on others, too few key-value heads, a row's places on others.
MESHES = {
    "slots and heads": ("serve_tp", (2, 2)),
    "heads": ("serve_tp", (1, 2)),
    "all key-value heads everywhere": ("serve_tp", (1, 4)),
    "heads on two axes, the cache's on one": (
        {"heads": ("data", "tensor"), "kv_heads": "tensor", "cache_heads": "tensor"},
        (2, 2),
    ),
    "the cache's heads on another axis": ({"heads": "tensor", "cache_heads": "data"}, (2, 2)),
    "the cache's heads alone": ({"cache_heads": "tensor"}, (2, 2)),
    "places": ("serve_tp_long", (2, 2)),
}


@pytest.mark.parametrize("name", MESHES)
@pytest.mark.parametrize("past", [0, 5, 24])
def test_several_devices_equal_the_definition(name, past):
    rules, shape = MESHES[name]
    mesh = Mesh(np.array(jax.devices()[: shape[0] * shape[1]]).reshape(shape), ("data", "tensor"))
    sizes = {"kv_heads": KV_HEADS, "cache_heads": KV_HEADS}
    sharding = Sharding.of(mesh, rules).fitted(sizes)
    assert worst(past, 8, sharding=sharding) <= 1
    if sharding.parts("batch") * sharding.parts("context") == 1:
        assert worst(past, 8, sharding=sharding, page=8) <= 1


# Of a mesh of (context, tensor): a piece in four parts, or in two with heads split too, and places on the first.
SPLIT = {
    "four parts": ((4, 1), {}),
    "two parts, heads": ((2, 2), {}),
    "two parts, the cache's heads on the other axis": ((2, 2), {"cache_heads": "context", "context": None}),
    "two parts, all key-value heads everywhere": ((2, 2), {"kv_heads": None, "cache_heads": None}),
}


def split_on(name):
    shape, changed = SPLIT[name]
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(shape), ("context", "tensor"))
    return Sharding.of(mesh, {**STRATEGIES["serve_cp"], **changed})


@pytest.mark.parametrize("name", SPLIT)
@pytest.mark.parametrize(
    ("past", "length", "more"),
    [
        (0, 8, {}),
        (5, 8, {"window": 4}),
        pytest.param(24, 8, {"quantized": True}, marks=pytest.mark.slow),
        (16, 4, {}),  # a token a device, of which four make no pairs
    ],
)
def test_a_piece_split_along_its_length_equals_the_definition(name, past, length, more):
    assert worst(past, length, sharding=split_on(name), **more) <= 1


def test_tokens_in_another_order_are_seen():
    """As they came, where the rules have them in their order."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(np, "argsort", lambda order: np.arange(len(order)))
        assert worst(5, 8, sharding=split_on("four parts")) > 1


@pytest.mark.slow
@pytest.mark.parametrize(("length", "kernels"), [(1024, 2), (48, 3)])
def test_splash_of_a_piece_split_along_its_length(length, kernels, as_on_tpu, monkeypatch):
    """By tables that are split as the queries are; a short piece in two runs on each device."""
    calls = []
    monkeypatch.setattr(tpu, "splash", lambda *x, of=tpu.splash: calls.append(x) or of(*x))
    assert worst(200, length, width=64, capacity=2048, sharding=split_on("four parts"), block=128) <= 1
    assert len(calls) == kernels + (length == 48) * 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["slots and heads", "all key-value heads everywhere", "places"])
def test_kernels_on_several_devices(name, as_on_tpu):
    rules, shape = MESHES[name]
    mesh = Mesh(np.array(jax.devices()[: shape[0] * shape[1]]).reshape(shape), ("data", "tensor"))
    sharding = Sharding.of(mesh, rules).fitted({"kv_heads": KV_HEADS, "cache_heads": KV_HEADS})
    assert worst(200, 16, width=64, capacity=512, sharding=sharding, block=128) <= 1
