"""Perplexity: the numbers are those of the whole forward pass, computed token by token from the cache."""

import gzip
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rounding
from proxies import FULL
from tiny import talking_checkpoint

import smollm3_jax as s3
from smollm3_jax.commands.main import main
from smollm3_jax.errors import OptionError
from smollm3_jax.evaluate import perplexity as module
from smollm3_jax.evaluate.perplexity import perplexity, read_documents
from smollm3_jax.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def talking(tmp_path_factory) -> Path:
    return talking_checkpoint(tmp_path_factory.mktemp("perplexity") / "talking")


@pytest.fixture(scope="module")
def model(talking) -> s3.SmolLM3:
    return s3.from_pretrained(talking, "float32")


@pytest.fixture(scope="module")
def tokenizer(talking, model):
    return load_tokenizer(talking, model.config)


def write(path: Path, *lines) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def test_it_is_the_whole_forward_pass(model, monkeypatch):
    monkeypatch.setattr(module, "ROWS", 2)  # the three documents take two rounds
    random = np.random.RandomState(0)
    documents = {"en": [random.randint(0, 160, length).tolist() for length in (40, 5)], "fr": [[7, 8]], "de": []}
    report = perplexity(model, documents)

    def means(model):
        """Nats per token of all documents, and of the last."""
        nats = []
        for document in (*documents["en"], *documents["fr"]):
            logits = jax.nn.log_softmax(model(jnp.array([document]))[0])
            nats += [-float(logits[i, token]) for i, token in enumerate(document[1:])]
        assert report["tokens"] == len(nats) == 39 + 4 + 1
        return np.mean(nats), nats[-1]

    bounded = rounding.shaken(means, model)
    found = report["nats_per_token"], report["languages"]["fr"]["nats_per_token"]
    assert max(rounding.worst(found, bounded)) <= 1 and min(rounding.worst(found, bounded[::-1])) > 1
    assert report["perplexity"] == np.exp(report["nats_per_token"])
    assert report["languages"]["de"]["tokens"] == 0
    assert (report["documents"], report["longest"], report["rows"]) == (3, 40, 2)


@pytest.mark.parametrize("options", [("--mesh", "data=8", "--rules", "dp"), ("--mesh", "data=4,tensor=2")])
def test_rows_that_a_mesh_does_not_divide(talking, model, tmp_path, capsys, options):
    text = write(tmp_path / "text.jsonl", *({"text": f"w{i} w6 w7 w8"} for i in range(3)))
    common = ["perplexity", str(talking), "--text", str(text), "--json"]
    found = []
    for words in ([], options):
        assert main([*common, *words]) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert (found[0]["rows"], found[1]["rows"]) == (3, 8 if "dp" in options else 4)
    documents = {"": [[i, 6, 7, 8] for i in range(3)]}
    bounded = rounding.shaken(lambda model: perplexity(model, documents)["nats_per_token"], model) * 2
    nats = [report["nats_per_token"] for report in found]
    assert max(rounding.worst(nats, bounded)) <= 1
    # With a row that fills the mesh up counted among them, or one left out, it is another number.
    for others in ([*documents[""], documents[""][0]], documents[""][:2]):
        assert rounding.within(perplexity(model, {"": others})["nats_per_token"], bounded[0]) > 1


