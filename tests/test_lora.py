"""The product with a weight and its adapter, against the weight that both make up."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from smollm3_jax.lora import LoraStack, LoraWeight, adapted, adapted_each, for_each, in_dtype, lengths, plain
from smollm3_jax.quantize import quantize_weight


def weight(shape=(6, 32), contracted=1, scheme=None, dora=False, **more):
    random = np.random.RandomState(0)
    out, inner = shape[:-contracted], shape[-contracted:]

    def param(*shape):
        return nnx.Param(jnp.asarray(random.standard_normal(shape), jnp.float32), axes=(None,) * len(shape))

    base = param(*shape)
    base = base if scheme is None else quantize_weight(base, scheme, contracted)
    own = LoraWeight(base, param(3, *inner), param(*out, 3), scale=0.5, **more)
    return own.replaced(magnitude=param(*out)) if dora else own


def whole(w, contracted):
    """The weight that a product with `w` is one with, in numpy's float64: [N, K]."""
    size = w.a[...].size // 3
    full = np.asarray(plain(w.base), np.float64).reshape(-1, size)
    full = full + w.scale * np.asarray(w.b[...]).reshape(-1, 3) @ np.asarray(w.a[...], np.float64).reshape(3, -1)
    if w.magnitude is not None:
        full *= (np.asarray(w.magnitude[...]).reshape(-1) / np.linalg.norm(full, axis=1))[:, None]
    return full


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize(
    ("shape", "contracted", "scheme"),
    [((6, 32), 1, None), ((2, 3, 32), 1, None), ((6, 4, 8), 2, None), ((6, 32), 1, "int8"), ((6, 64), 1, "int4")],
)
def test_one_product_is_that_of_the_whole_weight(shape, contracted, scheme, dora):
    w = weight(shape, contracted, scheme, dora)
    x = jnp.asarray(np.random.RandomState(1).standard_normal((2, 200, *shape[-contracted:])), jnp.float32)
    got = adapted(x, w, contracted)
    assert got.shape == (2, 200, *shape[:-contracted]) and got.dtype == jnp.float32
    want = np.asarray(x, np.float64).reshape(2, 200, -1) @ whole(w, contracted).T
    np.testing.assert_allclose(got.reshape(want.shape), want, rtol=0, atol=2e-5 * np.abs(want).max())


@pytest.mark.parametrize(
    ("shape", "contracted", "scheme"), [((2, 3, 32), 1, None), ((6, 4, 8), 2, None), ((6, 64), 1, "int4")]
)
def test_each_sequence_adds_its_own(shape, contracted, scheme):
    """Exactly nothing for the base; bit for bit the same whatever the others add."""
    random, (out, inner) = np.random.RandomState(2), (shape[:-contracted], shape[-contracted:])
    a, b = random.standard_normal((2, 4, *inner)), random.standard_normal((*out, 2, 4))
    base = weight(shape, contracted, scheme).base
    stack = LoraStack(base, *(nnx.Param(jnp.asarray(x, jnp.float32), axes=(None,) * x.ndim) for x in (a, b)))
    x = jnp.asarray(random.standard_normal((4, 5, *inner)), jnp.float32)
    nothing = np.asarray(adapted_each(x, stack, contracted), np.float64)

    def added(*numbers):
        tree = for_each({"w": stack, "n": jnp.ones(3)}, jnp.array(numbers))
        got = adapted_each(x[: len(numbers)], tree["w"], contracted)
        assert got.shape == (len(numbers), 5, *out) and got.dtype == jnp.float32 and stack.number is None
        return np.asarray(got)

    def want(i, number):
        low = np.asarray(x[i], np.float64).reshape(5, -1) @ a[number - 1].reshape(4, -1).T
        return nothing[i] + (low @ b[..., number - 1, :].reshape(-1, 4).T).reshape(nothing[i].shape)

    got = added(2, 0, 1, 2)
    np.testing.assert_array_equal(got[1], np.asarray(nothing[1], np.float32))
    for i, number in ((0, 2), (2, 1), (3, 2)):
        np.testing.assert_allclose(got[i], want(i, number), rtol=0, atol=2e-5 * np.abs(got[i]).max())
    np.testing.assert_array_equal(got[0], added(2, 1, 0, 1)[0])
    # One alone is another program.
    np.testing.assert_allclose(added(2)[0], want(0, 2), rtol=0, atol=2e-5 * np.abs(got[0]).max())
    np.testing.assert_allclose(added(0)[0], nothing[0], rtol=0, atol=2e-5 * np.abs(nothing[0]).max())


def test_what_divides_in_dora_has_no_gradient():
    """As in PEFT, and the paper: the lengths are held fixed."""
    w, x = weight(dora=True), jnp.ones((1, 32))

    def total(b, fixed):
        used = w.replaced(b=nnx.Param(b, axes=(None, None)))
        length = lengths(w if fixed else used)
        return ((w.magnitude[...] / length)[None] * (x @ (plain(w.base) + w.scale * b @ w.a[...]).T)).sum()

    got = jax.grad(lambda b: adapted(x, w.replaced(b=nnx.Param(b, axes=(None, None)))).sum())(w.b[...])
    np.testing.assert_allclose(got, jax.grad(total)(w.b[...], True), rtol=1e-5)
    assert np.abs(got - jax.grad(total)(w.b[...], False)).max() > 1e-2


def test_a_cast_leaves_integers_scales_and_lengths_alone():
    for scheme in (None, "int8"):
        w = weight(scheme=scheme, dora=True)
        cast = in_dtype({"w": w, "n": jnp.ones(3)}, jnp.bfloat16)
        assert cast["n"].dtype == cast["w"].a.dtype == cast["w"].b.dtype == jnp.bfloat16
        assert cast["w"].magnitude.dtype == jnp.float32
        kept = cast["w"].base
        assert (
            (kept.dtype == jnp.bfloat16)
            if scheme is None
            else (kept.values.dtype, kept.scale.dtype)
            == (
                jnp.int8,
                jnp.float32,
            )
        )


def test_dropout_leaves_inputs_out_and_keeps_the_mean():
    w = weight(dropout=0.25)
    x = jnp.ones((4000, 32))
    seeded = w.replaced(seed=nnx.Variable(jax.random.key_data(jax.random.key(0))))
    alone = adapted(x, w)
    assert np.array_equal(alone, adapted(x, w.replaced(dropout=0.0)))  # without a seed nothing is dropped
    got = adapted(x, seeded) - jnp.asarray(x @ plain(w.base).T)
    want = (alone - jnp.asarray(x @ plain(w.base).T))[0]
    assert np.array_equal(got, adapted(x, seeded) - jnp.asarray(x @ plain(w.base).T))
    assert len(np.unique(np.asarray(got), axis=0)) > 3900
    # 4,000 rows of 32 inputs: the mean's own deviation is a hundredth of what adds up.
    np.testing.assert_allclose(got.mean(0), want, atol=0.05 * np.abs(want).max() + 0.1)
