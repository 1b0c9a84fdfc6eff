"""weights/gguf_write.py: gguf's own reader, this package and llama.cpp find in a file the model that was written."""

import errno
import json
import logging
import shutil
import sys
import tracemalloc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from gguf.quants import dequantize, quantize
from proxies import FULL
from tiny import LLAMA as LLAMA_CONFIG
from tiny import random_tensors, raw_config, tiny_checkpoint, without_nulls, write_checkpoint
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from vocabularies import PRE, TEXTS, gguf_keys_of, trained

import smollm3_jax as s3
from smollm3_jax.commands.main import main
from smollm3_jax.config import ModelConfig
from smollm3_jax.errors import CheckpointFormatError, ConfigError, OptionError, SaveError, TokenizerError
from smollm3_jax.weights import gguf_write, peft
from smollm3_jax.weights.load import open_checkpoint

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

from bench_inference import LLAMA, Worker, node_folder
from bench_peers import BenchError

KIND = gguf.GGMLQuantizationType
QUANTIZED = ("q8_0", "q4_0", "q4_1")
TEXTS = [*TEXTS, "<|begin|>user\nIl était une fois<|end|><think>12345 ¿qué?</think>"]


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    """A SmolLM3 in float32, without a tokenizer."""
    return tiny_checkpoint(tmp_path_factory.mktemp("plain") / "tiny")


@pytest.fixture
def speaking(tmp_path) -> Path:
    """A SmolLM3 with a tokenizer of SmolLM3's kind, fewer tokens than rows, and a chat template."""
    return speaking_checkpoint(tmp_path / "speaking", "llama-bpe")


def speaking_checkpoint(folder: Path, pre: str, specials_first: bool = False, **changes: Any) -> Path:
    tokenizer = trained(pre, specials_first)
    ids = {f"{name}_token_id": tokenizer.token_to_id(f"<|{name}|>") for name in ("begin", "end", "pad")}
    raw = raw_config("plain") | {"vocab_size": tokenizer.get_vocab_size() + 3} | changes
    raw |= {"bos_token_id": ids["begin_token_id"], "eos_token_id": ids["end_token_id"]}
    raw |= {"pad_token_id": ids["pad_token_id"]}
    write_checkpoint(folder, without_nulls(raw), random_tensors(without_nulls(raw)))
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<|begin|>", "eos_token": "<|end|>", "pad_token": "<|pad|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names | {"tokenizer_class": "PreTrainedTokenizerFast"}))
    (folder / "chat_template.jinja").write_text("{% for m in messages %}<|begin|>{{ m.content }}<|end|>\n{% endfor %}")
    return folder


def changed(folder: Path, name: str, **keys: Any) -> None:
    file = folder / name
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))


def values(path: Path) -> dict[str, Any]:
    """The file's keys, as gguf's own reader has them."""
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items() if "GGUF." not in name}


def differing(a: Path, b: Path) -> list[str]:
    """The tensors of two checkpoints that are not the same numbers, bit for bit."""
    ours, theirs = open_checkpoint(a).tensors, open_checkpoint(b).tensors
    assert ours.keys() == theirs.keys()
    bits = {name: [np.float32(side[name].read()).view(np.uint32) for side in (ours, theirs)] for name in ours}
    return [name for name, (x, y) in bits.items() if x.shape != y.shape or (x != y).any()]


# --- tensors ---------------------------------------------------------------------------------------------

