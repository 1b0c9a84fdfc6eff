"""What the command is before any of its subcommands runs."""

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from tiny import talking_checkpoint

from smollm3_jax.commands.main import COMMANDS, _Plain, main, parse, parser_of

ROOT = Path(__file__).parents[2]
HEAVY = ("jax", "jaxlib", "flax", "numpy", "rich", "optax", "tokenizers", "huggingface_hub", "safetensors")
LOADED = """
import json, sys
from smollm3_jax.commands.main import main
try:
    main(sys.argv[1:])
finally:
    print(json.dumps(sorted({name.split(".")[0] for name in sys.modules})), file=sys.stderr)
"""


@pytest.fixture(scope="module")
def talking(tmp_path_factory) -> Path:
    return talking_checkpoint(tmp_path_factory.mktemp("main") / "talking")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        [],
        ["fly"],
        *([name, "--help"] for name in COMMANDS),
        ["plan", "train", "--help"],
        ["generate", "--prompt"],
    ],
    ids=" ".join,
)
def test_help_and_usage_errors_load_nothing_heavy(arguments):
    done = subprocess.run([sys.executable, "-c", LOADED, *arguments], cwd=ROOT, capture_output=True, text=True)
    loaded = next(line for line in done.stderr.splitlines() if line.startswith("["))
    assert not set(json.loads(loaded)) & set(HEAVY)
    assert "usage: smollm3" in done.stdout + done.stderr
    assert done.returncode == (0 if "--help" in arguments else 2)


