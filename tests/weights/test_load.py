"""Checkpoints that are not what their config says, PyTorch's files, missing tokenizers, and placement on a mesh."""

import json
import logging
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import rounding
from jax.sharding import Mesh
from refusal import refusal
from tiny import LLAMA, random_tensors, random_tokens, raw_config, tiny_checkpoint, write_checkpoint

import smollm3_jax
from sharding.rules import ShardingError
from smollm3_jax.commands.main import main
from smollm3_jax.errors import (
    CheckpointFormatError,
    ConfigError,
    OptionError,
    SmolLM3Error,
    SupportError,
    TokenizerError,
)
from smollm3_jax.weights.key_map import parameters
from smollm3_jax.weights.load import open_checkpoint

ROOT = Path(__file__).parents[2]
EMBED, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
QUERY = "model.layers.2.self_attn.q_proj.weight"


@pytest.fixture
def refused(capsys, monkeypatch) -> Callable[..., str]:
    """The library raises before any weight is read, and the command exits with 3 and one line; both name it all."""

    def check(folder: Path, *fragments: str, error: type[SmolLM3Error] = CheckpointFormatError) -> str:
        def untouchable(*_, **__):
            raise AssertionError("a weight was read")

        with monkeypatch.context() as patch:
            patch.setattr(np, "memmap", untouchable)
            with pytest.raises(error) as caught:
                smollm3_jax.from_pretrained(folder)
            err = refusal(capsys, folder)
        for fragment in (str(folder), *fragments):
            assert fragment in str(caught.value) and fragment in err, f"{fragment!r} is not in {err!r}"
        return err

    return check


def python(script: str, *arguments: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )


def logits(model) -> np.ndarray:
    return np.asarray(model(random_tokens(model.config.to_hf(), 2, 16)))


def warnings(caplog) -> list[str]:
    return [record.message for record in caplog.records if record.levelno >= logging.WARNING]


def edited(folder: Path, edit: Callable[[dict[str, np.ndarray]], Any], name: Any = "plain", **fields: Any) -> Path:
    """A checkpoint whose tensors, and config.json, were changed after they were made for each other."""
    raw = raw_config(name)
    tensors = random_tensors(raw)
    edit(tensors)
    return write_checkpoint(folder, {k: v for k, v in (raw | fields).items() if v is not ...}, tensors)


# W16: names


def drop(tensors: dict[str, np.ndarray], fragment: str) -> None:
    for name in [name for name in tensors if fragment in name]:
        del tensors[name]


def rename(tensors: dict[str, np.ndarray], old: str, new: str) -> None:
    for name in list(tensors):
        tensors[name.replace(old, new)] = tensors.pop(name)


NAMES: dict[str, tuple[Callable[[dict[str, np.ndarray]], Any], tuple[str, ...]]] = {
    "one_missing": (lambda t: t.pop(QUERY), (f"1 missing: {QUERY}",)),
    "layer_missing": (lambda t: drop(t, "layers.3."), ("9 missing: model.layers.3.self_attn.q_proj.weight",)),
    "layer_too_many": (
        lambda t: t.update({k.replace("s.3.", "s.4."): v for k, v in t.items() if "s.3." in k}),
        ("9 unknown: ", "model.layers.4.self_attn.q_proj.weight"),
    ),
    "many_missing": (
        lambda t: drop(t, "proj"),
        ("28 missing: model.layers.0.self_attn.q_proj.weight", "model.layers.1.self_attn.v_proj.weight and 18 more"),
    ),
    "one_renamed": (
        lambda t: rename(t, "model.norm", "model.final_norm"),
        ("1 missing", NORM, "1 unknown: model.final"),
    ),
    "all_renamed": (lambda t: rename(t, "model.", "transformer."), ("38 missing", "38 unknown", "and 28 more")),
    "biases": (
        lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": np.zeros(64, np.float32)}),
        ("1 unknown: model.layers.0.self_attn.q_proj.bias",),
    ),
    "nothing": (lambda t: t.clear(), ("38 missing",)),
}


