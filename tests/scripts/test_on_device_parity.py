"""The measuring run's comparisons: each is out of its bound where what it compares is broken."""

import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import no_gpu
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
from device import parity, parity_cache, parity_gradients, parity_quantized, shape
from device.run import Run, lines

from smollm3_jax import nvidia
from smollm3_jax.attention import cudnn, dispatch, gpu
from smollm3_jax.generation.prompts import pieces


def passed(out):
    return [line["passed"] for line in lines(out) if line["kind"] == "parity"]


def cache_models():
    model = shape.random_model(shape.config(True))
    return model, parity.widened(model)


@pytest.mark.slow
def test_a_prompt_whose_past_is_lost_is_seen(tmp_path, monkeypatch):
    """A planted bug: no piece sees those before it."""
    monkeypatch.setattr(parity, "pieces", lambda *a: [(0, *rest) for _, *rest in pieces(*a)])
    model = shape.random_model(shape.config(True))
    parity.pieces_against_whole(Run("parity", tmp_path, tiny=True), model)
    assert passed(tmp_path) == [False, False]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("field", "dtype", "expected"),
    [
        ("v_scale", "float32", [False, False, False]),
        ("v_scale", "bfloat16", [True, True, False]),
        ("k_scale", "float32", [False, True, True]),
    ],
)
def test_a_wrong_scale_of_an_int8_cache_is_seen(field, dtype, expected, tmp_path, monkeypatch):
    """A planted bug: not on the CPU, the device takes for each token the scale of the one before."""

    def with_shifted_scales(model, cache, *rest):
        if model.dtype == dtype and jax.config.jax_default_device is None:
            layers = [replace(x, **{field: jnp.roll(getattr(x, field), 1, axis=2)}) for x in cache.layers]
            cache = replace(cache, layers=tuple(layers))
        return parity.following(model, cache, *rest)

    monkeypatch.setattr(parity_cache, "following", with_shifted_scales)
    parity_cache.int8_cache(Run("parity_cache", tmp_path, tiny=True), *cache_models())
    assert passed(tmp_path) == expected


@pytest.mark.slow
def test_a_wrong_table_of_pages_is_seen(tmp_path, monkeypatch):
    """A planted bug: decoding takes two pages of a row for each other."""

    def with_another_table(model, cache, *rest):
        if cache.table is not None:
            cache = replace(cache, table=cache.table.at[0, :2].set(cache.table[0, 1::-1]))
        return parity.following(model, cache, *rest)

    monkeypatch.setattr(parity_cache, "following", with_another_table)
    parity_cache.pages(Run("parity_cache", tmp_path, tiny=True), *cache_models())
    assert passed(tmp_path) == [False, False]


@pytest.mark.slow
def test_groups_whose_scales_are_shifted_are_seen(tmp_path, monkeypatch):
    """A planted bug: each group of an int8 weight has the scale of the one before."""

    def with_shifted_scales(values, scale, minimum):
        return dequantize(values, jnp.roll(scale, 1, axis=-1), minimum)

    dequantize = parity_quantized.dequantize
    monkeypatch.setattr(parity_quantized, "dequantize", with_shifted_scales)
    parity_quantized.one(Run("parity_quantized", tmp_path, tiny=True), "int8-g64")
    assert passed(tmp_path) == [False, False, False, True]  # the last is the device beside the CPU


def test_many_documents_are_more_than_a_call_takes():
    for length in (parity_gradients.LENGTH, parity_gradients.TINY_MANY):
        row = shape.packed_segments(1, length, parity_gradients.MANY, padding=7)
        assert len(jnp.unique(row)) - 1 > gpu.DOCUMENTS


@pytest.mark.slow
@pytest.mark.parametrize("calls", ["all", "the first"])
def test_documents_that_a_kernel_leaves_out_are_seen(calls, tmp_path, monkeypatch):
    """Attention as on an H100, its kernels by their definition and with fewer documents a call; with a planted bug no
    call follows the first."""
    monkeypatch.setattr(dispatch, "platform_of", lambda sharding: "gpu")
    monkeypatch.setattr(nvidia, "compute_capability", lambda sharding: (9, 0))
    monkeypatch.setattr(nvidia, "kernels_fit", lambda: True)
    monkeypatch.setattr(cudnn, "forward", no_gpu.forward)
    monkeypatch.setattr(cudnn, "backward", no_gpu.backward)
    monkeypatch.setattr(gpu, "DOCUMENTS", 8)
    if calls == "the first":
        monkeypatch.setattr(gpu, "_all_calls", lambda some, number, batch: some(0)[0])
    jax.clear_caches()  # programs that were traced otherwise
    model = shape.random_model(shape.config(True), "float32", stacked=True)
    parity_gradients.bfloat16(Run("parity_gradients", tmp_path, tiny=True), model, "many documents", 24, 64)
    jax.clear_caches()
    assert lines(tmp_path)[0]["documents"] > gpu.DOCUMENTS
    assert passed(tmp_path) == [calls == "all"]