def test_command(talking, tmp_path, capsys):
    text = write(tmp_path / "text.jsonl", {"text": "w5 w6 w7 w8", "language": "en"}, {"text": "w9 w10 w11 w12 w13"})
    options = ["perplexity", "--model", str(talking), "--text", str(text), "--weights", "int8", "--cache", "int8"]
    options += ["--length", "4", "--max-tokens", "7"]
    assert main([*options, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["tokens"] == 3 + 2 and report["languages"].keys() == {"en", ""}
    assert report["perplexity"] == pytest.approx(np.exp(report["nats_per_token"]))
    wanted = {"weights": "int8", "cache": "int8", "kernel": "integer", "activations": "int8 with an int8 remainder"}
    assert {key: report[key] for key in wanted} == wanted
    assert main(options) == 0
    out = capsys.readouterr().out
    assert "weights int8, activations int8 with an int8 remainder, cache int8" in out and "2 documents" in out


def test_languages_take_turns(tokenizer, tmp_path):
    lines = [{"text": f"w{i} w{i} w{i}", "language": language} for language in ("en", "fr") for i in range(5, 9)]
    got = read_documents(write(tmp_path / "text.jsonl", *lines, {"text": "w5", "language": "de"}), tokenizer, 11, 3)
    assert got == {"en": [[5, 5, 5], [6, 6, 6]], "fr": [[5, 5, 5], [6, 6]], "de": []}


def test_texts_that_are_none(tokenizer, tmp_path):
    def refuse(words: str, *lines, max_tokens: int = 100, length: int = 10) -> None:
        with pytest.raises(OptionError, match=words):
            read_documents(write(tmp_path / "bad.jsonl", *lines), tokenizer, max_tokens, length)

    fine = {"text": "w5 w6"}
    refuse("bad.jsonl: line 2 is no JSON object", fine, "{")
    refuse("bad.jsonl: line 2 .* KeyError.* it has content", fine, {"content": "w5"})
    refuse("bad.jsonl: line 1 .* must be strings", {"text": 5})
    refuse("bad.jsonl: line 1", [1])
    refuse("holds no text of two tokens", {"text": "w5"})
    refuse("holds no text")
    refuse("length 1", fine, length=1)
    refuse("max_tokens -3", fine, max_tokens=-3)
    with pytest.raises(OptionError, match=r"none\.jsonl cannot be read: No such file"):
        read_documents(tmp_path / "none.jsonl", tokenizer, 10, 10)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_files_as_people_have_them(tokenizer, tmp_path, encoding):
    lines = [json.dumps({"text": f"w{i} w7"}) for i in (5, 6)]
    lines[1] = "\ufeff" * (encoding != "utf-8") + lines[1]  # as joined files have it
    for name, pack in (("a.jsonl", bytes), ("a.jsonl.gz", gzip.compress)):
        (tmp_path / name).write_bytes(pack("\r\n\r\n \r\n".join(["", *lines, ""]).encode(encoding)))
        assert read_documents(tmp_path / name, tokenizer, 100, 10) == {"": [[5, 7], [6, 7]]}


def test_half_a_surrogate_pair_is_skipped_and_counted(talking, tmp_path, capsys):
    """T8."""
    lines = ['{"text": "w5 w6"}', '{"text": "w5 \\ud800"}', '{"text": "w5 w7", "language": "\\udfff"}']
    text = str(write(tmp_path / "text.jsonl", *lines))
    assert main(["perplexity", "--model", str(talking), "--text", text, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["documents"], report["skipped"]) == (1, 2)
    assert main(["perplexity", "--model", str(talking), "--text", text]) == 0
    assert "bad records skipped: 2" in capsys.readouterr().out


@pytest.fixture(scope="module")
def real(demo_folder, corpus, tmp_path_factory):
    """Two documents of each language."""
    lines = []
    for language in ("en", "fr", "es", "de", "it", "pt"):
        with (corpus / f"{language}.jsonl").open() as file:
            lines += [json.loads(next(file)) for _ in range(2)]
    path = write(tmp_path_factory.mktemp("text") / "text.jsonl", *lines)
    return read_documents(path, load_tokenizer(demo_folder, s3.ModelConfig.from_hf(demo_folder)), 12 * 128, 128)


@FULL
@pytest.mark.slow
@pytest.mark.usefixtures("programs_as_users_run_them")
def test_int8_costs_the_demo_little(demo_folder, real):
    """Less than a hundredth over thousands of tokens, as the README has it; this many leave half of one to chance."""
    reference = perplexity(s3.from_pretrained(demo_folder), real)["perplexity"]
    report = perplexity(s3.from_pretrained(demo_folder, weights="int8"), real)
    assert report["kernel"] == "integer"
    assert report["perplexity"] <= 1.015 * reference


@FULL
@pytest.mark.slow
@pytest.mark.usefixtures("programs_as_users_run_them")
def test_int4_off_the_grid_is_no_worse_than_q4_1(demo_folder, real, tmp_path):
    """The demo's weights are on Q4_1's grid; with three hundredths of noise they are not."""
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize, quantize

    from smollm3_jax.weights.load import Checkpoint, load, open_checkpoint
    from smollm3_jax.weights.quantized import dequantize_tensors, quantize_tensors, with_scheme

    checkpoint = open_checkpoint(demo_folder)
    random = np.random.RandomState(0)

    def off_grid(tensor):
        noise = 1 + 0.03 * random.standard_normal(tensor.shape).astype(np.float32)
        array = tensor.read().astype(np.float32) * noise
        return type(tensor)(tensor.name, "float32", tensor.shape, tensor.file, lambda: array)

    tensors = {
        name: off_grid(tensor) if name.endswith("proj.weight") else tensor
        for name, tensor in checkpoint.tensors.items()
    }

    def q4_1(tensor):
        kind = GGMLQuantizationType.Q4_1
        return type(tensor)(
            *(tensor.name, "float32", tensor.shape, tensor.file),
            lambda: dequantize(quantize(tensor.read(), kind), kind),
        )

    def run(some) -> float:
        parts = (checkpoint.generation_config, some, checkpoint.files)
        return perplexity(load(Checkpoint(checkpoint.config, *parts), "bfloat16"), real)["perplexity"]

    config = with_scheme(checkpoint.config, "int4")
    _, ours = dequantize_tensors(config, quantize_tensors(config, tensors))
    for name, tensor in tensors.items():
        if not name.endswith("proj.weight"):
            ours[name] = tensor  # the embedding is no part of the comparison
    theirs = {n: q4_1(t) if n.endswith("proj.weight") else t for n, t in tensors.items()}
    assert run(ours) <= run(theirs)