BIASED = LLAMA_CONFIG | {"attention_bias": True, "mlp_bias": True}
MODELS: dict[str, dict[str, Any]] = {
    "smollm3": {"num_hidden_layers": 5},
    "untied": {"tie_word_embeddings": False},
    "head_dim": {"head_dim": 24},
    "multi_query": {"num_key_value_heads": 1},
    "RoPE everywhere": {"no_rope_layers": [1, 1, 1, 1]},
    "three layers": {"num_hidden_layers": 3},
    "linear": {"rope_scaling": {"rope_type": "linear", "factor": 3.0}},
    "yarn": {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64}},
    "yarn's betas": {
        "rope_scaling": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64}
        | {"beta_fast": 16.0, "beta_slow": 2.0}
    },
    "llama": LLAMA_CONFIG,
    "biases": BIASED,
}
FIELDS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
FIELDS += ("head_dim", "vocab_size", "max_position_embeddings", "rms_norm_eps", "rope_theta", "rope_layers", "dtype")
FIELDS += ("rope_scaling", "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_model_comes_back_bit_for_bit(tmp_path, name, dtype):
    raw = without_nulls(raw_config("plain") | MODELS[name] | {"torch_dtype": dtype})
    folder = write_checkpoint(tmp_path / "hf", raw, random_tensors(raw, dtype=dtype))
    s3.convert(folder, tmp_path / "m.gguf")
    assert differing(folder, tmp_path / "m.gguf") == []
    before, after = open_checkpoint(folder).config, open_checkpoint(tmp_path / "m.gguf").config
    assert {field: getattr(after, field) for field in FIELDS} == {field: getattr(before, field) for field in FIELDS}
    # llama.cpp's smollm3 has NoPE on every fourth layer, always.
    everywhere = name in ("RoPE everywhere", "llama", "biases")
    assert (
        after.model_type
        == values(tmp_path / "m.gguf")["general.architecture"]
        == ("llama" if everywhere else "smollm3")
    )


@pytest.mark.parametrize(("kind", "number"), [("f32", 0), ("f16", 1), ("bf16", 32)])
def test_plain_types(plain, tmp_path, kind, number):
    out = tmp_path / f"m-{kind}.gguf"
    assert main(["convert", str(plain), str(out), "--type", kind]) == 0
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(out).tensors}
    assert {tensor.tensor_type.name for tensor in found.values() if len(tensor.shape) == 2} == {kind.upper()}
    assert {tensor.tensor_type.name for tensor in found.values() if len(tensor.shape) == 1} == {"F32"}
    keys = values(out)
    assert (keys["general.file_type"], keys["general.name"]) == (number, out.stem)
    assert keys["general.type"] == "model" and "general.quantization_version" not in keys
    dtype = {"f32": np.float32, "f16": np.float16, "bf16": ml_dtypes.bfloat16}[kind]
    for tensor in open_checkpoint(plain).tensors.values():
        read = open_checkpoint(out).tensors[tensor.name].read()
        wanted = tensor.read().astype(dtype) if read.ndim == 2 else tensor.read()
        np.testing.assert_array_equal(read.view(np.uint8), wanted.view(np.uint8), err_msg=tensor.name)