@pytest.mark.parametrize("case", NAMES)
def test_wrong_names(case, tmp_path, refused):
    """W16."""
    edit, fragments = NAMES[case]
    refused(edited(tmp_path / "bad", edit), *fragments)


# W17: shapes


def pad_vocabulary(tensors: dict[str, np.ndarray]) -> None:
    tensors[EMBED] = np.pad(tensors[EMBED], ((0, 32), (0, 0)))


SHAPES: dict[str, tuple[Callable[[dict[str, np.ndarray]], Any], dict[str, Any], tuple[str, ...]]] = {
    "padded_vocabulary": (pad_vocabulary, {}, (EMBED, "vocab_size (config.json: 160, tensor: 192)")),
    "width": (lambda t: None, {"hidden_size": 128}, (EMBED, "hidden_size (config.json: 128, tensor: 64)")),
    "feed_forward": (
        lambda t: None,
        {"intermediate_size": 128},
        ("mlp.gate_proj.weight", "intermediate_size (config.json: 128, tensor: 96)"),
    ),
    "kv_heads": (
        lambda t: None,
        {"num_key_value_heads": 4},
        ("k_proj.weight", "num_key_value_heads * head_dim (config.json: 32, tensor: 16)"),
    ),
    "head_dim": (
        lambda t: None,
        {"head_dim": 16},
        ("q_proj.weight", "num_attention_heads * head_dim (config.json: 128, tensor: 64)"),
    ),
    "transposed": (
        lambda t: t.update({EMBED: np.ascontiguousarray(t[EMBED].T)}),
        {},
        ("vocab_size (config.json: 160, tensor: 64)", "hidden_size (config.json: 64, tensor: 160)"),
    ),
    "rank": (lambda t: t.update({NORM: t[NORM][None]}), {}, (NORM, "[1, 64]")),
    "flat": (lambda t: t.update({QUERY: t[QUERY].reshape(-1)}), {}, (QUERY, "[4096]")),
    "scalar": (lambda t: t.update({NORM: np.asarray(t[NORM][0])}), {}, (NORM, "the number of dimensions")),
}


@pytest.mark.parametrize("case", SHAPES)
def test_wrong_shapes(case, tmp_path, refused):
    """W17: the message says which field of config.json disagrees."""
    edit, fields, fragments = SHAPES[case]
    refused(edited(tmp_path / "bad", edit, **fields), "has shape", *fragments)


# W18: config.json

CONFIGS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "unknown_type": ({"model_type": "qwen3"}, ("model_type is 'qwen3'", "smollm3")),
    "no_type": ({"model_type": ...}, ("model_type",)),
    "nope_list_short": ({"no_rope_layers": [1, 1, 0]}, ("no_rope_layers must hold 4 values",)),
    "nope_list_wrong_values": ({"no_rope_layers": [1, 1, 1, 2]}, ("no_rope_layers must hold 4 values of 0 or 1",)),
    "nope_open": ({"no_rope_layer_interval": ...}, ("no_rope_layers and no_rope_layer_interval are both absent",)),
    "nope_interval_0": ({"no_rope_layer_interval": 0}, ("no_rope_layer_interval is 0",)),
    "rope_type": ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, ("'longrope'", "yarn", "llama3")),
    "rope_type_dynamic": ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, ("'dynamic' is not supported",)),
    "rope_without_type": ({"rope_scaling": {"factor": 2.0}}, ("rope_scaling", "rope_type")),
    "no_theta": ({"rope_theta": ...}, ("rope_theta is missing",)),
    "no_size": ({"hidden_size": ...}, ("hidden_size is missing",)),
    "string_size": ({"hidden_size": "64"}, ("hidden_size is '64'",)),
    "float_layers": ({"num_hidden_layers": 4.0}, ("num_hidden_layers is 4.0",)),
    "huge_theta": ({"rope_theta": 10**400}, ("rope_theta",)),
    "dtype": ({"torch_dtype": 16}, ("torch_dtype is 16", "must be str")),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_wrong_config(case, tmp_path, refused):
    """W18: nothing about RoPE or NoPE is ever filled in by a default."""
    fields, fragments = CONFIGS[case]
    refused(edited(tmp_path / "bad", lambda t: None, **fields), "config.json", *fragments, error=ConfigError)


