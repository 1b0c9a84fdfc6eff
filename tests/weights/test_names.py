"""weights/names.py: other names and redundant tensors give the logits that transformers has for the same model."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from parity import bound, reference_logits, reference_model
from refusal import refusal
from safetensors.numpy import save_file
from tiny import random_tensors, random_tokens, raw_config, write_checkpoint

import smollm3_jax
from smollm3_jax.commands.main import main
from smollm3_jax.weights.load import open_checkpoint

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
Tensors = dict[str, np.ndarray]
pytestmark = pytest.mark.torch


@pytest.fixture(scope="module")
def expected(tmp_path_factory) -> dict[str, np.ndarray]:
    """transformers' logits of the tied and the untied model, saved as it saves them."""
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("names")
    logits = {}
    for name in ("plain", "untied"):
        raw = raw_config(name)
        reference = reference_model(write_checkpoint(folder / name, raw, random_tensors(raw)))
        logits[name] = reference_logits(reference, random_tokens(raw, 2, 16))
    return logits


def named(change: Callable[[str], str]) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {change(name): array for name, array in tensors.items()}


def with_buffers(tensors: Tensors) -> Tensors:
    frequencies = np.arange(4, dtype=np.float32)
    layer = "model.layers.{}.self_attn.rotary_emb."
    buffers = {layer.format(i) + "inv_freq": frequencies for i in range(4)}
    buffers |= {
        layer.format(0) + "cos_cached": frequencies.astype(np.float64),
        "model.rotary_emb.inv_freq": frequencies,
    }
    buffers |= {"model.causal_mask": np.ones((4, 4), bool), "model.position_ids": np.arange(4)}
    more = ("cos_sin_cache", "rotary.freqs", "rotary_embedding.full.inv_freq", "attn.bias", "masked_bias")
    buffers |= {f"model.layers.1.self_attn.{name}": np.ones(4, np.float16) for name in more}
    buffers |= {"freqs_cos": frequencies, "rope_freqs": frequencies, "model._position_ids": np.arange(4)}
    return tensors | buffers | {"model.rotary_emb.original_inv_freq": frequencies.astype(ml_dtypes.bfloat16)}


def half_head(tensors: Tensors) -> Tensors:
    """The head in float16, the embedding in float32, and both the same numbers."""
    head = tensors[EMBED].astype(np.float16)
    return tensors | {EMBED: head.astype(np.float32), HEAD: head}


def only_head(tensors: Tensors) -> Tensors:
    return {HEAD if name == EMBED else name: array for name, array in tensors.items()}


# name -> (the model, its tensors as they are stored, whether transformers loads that too)
CASES: dict[str, tuple[str, Callable[[Tensors], Tensors], bool]] = {
    "buffers": ("plain", with_buffers, True),
    "buffers_untied": ("untied", with_buffers, True),
    "no_model": ("plain", named(lambda name: name.removeprefix("model.")), True),
    "no_model_untied": ("untied", named(lambda name: name.removeprefix("model.")), False),
    "only_head": ("plain", only_head, True),
    "head_too": ("plain", lambda tensors: tensors | {HEAD: tensors[EMBED]}, True),
    "compiled": ("plain", named("_orig_mod.{}".format), False),
    "compiled_buffers": ("plain", lambda tensors: named("_orig_mod.{}".format)(with_buffers(tensors)), False),
    "data_parallel": ("untied", named("module.{}".format), False),
    "data_parallel_only_head": ("plain", lambda tensors: named("module.{}".format)(only_head(tensors)), False),
    "twice": ("plain", named("module._orig_mod.{}".format), False),
    "fsdp": ("plain", named("_fsdp_wrapped_module.{}".format), False),
    "peft": ("untied", named("base_model.model.{}".format), False),
    "lightning": ("untied", named("model.{}".format), False),
    "another_program": ("plain", named("policy.net.{}".format), False),
    "decoder_compiled": ("plain", named(lambda name: f"_orig_mod.{name.removeprefix('model.')}"), False),
}


def saved(folder: Path, case: str) -> tuple[Path, dict[str, Any]]:
    name, change, _ = CASES[case]
    raw = raw_config(name)
    return write_checkpoint(folder, raw, change(random_tensors(raw))), raw


