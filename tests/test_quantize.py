"""Quantized weights: what they hold, what they multiply to, and what that takes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rounding
from flax import nnx
from gguf import GGMLQuantizationType
from gguf.quants import dequantize as gguf_dequantize
from gguf.quants import quantize as gguf_quantize
from jax.sharding import Mesh, PartitionSpec
from tiny import random_tokens, raw_config

from sharding.arrays import zeros
from sharding.rules import Sharding
from smollm3_jax.config import WEIGHT_SCHEMES, ModelConfig, QuantizationConfig
from smollm3_jax.errors import ConfigError
from smollm3_jax.generation.device_loop import decode, slot_specs
from smollm3_jax.kv_cache import empty_cache
from smollm3_jax.model import SmolLM3
from smollm3_jax.quantize import (
    INTEGER_ROWS,
    QuantizedWeight,
    best_scales,
    dequantize,
    kernel,
    linear,
    lookup,
    quantize_weight,
    range_scales,
    to_integers,
)
from smollm3_jax.weights.key_map import abstract_model, hf_tensors, parameters

RANDOM = np.random.RandomState
Q4_1 = GGMLQuantizationType.Q4_1


def config_of(scheme: str, **fields) -> ModelConfig:
    raw = raw_config("plain") | {"num_attention_heads": 4, "head_dim": 64, "intermediate_size": 128}
    raw |= {"num_hidden_layers": 2} | fields
    return dataclasses.replace(ModelConfig.from_hf(raw), quantization=QuantizationConfig(weights=scheme))


def matrix(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    return RANDOM(seed).standard_normal((rows, columns)).astype(np.float32)


def error_of(w: np.ndarray, scale: np.ndarray, minimum: np.ndarray | None) -> np.ndarray:
    return dequantize(to_integers(w, scale, minimum), scale, minimum) - w


@pytest.mark.parametrize("scheme", WEIGHT_SCHEMES)
def test_every_number_is_within_half_a_step(scheme):
    w = matrix(7, 128)
    scale, minimum = range_scales(w, scheme)
    values = to_integers(w, scale, minimum)
    group = WEIGHT_SCHEMES[scheme]
    assert values.dtype == (np.uint8 if scheme == "int4" else np.int8)
    assert values.shape == ((7, 64) if scheme == "int4" else (7, 128))
    assert scale.shape == ((7,) if group is None else (7, 128 // group))
    error = np.abs(error_of(w, scale, minimum)).reshape(scale.size, -1).max(axis=1)
    # Three roundings of the largest number: of the quotient that is rounded to steps, of a product and a difference.
    # In float16 the range, of 15 steps, begins and ends a rounding of the minimum or of all steps away.
    half = scale.reshape(-1).astype(np.float32) / 2 + 3 * 2.0**-24 * np.abs(w).max()
    beyond = 0 if minimum is None else 2.0**-11 * (np.abs(minimum) + 15 * scale).reshape(-1)
    assert (error <= half + beyond).all() and (error > 0.9 * half).any()
    # On the device the same numbers come out.
    of_device = to_integers(jnp.asarray(w), jnp.asarray(scale), None if minimum is None else jnp.asarray(minimum))
    np.testing.assert_array_equal(of_device, values)


@pytest.mark.parametrize("scheme", WEIGHT_SCHEMES)
def test_zeros_stay_zeros_and_nan_stays_nan(scheme):
    w = matrix(4, 64)
    w[1], w[2, 3] = 0, np.nan
    scale, minimum = best_scales(w, scheme)
    assert (error_of(w[:2], scale[:2], None if minimum is None else minimum[:2])[1] == 0).all()
    assert np.isnan(scale[2]).any()
    with np.errstate(invalid="ignore"):
        assert np.isnan(dequantize(to_integers(w, scale, minimum), scale, minimum)[2]).any()
    assert np.isfinite(scale[[0, 1, 3]]).all()


@pytest.mark.parametrize("levels", [2, 5, 16])
def test_int4_meets_numbers_on_its_grid_exactly(levels):
    random = RANDOM(levels)
    scale = (random.rand(3000, 1) * 0.01).astype(np.float16).astype(np.float32)
    minimum = (random.standard_normal((3000, 1)) * 0.05).astype(np.float16).astype(np.float32)
    # Groups need not use the whole range: their lowest step may be any.
    steps = random.randint(0, levels, (3000, 32)) + random.randint(0, 17 - levels, (3000, 1))
    w = (steps.astype(np.float32) * scale + minimum).reshape(250, -1)
    assert (error_of(w, *best_scales(w, "int4")) == 0).all()


def test_int4_reproduces_what_gguf_has_quantized():
    w = gguf_dequantize(gguf_quantize(matrix(64, 256), Q4_1), Q4_1)
    assert (error_of(w, *best_scales(w, "int4")) == 0).all()


@pytest.mark.parametrize("size", [1.0, 1e-5, 300.0])
def test_int4_off_the_grid_loses_less_than_gguf(size):
    w = size * matrix(64, 256)
    theirs = gguf_dequantize(gguf_quantize(w, Q4_1), Q4_1) - w
    ours = error_of(w, *best_scales(w, "int4"))
    by_group = [np.square(error).reshape(-1, 32).sum(axis=1) for error in (ours, theirs)]
    assert (by_group[0] <= by_group[1] * 1.0001).all()
    assert np.sqrt(by_group[0].sum() / by_group[1].sum()) < 0.95


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rows", [1, 3, INTEGER_ROWS + 1])
@pytest.mark.parametrize("platform", ["cpu", "tpu"])
@pytest.mark.parametrize("scheme", WEIGHT_SCHEMES)
def test_linear_is_the_product_with_what_the_weight_stands_for(scheme, platform, rows, dtype):
    weight = nnx.Param(jnp.asarray(matrix(24, 256)).reshape(24, 4, 64), axes=("embed", "heads", "head"))
    packed = quantize_weight(weight, scheme, contracted=2)
    assert packed.shape == (24, 4, 64)
    parts = (packed.values, packed.scale, packed.minimum)
    whole = dequantize(*(None if part is None else part[...] for part in parts)).reshape(24, -1)
    x = jnp.asarray(matrix(rows, 256, seed=1), dtype).reshape(rows, 1, 4, 64)
    got = linear(x, packed, contracted=2, platform=platform)
    assert got.shape == (rows, 1, 24) and got.dtype == jnp.float32
    expected = np.asarray(x.reshape(rows, -1), np.float64) @ np.asarray(whole, np.float64).T
    # Two int8 rows hold 1/64,000 of a row's largest number; bfloat16 weights 1/512 of each number.
    by = kernel(scheme, rows, platform)
    relative = 2.0**-8 if dtype == "bfloat16" and by == "dequantized" else 2.0**-14
    assert np.abs(np.asarray(got)[:, 0] - expected).max() <= relative * np.abs(expected).max()


def unpacked(values: np.ndarray, scheme: str, groups: int) -> np.ndarray:
    """The integers [N, groups, numbers that share a scale]."""
    values = np.asarray(values, np.int64).reshape(len(values), groups, -1)
    return np.concatenate([values & 15, values >> 4], axis=-1) if scheme == "int4" else values


def gradients_of(x, into_out, scheme, values, scale=None, minimum=None):
    """Of sum(x w^T * into_out), in float64: of x, and of the weight or of its scale and minimum."""
    if scheme is None:
        return into_out @ values, into_out.T @ x
    integers = unpacked(values, scheme, scale.size // len(values))
    scale_N_G = scale.reshape(*integers.shape[:2], 1)
    whole = (integers * scale_N_G + (0 if minimum is None else minimum.reshape(scale_N_G.shape))).reshape(
        len(values), -1
    )
    into_weight = (into_out.T @ x).reshape(integers.shape)
    into_scale = (into_weight * integers).sum(axis=-1).reshape(scale.shape)
    into_minimum = () if minimum is None else (into_weight.sum(axis=-1).reshape(scale.shape),)
    return into_out @ whole, into_scale, *into_minimum


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("platform", "rows"), [*(("cpu", rows) for rows in (1, 2, 5, INTEGER_ROWS, INTEGER_ROWS + 1, 200)), ("tpu", 5)]
)
@pytest.mark.parametrize("scheme", [None, *WEIGHT_SCHEMES])
def test_gradients_are_those_of_the_dequantized_weight(scheme, platform, rows, dtype):
    """Of activations, scales and minima, whatever the forward product does with that number of rows."""
    weight = nnx.Param(jnp.asarray(matrix(24, 256), dtype), axes=("mlp", "embed"))
    packed = quantize_weight(weight, scheme) if scheme else weight
    parts = (packed.values, packed.scale, packed.minimum) if isinstance(packed, QuantizedWeight) else (packed,)
    parts = [part[...] for part in parts if part is not None]
    x, into_out = jnp.asarray(matrix(rows, 256, seed=1), dtype), jnp.asarray(matrix(rows, 24, seed=2))

    def product(x, *parts):
        params = [nnx.Param(part) for part in parts]
        return linear(x, QuantizedWeight(scheme, *params) if scheme else params[0], platform=platform)

    found = jax.vjp(product, x, *parts)[1](into_out)
    assert not scheme or found[1].dtype == jax.dtypes.float0
    found = [gradient for gradient in found if gradient.dtype != jax.dtypes.float0]
    exact = [np.asarray(array, np.float64) for array in (x, into_out, *parts)]
    wanted = gradients_of(exact[0], exact[1], scheme, *exact[2:])
    # Sums of at most 256 terms, of each of which two factors were rounded to the dtype; then the result is, to its own.
    sizes = gradients_of(*map(np.abs, exact[:2]), scheme, *map(np.abs, exact[2:]))
    relative = 2.01 * 2.0**-8 if dtype == "bfloat16" else 256 * 2.0**-24
    for gradient, want, size in zip(found, wanted, sizes, strict=True):
        bound = relative * size + jnp.finfo(gradient.dtype).eps * np.abs(want)
        assert (np.abs(np.asarray(gradient, np.float64) - want) <= bound).all()
        assert (np.abs(want) > bound).mean() > 0.25  # no gradient of zeros would pass


def test_kernels():
    assert kernel(None, 1, "cpu") == "plain"
    assert [kernel("int8", rows, "cpu") for rows in (1, INTEGER_ROWS, INTEGER_ROWS + 1)] == [
        *("integer", "integer", "weight-only")
    ]
    assert kernel("int8", 1, "tpu") == "weight-only"
    assert kernel("int4", 1, "cpu") == kernel("int8-g64", 1, "gpu") == "dequantized"


def test_activations_with_outliers_keep_their_small_numbers():
    """A row whose largest number is 200 times the others, as real activations have them."""
    w, x = jnp.asarray(matrix(64, 512)), jnp.asarray(matrix(2, 512, seed=1)).at[:, 7].set(200.0)
    packed = quantize_weight(nnx.Param(w, axes=("mlp", "embed")), "int8")
    difference = linear(x, packed, platform="cpu") - linear(x, packed, platform="tpu")
    # As good as bfloat16 activations: each number off by up to its 1/256th, at random.
    assert np.abs(difference).max() < 2.0**-7 * np.sqrt(512)


def test_the_plain_product_is_one_dot():
    w, x = jnp.asarray(matrix(8, 16)), jnp.asarray(matrix(3, 16, seed=1))
    got = linear(x, nnx.Param(w, axes=("mlp", "embed")))
    np.testing.assert_array_equal(got, jax.lax.dot_general(x, w, (((1,), (1,)), ((), ()))))


@pytest.mark.parametrize("scheme", WEIGHT_SCHEMES)
def test_lookup_of_rows(scheme):
    packed = quantize_weight(nnx.Param(jnp.asarray(matrix(10, 64)), axes=("vocab", "embed")), scheme)
    parts = (packed.values, packed.scale, packed.minimum)
    whole = dequantize(*(None if part is None else part[...] for part in parts))
    index = jnp.array([[3, 9], [0, 3]])
    np.testing.assert_array_equal(jax.jit(lookup, static_argnums=2)(packed, index, "float32"), whole[index])
    assert lookup(packed, index, "bfloat16").dtype == jnp.bfloat16
    np.testing.assert_array_equal(lookup(packed, index[:1, :1], "float32", "tpu"), whole[index[:1, :1]])


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_a_quantized_model_runs_from_its_cache_as_without(scheme):
    model = SmolLM3(config_of(scheme, num_hidden_layers=1), rngs=nnx.Rngs(0))
    tokens = jnp.asarray(random_tokens(raw_config("plain"), 2, 6))
    (bounded,) = rounding.shaken(lambda model: model(tokens), model)
    logits, cache = model(tokens[:, :5], cache=empty_cache(model.config, 2, 8, jnp.float32))
    for last, seen in ((tokens[:, 5:], True), (tokens[:, :1], False)):
        got = jnp.concatenate([logits, model(last, cache=cache)[0]], axis=1)
        assert (rounding.within(got, bounded) <= 1) == seen


def test_int4_keeps_embedding_and_head_in_int8():
    params = parameters(abstract_model(config_of("int4", tie_word_embeddings=False), "bfloat16"))
    assert params["embed.values"].dtype == params["head.values"].dtype == jnp.int8
    assert params["layers.o.values"].dtype == jnp.uint8 and params["layers.o.values"].shape == (2, 64, 4, 32)
    assert params["layers.o.scale"].shape == params["layers.o.minimum"].shape == (2, 64, 4, 2)
    assert params["norm"].dtype == jnp.bfloat16


def test_parts_shard_by_the_rules_of_their_weight():
    mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("data", "tensor"))

    def specs(scheme: str, rules: str) -> dict[str, PartitionSpec]:
        params = parameters(abstract_model(config_of(scheme), "bfloat16"))
        return {
            path: Sharding.of(mesh, rules).named(path, param.get_metadata("axes"), param.shape).spec
            for path, param in params.items()
        }

    tensor = specs("int8", "serve_tp")
    assert tensor["layers.q.values"] == PartitionSpec(None, ("tensor",), None, None)
    assert tensor["layers.q.scale"] == PartitionSpec(None, ("tensor",), None)
    assert tensor["layers.o.values"] == PartitionSpec(None, None, ("tensor",), None)
    assert tensor["layers.o.scale"] == PartitionSpec(None, None)
    assert tensor["embed.scale"] == PartitionSpec(("tensor",))
    grouped = specs("int4", "fsdp")
    assert grouped["layers.q.values"] == grouped["layers.q.scale"] == grouped["layers.q.minimum"]
    assert grouped["layers.q.scale"] == PartitionSpec(None, None, None, ("data", "tensor"))
    assert grouped["layers.down.scale"] == PartitionSpec(None, ("data", "tensor"), None)


def test_groups_must_fit():
    for scheme, fields in (("int4", {"head_dim": 24}), ("int8-g64", {"intermediate_size": 96})):
        with pytest.raises(ConfigError, match=r"quantized weights in groups of (32|64)"):
            config_of(scheme, **fields)
    assert "model.norm.weight" in hf_tensors(config_of("int8", head_dim=24, intermediate_size=96))


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("scheme", ["int8", "int8-g32", "int4"])
def test_decoding_keeps_no_unpacked_weights(scheme, batch):
    """XLA:CPU unpacks weights before the loop, or all layers' at once, wherever it is let."""
    config = config_of(scheme, hidden_size=512, intermediate_size=1024, num_hidden_layers=6)
    model = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), abstract_model(config, "bfloat16", stacked=False))
    cache, slots_ = empty_cache(config, batch, 128, jnp.bfloat16), zeros(slot_specs(batch, config.vocab_size), None)
    compiled = decode.lower(model, cache, slots_, jnp.array(16)).compile()
    layer = 2 * (3 * 512 * 1024 + 2 * 512 * 256 + 2 * 512 * 128)  # bfloat16 bytes; there are six
    assert compiled.memory_analysis().temp_size_in_bytes < 2 * layer