@pytest.mark.parametrize(
    "content",
    [None, b"", b"{", b"[1]", b"\xff\xfe{}", b"[" * 100_000, b'{"model_type": "smollm3"}'],
    ids=["missing", "empty", "cut", "list", "utf16", "deep", "nearly_nothing"],
)
def test_garbled_config(content, tmp_path, refused):
    folder = tiny_checkpoint(tmp_path / "bad")
    (folder / "config.json").unlink()
    if content is not None:
        (folder / "config.json").write_bytes(content)
    refused(folder, "config.json", error=ConfigError)


LIMITED = """
import resource, sys
from smollm3_jax.config import ModelConfig, ConfigError
limit = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize() + (256 << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    ModelConfig.from_hf(sys.argv[1])
except ConfigError as error:
    print(error)
"""


@pytest.mark.slow
def test_layer_count_beyond_reason_takes_no_memory(tmp_path):
    """A list with an entry for each layer would fill the memory before any check: hence a process with little."""
    folder = edited(tmp_path / "bad", lambda t: None, num_hidden_layers=10**15)
    run = python(LIMITED, folder)
    assert "config.json" in run.stdout and "num_hidden_layers 1000000000000000" in run.stdout, run.stderr[-999:]


def test_interval_alone_is_expanded(tmp_path):
    """The interval says the same as the list; llama means RoPE everywhere."""
    listed = edited(tmp_path / "listed", lambda t: None, no_rope_layers=[1, 0, 1, 0], no_rope_layer_interval=...)
    interval = edited(tmp_path / "interval", lambda t: None, no_rope_layer_interval=2)
    llama = edited(
        tmp_path / "llama", lambda t: None, **{k: v or ... for k, v in LLAMA.items()}, tie_word_embeddings=True
    )
    models = [smollm3_jax.from_pretrained(folder) for folder in (listed, interval, llama)]
    assert [model.config.rope_layers for model in models] == [(True, False) * 2] * 2 + [(True,) * 4]
    first, second, third = map(logits, models)
    np.testing.assert_array_equal(first, second)
    assert np.abs(first - third).max() > 1e-3


def test_tied_head_that_equals_the_embedding(tmp_path):
    """Accepted as what some trainers write, and not written again."""
    folder = edited(tmp_path / "hf", lambda t: t.update({HEAD: t[EMBED].copy()}))
    model = smollm3_jax.from_pretrained(folder)
    assert model.head is None
    smollm3_jax.save_pretrained(model, tmp_path / "saved")
    smollm3_jax.convert(folder, tmp_path / "converted")
    for out in (tmp_path / "saved", tmp_path / "converted"):
        names = {tensor["name"] for tensor in inspect(out)["tensors"]}
        assert names == random_tensors(raw_config("plain")).keys()
        assert open_checkpoint(out).config.tie_word_embeddings
    np.testing.assert_array_equal(logits(model), logits(smollm3_jax.from_pretrained(tmp_path / "saved")))


def test_a_tied_head_whose_zeros_have_another_sign(tmp_path):
    def change(tensors: dict[str, np.ndarray]) -> None:
        tensors[EMBED][5] = 0.0
        tensors[HEAD] = np.where(tensors[EMBED] == 0, np.float32(-0.0), tensors[EMBED])

    assert HEAD not in open_checkpoint(edited(tmp_path / "hf", change)).tensors


def inspect(folder: Path) -> dict[str, Any]:
    from smollm3_jax.weights.summary import summarize

    return summarize(folder)


def nudge(array: np.ndarray) -> np.ndarray:
    out = array.copy()
    out[-1, -1] = np.nextafter(out[-1, -1], np.float32(9))
    return out


