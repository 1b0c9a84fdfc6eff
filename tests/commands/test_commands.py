import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
import rounding
from proxies import FULL
from tiny import letters_checkpoint, raw_config, talking_checkpoint

import smollm3_jax as s3
from smollm3_jax.commands.main import main


@pytest.fixture(scope="module")
def talking(tmp_path_factory) -> Path:
    return talking_checkpoint(tmp_path_factory.mktemp("cli") / "talking")


def answer(capsys, *arguments) -> dict:
    assert main(["generate", "--json", *map(str, arguments)]) == 0
    return json.loads(capsys.readouterr().out)


def test_generate_prints_one_object(talking, capsys):
    got = answer(capsys, "--model", talking, "--prompt", "w5 w6", "--max-new-tokens", 5)
    assert got.keys() == {"text", "token_ids", "prompt_token_ids", "finish_reason"}
    assert got["prompt_token_ids"] == [5, 6] and len(got["token_ids"]) == 5
    assert got["text"] == "".join(f" w{i}" for i in got["token_ids"])  # as it goes on from the prompt
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
    common = ("--model", str(talking), "--prompt", "w5", "--max-new-tokens", "40", "--ignore-eos")
    assert main(["generate", *common]) == 0
    out, err = capsys.readouterr()
    assert out == answer(capsys, *common)["text"] + "\n" and err == ""
    assert len(out.split()) == 40


def test_text_comes_as_it_is_generated(talking, monkeypatch):
    seen = []

    class Terminal(io.StringIO):
        def flush(self) -> None:
            seen.append(len(self.getvalue().split()))

    monkeypatch.setattr(sys, "stdout", Terminal())
    common = ("--model", str(talking), "--prompt", "w5", "--max-new-tokens", "40", "--ignore-eos")
    assert main(["generate", *common]) == 0
    assert seen[:3] == [16, 32, 40]


def test_samples(talking, capsys):
    common = ("--model", talking, "--prompt", "w5 w6", "--max-new-tokens", 4, "--temperature", 2, "--ignore-eos")
    got = answer(capsys, *common, "--n", 3, "--seed", 5)
    assert got.keys() == {"prompt_token_ids", "samples"} and got["prompt_token_ids"] == [5, 6]
    alone = [answer(capsys, *common, "--seed", 5 + i) for i in range(3)]
    assert got["samples"] == [{k: v for k, v in one.items() if k != "prompt_token_ids"} for one in alone]
    assert main(["generate", *map(str, common), "--n", "3", "--seed", "5"]) == 0
    texts = [f"--- sample {i} of 3 ---\n{one['text']}\n" for i, one in enumerate(alone, 1)]
    assert capsys.readouterr().out == "".join(texts)


def test_logprobs(talking, capsys):
    common = ("--model", talking, "--prompt", "w5 w6 w7", "--max-new-tokens", 4, "--ignore-eos")
    got = answer(capsys, *common, "--logprobs", 2, "--prompt-logprobs")
    tokens = got["prompt_token_ids"] + got["token_ids"]
    model = s3.from_pretrained(talking)
    ((expected, allowed),) = rounding.shaken(lambda m: jax.nn.log_softmax(m(jnp.array([tokens]))[0]), model)
    entries = got["prompt_logprobs"] + got["logprobs"]
    assert [entry["id"] for entry in entries] == tokens
    assert [entry["token"] for entry in entries] == [f"w{token}" for token in tokens]
    assert entries[0]["logprob"] is None
    for i, entry in enumerate(entries[1:]):
        off = [abs(entry["logprob"] - expected[at, entry["id"]]) <= allowed[at, entry["id"]] for at in (i, i - 1)]
        assert off == [True, False]
    for entry in got["logprobs"]:
        first, second = entry["top"]
        assert {"id": first["id"], "token": first["token"]} == {"id": entry["id"], "token": entry["token"]}
        assert first["logprob"] == pytest.approx(entry["logprob"]) and second["logprob"] <= first["logprob"]
    assert answer(capsys, *common, "--logprobs", 0)["logprobs"][0]["top"] == []
    several = answer(capsys, *common, "--logprobs", 2, "--prompt-logprobs", "--n", 2)
    assert several["prompt_logprobs"] == got["prompt_logprobs"]
    for sample in several["samples"]:
        assert [entry["id"] for entry in sample["logprobs"]] == got["token_ids"]


