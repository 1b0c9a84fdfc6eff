"""Adapters as PEFT keeps them: read, written, folded in; against PEFT itself."""

import json
import re
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import parity
import pytest
from safetensors.numpy import load_file, save_file
from tiny import (
    random_tensors,
    random_tokens,
    raw_config,
    talking_checkpoint,
    tiny_adapter,
    tiny_checkpoint,
    write_checkpoint,
)

import smollm3_jax as s3
from smollm3_jax.commands.main import main
from smollm3_jax.errors import CheckpointFormatError, HubError, OptionError
from smollm3_jax.weights import peft
from smollm3_jax.weights.load import load, open_checkpoint, with_adapters

RAW = raw_config("plain")
KINDS: dict[str, Any] = {"lora": {}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True}}


def change(folder, **keys):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("base") / "base", "plain")


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_ours_answers_the_same_under_peft_and_comes_back(base, tmp_path, kind):
    folder = tiny_adapter(tmp_path / "adapter", base, **KINDS[kind])
    reference = parity.peft_model(base, folder)
    tokens = random_tokens(RAW, 2, 12)
    want = parity.reference_logits(reference, tokens)
    model = load(open_checkpoint(folder), "float32")
    got = np.asarray(model(jnp.asarray(tokens)))
    plain = np.asarray(load(open_checkpoint(base), "float32")(jnp.asarray(tokens)))
    assert np.abs(got - plain).max() > 0.1 * np.abs(want).max()  # the adapter matters
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())
    np.testing.assert_array_equal(got.argmax(-1), want.argmax(-1))

    reference.save_pretrained(tmp_path / "back")
    ours, back = load_file(folder / peft.WEIGHTS), load_file(tmp_path / "back" / peft.WEIGHTS)
    assert ours.keys() == back.keys()
    for name, x in ours.items():
        np.testing.assert_array_equal(x, back[name], err_msg=name)
    again, first = peft.read_adapter(tmp_path / "back"), peft.read_adapter(folder)
    assert {name: part.scale for name, part in again.parts.items()} == {k: x.scale for k, x in first.parts.items()}


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_one_made_by_peft_answers_the_same_here(base, tmp_path, kind):
    import torch
    from peft import LoraConfig, get_peft_model

    targets = ["q_proj", "v_proj", "o_proj", "down_proj"]
    patterns: Any = {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {r"layers\.1\.self_attn\.q_proj": 3}}
    own = LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM", **KINDS[kind], **patterns)
    torch.manual_seed(0)
    model = get_peft_model(parity.reference_model(base), own)
    for name, x in model.named_parameters():
        if "lora_" in name:
            x.data += 0.1 * torch.randn_like(x)
    model.save_pretrained(tmp_path / "adapter")
    tokens = random_tokens(RAW, 2, 12)
    want = parity.reference_logits(model.eval(), tokens)
    got = np.asarray(load(open_checkpoint(tmp_path / "adapter"), "float32")(jnp.asarray(tokens)))
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())
    np.testing.assert_array_equal(got.argmax(-1), want.argmax(-1))


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_a_bfloat16_merge_errs_no_more_than_pefts(tmp_path, kind):
    """peft #1388, unsloth #3091: merges in bfloat16 differ from the adapter. Here: added in float32, rounded once."""
    base = tiny_checkpoint(tmp_path / "base", "plain", dtype="bfloat16")
    folder = tiny_adapter(tmp_path / "adapter", base, **KINDS[kind])
    assert main(["merge", str(base), "--adapter", str(folder), "--out", str(tmp_path / "out")]) == 0
    ours, was = load_file(tmp_path / "out" / "model.safetensors"), load_file(base / "model.safetensors")
    state = parity.peft_model(base, folder, "bfloat16").merge_and_unload().state_dict()
    merged = {name: x.float().numpy() for name, x in state.items()}
    adapter, errors = peft.read_adapter(folder), []
    for name, x in ours.items():
        assert x.dtype == ml_dtypes.bfloat16
        if name not in adapter.parts:
            np.testing.assert_array_equal(x, was[name], err_msg=name)
            continue
        part = adapter.parts[name]
        exact = was[name].astype(np.float64) + part.scale * (part.b.read().astype(np.float64) @ part.a.read())
        if part.magnitude is not None:
            exact *= (part.magnitude.read() / np.linalg.norm(exact, axis=1))[:, None]
        once = exact.astype(np.float32).astype(ml_dtypes.bfloat16)
        assert (x != once).mean() < 1e-3, name  # but where float32's own rounding decides
        errors.append([np.abs(y.astype(np.float64) - exact).mean() for y in (x, merged[name])])
    ours_mean, theirs_mean = np.mean(errors, axis=0)
    assert ours_mean <= theirs_mean


def test_tied_embeddings_survive_and_the_scale_counts(tmp_path):
    """peft #2777, transformers #45127, unsloth #9331: tied embeddings lost at a merge."""
    base = talking_checkpoint(tmp_path / "base")
    folder = tiny_adapter(tmp_path / "adapter", base)
    assert main(["merge", str(base), "--adapter", f"it={folder}:0.5", "--out", str(tmp_path / "out")]) == 0
    found, was = load_file(tmp_path / "out" / "model.safetensors"), load_file(base / "model.safetensors")
    assert found.keys() == was.keys() and "lm_head.weight" not in found
    assert s3.ModelConfig.from_hf(tmp_path / "out").tie_word_embeddings
    np.testing.assert_array_equal(found["model.embed_tokens.weight"], was["model.embed_tokens.weight"])
    assert (tmp_path / "out" / "tokenizer.json").exists()
    name, part = next(iter(peft.read_adapter(folder).parts.items()))
    np.testing.assert_allclose(found[name], was[name] + 0.5 * 2 * part.b.read() @ part.a.read(), atol=1e-6)