def test_python_m():
    done = subprocess.run([sys.executable, "-m", "smollm3_jax", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("usage: smollm3 ")


def test_any_encoding_will_do():
    done = subprocess.run(
        [sys.executable, "-m", "smollm3_jax", "doctor"],
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii", "SMOLLM3_JAX_CACHE": "/tmp/ä"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and done.stderr == "" and "SMOLLM3_JAX_CACHE=/tmp/\\xe4\n" in done.stdout


def test_version(capsys):
    import smollm3_jax as s3

    for word in ("--version", "-V"):
        with pytest.raises(SystemExit) as exit:
            main([word])
        assert exit.value.code == 0
        assert capsys.readouterr().out.startswith(f"smollm3 {s3.__version__} (jax ")


def usage_error(capsys, arguments) -> list[str]:
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    assert exit.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    return err.splitlines()


@pytest.mark.parametrize(
    ("arguments", "usage", "words"),
    [
        (["fly"], "smollm3 COMMAND", "'fly' is no command"),
        (["generat"], "smollm3 COMMAND", "'generat' is no command; did you mean generate?"),
        (["--hlep"], "smollm3 COMMAND", "there is no option --hlep; did you mean --help?"),
        (["generate", "m", "-p", "x", "--temprature", "0"], "smollm3 generate", "did you mean --temperature?"),
        (["generate", "m", "-p", "x", "--max_new_tokens=3"], "smollm3 generate", "did you mean --max-new-tokens?"),
        (["generate", "-model", "m", "-p", "x"], "smollm3 generate", "no option -model; did you mean --model?"),
        (["generate", "--modle", "m"], "smollm3 generate", "there is no option --modle; did you mean --model?"),
        (["generate", "m", "-p", "x", "--weights", "int9"], "smollm3 generate", "'int9' is none of int8, int8-g64"),
        (["generate", "m", "-p", "x", "--dtype", "bfloat61"], "smollm3 generate", "did you mean bfloat16?"),
        (["generate", "m", "-m", "n", "-p", "x"], "smollm3 generate", "two models are named, m and n"),
        (["generate", "m", "n", "-p", "x"], "smollm3 generate", "unexpected: 'n'"),
        (["generate", "-p", "x"], "smollm3 generate", "name a model"),
        (["pull", "m", "-x"], "smollm3 pull", "there is no option -x"),
        (["chat", "-z"], "smollm3 chat", "there is no option -z"),
        (["GENERATE"], "smollm3 COMMAND", "did you mean generate?"),
        (["version"], "smollm3 COMMAND", "did you mean --version?"),
        (["plan", "memory", "a", "b"], "smollm3 plan memory", "unexpected: 'b'"),
        (["plan", "trian"], "smollm3 plan", "did you mean train?"),
        (["plan", "train", "--bacth", "3"], "smollm3 plan train", "did you mean --batch?"),
        (["train", "--config", "quick", "--run.dir=x"], "smollm3 train", "settings have no dashes: run.dir=x"),
        (["train", "--config", "quick", "--resum", "auto", "x=1", "--resume", "atuo"], "smollm3 train", "mean auto?"),
        (["convert", "a"], "smollm3 convert SRC DST", "required: DST"),
        (["inspect", "m", "\x1b[31m"], "smollm3 inspect", r"\x1b[31m"),
    ],
)
def test_a_mistake_shows_the_commands_own_usage_in_short(capsys, arguments, usage, words):
    first, second = usage_error(capsys, arguments)
    assert first.startswith(f"usage: {usage}") and len(first) <= 100
    assert words in second and "\x1b" not in second


@pytest.mark.parametrize(
    "arguments",
    [
        ["m"],
        ["-m", "m"],
        ["--model", "m"],
        ["--model=m"],
        ["m", "--top-k", "3"],
        ["--top-k", "3", "m"],
        ["-q", "m", "--temp", "0"],
        ["--dtype", "bf16", "-v", "m"],
    ],
    ids=" ".join,
)
def test_where_the_model_may_stand(arguments):
    parser = parser_of("generate")[1]
    assert parse(parser, [*arguments, "-p", "--not an option"]).model == "m"
    assert parse(parser, ["-p", "x", *arguments]).model == "m"


@pytest.mark.parametrize("name", ["pull", "inspect", "verify", "generate", "chat", "perplexity"])
def test_every_command_takes_the_model_either_way(name):
    needed = {"verify": ["--against", "x"], "generate": ["-p", "x"], "perplexity": ["--text", "x"]}.get(name, [])
    parser = parser_of(name)[1]
    assert parse(parser, ["m", *needed]).model == parse(parser, [*needed, "-m", "m"]).model == "m"


def test_habits():
    parser = parser_of("generate")[1]
    args = parse(
        parser, ["m", "-p", "hi", "--max-tokens", "3", "--temp", "0.5", "--system", "s", "--cache", "bf16", "-vv"]
    )
    assert (args.prompt, args.max_new_tokens, args.temperature, args.system) == ("hi", 3, 0.5, "s")
    assert args.cache == "bfloat16" and args.verbose == 2
    for short, long in (("bf16", "bfloat16"), ("fp16", "float16"), ("fp32", "float32"), ("BF16", "bfloat16")):
        for command in (["generate", "m", "-p", "x"], ["convert", "a", "b"], ["export", "a", "b"]):
            assert parse(parser_of(command[0])[1], [*command[1:], "--dtype", short]).dtype == long


def test_flags_may_stand_before_the_command(monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(
        "smollm3_jax.commands.plan._plan_memory", lambda args: seen.append((args.quiet, args.verbose, args.batch)) or 0
    )
    assert main(["-q", "plan", "memory", "--batch", "2"]) == 0
    assert main(["-v", "plan", "memory"]) == 0
    assert seen == [(True, 0, 2), (False, 1, 1)]
    with pytest.raises(SystemExit):
        main(["help", "chat"])
    assert capsys.readouterr().out.startswith("usage: smollm3 chat MODEL ")


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["ge"], ["generate"]),
        (["generate", "--temp"], ["--temperature", "--temp"]),
        (["generate", "m", "--weights", "int8-g"], ["int8-g64", "int8-g32"]),
        (["generate", ""], ["demo"]),
        (["generate", "-m", "d"], ["demo"]),
        (["plan", "me"], ["memory"]),
        (["plan", "train", "--rules", "fsdp_tp_"], ["fsdp_tp_cp"]),
        (["plan", "train", "--micro"], ["--micro-batches"]),
        (["train", "--config", "smollm3-stage"], ["smollm3-stage1", "smollm3-stage2", "smollm3-stage3"]),
        (["completion", ""], ["bash", "zsh", "fish"]),
        (["convert", "./"], []),
        (["fly", ""], []),
    ],
)
def test_completion(words, wanted, capsys):
    assert main(["__complete", *words]) == 0
    assert capsys.readouterr().out.split() == wanted


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_completion_in_bash(tmp_path):
    """As the shell does it at a Tab."""
    (tmp_path / "smollm3").write_text(f'#!/bin/sh\nexec {sys.executable} -m smollm3_jax "$@"\n')
    (tmp_path / "smollm3").chmod(0o755)
    script = (
        'eval "$(smollm3 completion bash)"; COMP_WORDS=(smollm3 plan train --ru); COMP_CWORD=3; _smollm3; '
        'echo "${COMPREPLY[*]}"'
    )
    environment = os.environ | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True)
    assert done.stdout == "--rules\n", done.stderr


def test_errors_are_plain_and_a_line(capsys, tmp_path):
    for name in ("a\x1b[31m", "[/red]", "x" * 300, "y" * 5000, "nul\0"):
        assert main(["inspect", str(tmp_path / name)]) == 3
        out, err = capsys.readouterr()
        assert out == "" and "\x1b" not in err and "\0" not in err and err.count("\n") == 1
    assert main(["convert", str(tmp_path / ("z" * 300)), "out"]) == 3