def test_options_reach_the_sampler(talking, capsys):
    """Each changes what comes in the way it says."""
    common = ("--model", talking, "--prompt", "w5 w6", "--max-new-tokens", 8)
    plain = answer(capsys, *common)["token_ids"]
    bias = ("--logit-bias", "33=100", "--logit-bias", "34=80")
    assert answer(capsys, *common, *bias)["token_ids"] == [33] * 8
    penalty = answer(capsys, *common, *bias, "--frequency-penalty", 6)["token_ids"]
    assert set(penalty) == {33, 34} and penalty[:2] == [33, 33]
    assert answer(capsys, *common, *bias, "--presence-penalty", 200)["token_ids"][:2] == [33, 34]
    assert answer(capsys, *common, "--repetition-penalty", 1e9)["token_ids"] != plain
    assert answer(capsys, *common, "--temperature", 2, "--min-p", 1)["token_ids"] == plain
    assert answer(capsys, *common, "--temperature", 2, "--top-p", 1e-6)["token_ids"] == plain
    stopped = answer(capsys, *common, "--stop-token-id", plain[3], "--stop-token-id", 0)
    assert stopped["token_ids"] == plain[: plain.index(plain[3]) + 1] and stopped["finish_reason"] == "stop"
    stopped = answer(capsys, *common, "--stop", "never", "--stop", f" w{plain[2]}")
    assert stopped["text"] == f" w{plain[0]} w{plain[1]}" and stopped["finish_reason"] == "stop"


def test_an_answer_keeps_to_a_schema(capsys, tmp_path):
    model, schema = letters_checkpoint(tmp_path / "m"), tmp_path / "schema.json"
    schema.write_text('{"enum": [[1], [2]]}')
    common = ("--model", model, "--prompt", "ab", "--max-new-tokens", 60, "--json-schema", schema)
    got = answer(capsys, *common, "--temperature", 0, "--max-thinking-tokens", 3)
    assert json.loads(got["text"].split("</think>")[-1]) in ([1], [2]) and got["finish_reason"] == "stop"
    schema.write_text('{"uniqueItems": true}')
    assert main(["generate", *map(str, common)]) == 2
    assert "uniqueItems cannot be kept by a grammar" in capsys.readouterr().err
    schema.write_text("{")
    assert main(["generate", *map(str, common)]) == 2
    assert "schema.json cannot be read" in capsys.readouterr().err
    assert main(["generate", str(model), "--input", "x", "--output", "y", "--json-schema", str(schema)]) == 2
    assert "with --input each line" in capsys.readouterr().err


def test_prompts_from_files(talking, capsys, tmp_path, monkeypatch):
    file = tmp_path / "prompt.txt"
    marked = ["w5 w6\r\n".encode(encoding) for encoding in ("utf-8-sig", "utf-16", "utf-32")]
    for content in (b"w5 w6", b"w5 w6\n", b"w5 w6\r\n", *marked):
        file.write_bytes(content)
        common = ("--model", talking, "--max-new-tokens", 2)
        assert answer(capsys, *common, "--prompt-file", file)["prompt_token_ids"] == [5, 6]
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
        assert answer(capsys, *common, "--prompt", "-")["prompt_token_ids"] == [5, 6]


def test_statistics_are_for_who_asks(talking, capsys):
    common = ("generate", "--model", str(talking), "--prompt", "w5 w6 w7", "--max-new-tokens", "40", "--ignore-eos")
    speed = r"\d+\.\d\d s, [\d,]+\.\d tokens/s"
    compilation = r"(; besides, compilation: \d+\.\d\d s \(\d+ programs?(, and \d+ loaded from the cache)?\))?"
    programs = r"prefill of 16 tokens \(1 x\); decoding of {} of 128 tokens, up to 16 tokens a call \({} x\)"
    for options, slots, tokens in ((["--stats"], "1 slot", 40), (["--stats", "--n", "2"], "2 slots", 80)):
        assert main([*common, *options]) == 0
        pattern = rf"smollm3: prompt: 2 tokens in {speed}; generated: {tokens} tokens in {speed}{compilation}\n"
        pattern += rf"smollm3: programs: {programs.format(slots, 3)}\n"
        assert re.fullmatch(pattern, capsys.readouterr().err)
    assert main([*common]) == 0
    assert capsys.readouterr().err == ""


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


FOREIGN = "\x1b]0;pwned\x07\x9b2J\u202e[/red]"


def commands_it(text: str) -> bool:
    return any(command in text for command in ("\x1b]", "\x07", "\x9b", "\u202e"))