@pytest.mark.parametrize(
    "change", [nudge, lambda a: a[:-1], lambda a: a.astype(np.float16)], ids=["bit", "shape", "dtype"]
)
def test_tied_head_that_differs(change, tmp_path, capsys):
    """Which of the two is meant is for the user to say: a silent choice would compute something else."""
    folder = edited(tmp_path / "bad", lambda t: t.update({HEAD: np.ascontiguousarray(change(t[EMBED]))}))
    with pytest.raises(CheckpointFormatError, match=f"{HEAD} differs from {EMBED}.*tie_word_embeddings is true"):
        smollm3_jax.from_pretrained(folder)
    assert main(["inspect", str(folder)]) == 3
    assert f"{HEAD} differs" in capsys.readouterr().err


def test_untied_without_a_head(tmp_path, refused):
    refused(edited(tmp_path / "bad", lambda t: None, tie_word_embeddings=False), f"1 missing: {HEAD}")


# W11: dtypes


def test_mixed_dtypes_need_a_choice(tmp_path, refused, capsys, caplog):
    folder = edited(
        tmp_path / "mixed", lambda t: t.update({k: v.astype(ml_dtypes.bfloat16) for k, v in t.items() if "norm" in k})
    )
    with pytest.raises(CheckpointFormatError, match=rf"most tensors are float32.*9 others: .*{NORM} \(bfloat16\)") as e:
        smollm3_jax.from_pretrained(folder)
    assert 'dtype="float32"' in str(e.value) and "--dtype float32" in str(e.value)
    caplog.set_level(logging.INFO, logger="smollm3_jax")
    for dtype in ("bfloat16", np.float32):
        caplog.clear()
        model = smollm3_jax.from_pretrained(folder, dtype=dtype, stacked=True)
        assert {str(p.dtype) for p in (model.embed, model.norm, model.layers.q)} == {model.config.dtype}
        assert model.config.dtype == np.dtype(dtype if dtype != "bfloat16" else ml_dtypes.bfloat16).name
        other = {"float32": "bfloat16", "bfloat16": "float32"}[str(model.config.dtype)]
        assert [r.message for r in caplog.records] == [f"casting {other} tensors to {model.config.dtype}"]
    # Conversion need not choose: it keeps every tensor as it is.
    smollm3_jax.convert(folder, tmp_path / "out")
    assert {t["dtype"] for t in inspect(tmp_path / "out")["tensors"]} == {"float32", "bfloat16"}


def test_uniform_dtype_that_is_not_the_configs(tmp_path, caplog):
    folder = edited(tmp_path / "odd", lambda t: None, torch_dtype="bfloat16")
    model = smollm3_jax.from_pretrained(folder)
    assert model.embed.dtype == np.float32 and model.config.dtype == "float32"
    assert warnings(caplog) == ["config.json says bfloat16, but the tensors are float32: loading them as they are"]


def test_dtype_that_is_none(tmp_path):
    folder = tiny_checkpoint(tmp_path / "hf")
    for dtype in ("int8", "float64", np.int32):
        with pytest.raises(OptionError, match="is not supported; choose one of float32, bfloat16, float16"):
            smollm3_jax.from_pretrained(folder, dtype=dtype)


@pytest.mark.parametrize("name", [EMBED, QUERY, NORM])
def test_cast_that_overflows(name, tmp_path, caplog):
    """65520 is finite in float32 and infinite in float16: that must not pass in silence."""
    folder = edited(tmp_path / "hf", lambda t: t[name].reshape(-1).__setitem__(3, 65520.0))
    smollm3_jax.from_pretrained(folder)
    assert not warnings(caplog)
    smollm3_jax.from_pretrained(folder, dtype="float16")
    (message,) = warnings(caplog)
    assert f"1 tensors: {name}" in message and "too large for float16" in message
    with pytest.raises(OptionError, match=f"{name}.*too large for float16"):
        smollm3_jax.convert(folder, tmp_path / "out", dtype="float16")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


# W19