def test_verify_finds_no_tensor_that_differs(plain, tmp_path, capsys):
    assert main(["convert", str(plain), str(tmp_path / "m.gguf")]) == 0
    assert main(["convert", str(tmp_path / "m.gguf"), str(tmp_path / "back")]) == 0
    capsys.readouterr()
    assert main(["verify", str(tmp_path / "back"), "--against", str(plain), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["weights"]["different"] == 0


@pytest.mark.parametrize("kind", QUANTIZED)
@pytest.mark.parametrize("tied", [True, False])
def test_quantized_blocks_are_ggufs(tmp_path, kind, tied, monkeypatch):
    """Of a type below 8 bits, what makes the logits has 8."""
    folder = tiny_checkpoint(tmp_path / "hf", "plain" if tied else "untied")
    monkeypatch.setattr(gguf_write, "PIECE", 5 * 64)  # 5 rows of most: the last piece is a rest
    s3.convert(folder, tmp_path / "m.gguf", gguf_type=kind)
    head = "token_embd.weight" if tied else "output.weight"
    original, read = open_checkpoint(folder).tensors, open_checkpoint(tmp_path / "m.gguf").tensors
    names = {"attn_q.weight": ("q_proj", 8), "attn_k.weight": ("k_proj", 2), "ffn_down.weight": ("down_proj", None)}
    compared = 0
    for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors:
        if len(tensor.shape) == 1:
            assert tensor.tensor_type.name == "F32"
            continue
        wanted = "Q8_0" if tensor.name == head else kind.upper()
        assert tensor.tensor_type.name == wanted
        if tensor.name == head:
            of, heads = "lm_head.weight" if not tied else "model.embed_tokens.weight", None
        elif tensor.name.startswith("blk.") and tensor.name[6:] in names:
            of, heads = names[tensor.name[6:]]
            of = next(name for name in original if f".{tensor.name[4]}." in name and of in name)
        else:
            continue
        plain = original[of].read()
        rows = plain.reshape(heads, 2, 4, -1).swapaxes(1, 2).reshape(plain.shape) if heads else plain
        blocks = quantize(rows, KIND[wanted])
        np.testing.assert_array_equal(tensor.data, blocks, err_msg=tensor.name)
        back = read[of].read()
        back = back.reshape(heads, 2, 4, -1).swapaxes(1, 2).reshape(back.shape) if heads else back
        np.testing.assert_array_equal(back, dequantize(blocks, KIND[wanted]), err_msg=tensor.name)
        compared += 1
    assert compared == 3 * 4 + 1
    keys = values(tmp_path / "m.gguf")
    assert keys["general.file_type"] == {"q8_0": 7, "q4_0": 2, "q4_1": 3}[kind]
    assert keys["general.quantization_version"] == gguf.GGML_QUANT_VERSION


def test_rows_of_no_whole_block_are_float16(tmp_path, caplog):
    raw = raw_config("plain") | {"intermediate_size": 80}
    folder = write_checkpoint(tmp_path / "hf", raw, random_tensors(raw))
    with caplog.at_level(logging.WARNING):
        s3.convert(folder, tmp_path / "m.gguf", gguf_type="q4_1")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    assert kinds["blk.0.ffn_down.weight"] == "F16" and kinds["blk.0.ffn_up.weight"] == "Q4_1"
    assert "the rows of 4 tensors are no multiple" in caplog.text
    down = "model.layers.0.mlp.down_proj.weight"
    read, wanted = (open_checkpoint(path).tensors[down].read() for path in (tmp_path / "m.gguf", folder))
    np.testing.assert_array_equal(read, wanted.astype(np.float16))


def test_writing_takes_little_memory(tmp_path, monkeypatch):
    """Of a tensor in a mapped file, some rows at a time."""
    monkeypatch.setattr(gguf_write, "PIECE", 1 << 14)
    raw = raw_config("one_layer") | {"vocab_size": 1 << 16}
    folder = write_checkpoint(tmp_path / "hf", raw, random_tensors(raw))  # an embedding of 16 MiB
    s3.convert(folder, tmp_path / "m.gguf", gguf_type="q8_0")  # imports and caches
    tracemalloc.start()
    s3.convert(folder, tmp_path / "m.gguf", gguf_type="q8_0", force=True)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20


def test_a_quantized_checkpoint_and_an_adapter_are_written_as_what_they_stand_for(tmp_path, plain):
    assert main(["quantize", str(plain), str(tmp_path / "int8"), "--weights", "int8"]) == 0
    s3.convert(tmp_path / "int8", tmp_path / "int8.gguf")
    s3.convert(tmp_path / "int8", tmp_path / "plain", dtype="float32")
    assert differing(tmp_path / "int8.gguf", tmp_path / "plain") == []
    a, b = np.full((4, 64), 0.1, np.float32), np.full((64, 4), 0.1, np.float32)
    parts = {"model.layers.0.self_attn.q_proj.weight": {"a": a, "b": b}}
    peft.write_adapter(tmp_path / "adapter", peft.adapter_config(str(plain), ("q_proj",), 4, 8), parts, {})
    merge = ["merge", str(plain), "--adapter", str(tmp_path / "adapter"), "--out", str(tmp_path / "merged")]
    assert main(merge) == 0
    s3.convert(tmp_path / "adapter", tmp_path / "adapter.gguf")
    assert differing(tmp_path / "adapter.gguf", tmp_path / "merged") == []
    assert len(differing(tmp_path / "adapter.gguf", plain)) == 1


# --- config and tokenizer --------------------------------------------------------------------------------


def test_keys_of_smollm3(speaking, tmp_path):
    settings = {"do_sample": True, "temperature": 0.5, "top_p": 0.75, "eos_token_id": [321, 320, 319, 318]}
    (speaking / "generation_config.json").write_text(json.dumps(settings))
    s3.convert(speaking, tmp_path / "SmolLM3-tiny.gguf")
    keys = values(tmp_path / "SmolLM3-tiny.gguf")
    tokenizer = {name: keys.pop(name) for name in list(keys) if name.startswith("tokenizer.")}
    assert keys == {
        "general.architecture": "smollm3",
        "general.type": "model",
        "general.file_type": 0,
        "general.name": "SmolLM3-tiny",
        "general.sampling.temp": 0.5,
        "general.sampling.top_p": 0.75,
        "smollm3.block_count": 4,
        "smollm3.context_length": 512,
        "smollm3.embedding_length": 64,
        "smollm3.feed_forward_length": 96,
        "smollm3.attention.head_count": 8,
        "smollm3.attention.head_count_kv": 2,
        "smollm3.attention.key_length": 8,
        "smollm3.attention.value_length": 8,
        "smollm3.attention.layer_norm_rms_epsilon": pytest.approx(1e-6),
        "smollm3.rope.freq_base": 10000.0,
        "smollm3.rope.dimension_count": 8,
        "smollm3.vocab_size": 328,
    }
    wanted = gguf_keys_of(Tokenizer.from_file(str(speaking / "tokenizer.json")), "llama-bpe", add_bos_token=False)
    wanted["tokenizer.ggml.tokens"] += [f"[PAD{i}]" for i in (325, 326, 327)]
    wanted["tokenizer.ggml.token_type"] += [5, 5, 5]
    ids = {"bos": 320, "eos": 321, "eot": 320, "eom": 319, "padding": 322}
    wanted |= {f"tokenizer.ggml.{name}_token_id": token for name, token in ids.items()}
    assert tokenizer == wanted | {"tokenizer.chat_template": (speaking / "chat_template.jinja").read_text()}


def test_yarn_is_said(tmp_path):
    scaling = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64, "beta_fast": 16.0}
    raw = raw_config("plain") | {"rope_scaling": scaling}
    s3.convert(write_checkpoint(tmp_path / "hf", raw, random_tensors(raw)), tmp_path / "m.gguf")
    keys = values(tmp_path / "m.gguf")
    assert {name: value for name, value in keys.items() if "scaling" in name} == {
        "smollm3.rope.scaling.type": "yarn",
        "smollm3.rope.scaling.factor": 2.0,
        "smollm3.rope.scaling.original_context_length": 64,
        "smollm3.rope.scaling.yarn_beta_fast": 16.0,
    }


@pytest.mark.parametrize("specials_first", [True, False])
@pytest.mark.parametrize("pre", [pre for pre in PRE if pre != "smaug-bpe"])
def test_a_tokenizer_comes_back(tmp_path, pre, specials_first):
    folder = speaking_checkpoint(tmp_path / "hf", pre, specials_first)
    templates = [{"name": name, "template": f"{{{{ {name} }}}}"} for name in ("default", "tool_use")]
    (folder / "chat_template.jinja").unlink()
    changed(folder, "tokenizer_config.json", chat_template=templates)
    s3.convert(folder, tmp_path / "m.gguf")
    ours, theirs = s3.load_tokenizer(tmp_path / "m.gguf"), s3.load_tokenizer(folder)
    assert ours.templates == theirs.templates and ours.special_tokens == theirs.special_tokens
    for text in TEXTS:
        ids = theirs.encode(text)
        assert ours.encode(text) == ids
        assert [ours.decode(ids, skip) for skip in (True, False)] == [
            theirs.decode(ids, skip) for skip in (True, False)
        ]


def test_bos_is_added_where_the_tokenizer_adds_it(speaking, tmp_path):
    tokenizer = Tokenizer.from_file(str(speaking / "tokenizer.json"))
    bos = tokenizer.token_to_id("<|begin|>")
    tokenizer.post_processor = processors.TemplateProcessing("<|begin|> $A", None, [("<|begin|>", bos)])
    tokenizer.save(str(speaking / "tokenizer.json"))
    s3.convert(speaking, tmp_path / "m.gguf")
    assert values(tmp_path / "m.gguf")["tokenizer.ggml.add_bos_token"] is True
    assert s3.load_tokenizer(tmp_path / "m.gguf").encode("a")[0] == bos


def with_digits(tokenizer: Tokenizer) -> None:
    tokenizer.pre_tokenizer = pre_tokenizers.Digits()


def with_normalizer(tokenizer: Tokenizer) -> None:
    tokenizer.normalizer = normalizers.NFC()


def with_end(tokenizer: Tokenizer) -> None:
    end = ("<|end|>", tokenizer.token_to_id("<|end|>"))
    tokenizer.post_processor = processors.TemplateProcessing("$A <|end|>", None, [end])


def with_stripped_token(tokenizer: Tokenizer) -> None:
    tokenizer.add_special_tokens([AddedToken("<|new|>", lstrip=True, normalized=False)])


def with_other_decoder(tokenizer: Tokenizer) -> None:
    tokenizer.decoder = decoders.Metaspace()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_digits, "llama.cpp's name for this tokenizer's pre_tokenizer is not known"),
        (with_normalizer, "they differ in normalizer"),
        (with_end, "they differ in post_processor"),
        (with_stripped_token, "they differ in added_tokens"),
        (with_other_decoder, "they differ in decoder"),
    ],
)
def test_a_tokenizer_that_llama_cpp_would_not_run_so_is_refused(speaking, tmp_path, change, message):
    tokenizer = Tokenizer.from_file(str(speaking / "tokenizer.json"))
    change(tokenizer)
    tokenizer.save(str(speaking / "tokenizer.json"))
    with pytest.raises(TokenizerError, match=message):
        s3.convert(speaking, tmp_path / "m.gguf")
    assert not (tmp_path / "m.gguf").exists()


