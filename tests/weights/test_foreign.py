"""Folders and files that are something else than a model: each is named, with the way out, and nothing is unpickled."""

import json
import os
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from proxies import FULL
from refusal import refusal
from safetensors.numpy import save_file
from tiny import random_tensors, raw_config, tiny_checkpoint, write_checkpoint

from smollm3_jax.commands.main import main
from smollm3_jax.errors import SmolLM3Error
from smollm3_jax.weights.load import open_checkpoint

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 6150230128\n"
PAGE = b"\n<!DOCTYPE html>\n<html><body>404</body></html>"


def adapter(folder: Path) -> None:
    lora = {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": np.ones((4, 64), np.float32)}
    save_file(lora, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": "org/base", "peft_type": "LORA"})
    )


def adapter_with_config(folder: Path) -> None:
    adapter(folder)
    (folder / "config.json").write_text(json.dumps(raw_config("plain")))


def torch_adapter_with_config(folder: Path) -> None:
    adapter_with_config(folder)
    (folder / "adapter_model.safetensors").unlink()


def torch_adapter_with_its_weights(folder: Path) -> None:
    torch_adapter_with_config(folder)
    (folder / "adapter_model.bin").write_bytes(b"PK")


def gguf_below(folder: Path) -> None:
    (folder / "Q4").mkdir()
    (folder / "Q4" / "a.GGUF").write_bytes(b"GGUF")


def only_gguf(folder: Path) -> None:
    for name in ("b.Q8_0.gguf", "a.Q4_0.gguf"):
        (folder / name).write_bytes(b"GGUF")


def gguf_with_config(folder: Path) -> None:
    (folder / "a.gguf").write_bytes(b"GGUF")
    (folder / "config.json").write_text(json.dumps(raw_config("plain")))


def mlx(folder: Path) -> None:
    raw = raw_config("plain") | {"quantization": {"group_size": 64, "bits": 4}}
    tensors = random_tensors(raw_config("plain"))
    name = "model.layers.0.self_attn.q_proj"
    tensors |= {f"{name}.weight": np.ones((64, 8), np.uint32), f"{name}.scales": np.ones((64, 1), np.float32)}
    write_checkpoint(folder, raw, tensors)


def mlx_without_a_word(folder: Path) -> None:
    mlx(folder)
    (folder / "config.json").write_text(json.dumps(raw_config("plain")))


def checkpoints(folder: Path) -> None:
    for step in (500, 1000):
        tiny_checkpoint(folder / f"checkpoint-{step}")


def cache(folder: Path) -> None:
    tiny_checkpoint(folder / "snapshots" / "abc")


def quantized(folder: Path) -> None:
    raw = raw_config("plain") | {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    write_checkpoint(folder, raw, random_tensors(raw_config("plain")))


FOLDERS: dict[Callable[[Path], None], tuple[str, ...]] = {
    adapter: ("adapter_config.json", "r must be a number above 0"),
    adapter_with_config: ("adapter_config.json", "r must be a number above 0"),
    torch_adapter_with_config: ("has no adapter_model.safetensors", "save_pretrained"),
    torch_adapter_with_its_weights: ("has no adapter_model.safetensors", "save_pretrained"),
    gguf_below: ("holds GGUF files", "Q4/a.GGUF"),
    only_gguf: ("holds GGUF files", "give the file", "a.Q4_0.gguf, or another of the 2"),
    gguf_with_config: ("holds no weights", "give the file", "a.gguf"),
    mlx: ("MLX has quantized", "--dequantize"),
    mlx_without_a_word: ("is U32", "quantized by another program"),
    checkpoints: ("config.json is missing", "checkpoint-1000, or another of the 2"),
    cache: ("config.json is missing", "snapshots/abc"),
    quantized: ("quant_method is 'gptq'", "plain weights"),
}


def run(folder: Path) -> None:
    (folder / "settings.json").write_text("{}")
    (folder / "checkpoints").mkdir()


def onnx(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(raw_config("plain")))
    (folder / "model.onnx").touch()


FOLDERS |= {run: ("a training run's", "smollm3 export"), onnx: ("holds no weights", "model.onnx, which cannot be read")}


@pytest.mark.parametrize("make", FOLDERS, ids=lambda make: make.__name__)
def test_a_folder_that_is_no_model(make, tmp_path, capsys):
    folder = tmp_path / "m"
    folder.mkdir()
    make(folder)
    message = refusal(capsys, folder)
    assert all(word in message for word in FOLDERS[make]), message
    with pytest.raises(SmolLM3Error):
        open_checkpoint(folder)


def test_a_hostile_adapter_config(tmp_path, capsys):
    adapter(tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "\\u001b[31m' + "x" * 9999 + '"}')
    message = refusal(capsys, tmp_path)
    assert "\x1b" not in message and len(message) < 1000
    (tmp_path / "adapter_config.json").write_bytes(b"\xff")
    assert "adapter_config.json" in refusal(capsys, tmp_path)


# Files


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "pytorch_model.bin", "weights.pt", "m.gguf"])
@pytest.mark.parametrize(
    ("content", "words"), [(POINTER, "git-LFS pointer"), (PAGE, "a web page")], ids=["lfs", "page"]
)
def test_a_pointer_or_a_page(name, content, words, tmp_path, capsys):
    """W1, W20: none reaches torch, whose advice would be to unpickle it without a guard."""
    folder = tiny_checkpoint(tmp_path / "m")
    if name != "config.json":
        (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(content)
    message = refusal(capsys, folder / name if name == "m.gguf" else folder)
    assert name in message and words in message and "weights_only" not in message
    assert content is PAGE or ("of 6,150,230,128 bytes" in message and "git lfs pull" in message)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_what_never_ends_is_not_read(name, kind, tmp_path, capsys):
    folder = tiny_checkpoint(tmp_path / "m")
    if name != "config.json":
        (folder / "model.safetensors").unlink()
    else:
        (folder / name).unlink()
    os.mkfifo(folder / name) if kind == "pipe" else (folder / name).symlink_to("/dev/zero")
    message = refusal(capsys, folder)
    assert name in message and ("no regular file" in message or "no file" in message)


@pytest.mark.parametrize("name", ["tokenizer.model", "chat_template.jinja", "LICENSE", "model.safetensors.index.json"])
def test_a_text_without_end_is_not_read(name, tmp_path, capsys):
    folder = tiny_checkpoint(tmp_path / "m")
    if name.endswith(".index.json"):
        (folder / "model.safetensors").unlink()
    (folder / name).touch()
    os.truncate(folder / name, 1 << 40)
    assert f"{name} " in (error := refusal(capsys, folder)) and "it is larger than" in error


def test_a_link_that_leads_nowhere_is_no_absent_file(tmp_path, capsys):
    folder = tiny_checkpoint(tmp_path / "m")
    (folder / "generation_config.json").symlink_to("../../blobs/0")
    assert "generation_config.json is missing: a link of that name" in refusal(capsys, folder)
    (folder / "generation_config.json").unlink()
    (folder / "merges.txt").symlink_to("../../blobs/0")
    assert main(["convert", str(folder), str(tmp_path / "out")]) == 3
    assert "merges.txt is a link that leads nowhere" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_shard_that_is_a_pointer(tmp_path, capsys):
    folder = tiny_checkpoint(tmp_path / "m")
    tensors = random_tensors(raw_config("plain"))
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    (folder / "b.safetensors").write_bytes(POINTER)
    weight_map = {"weight_map": {name: "a.safetensors" for name in tensors} | {"model.norm.weight": "b.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(weight_map))
    message = refusal(capsys, folder)
    assert "b.safetensors is no safetensors file: it is a git-LFS pointer" in message
    (folder / "model.safetensors.index.json").write_bytes(POINTER)
    assert "index.json has no readable weight_map: it is a git-LFS pointer" in refusal(capsys, folder)


def test_weights_under_a_wrong_name(tmp_path, capsys):
    folder = tiny_checkpoint(tmp_path / "m")
    safe = folder / "model.safetensors"
    content = safe.read_bytes()
    safe.write_bytes(b"GGUF" + content)
    assert "it is a GGUF file: let its name end in .gguf" in refusal(capsys, folder)
    safe.write_bytes(b"PK\3\4" + content)
    assert "it is a zip archive, as PyTorch writes" in refusal(capsys, folder)
    safe.unlink()
    (folder / "pytorch_model.bin").write_bytes(content)
    assert "it is a safetensors file: let its name end in .safetensors" in refusal(capsys, folder)
    (folder / "m.gguf").write_bytes(content)
    assert "no GGUF file: it is a safetensors file" in refusal(capsys, folder / "m.gguf")


def test_a_pointer_for_a_tokenizer_or_for_lines(tmp_path, capsys):
    from tiny import talking_checkpoint

    folder = talking_checkpoint(tmp_path / "m")
    lines = tmp_path / "lines.jsonl"
    lines.write_bytes(POINTER)
    calls = [
        ["perplexity", "--model", str(folder), "--text", str(lines)],
        ["generate", "--model", str(folder), "--input", str(lines), "--output", str(tmp_path / "out.jsonl")],
        ["tokenize", str(lines), str(tmp_path / "out"), "--model", str(folder)],
    ]
    for call in calls:
        assert main(call) in (2, 3)
        out, err = capsys.readouterr()
        assert out == "" and "lines.jsonl" in err and "git lfs pull" in err and err.count("\n") == 1
    (folder / "tokenizer.json").write_bytes(POINTER)
    assert "tokenizer.json cannot be read as a tokenizer (it is a git-LFS pointer" in refusal(capsys, folder)


def gguf(path: Path, keys: dict[str, str], tensors: tuple[str, ...] = ()) -> Path:
    def text(string: str) -> bytes:
        return struct.pack("<Q", len(string)) + string.encode()

    out = b"GGUF" + struct.pack("<I2Q", 3, len(tensors), len(keys))
    out += b"".join(text(key) + struct.pack("<I", 8) + text(value) for key, value in keys.items())
    out += b"".join(text(name) + struct.pack("<IQIQ", 1, 8, 0, 32 * i) for i, name in enumerate(tensors))
    path.write_bytes(out + bytes(-len(out) % 32 + 32 * len(tensors)))
    return path


LLAMA = {"general.architecture": "llama"}


@pytest.mark.parametrize(
    ("keys", "tensors", "words"),
    [
        (LLAMA | {"general.type": "adapter", "adapter.type": "lora"}, (), ("an adapter (LoRA)", "llama-export-lora")),
        (LLAMA | {"adapter.type": "lora"}, (), ("an adapter (LoRA)",)),
        (LLAMA, ("blk.0.attn_q.weight.lora_a",), ("adapter (LoRA)",)),
        ({"general.type": "imatrix"}, ("blk.0.attn_q.weight.in_sum2",), ("'imatrix'", "llama-imatrix", "model's own")),
        (LLAMA, ("blk.0.attn_q.weight.in_sum2",), ("llama-imatrix measured",)),
        ({"general.architecture": "clip", "general.type": "mmproj"}, (), ("'mmproj'", "sees or hears")),
        (LLAMA | {"general.type": "vocab"}, (), ("a vocabulary without weights",)),
        (LLAMA | {"general.type": "\x1b[2J"}, (), ("general.type is '\\x1b[2J'",)),
        ({"general.architecture": "\x1b[2J"}, (), ("its architecture is '\\x1b[2J'",)),
    ],
)
def test_a_gguf_file_that_is_no_model(keys, tensors, words, tmp_path, capsys):
    message = refusal(capsys, gguf(tmp_path / "m.gguf", keys, tensors))
    assert all(word in message for word in words), message


# PyTorch's files


@pytest.mark.torch
def test_a_small_torch_file_that_claims_much(tmp_path, capsys):
    """W9, W20: a view that repeats one number claims 549 GB, in whatever tensor, and no such memory is asked for."""
    torch = pytest.importorskip("torch")
    folder = tiny_checkpoint(tmp_path / "m")
    (folder / "model.safetensors").unlink()
    state = {name: torch.from_numpy(array) for name, array in random_tensors(raw_config("plain")).items()}
    state["model.norm.weight"] = torch.ones(1).expand(137_000_000_000)
    torch.save(state, folder / "pytorch_model.bin")
    assert "model.norm.weight claims 548,000,000,000 bytes where the file has 4" in refusal(capsys, folder)
    state["model.norm.weight"] = torch.ones(1).expand(64)  # as the config has it
    torch.save(state, folder / "pytorch_model.bin")
    assert "model.norm.weight claims 256 bytes where the file has 4" in refusal(capsys, folder)
    for zipped in (True, False):
        path = folder / "pytorch_model.bin"
        torch.save({"a": torch.ones(1000)}, path, _use_new_zipfile_serialization=zipped)
        content = path.read_bytes()
        patched = content.replace(b"M\xe8\x03", b"\x8a\x05\x00\x00\x00\xe8\x1f")  # the storage's count: 1000 -> 137e9
        assert patched != content
        path.write_bytes(patched)
        started = time.monotonic()
        assert "cannot be read as a plain state dict" in refusal(capsys, folder)
        assert time.monotonic() - started < 5


@pytest.mark.torch
def test_a_compressed_torch_file(tmp_path, capsys):
    """Mapped, its compressed bytes would pass for numbers."""
    torch = pytest.importorskip("torch")
    import zipfile

    folder = tiny_checkpoint(tmp_path / "m")
    (folder / "model.safetensors").unlink()
    torch.save({k: torch.from_numpy(v) for k, v in random_tensors(raw_config("plain")).items()}, tmp_path / "a.bin")
    with (
        zipfile.ZipFile(tmp_path / "a.bin") as old,
        zipfile.ZipFile(folder / "pytorch_model.bin", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for name in old.namelist():
            new.writestr(name, old.read(name))
    assert "cannot be read as a plain state dict" in refusal(capsys, folder)


# Names


def header(path: Path, names: list[str]) -> None:
    """A safetensors file of empty tensors with these names, one for each as often as it stands there."""
    entry = '{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    text = ("{" + ",".join(f"{json.dumps(name)}:{entry}" for name in names) + "}").encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)


MANY = [f"model.layers.{i}.x.weight" for i in range(40_000)]


@pytest.mark.parametrize("names", [[*MANY, MANY[-1]], [*MANY, MANY[0]], MANY], ids=["last", "first", "none"])
@pytest.mark.parametrize("where", ["header", "index", "torch_index", "gguf"])
def test_many_names_take_little_time(names, where, tmp_path, capsys):
    """W4, W16: what a duplicate among many names takes is linear in their number."""
    folder = tiny_checkpoint(tmp_path / "m")
    path = folder
    if where == "header":
        header(folder / "model.safetensors", names)
    elif where == "gguf":
        path = gguf(folder / "m.gguf", LLAMA, tuple(names))
    else:
        (folder / "model.safetensors").rename(folder / "a.safetensors")
        index = "pytorch_model.bin.index.json" if where == "torch_index" else "model.safetensors.index.json"
        pairs = ",".join(f'{json.dumps(name)}:"a.safetensors"' for name in names)
        (folder / index).write_text(f'{{"weight_map":{{{pairs}}}}}')
    started = time.monotonic()
    message = refusal(capsys, path)
    assert time.monotonic() - started < 10  # against 16 s to 58 s where each name was looked for among all
    assert len(message) < 5000
    assert names is MANY or where == "torch_index" or "occurs twice" in message


HOSTILE = "model.\x1b]0;x\x07[/red]\nsmollm3: fine\u202e.weight"


def torch_file(folder: Path) -> None:
    torch = pytest.importorskip("torch")
    (folder / "model.safetensors").unlink()
    torch.save({HOSTILE: torch.ones(2)}, folder / "pytorch_model.bin")


def torch_dtype(folder: Path) -> None:
    torch = pytest.importorskip("torch")
    (folder / "model.safetensors").unlink()
    torch.save({HOSTILE: torch.ones(2, dtype=torch.int64)}, folder / "pytorch_model.bin")


def index(weight_map: dict[str, str]) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "a.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    return make


NAMED: dict[str, Callable[[Path], object]] = {
    "unknown": lambda folder: save_file({HOSTILE: np.ones(2, np.float32)}, folder / "model.safetensors"),
    "dtype": lambda folder: save_file({HOSTILE: np.ones(2, np.int64)}, folder / "model.safetensors"),
    "twice": lambda folder: header(folder / "model.safetensors", [HOSTILE, HOSTILE]),
    "long": lambda folder: header(folder / "model.safetensors", ["\x1b" + "x" * 10**6] * 2),
    "listed": index({HOSTILE: "a.safetensors"}),
    "shard": index({"a": HOSTILE.replace("/", "")}),
    "path": index({HOSTILE: "../\x1b"}),
    "torch": torch_file,
    "torch_dtype": torch_dtype,
    "architecture": lambda folder: (folder / "config.json").write_text(json.dumps({"model_type": HOSTILE})),
    "activation": lambda folder: (folder / "config.json").write_text(
        json.dumps(raw_config("plain") | {"hidden_act": HOSTILE * 1000})
    ),
}


@pytest.mark.parametrize("case", NAMED)
def test_foreign_names_do_nothing_to_a_terminal(case, tmp_path, capsys):
    folder = tiny_checkpoint(tmp_path / "m")
    NAMED[case](folder)
    message = refusal(capsys, folder)  # which is one line
    assert not set(message[:-1]) & set("\x1b\x07\u202e\n") and len(message) < 5000
    with pytest.raises(SmolLM3Error) as error:
        open_checkpoint(folder)
    assert not set(str(error.value)) & set("\x1b\x07\u202e")


def test_a_folder_with_a_foreign_name(tmp_path, capsys):
    folder = tmp_path / "m\x1b[31m\nsmollm3: fine"
    folder.mkdir()
    assert "\x1b" not in refusal(capsys, folder)


# The same commands read a file


@FULL
@pytest.mark.torch
def test_every_command_reads_torch_files_and_a_file_of_weights(tmp_path, capsys):
    from tiny import talking_checkpoint

    safe, old = talking_checkpoint(tmp_path / "hf"), tmp_path / "torch"
    assert main(["convert", str(safe), str(old), "--format", "torch"]) == 0
    (tmp_path / "text.jsonl").write_text('{"text": "w3 w4 w5 w6"}\n')
    generate = ["generate", "--prompt", "w3 w4", "--max-new-tokens", "4", "--temperature", "0", "--model"]
    calls = [
        generate,
        ["inspect", "--json"],
        ["perplexity", "--text", str(tmp_path / "text.jsonl"), "--model"],
        ["verify", "--against", str(safe)],
        ["plan", "memory", "--model"],
    ]
    for call in calls:
        answers = set()
        for path in (old, old / "pytorch_model.bin", safe / "model.safetensors"):
            capsys.readouterr()
            code = main([*call, str(path)])
            out, err = capsys.readouterr()
            assert code == 0, err
            answers.add(out if call is generate else code)
        assert len(answers) == 1
    shutil.rmtree(old)
    assert (
        subprocess.run([sys.executable, "-c", "import smollm3_jax, sys; sys.exit('torch' in sys.modules)"]).returncode
        == 0
    )