def test_what_a_model_says_commands_no_terminal(talking, tmp_path, capsys, monkeypatch):
    """A file or a pipe gets it as it is."""
    folder = tmp_path / "model"
    shutil.copytree(talking, folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    tokenizer["model"]["vocab"] = {(FOREIGN + str(id) if id > 9 else word): id for word, id in vocab.items()}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    command = ["generate", "--model", str(folder), "--prompt", "w5", "--max-new-tokens", "8"]
    for more in ([], ["--n", "2"], ["--json"]):
        assert main([*command, *more]) == 0
        piped = capsys.readouterr().out
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", Terminal())
            assert main([*command, *more]) == 0
            shown = sys.stdout.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
        assert not commands_it(shown) and r"\x1b]0;pwned" in shown.replace("u001b", "x1b")
        assert FOREIGN in (json.loads(piped)["text"] if more == ["--json"] else piped)


def test_names_of_files_command_no_terminal(talking, tmp_path, monkeypatch, capsys):
    folder = tmp_path / FOREIGN.replace("/", "")
    shutil.copytree(talking, folder)
    (folder / f"{FOREIGN.replace('/', '')}.safetensors").symlink_to(folder / "model.safetensors")
    out, err = Terminal(), Terminal()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    main(["inspect", str(folder)])
    main(["inspect", str(folder / "nowhere")])
    assert not commands_it(out.getvalue() + err.getvalue())
    assert r"\x1b]0;pwned" in out.getvalue() and r"\x1b]0;pwned" in err.getvalue()


def test_a_table_of_foreign_names(monkeypatch):
    """As of languages, which are whatever a file of texts calls them: neither markup nor commands."""
    from rich.table import Table

    from smollm3_jax.commands.shared import console

    monkeypatch.setattr(sys, "stdout", out := Terminal())
    table = Table("language")
    table.add_row(FOREIGN)
    console().print(table)
    assert r"\x1b]0;pwned\x07\x9b2J\u202e[/red]" in out.getvalue() and not commands_it(out.getvalue())


@pytest.mark.parametrize(
    "error",
    [
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 17 bytes.\nmore"),
        MemoryError(),
        MemoryError("Unable to allocate 17 bytes"),
    ],
)
def test_too_little_memory_is_one_line(talking, tmp_path, capsys, monkeypatch, error):
    """Of the cache and its slots, and of anything else."""

    def fail(*_, **__):
        raise error

    (tmp_path / "in").write_text('{"prompt": "w5"}\n')
    one = ["generate", "--model", str(talking), "--prompt", "w5 w6"]
    many = [*one[:3], "--input", str(tmp_path / "in"), "--output", str(tmp_path / "out")]
    with monkeypatch.context() as patch:
        patch.setattr("smollm3_jax.generation.places.zeros", fail)
        for command in (one, many):
            assert main(command) == 3
            expected = r"smollm3: too little memory for 1 slot of 256 tokens; fewer new tokens \(max_new_tokens\), .*\n"
            assert re.fullmatch(expected, capsys.readouterr().err)
        model = s3.from_pretrained(talking)
        with pytest.raises(MemoryError, match="1 slot of 256 tokens"):
            s3.generate(model, [[5]])
    monkeypatch.setattr("smollm3_jax.weights.load.load", fail)
    assert main(one) == 3
    assert re.fullmatch(r"smollm3: too little memory: .*\n", capsys.readouterr().err)


@pytest.mark.parametrize(
    "options", [("--mesh", "data=4,tensor=2"), ("--mesh", "fsdp=8", "--rules", "fsdp"), ("--rules", "dp")]
)
def test_a_mesh_says_what_one_device_says(talking, capsys, options):
    common = ("--model", talking, "--prompt", "w5 w6 w7", "--max-new-tokens", 4, "--temperature", 0)
    assert answer(capsys, *common, *options) == answer(capsys, *common)


@pytest.mark.slow
def test_two_models_are_compared_on_a_mesh(talking, capsys):
    assert main(["verify", str(talking), "--against", str(talking), "--mesh", "data=4,tensor=2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ok"]


@FULL
def test_yarn_stretches_the_context(talking, capsys):
    common = ("--model", talking, "--prompt", "w5 w6 " * 300, "--max-new-tokens", 3)
    assert len(answer(capsys, *common, "--yarn", 2)["token_ids"]) == 3
    assert main(["generate", *map(str, common), "--yarn", "1.1"]) == 2
    assert "600 tokens; with max_new_tokens 3 that exceeds the model's context of 563" in capsys.readouterr().err


@FULL
def test_weights_and_cache(talking, capsys):
    common = ("--model", talking, "--prompt", "w5 w6 w7", "--max-new-tokens", 4, "--logprobs", 0)
    plain = answer(capsys, *common)["logprobs"]
    # bfloat16 rounds by up to 2**-8 of a number, int8 by half of 1/127 of a row's largest, which is about three times
    # their root mean square: as far as parameters move it that are off by 2**-7.
    model = s3.from_pretrained(talking)
    said = rounding.shaken(lambda m: jax.nn.log_softmax(m(jnp.array([[5, 6, 7]]))[0, -1]), model, roundings=2**17)
    allowed = said[0][1][plain[0]["id"]]
    for option in (("--cache", "int8"), ("--cache", "bfloat16"), ("--weights", "int8"), ("--dtype", "bfloat16")):
        got = answer(capsys, *common, *option)["logprobs"]
        assert got[0]["logprob"] != plain[0]["logprob"], option
        assert abs(got[0]["logprob"] - plain[0]["logprob"]) <= allowed < 1, option


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
        (["--max-new-tokens", "0"], 2, "max_new_tokens is 0"),
        (["--temperature", "-1"], 2, "temperature is -1.0"),
        (["--temperature", "nan"], 2, "temperature is nan"),
        (["--temperature", "1e40"], 2, "temperature is 1e+40"),
        (["--top-k", "-1"], 2, "top_k is -1"),
        (["--top-p", "2"], 2, "top_p is 2.0"),
        (["--top-p", "0"], 2, "top_p is 0.0"),
        (["--min-p", "1.5"], 2, "min_p is 1.5"),
        (["--repetition-penalty", "0"], 2, "repetition_penalty is 0.0"),
        (["--presence-penalty", "inf"], 2, "presence_penalty is inf"),
        (["--frequency-penalty", "nan"], 2, "frequency_penalty is nan"),
        (["--logit-bias", "160=1"], 2, "logit_bias names the id 160"),
        (["--logit-bias", "3=nan"], 2, "logit_bias is {3: nan}"),
        (["--stop", ""], 2, "stop is ['']"),
        (["--stop-token-id", "160"], 2, "stop_token_ids names the id 160"),
        (["--stop-token-id", "3"] * 17, 2, "stop_token_ids is [3"),
        ([x for i in range(3, 19) for x in ("--stop-token-id", str(i))], 2, "stop_token_ids: with the model's own"),
        (["--seed", "-1"], 2, "seed is -1"),
        (["--n", "0"], 2, "n is 0"),
        (["--logprobs", "21", "--json"], 2, "logprobs is 21"),
        (["--logprobs", "2"], 2, "--json"),
        (["--prompt-logprobs"], 2, "--json"),
        (["--max-thinking-tokens", "-1"], 2, "max_thinking_tokens is -1"),
        (["--max-thinking-tokens", "5"], 2, "max_thinking_tokens needs"),
        (["--mesh", "tensor"], 2, "'tensor' is not AXIS=LENGTH"),
        (["--mesh", "tensor=3"], 2, "3 devices, but there are 8"),
        (["--mesh", "context=8"], 2, "the strategy serve_tp has no use for the mesh's axis 'context'"),
        (["--yarn", "1"], 2, "YaRN factor is 1.0"),
        (["--yarn", "nan"], 2, "YaRN factor is nan"),
        (["--max-new-tokens", "511"], 2, "2 tokens; with max_new_tokens 511 that exceeds the model's context of 512"),
        (["--no-think"], 2, "--chat"),
        (["--prompt", ""], 2, "prompt is empty"),
        (["--model", "/nowhere/to/be"], 3, "/nowhere/to/be"),
    ],
)
def test_mistakes_are_one_line_and_a_code(talking, capsys, arguments, code, words):
    assert main(["generate", "--model", str(talking), "--prompt", "w5 w6", *arguments]) == code
    out, err = capsys.readouterr()
    assert out == "" and words in err and len(err.splitlines()) == 1