def test_words_that_are_no_bpe_are_refused(plain, tmp_path):
    shutil.copytree(plain, tmp_path / "hf")
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(160)}, unk_token="w0"))
    words.save(str(tmp_path / "hf" / "tokenizer.json"))
    with pytest.raises(TokenizerError, match="this one is WordLevel"):
        s3.convert(tmp_path / "hf", tmp_path / "m.gguf")


def test_a_model_without_a_tokenizer_says_so(plain, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        s3.convert(plain, tmp_path / "m.gguf")
    assert "no tokenizer.json" in caplog.text
    assert values(tmp_path / "m.gguf")["tokenizer.ggml.model"] == "no_vocab"


YARN = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"no_rope_layers": [0, 1, 1, 0]}, "NoPE on other layers than every fourth"),
        ({"no_rope_layer_interval": 2}, "NoPE on other layers than every fourth"),
        ({"attention_bias": True}, "smollm3 cannot have biases"),
        ({"mlp_bias": True}, "smollm3 cannot have biases"),
        ({"use_sliding_window": True, "sliding_window": 5}, "sliding windows"),
        ({"rope_scaling": YARN | {"attention_factor": 1.3}}, "attention_factor, mscale or truncate"),
        ({"rope_scaling": YARN | {"mscale": 1.2, "mscale_all_dim": 0.8}}, "attention_factor, mscale or truncate"),
        ({"rope_scaling": YARN | {"truncate": False}}, "attention_factor, mscale or truncate"),
        ({"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 32}}, "rope_scaling is llama3"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(tmp_path, changes, message):
    raw = without_nulls(raw_config("plain") | changes)
    folder = write_checkpoint(tmp_path / "hf", raw, random_tensors(raw))
    with pytest.raises(ConfigError, match=message):
        s3.convert(folder, tmp_path / "m.gguf")
    assert not (tmp_path / "m.gguf").exists()


# --- the file --------------------------------------------------------------------------------------------


def refused(capsys, code: int, *words: str | Path) -> str:
    assert main(["convert", *map(str, words)]) == code
    out, err = capsys.readouterr()
    assert out == "" and "Traceback" not in err
    return err


def test_a_file_that_is_there_is_not_overwritten(plain, tmp_path, capsys):
    """--force replaces it as a whole: also the file that is converted."""
    out = tmp_path / "m.gguf"
    out.write_bytes(b"mine")
    assert "is there already" in (err := refused(capsys, 2, plain, out)) and "--force" in err
    assert out.read_bytes() == b"mine"
    assert main(["convert", str(plain), str(out), "--force"]) == 0 and differing(plain, out) == []
    assert main(["convert", str(out), str(out), "--force", "--type", "q8_0"]) == 0
    assert values(out)["general.file_type"] == 7 and {path.name for path in tmp_path.iterdir()} == {"m.gguf"}


def test_mistakes_are_named(plain, tmp_path, capsys):
    out = tmp_path / "m.gguf"
    with pytest.raises(SystemExit) as caught:
        main(["convert", str(plain), str(out), "--type", "q5_k"])
    assert caught.value.code == 2 and "'q5_k'" in capsys.readouterr().err
    with pytest.raises(OptionError, match="type is 'q5_k'; choose one of f32, f16, bf16, q8_0, q4_0, q4_1"):
        s3.convert(plain, out, gguf_type="q5_k")
    for words in (["--dtype", "bfloat16"], ["--format", "torch"], ["--max-shard-size", "1GB"]):
        assert "whose numbers --type says" in refused(capsys, 2, plain, out, *words)
    assert "such as folder.gguf" in refused(capsys, 2, plain, tmp_path / "folder", "--type", "f16")
    assert "there is no folder" in refused(capsys, 3, plain, tmp_path / "no" / "m.gguf")
    (tmp_path / "link.gguf").symlink_to("elsewhere")
    assert "it is a link" in refused(capsys, 3, plain, tmp_path / "link.gguf", "--force")
    assert {path.name for path in tmp_path.iterdir()} == {"link.gguf"}


def test_numbers_that_a_type_cannot_hold(tmp_path):
    raw = raw_config("plain")
    tensors = random_tensors(raw)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 3] = 1e6
    folder = write_checkpoint(tmp_path / "hf", raw, tensors)
    with pytest.raises(OptionError, match=r"up_proj\.weight holds numbers too large for float16"):
        s3.convert(folder, tmp_path / "m.gguf", gguf_type="f16")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 3] = np.nan
    write_checkpoint(folder, raw, tensors)
    with pytest.raises(CheckpointFormatError, match=r"up_proj\.weight holds NaN or infinity, which Q4_0 cannot"):
        s3.convert(folder, tmp_path / "m.gguf", gguf_type="q4_0")
    assert {path.name for path in tmp_path.iterdir()} == {"hf"}