@pytest.mark.slow
@pytest.mark.parametrize("name", [EMBED, QUERY, NORM])
@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_not_finite(name, value, tmp_path, caplog, capsys):
    folder = edited(tmp_path / "bad", lambda t: t[name].reshape(-1).__setitem__(-1, value))
    smollm3_jax.from_pretrained(folder)
    assert warnings(caplog) == [f"not all finite; 1 tensors: {name}: the checkpoint is damaged or diverged"]
    capsys.readouterr()
    assert main(["verify", str(folder), "--against", str(folder), "--json"]) == 4
    out, err = capsys.readouterr()

    def no_constant(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    report = json.loads(out, parse_constant=no_constant)
    assert report["ok"] is False and report["checks"]["finite"] is False
    assert "Traceback" not in err


def test_not_finite_in_many(tmp_path, caplog):
    folder = edited(
        tmp_path / "bad", lambda t: [v.reshape(-1).__setitem__(0, np.nan) for k, v in t.items() if "s." in k]
    )
    smollm3_jax.from_pretrained(folder)
    (message,) = warnings(caplog)
    assert "and 27 more" in message and "37 tensors: " in message


def test_verify_of_a_sound_model(tmp_path, caplog, capsys):
    """The counterpart of the above: the same command, and it passes."""
    folder = tiny_checkpoint(tmp_path / "good")
    assert main(["verify", str(folder), "--against", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ok"] is True
    assert not warnings(caplog)


# W20: PyTorch's files


def torch_state(folder: Path) -> dict[str, Any]:
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file

    assert torch
    return load_file(folder / "model.safetensors")


def torch_folder(folder: Path, **files: dict[str, Any]) -> Path:
    """A config.json and PyTorch files, named as the keywords say with the last _ for a dot."""
    import torch

    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(raw_config("plain")))
    for name, state in files.items():
        torch.save(state, folder / ".".join(name.rsplit("_", 1)))
    return folder


@pytest.mark.torch
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_torch_files(dtype, tmp_path):
    """Single, sharded, a lone .pt, and the format before torch 1.6: all load to the very same bits."""
    torch = pytest.importorskip("torch")
    hf = tiny_checkpoint(tmp_path / "hf", dtype=dtype)
    state = torch_state(hf)
    single = torch_folder(tmp_path / "single", pytorch_model_bin=state)
    lone = torch_folder(tmp_path / "lone", weights_pt={k: torch.nn.Parameter(v) for k, v in state.items()})
    negated = torch_folder(tmp_path / "negated", pytorch_model_bin={k: torch._neg_view(-v) for k, v in state.items()})
    strided = torch_folder(
        tmp_path / "strided", pytorch_model_bin={k: v.t().contiguous().t() for k, v in state.items()}
    )
    legacy = torch_folder(tmp_path / "legacy")
    torch.save(state, legacy / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    names = list(state)
    parts = {f"pytorch_model-0000{i + 1}-of-00002": names[i * 20 : i * 20 + 20] for i in range(2)}
    sharded = torch_folder(
        tmp_path / "sharded", **{f"{part}_bin": {k: state[k] for k in some} for part, some in parts.items()}
    )
    (sharded / "pytorch_model.bin.index.json").write_text(
        json.dumps({"weight_map": {k: f"{part}.bin" for part, some in parts.items() for k in some}})
    )
    wanted = open_checkpoint(hf).tensors
    for folder in (single, lone, negated, strided, legacy, sharded):
        checkpoint = open_checkpoint(folder)
        assert checkpoint.tensors.keys() == wanted.keys()
        for name, tensor in checkpoint.tensors.items():
            got = tensor.read()
            assert (got.dtype, got.shape) == (wanted[name].read().dtype, wanted[name].shape)
            assert got.tobytes() == wanted[name].read().tobytes()
    assert str(smollm3_jax.from_pretrained(sharded).embed.dtype) == dtype


class Runs:
    """Pickles to a call of os.system."""

    def __init__(self, command: str):
        self.command = command

    def __reduce__(self):
        return (os.system, (self.command,))


@pytest.mark.torch
@pytest.mark.parametrize("form", ["zip", "legacy", "plain_pickle"])
@pytest.mark.parametrize("name", ["pytorch_model.bin", "weights.pt"])
def test_pickle_that_runs_code_is_refused(form, name, tmp_path, refused):
    torch = pytest.importorskip("torch")
    folder, mark = torch_folder(tmp_path / "bad"), tmp_path / "mark"
    evil = Runs(f"touch {mark}")
    if form == "plain_pickle":
        (folder / name).write_bytes(pickle.dumps({EMBED: evil}))
    else:
        torch.save({EMBED: evil}, folder / name, _use_new_zipfile_serialization=form == "zip")
    refused(folder, str(folder / name), "cannot be read as a plain state dict", "as safetensors")
    assert not mark.exists()
    # The file is no dud: a reader that trusts it does run the command.
    torch.load(folder / name, weights_only=False) if form != "plain_pickle" else pickle.loads(
        (folder / name).read_bytes()
    )
    assert mark.exists()


@pytest.mark.torch
def test_wrong_torch_files(tmp_path, refused):
    torch = pytest.importorskip("torch")
    state = torch_state(tiny_checkpoint(tmp_path / "hf"))
    file = "pytorch_model.bin"
    good = torch_folder(tmp_path / "good", pytorch_model_bin=state)
    content = (good / file).read_bytes()
    for length in (0, 1, 100, len(content) // 2, len(content) - 1):
        (good / file).write_bytes(content[:length])
        refused(good, str(good / file), "cannot be read as a plain state dict")
    cases: list[tuple[Any, tuple[str, ...]]] = [
        ({"model": state}, ("not a flat dict of tensors", "model.state_dict()")),
        ([state[EMBED]], ("not a flat dict of tensors",)),
        (state[EMBED], ("not a flat dict of tensors",)),
        ({0: state[EMBED]}, ("not a flat dict of tensors",)),
        (state | {NORM: state[NORM].double()}, (f"tensor {NORM} is float64; supported are float32",)),
        (state | {NORM: state[NORM].to(torch.int8)}, (f"tensor {NORM} is int8",)),
        ({k: v for k, v in state.items() if k != NORM}, (f"1 missing: {NORM}",)),
        (state | {QUERY: state[QUERY].to_sparse()}, (QUERY,)),
        (state | {QUERY: state[QUERY].to("meta")}, (QUERY,)),
    ]
    for i, (content, fragments) in enumerate(cases):
        refused(torch_folder(tmp_path / f"bad{i}", pytorch_model_bin=content), *fragments)
    refused(torch_folder(tmp_path / "two", a_pt=state, b_bin=state), "a.pt, b.bin", "pytorch_model.bin.index.json")
    sharded = torch_folder(tmp_path / "sharded", pytorch_model_bin=state)
    for shard, fragment in (("gone.bin", "gone.bin is missing"), ("../pytorch_model.bin", "plain file name")):
        (sharded / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {EMBED: shard}}))
        refused(sharded, fragment)


@pytest.mark.torch
def test_foreign_safetensors_beside_torch_weights(tmp_path):
    """An adapter or a vision tower beside pytorch_model.bin does not hide it."""
    hf = tiny_checkpoint(tmp_path / "hf")
    folder = torch_folder(tmp_path / "both", pytorch_model_bin=torch_state(hf))
    (folder / "adapter_model.safetensors").write_bytes((hf / "model.safetensors").read_bytes())
    assert open_checkpoint(folder).tensors.keys() == open_checkpoint(hf).tensors.keys()


def test_torch_file_without_torch(tmp_path, capsys, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps(raw_config("plain")))
    (tmp_path / "pytorch_model.bin").write_bytes(b"whatever")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(SupportError, match=r"pip install '(torch|\.\[torch\])"):
        smollm3_jax.from_pretrained(tmp_path)
    assert main(["convert", str(tmp_path), str(tmp_path / "out")]) == 3
    assert "PyTorch files need torch: pip install" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_no_weights(tmp_path, refused):
    (tmp_path / "config.json").write_text(json.dumps(raw_config("plain")))
    refused(tmp_path, "holds no weights", "model.safetensors", "pytorch_model.bin")


# W22: tokenizer


def add_tokenizer(folder: Path, tokens: int) -> Path:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    tokenizer = Tokenizer(WordLevel({f"w{i}": i for i in range(tokens)}, unk_token="w0"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


GENERATE = ["generate", "--prompt", "w3 w4", "--max-new-tokens", "2", "--temperature", "0", "--model"]


def test_missing_tokenizer(tmp_path, capsys):
    """Text commands say so when they start; what needs no text works."""
    folder = tiny_checkpoint(tmp_path / "hf")
    capsys.readouterr()
    assert main([*GENERATE, str(folder)]) == 3
    out, err = capsys.readouterr()
    assert out == "" and "tokenizer.json" in err and "missing" in err and err.count("\n") == 1
    smollm3_jax.from_pretrained(folder)
    assert main(["inspect", str(folder)]) == 0
    assert "text files: none" in capsys.readouterr().out
    assert main(["convert", str(folder), str(tmp_path / "out")]) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"README.md", "config.json", "model.safetensors"}


@pytest.mark.slow
def test_missing_template(tmp_path, capsys):
    folder = add_tokenizer(tiny_checkpoint(tmp_path / "hf"), 160)
    assert main([*GENERATE, str(folder)]) == 0
    capsys.readouterr()
    assert main([*GENERATE, str(folder), "--chat"]) == 3
    out, err = capsys.readouterr()
    assert out == "" and "chat_template.jinja" in err and err.count("\n") == 1


def test_added_tokens_beyond_the_rows(tmp_path, capsys, caplog):
    """W22: a padding token that the model has no row for is in the way of nothing but itself."""
    from tokenizers import AddedToken, Tokenizer

    folder = add_tokenizer(tiny_checkpoint(tmp_path / "hf"), 160)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken("[PAD]", special=True)])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"pad_token": "[PAD]"}')
    assert tokenizer.token_to_id("[PAD]") == 160
    capsys.readouterr()
    for call in (["inspect", str(folder)], ["convert", str(folder), str(tmp_path / "out")], [*GENERATE, str(folder)]):
        caplog.clear()
        assert main(call) == 0
        assert "1 added tokens have no row in the model" in caplog.text
    capsys.readouterr()
    assert main([*GENERATE, str(tmp_path / "out"), "--prompt", "w3 [PAD]"]) == 2
    assert "the text holds '[PAD]', the token 160, which the model has no row for" in capsys.readouterr().err
    (folder / "text.jsonl").write_text('{"text": "w1 [PAD] w2"}\n')
    assert main(["perplexity", "--model", str(folder), "--text", str(folder / "text.jsonl")]) == 2
    tokenizer.add_tokens([f"x{i}" for i in range(1100)])
    tokenizer.save(str(folder / "tokenizer.json"))
    assert main(["inspect", str(folder)]) == 3
    assert "belongs to another model: its largest token id is 1260" in capsys.readouterr().err