def test_wherever_a_model_is_named(tmp_path, capsys):
    base = talking_checkpoint(tmp_path / "base")
    folder = tiny_adapter(tmp_path / "adapter", base)

    def said(*words):
        assert main(["generate", *map(str, words), "-p", "w5 w6", "--max-new-tokens", "8", "--temperature", "0"]) == 0
        return capsys.readouterr().out

    plain, alone = said(base), said(folder)
    assert plain != alone == said(base, "--adapter", folder) == said(base, "--adapter", f"x={folder}:1.0")
    assert said(base, "--adapter", f"{folder}:0") == plain
    assert said(base, "--adapter", f"{folder}:0.5", "--adapter", f"{folder}:0.5") == alone
    assert s3.load_tokenizer(folder).encode("w5") == [5]
    loaded = s3.from_pretrained(folder)
    assert np.array_equal(
        loaded.layers[0].q[...],
        load(with_adapters(open_checkpoint(base), [(peft.read_adapter(folder), 1.0)])).layers[0].q[...],
    )


def test_a_quantized_base_becomes_plain(base, tmp_path):
    folder = tiny_adapter(tmp_path / "adapter", base)
    assert main(["quantize", str(base), str(tmp_path / "q"), "--weights", "int8"]) == 0
    whole = with_adapters(open_checkpoint(tmp_path / "q"), [(peft.read_adapter(folder), 1.0)])
    exact = with_adapters(open_checkpoint(base), [(peft.read_adapter(folder), 1.0)])
    assert whole.config.quantization is None and whole.tensors.keys() == exact.tensors.keys()
    for name, x in whole.tensors.items():
        assert np.abs(x.read() - exact.tensors[name].read()).max() < 0.01 * np.abs(exact.tensors[name].read()).max()


def test_an_adapter_of_another_model(base, tmp_path):
    folder = tiny_adapter(tmp_path / "adapter", base)
    raw = RAW | {"intermediate_size": 128}
    write_checkpoint(tmp_path / "wide", raw, random_tensors(raw))
    with pytest.raises(
        CheckpointFormatError, match=r"adapter of another model: it has .*gate_proj.weight \[96, 64\], which is"
    ):
        with_adapters(open_checkpoint(tmp_path / "wide"), [(peft.read_adapter(folder), 1.0)])
    change(folder, base_model_name_or_path=str(tmp_path / "nowhere.gguf"))
    with pytest.raises(HubError, match=r"is an adapter of .*nowhere.*MODEL --adapter DIR names another"):
        open_checkpoint(folder)
    change(folder, base_model_name_or_path=None)
    with pytest.raises(CheckpointFormatError, match="does not say what model it is of"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"target_modules": ["q_proj", "lm_head"]}, "target_modules has lm_head: one matrix is both"),
        ({"target_modules": ["embed_tokens"]}, "target_modules has embed_tokens: one matrix is both"),
        ({"target_modules": ["q_proj", "x_proj"]}, "target_modules names x_proj, and .* has nothing of it"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save holds whole modules"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3'; LORA is read"),
        ({"bias": "all"}, "bias is trained"),
        ({"init_lora_weights": "pissa_niter_4"}, "changes the base model"),
        ({"r": 8}, "is of rank 4, and adapter_config.json says 8"),
        ({"lora_alpha": None}, "lora_alpha must be a number"),
        ({"use_dora": True}, "has not what an adapter of its kind has: magnitude"),
    ],
)
def test_what_is_refused(base, tmp_path, keys, said):
    folder = tiny_adapter(tmp_path / "adapter", base)
    change(folder, **keys)
    with pytest.raises(CheckpointFormatError, match=said):
        peft.read_adapter(folder)


@pytest.mark.parametrize("name", ["lm_head.lora_A.weight", "model.embed_tokens.lora_embedding_A", "model.norm.weight"])
def test_tensors_that_are_not_read_are_refused(base, tmp_path, name):
    folder = tiny_adapter(tmp_path / "adapter", base)
    tensors = load_file(folder / peft.WEIGHTS)
    save_file(tensors | {f"base_model.model.{name}": np.ones((4, 64), np.float32)}, folder / peft.WEIGHTS)
    why = "untie" if "norm" not in name else "LoRA and DoRA on projections are"
    with pytest.raises(CheckpointFormatError, match=f"tensor .*{re.escape(name)} is not read.*{why}"):
        peft.read_adapter(folder)


@pytest.mark.parametrize(
    ("word", "said"),
    [("{}:much", "'much' is no scale"), ("x={}/nowhere", "no adapter's folder"), ("{}/..", "no adapter's folder")],
)
def test_words_that_name_no_adapter(base, tmp_path, word, said):
    folder = tiny_adapter(tmp_path / "adapter", base)
    with pytest.raises(OptionError, match=said):
        peft.parse_adapter(word.format(folder))
    assert peft.parse_adapter(f"{folder}:0.25") == ("adapter", folder, 0.25)
    assert peft.parse_adapter(f"a={folder}") == ("a", folder, 1.0)