def test_a_full_disk_leaves_what_was_there(plain, tmp_path, monkeypatch):
    out = tmp_path / "m.gguf"
    out.write_bytes(b"mine")
    monkeypatch.setattr(gguf_write.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(SaveError, match=r"would take [\d,]+ bytes, and its disk has 1,000 left; nothing was changed"):
        s3.convert(plain, out, force=True)
    monkeypatch.undo()

    def full(part):
        raise OSError(errno.ENOSPC, "No space left on device")
        yield

    monkeypatch.setattr(gguf_write, "_encoded", full)
    with pytest.raises(SaveError, match="the disk is full; nothing was changed"):
        s3.convert(plain, out, force=True)
    assert out.read_bytes() == b"mine" and {path.name for path in tmp_path.iterdir()} == {"m.gguf"}


@pytest.mark.parametrize("fault", ["a bit", "the end"])
def test_what_was_written_is_read_back(plain, tmp_path, monkeypatch, fault):
    def damaging(file):
        pad(file)
        if fault == "the end":
            file.truncate(file.tell() - 100)
            file.seek(0, 2)
        else:
            file.seek(-40, 1)
            file.write(b"\xff\xfe")
            file.seek(0, 2)

    pad = gguf_write._pad
    monkeypatch.setattr(gguf_write, "_pad", damaging)
    with pytest.raises(SaveError, match="reads back differently"):
        s3.convert(plain, tmp_path / "m.gguf")
    assert list(tmp_path.iterdir()) == []


# --- llama.cpp -------------------------------------------------------------------------------------------

PROMPTS = ["The capital of France is", "Es war einmal", "def fibonacci(n):\n"]
NEW = 64
RELEASED = ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")
SIX = [
    "<|im_start|>system\n/think<|im_end|>\n<|im_start|>assistant\n<think>\n12345 ¿qué?</think>\n<tool_call>{}",
    "Der Fluß führt übers Jahr 1804 m³ Wasser; »nie«, sagen die Alten.",
    "L'été, c'est l'été : où êtes-vous allés, aujourd'hui ?",
    "¡Qué vergüenza! El pingüino comió 3,14 piñas — ¿y tú?",
    "Perché no? Così è (se vi pare), dell'amico più caro.",
    "A avó não dançou no coração da cidade: João, 25 anos.",
    "Привет, мир! 你好，世界 こんにちは 안녕 🙂👩‍👩‍👧",
    "Bu siyasi sektör döndü; pravidel zpracování; профессиональные",  # words that SmolLM3's merges would cut
]


def llama_cpp(path: Path) -> Worker:
    """llama.cpp with a file; skipped where node-llama-cpp is not installed."""
    try:
        folder = node_folder()
    except BenchError as error:
        pytest.skip(f"no llama.cpp: {error}")
    script = Path(__file__).parents[2] / "scripts" / "bench_llama.mjs"
    return Worker(LLAMA, ["node", str(script), str(folder), str(path), "1"])


def assert_llama_cpp_agrees(folder: Path, path: Path, texts: list[str]) -> None:
    """llama.cpp cuts the texts into the same tokens, and its greedy tokens are ours: our highest logits are theirs."""
    tokenizer, model = s3.load_tokenizer(folder), s3.from_pretrained(folder, dtype="float32", stacked=True)
    prompts = [tokenizer.encode(text, add_special_tokens=False) for text in PROMPTS]
    with llama_cpp(path) as peer:
        cut = peer.ask({"do": "tokenize", "texts": texts})["tokens"]
        command = {"do": "generate", "new": NEW - 1, "exact": True}
        answers = [peer.ask(command | {"prompts": [prompt]})["tokens"][0] for prompt in prompts]
    assert cut == [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    # One call: rows are filled up after their last token, which nothing before it sees.
    rows = [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
    batch = np.array([row + [0] * (max(map(len, rows)) - len(row)) for row in rows], np.int32)
    with jax.default_matmul_precision("highest"):
        likeliest = np.asarray(jnp.argmax(model(jnp.asarray(batch)), -1))
    for row, prompt, answer in zip(likeliest, prompts, answers, strict=True):
        assert len(answer) == NEW and row[len(prompt) - 1 :][:NEW].tolist() == answer
    assert any(len(set(answer)) > 10 for answer in answers)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [pytest.param({}, id="plain"), pytest.param({"rope_scaling": YARN | {"factor": 4.0}}, id="yarn", marks=FULL)],
)
def test_llama_cpp_computes_smollm3(full_release, tmp_path, changes):
    """With SmolLM3's tokenizer, and NoPE on the fourth and eighth layer."""
    folder = tmp_path / "hf"
    ids = {name: json.loads((full_release / "config.json").read_text())[name] for name in RELEASED}
    # Untied: a tied model of random weights says its last token again and again.
    raw = raw_config("plain") | ids | {"num_hidden_layers": 8, "tie_word_embeddings": False} | changes
    write_checkpoint(folder, raw, random_tensors(raw))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        shutil.copy(full_release / name, folder / name)
    s3.convert(folder, tmp_path / "m.gguf")
    assert_llama_cpp_agrees(folder, tmp_path / "m.gguf", [*TEXTS, *SIX])


@FULL
@pytest.mark.usefixtures("programs_as_users_run_them")
@pytest.mark.parametrize("nope", [False, True], ids=["demo", "demo with NoPE"])
def test_llama_cpp_computes_the_demo(demo_folder, tmp_path, nope):
    shutil.copytree(demo_folder, tmp_path / "hf")
    if nope:
        raw = {"model_type": "smollm3", "architectures": ["SmolLM3ForCausalLM"], "no_rope_layer_interval": 4}
        changed(tmp_path / "hf", "config.json", **raw)
        assert ModelConfig.from_hf(tmp_path / "hf").rope_layers.count(False) == 7
    s3.convert(tmp_path / "hf", tmp_path / "m.gguf", gguf_type="f32")
    assert_llama_cpp_agrees(tmp_path / "hf", tmp_path / "m.gguf", [*TEXTS, *SIX])