def ours(folder: Path, raw: dict[str, Any], dtype: str | None = None) -> np.ndarray:
    with jax.default_matmul_precision("highest"):
        return np.asarray(smollm3_jax.from_pretrained(folder, dtype)(jnp.asarray(random_tokens(raw, 2, 16))))


@pytest.mark.parametrize("case", CASES)
def test_the_logits_are_the_whole_models(case, tmp_path, expected):
    """W16: what is read is the same model, and what is written of it has Hugging Face's names and nothing besides."""
    folder, raw = saved(tmp_path / "in", case)
    name, _, too = CASES[case]
    reference = expected[name]
    assert np.abs(ours(folder, raw) - reference).max() <= bound(reference)
    if too:
        theirs = reference_logits(reference_model(folder), random_tokens(raw, 2, 16))
        assert np.abs(theirs - reference).max() <= bound(reference)
    smollm3_jax.convert(folder, tmp_path / "out")
    original = random_tensors(raw)
    stored = open_checkpoint(tmp_path / "out").tensors
    assert {key: tensor.read().tobytes() for key, tensor in stored.items()} == {
        key: array.tobytes() for key, array in original.items()
    }


@pytest.mark.parametrize("case", ["buffers", "no_model", "only_head", "head_too", "compiled", "data_parallel"])
def test_the_same_in_torch_files(case, tmp_path, expected):
    """W20: buffers of any dtype, names and tied heads are read there as in safetensors."""
    import torch

    name, change, _ = CASES[case]
    raw = raw_config(name)
    tensors = change(random_tensors(raw))
    state = {
        key: torch.tensor(array.astype(np.float32) if array.dtype == ml_dtypes.bfloat16 else array)
        for key, array in tensors.items()
    }
    torch.save(state, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert np.abs(ours(tmp_path, raw) - expected[name]).max() <= bound(expected[name])


def test_a_tied_head_of_another_dtype_with_equal_values(tmp_path, expected):
    raw = raw_config("plain")
    folder = write_checkpoint(tmp_path / "half", raw, half_head(random_tensors(raw)))
    theirs = reference_logits(reference_model(folder), random_tokens(raw, 2, 16))
    assert np.abs(ours(folder, raw) - theirs).max() <= bound(theirs)
    assert np.abs(theirs - expected["plain"]).max() > 1e-4  # they have been rounded
    assert set(open_checkpoint(folder).tensors) == set(random_tensors(raw))


def test_a_prefix_is_said(tmp_path, caplog):
    open_checkpoint(saved(tmp_path / "a", "fsdp")[0])
    [record] = caplog.records
    assert record.levelno == logging.WARNING and "'_fsdp_wrapped_module.'" in record.message
    caplog.clear()
    for case in ("no_model", "buffers", "only_head"):
        open_checkpoint(saved(tmp_path / case, case)[0])
    assert not caplog.records


def some(change: Callable[[str], str], part: str) -> Callable[[Tensors], Tensors]:
    return named(lambda name: change(name) if part in name else name)


REFUSED: dict[str, tuple[str, Callable[[Tensors], Tensors], str]] = {
    "one_without": ("plain", some(lambda name: name.removeprefix("module."), "model.norm"), "37 missing"),
    "some_with": ("plain", some("module.{}".format, "layers.2."), "9 missing"),
    "model_twice_in_some": ("plain", some("model.{}".format, "layers.0."), "9 missing"),
    "no_model_in_some": ("plain", some(lambda name: name.removeprefix("model."), "layers.0."), "missing"),
    "unknown_wrapper_of_a_decoder": ("plain", named(lambda name: name.replace("model.", "foo.")), "38 missing"),
    "a_decoder_of_an_untied_model": ("untied", lambda tensors: only_layers(tensors), "1 missing: lm_head.weight"),
    "two_models": ("plain", lambda tensors: tensors | named("ema.{}".format)(tensors), "38 unknown: ema."),
    "no_buffer": ("plain", lambda tensors: tensors | {"model.layers.0.self_attn.inv_freqs": np.ones(4)}, "inv_freqs"),
    "adapter": (
        "plain",
        lambda tensors: tensors | {"model.layers.0.self_attn.q_proj.lora_A.weight": np.ones((4, 64), np.float32)},
        "1 unknown: model.layers.0.self_attn.q_proj.lora_A.weight; the lora_ tensors are those of an adapter",
    ),
}


def only_layers(tensors: Tensors) -> Tensors:
    """As AutoModel saves them."""
    return {name.removeprefix("model."): array for name, array in tensors.items() if name != HEAD}


@pytest.mark.parametrize("case", REFUSED)
def test_anything_else_is_refused(case, tmp_path, capsys):
    """W16: one rule for all names, or none."""
    name, change, words = REFUSED[case]
    raw = raw_config(name)
    tensors = random_tensors(raw)
    if case == "one_without":
        tensors = named("module.{}".format)(tensors)
    message = refusal(capsys, write_checkpoint(tmp_path / "bad", raw, change(tensors)))
    assert words.split(",")[0] in message


# Shards and their index


def sharded(folder: Path, tensors: Tensors, listed: dict[str, str], raw: dict[str, Any]) -> Path:
    """Two shards, the embedding in the second, and an index with `listed` over what is true."""
    first = {name: array for name, array in tensors.items() if name != EMBED}
    shards = {"a.safetensors": first, "b.safetensors": {EMBED: tensors[EMBED]}}
    folder.mkdir(exist_ok=True)
    for name, part in shards.items():
        save_file(part, folder / name)
    (folder / "config.json").write_text(json.dumps(raw))
    weight_map = {name: shard for shard, part in shards.items() for name in part} | listed
    content = {"weight_map": {name: shard for name, shard in weight_map.items() if shard}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))
    return folder