@pytest.mark.parametrize("tokens", [161, 64])
@pytest.mark.parametrize("command", ["generate", "verify", "inspect", "convert"])
def test_tokenizer_of_another_model(command, tokens, tmp_path, capsys):
    """Wherever both are present, ids that mean something else are an error."""
    folder = add_tokenizer(tiny_checkpoint(tmp_path / "hf"), tokens)
    calls = {
        "generate": [*GENERATE, str(folder)],
        "verify": ["verify", str(folder), "--against", str(folder)],
        "inspect": ["inspect", str(folder)],
        "convert": ["convert", str(folder), str(tmp_path / "out")],
    }
    assert main(calls[command]) == 3
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert "tokenizer.json" in err and f"{tokens - 1}" in err and "vocab_size of config.json is 160" in err
    assert not (tmp_path / "out").exists()


def test_loading_with_a_tokenizer_of_another_model(tmp_path):
    folder = add_tokenizer(tiny_checkpoint(tmp_path / "hf"), 161)
    with pytest.raises(TokenizerError, match="belongs to another model"):
        smollm3_jax.from_pretrained(folder)


# Placement


@pytest.fixture(scope="module")
def biased(tmp_path_factory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("biased") / "hf", "all_biases")


@pytest.fixture(scope="module")
def mesh() -> Mesh:
    return Mesh(np.array(jax.devices()), ("data",))


