import json
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
from tiny import raw_config, tiny_checkpoint
from tokenizers import models, pre_tokenizers

from smollm3_jax.cli import main


@pytest.fixture(scope="module")
def talking(tmp_path_factory) -> Path:
    """A tiny model of one layer, with a tokenizer of 160 words, w0 to w159, and a chat template."""
    folder = tiny_checkpoint(tmp_path_factory.mktemp("cli") / "talking", "one_layer")
    tokenizer = tokenizers.Tokenizer(models.WordLevel({f"w{i}": i for i in range(160)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text("{{ 'w9' if enable_thinking else 'w8' }} {{ messages[0].content }}")
    return folder


def answer(capsys, *arguments) -> dict:
    assert main(["generate", "--json", *map(str, arguments)]) == 0
    return json.loads(capsys.readouterr().out)


def test_generate_prints_one_object(talking, capsys):
    got = answer(capsys, "--model", talking, "--prompt", "w5 w6", "--max-new-tokens", 5)
    assert got.keys() == {"text", "token_ids", "prompt_token_ids", "finish_reason"}
    assert got["prompt_token_ids"] == [5, 6] and len(got["token_ids"]) == 5
    assert got["text"] == " ".join(f"w{i}" for i in got["token_ids"])
    assert got["finish_reason"] == "length"


def test_generate_says_when_it_stopped(talking, capsys, tmp_path):
    first = answer(capsys, "--model", talking, "--prompt", "w5 w6", "--max-new-tokens", 5)["token_ids"]
    stop = talking / "generation_config.json"
    stop.write_text(json.dumps({"eos_token_id": [159, first[2]]}))
    try:
        got = answer(capsys, "--model", talking, "--prompt", "w5 w6", "--max-new-tokens", 5)
    finally:
        stop.unlink()
    assert got["finish_reason"] == "stop" and got["token_ids"] == first[: first.index(first[2]) + 1]


def test_sampling_defaults_come_from_the_model_and_options_win(talking, capsys):
    common = ("--model", talking, "--prompt", "w5", "--max-new-tokens", 12)
    greedy = answer(capsys, *common)["token_ids"]
    settings = talking / "generation_config.json"
    settings.write_text('{"do_sample": true, "temperature": 3.0}')
    try:
        assert answer(capsys, *common)["token_ids"] != greedy
        assert answer(capsys, *common, "--temperature", 0)["token_ids"] == greedy
        assert answer(capsys, *common, "--top-k", 1)["token_ids"] == greedy
        assert answer(capsys, *common, "--seed", 1)["token_ids"] != answer(capsys, *common)["token_ids"]
    finally:
        settings.unlink()


def test_chat_applies_the_template(talking, capsys):
    common = ("--model", talking, "--prompt", "w5", "--max-new-tokens", 2, "--chat")
    assert answer(capsys, *common)["prompt_token_ids"] == [9, 5]
    assert answer(capsys, *common, "--no-think")["prompt_token_ids"] == [8, 5]


def test_text_is_all_that_is_printed(talking, capsys):
    assert main(["generate", "--model", str(talking), "--prompt", "w5", "--max-new-tokens", "3"]) == 0
    assert len(capsys.readouterr().out.split()) == 3


def test_inspect(talking, capsys):
    assert main(["inspect", str(talking), "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    sizes = [tensor["bytes"] for tensor in summary["tensors"]]
    assert summary["bytes"] == sum(sizes) == 4 * summary["parameters"]
    assert summary["config"]["rope_theta"] == raw_config("plain")["rope_theta"]
    assert {tensor["name"] for tensor in summary["tensors"]} >= {"model.norm.weight", "model.embed_tokens.weight"}
    assert main(["inspect", str(talking)]) == 0
    assert f"{summary['parameters']:,} parameters" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--temperature", "-1"], 2, "temperature is -1.0"),
        (["--top-p", "2"], 2, "top_p is 2.0"),
        (["--max-new-tokens", "0"], 2, "max_new_tokens is 0"),
        (["--max-new-tokens", "511"], 2, "context of 512"),
        (["--no-think"], 2, "--chat"),
        (["--prompt", ""], 2, "no tokens"),
        (["--model", "/nowhere/to/be"], 3, "/nowhere/to/be"),
    ],
)
def test_mistakes_are_one_line_and_a_code(talking, capsys, arguments, code, words):
    assert main(["generate", "--model", str(talking), "--prompt", "w5 w6", *arguments]) == code
    out, err = capsys.readouterr()
    assert out == "" and words in err and len(err.splitlines()) == 1


def test_chat_without_a_template(talking, capsys):
    template = talking / "chat_template.jinja"
    text = template.read_text()
    template.unlink()
    try:
        assert main(["generate", "--model", str(talking), "--prompt", "w5", "--chat"]) == 3
    finally:
        template.write_text(text)
    assert "no chat template" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["fly"], ["convert", "a"], ["convert", "a", "b", "--dtype", "int3"]])
def test_usage_errors_exit_2(arguments, capsys):
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    assert exit.value.code == 2
    assert "usage: smollm3" in capsys.readouterr().err


def test_a_reader_that_leaves_is_no_error(talking):
    """As `smollm3 inspect DIR --json | head -0`: the pipe is closed before anything is written."""
    code = "import sys; from smollm3_jax.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "inspect", str(talking), "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout and process.stderr
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait() == 0
    process.stderr.close()