BUFFER = "model.layers.0.self_attn.rotary_emb.inv_freq"
NORM = "model.norm.weight"


@pytest.mark.parametrize(
    ("listed", "extra"),
    [
        ({HEAD: "a.safetensors"}, {}),
        ({BUFFER: "b.safetensors"}, {}),
        ({BUFFER: ""}, {BUFFER: np.arange(4.0)}),
        ({HEAD: ""}, {HEAD: None}),
    ],
    ids=["absent_head", "absent_buffer", "unlisted_buffer", "unlisted_head"],
)
def test_an_index_and_what_is_redundant(listed, extra, tmp_path, expected):
    """W14: a tied head and buffers may be listed and absent, or the other way round."""
    raw = raw_config("plain")
    tensors = random_tensors(raw)
    extra = {name: tensors[EMBED] if array is None else array for name, array in extra.items()}
    folder = sharded(tmp_path / "hf", tensors | extra, listed, raw)
    assert np.abs(ours(folder, raw) - expected["plain"]).max() <= bound(expected["plain"])


@pytest.mark.parametrize(
    ("name", "listed", "words"),
    [
        ("untied", {HEAD: "b.safetensors"}, "tensor lm_head.weight is listed in b.safetensors but is in a.safetensors"),
        ("plain", {NORM: "b.safetensors"}, "listed in b.safetensors but is in a.safetensors"),
        ("plain", {NORM: ""}, "is listed in no shard but is in a.safetensors"),
        ("plain", {"model.layers.9.mlp.up_proj.weight": "a.safetensors"}, "but is in no shard"),
        ("plain", {HEAD: "c.safetensors"}, "c.safetensors is listed in model.safetensors.index.json but missing"),
    ],
)
def test_an_index_that_lies_is_refused(name, listed, words, tmp_path, capsys):
    """W14."""
    raw = raw_config(name)
    assert words in refusal(capsys, sharded(tmp_path / "bad", random_tensors(raw), listed, raw))


def test_inspect_says_what_is_whole(tmp_path, capsys):
    """What came as a decoder alone is shown as the model that it is read as."""
    folder, raw = saved(tmp_path / "in", "no_model")
    (folder / "config.json").write_text(json.dumps(raw | {"architectures": ["SmolLM3Model"]}))
    assert main(["inspect", str(folder)]) == 0
    assert "SmolLM3ForCausalLM" in capsys.readouterr().out