def test_on_a_mesh(biased, mesh, tmp_path):
    """Every parameter is split along the model width; values, logits and what is saved are those of one device."""
    alone = smollm3_jax.from_pretrained(biased, stacked=True)
    model = smollm3_jax.from_pretrained(biased, mesh=mesh, stacked=True)
    split = 0
    for name, param in parameters(model).items():
        array, axes = param[...], param.get_metadata("axes")
        parts = {shard.data.shape for shard in array.addressable_shards}
        assert parts == {tuple(n // 8 if axis == "embed" else n for n, axis in zip(array.shape, axes, strict=True))}
        assert len({shard.device for shard in array.addressable_shards}) == 8, name
        split += "embed" in axes
        one = parameters(alone)[name][...]
        assert len(one.devices()) == 1
        np.testing.assert_array_equal(one, array)
    assert split == 13  # all but the biases of q, k, v, gate and up
    tokens = jnp.asarray(random_tokens({"vocab_size": 160}, 2, 16))
    (bounded,) = rounding.shaken(lambda model: model(tokens), alone)
    compute = jax.jit(type(model).__call__)
    assert (
        rounding.within(compute(model, tokens), bounded) <= 1 < rounding.within(compute(model, tokens[::-1]), bounded)
    )
    smollm3_jax.save_pretrained(model, tmp_path / "out")
    saved, original = open_checkpoint(tmp_path / "out").tensors, open_checkpoint(biased).tensors
    assert {k: t.read().tobytes() for k, t in saved.items()} == {k: t.read().tobytes() for k, t in original.items()}


def test_on_a_mesh_by_a_table_of_ones_own(biased):
    square = Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "model"))
    mixed = smollm3_jax.from_pretrained(biased, mesh=square, rules={"embed": "data", "mlp": "model"})
    assert {shard.data.shape for shard in mixed.layers[0].gate[...].addressable_shards} == {(24, 32)}


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        ({"embed": "tensor"}, "embed -> tensor names no axis of the mesh"),
        ({"embed": "data", "mlp": "data"}, "embed and mlp both lie on the mesh axis data"),
        ("zero4", "the sharding strategy 'zero4' is unknown"),
    ],
)
def test_rules_that_do_not_fit_the_mesh(rules, words, biased, mesh):
    with pytest.raises(ShardingError, match=words):
        smollm3_jax.from_pretrained(biased, mesh=mesh, rules=rules)