def test_a_name_makes_no_line_of_its_own_in_the_log():
    def shown(name: str, *arguments: object) -> str:
        return _Plain("%(message)s").format(logging.LogRecord(name, 30, "", 1, "%s: x", arguments, None))

    assert shown("smollm3_jax.weights", "m\nsmollm3: \x1b[31mfine") == r"m\nsmollm3: \x1b[31mfine: x"
    assert shown("sharding.mesh", "a\nb") == "a\nb: x"  # a table


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("JAX_ENABLE_X64", "maybe"),
        pytest.param("JAX_DEFAULT_MATMUL_PRECISION", "best", marks=pytest.mark.slow),
        pytest.param("JAX_NUM_CPU_DEVICES", "two", marks=pytest.mark.slow),
    ],
)
def test_a_variable_that_jax_does_not_take(talking, name, value):
    done = subprocess.run(
        [sys.executable, "-m", "smollm3_jax", "generate", talking, "-p", "w5"],
        env=os.environ | {"PYTHONPATH": str(ROOT), name: value},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 3 and done.stdout == "" and done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"smollm3: jax does not take the variable {name}: ") and value in done.stderr


def test_forbidden_transfers_are_a_line(talking, capsys):
    with jax.transfer_guard("disallow"):
        assert main(["generate", str(talking), "-p", "w5"]) == 3
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("smollm3: JAX_TRANSFER_GUARD forbids") and err.count("\n") == 1


def test_a_reader_that_leaves_ends_a_table_without_a_word(talking):
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "smollm3_jax", "inspect", talking]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


def test_another_pipe_that_breaks_is_an_error(talking, capsys, monkeypatch):
    def run(_):
        raise BrokenPipeError(32, "a connection of a library's")

    monkeypatch.setattr("smollm3_jax.commands.inspect.run", run)
    assert main(["inspect", str(talking)]) == 3
    assert "a connection of a library's" in capsys.readouterr().err


@pytest.mark.parametrize("closed", ["1", pytest.param("2", marks=pytest.mark.slow)])
def test_closed_streams(talking, closed):
    """sys.stdout is None there."""
    script = f'"$0" -m smollm3_jax generate "$1" -p w5 --max-tokens 1 {closed}>&-'
    done = subprocess.run(
        ["bash", "-c", script, sys.executable, talking],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_an_interrupt_before_the_command_runs(capsys, monkeypatch):
    def interrupted(name: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("smollm3_jax.commands.main.parser_of", interrupted)
    assert main(["inspect", "x"]) == 130
    assert capsys.readouterr().err == "smollm3: interrupted\n"


def test_help_of_help(capsys):
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["help", "help"])
    assert capsys.readouterr().out.startswith("usage: smollm3 COMMAND")


def test_quiet_says_nothing_on_the_way(capsys, caplog, talking, tmp_path):
    (tmp_path / "text.jsonl").write_text('{"text": "w5 w6 w7"}\n')
    common = ["perplexity", str(talking), "--text", str(tmp_path / "text.jsonl"), "--dtype", "bf16"]
    assert main(common) == 0
    assert "casting float32 tensors to bfloat16" in caplog.text
    caplog.clear()
    capsys.readouterr()  # a busy machine may have made it say how far it is
    assert main([*common, "--quiet"]) == 0
    assert caplog.text == "" and capsys.readouterr().err == ""


def test_only_what_is_cast_is_named(talking, tmp_path, caplog):
    mixed = tmp_path / "mixed"
    shutil.copytree(talking, mixed)
    from safetensors.numpy import load_file, save_file

    tensors = load_file(mixed / "model.safetensors")
    name = "model.norm.weight"
    save_file(tensors | {name: tensors[name].astype("float16")}, mixed / "model.safetensors", {"format": "pt"})
    assert main(["generate", str(mixed), "-p", "w5", "--dtype", "fp32", "--max-tokens", "1"]) == 0
    assert "casting float16 tensors to float32" in caplog.text


def test_a_system_message(capsys, talking):
    def prompt(*more: str) -> list[int]:
        assert main(["generate", str(talking), "--chat", "-p", "w5", "--max-tokens", "1", "--json", *more]) == 0
        return json.loads(capsys.readouterr().out)["prompt_token_ids"]

    assert prompt("--system", "w9 w10") != prompt()
    assert main(["generate", str(talking), "-p", "w5", "--system", "w9"]) == 2
    assert "--system is a message of a chat: give --chat too" in capsys.readouterr().err