def test_prompt_files_that_cannot_be_read(talking, capsys, tmp_path):
    (tmp_path / "latin").write_bytes(b"w5 \xe9")
    (tmp_path / "wide").write_bytes("w5 w6".encode("utf-16-le"))
    unread = (("nothing", "No such file"), ("latin", "utf-8"), ("wide", "no byte order mark"), ("", "Is a directory"))
    for name, words in unread:
        file = str(tmp_path / name)
        assert main(["generate", "--model", str(talking), "--prompt-file", file]) == 2
        out, err = capsys.readouterr()
        assert out == "" and words in err and name in err and len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "-p/--prompt --prompt-file --input is required"),
        (["--prompt", "w5", "--prompt-file", "x"], "not allowed with"),
        (["--prompt", "w5", "--logit-bias", "5"], "--logit-bias: '5' is not ID=VALUE"),
        (["--prompt", "w5", "--logit-bias", "w5=1"], "--logit-bias: 'w5=1' is not ID=VALUE"),
        (["--prompt", "w5", "--temperature", "hot"], "--temperature"),
        (["--prompt", "w5", "--n", "1.5"], "--n"),
        (["--prompt", "w5", "--weights", "int3"], "--weights"),
        (["--prompt", "w5", "--cache", "int4"], "--cache"),
        (["--prompt", "w5", "--yarn", "two"], "--yarn"),
    ],
)
def test_usage_errors_name_the_option(talking, capsys, arguments, words):
    with pytest.raises(SystemExit) as exit:
        main(["generate", "--model", str(talking), *arguments])
    assert exit.value.code == 2
    assert words in capsys.readouterr().err


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
    code = "import sys; from smollm3_jax.commands.main import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "inspect", str(talking), "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout and process.stderr
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait() == 0
    process.stderr.close()
