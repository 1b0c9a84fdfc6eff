"""Memory by arithmetic is what is allocated, to the byte."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest
import tiny

import smollm3_jax as s3
from smollm3_jax.commands.main import main
from smollm3_jax.config import SMOLLM3_3B, ModelConfig
from smollm3_jax.kv_cache import empty_cache
from smollm3_jax.plan.memory import plan_memory, weight_bytes


def test_the_shape_of_the_release(release):
    ours, released = ModelConfig.from_hf(SMOLLM3_3B), ModelConfig.from_hf(release)
    assert dataclasses.replace(ours, source=released.source) == released


def test_memory_of_smollm3_is_known_to_the_byte():
    report = plan_memory(ModelConfig.from_hf(SMOLLM3_3B), batch=2, contexts=[8192])
    assert report["parameters"] == 3_075_098_624
    assert report["weights"]["bfloat16"] == 6_150_197_248
    # Keys and values of 36 layers, 4 heads of 128, 2 bytes; and one length a row.
    assert report["cache"]["bfloat16"]["8192"] == 2 * 8192 * 73_728 + 2 * 4


def live_bytes(tree):
    return sum(x.nbytes for x in jax.tree.leaves(tree))


@pytest.mark.parametrize("weights", ["float32", "bfloat16", "int8", "int4"])
def test_memory_is_what_is_allocated(weights, tmp_path):
    raw = tiny.raw_config("plain") | {"head_dim": 32}
    folder = tiny.write_checkpoint(tmp_path, raw, tiny.random_tensors(raw))
    quantized = weights.startswith("int")
    model = s3.from_pretrained(
        folder, dtype="bfloat16" if quantized else weights, weights=weights if quantized else None
    )
    assert live_bytes(model) == weight_bytes(ModelConfig.from_hf(folder), weights)
    for dtype in ("bfloat16", "int8"):
        cache = empty_cache(model.config, 3, 64, jnp.dtype(dtype))
        report = plan_memory(ModelConfig.from_hf(folder), batch=3, contexts=[64])
        assert live_bytes(cache) == report["cache"][dtype]["64"]


def test_formats_that_a_shape_does_not_take_are_left_out():
    assert "int4" not in plan_memory(ModelConfig.from_hf(tiny.raw_config("plain")))["weights"]


def test_the_table_of_memory_is_printed_and_drawn(capsys, tmp_path):
    assert main(["plan", "memory", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["weights"]["int8"] == 3_079_963_648
    assert main(["plan", "memory"]) == 0
    assert "6,150,197,248" in capsys.readouterr().out
    pytest.importorskip("matplotlib")
    picture = tmp_path / "memory.png"
    assert main(["plan", "memory", "--out", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