def test_rules_without_a_mesh(biased):
    with pytest.raises(OptionError, match="rules 'fsdp' need a mesh"):
        smollm3_jax.from_pretrained(biased, rules="fsdp")


def test_a_length_that_the_mesh_does_not_divide(mesh, tmp_path):
    raw = raw_config("plain") | {"hidden_size": 36, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 6}
    odd = write_checkpoint(tmp_path / "odd", raw, random_tensors(raw))
    with pytest.raises(ShardingError, match="embed: embed has length 36, which 8 devices do not divide evenly"):
        smollm3_jax.from_pretrained(odd, mesh=mesh)


PEAK = """
import json, re, sys, threading, time
import jax
jax.config.update("jax_num_cpu_devices", 8)
import smollm3_jax
from sharding.mesh import make_mesh

def anonymous():
    return 1024 * int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1])

peak, done = 0, threading.Event()

def watch():
    global peak
    while not done.is_set():
        peak = max(peak, anonymous())
        time.sleep(0.001)

jax.device_put(0.0).block_until_ready()
before = anonymous()
watcher = threading.Thread(target=watch)
watcher.start()
model = smollm3_jax.from_pretrained(sys.argv[1], mesh=make_mesh({"fsdp": 8}), rules="fsdp")
jax.block_until_ready(model)
done.set()
watcher.join()
sizes = [x.nbytes for x in jax.tree.leaves(model)]
print(json.dumps({"held": anonymous() - before, "peak": peak - before, "all": sum(sizes), "largest": max(sizes)}))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_loading_onto_a_mesh_holds_one_whole_tensor_at_most(tmp_path):
    raw = raw_config("plain") | {"hidden_size": 512, "intermediate_size": 4096, "head_dim": 64, "vocab_size": 16384}
    folder = write_checkpoint(tmp_path, raw, random_tensors(raw))
    run = python(PEAK, folder)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    assert found["all"] > 4 * found["largest"]
    assert found["peak"] <= found["all"] + found["largest"] + 2**24, found
