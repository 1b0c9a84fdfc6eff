"""What goes around XLA:CPU computes the same, on every kind of processor."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smollm3_jax import xla_cpu

PROCESSORS = {"avx2": set(), "avx512": {"avx512_vnni", "avx512_bf16"}, "amx": {"avx512_vnni", "amx_tile", "amx_bf16"}}


@pytest.fixture(params=PROCESSORS)
def processor(request, monkeypatch):
    monkeypatch.setattr(xla_cpu, "processor", lambda: PROCESSORS[request.param])


@pytest.mark.parametrize("shape", [(24, 256), (1000, 4200)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_row_is_multiplied_as_many_are(processor, dtype, shape):
    outputs, inputs = shape
    random = np.random.RandomState(0)
    x, w = (jnp.asarray(random.standard_normal(shape), dtype) for shape in ((1, inputs), shape))
    got = xla_cpu.one_row_product(x, w)
    assert got.shape == (1, outputs) and got.dtype == jnp.float32
    x, w = np.asarray(x, np.float64), np.asarray(w, np.float64)
    assert (np.abs(got - x @ w.T) <= inputs * 2.0**-24 * (np.abs(x) @ np.abs(w).T)).all()


def test_integers_are_multiplied_exactly(processor):
    random = np.random.RandomState(0)
    x, w = (random.randint(-127, 128, shape).astype(np.int8) for shape in ((2, 256), (24, 256)))
    got = xla_cpu.two_row_integer_product(jnp.asarray(x), jnp.asarray(w))
    np.testing.assert_array_equal(got, x.astype(np.int32) @ w.T.astype(np.int32))


def test_what_is_kept_by_its_bits_is_kept_as_them():
    """Numbers and gradients are those without; a policy that keeps the name keeps uint16, and another nothing."""
    x = jnp.asarray(np.random.RandomState(0).standard_normal(5), jnp.bfloat16)

    def loss(x, name):
        return jnp.sin(xla_cpu.named(jnp.exp(x), name, "cpu").astype(jnp.float32)).sum()

    kept = {}
    for name in ("kept", "other"):
        policy = jax.checkpoint_policies.save_only_these_names("kept")
        layer = jax.checkpoint(lambda x, name=name: loss(x, name), policy=policy)
        want = jax.grad(lambda x: jnp.sin(jnp.exp(x).astype(jnp.float32)).sum())(x)
        np.testing.assert_array_equal(jax.grad(layer)(x), want)
        residuals = jax.tree.leaves(jax.vjp(layer, x)[1])
        kept[name] = [r.dtype for r in residuals if r.dtype == jnp.uint16]
    assert kept == {"kept": [jnp.uint16], "other": []}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int8"])
def test_what_a_cpu_holds_is_what_it_was_given(dtype, monkeypatch):
    for in_place in (False, True):
        monkeypatch.setattr(xla_cpu, "WRITES_16_BITS_IN_PLACE", in_place)
        held = xla_cpu.held_as(dtype, "cpu")
        assert held.itemsize == jnp.dtype(dtype).itemsize
        assert (held == dtype) == (in_place or "float16" not in dtype)
        assert xla_cpu.held_as(dtype, "tpu") == xla_cpu.held_as(dtype, "gpu") == dtype
        x = jnp.array([0, -0.0, 1, -127] + ([] if dtype == "int8" else [1e-40, 6e4, np.inf, np.nan]), dtype)
        kept = xla_cpu.as_held(x, held)
        assert kept.dtype == held
        np.testing.assert_array_equal(xla_cpu.values_of(kept).astype(jnp.float32), x.astype(jnp.float32))
