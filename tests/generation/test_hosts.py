"""Two processes say what one says: process 0 is asked, and the other does the same."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from proxies import FULL
from tiny import letters_checkpoint, talking_checkpoint

import smollm3_jax as s3
from smollm3_jax.generation import hosts
from smollm3_jax.generation.requests import Request, as_json, from_json

ROOT = Path(__file__).parents[2]
LINES = [
    {"prompt": "w5 w6 w7", "n": 2, "temperature": 0.8, "logprobs": 2, "prompt_logprobs": True},
    {"prompt": "w9", "max_new_tokens": 20},
    {"prompt": "nothing to tokenize", "max_new_tokens": 0},
    {"messages": [{"role": "user", "content": "w3 w4"}], "logit_bias": {"7": 3.5}},
]


def test_alone_there_is_nobody_to_tell():
    with hosts.leading():
        assert not hosts.leads() and not hosts.is_follower()
        assert hosts.broadcast({"a": [1, None]}) == {"a": [1, None]}
    tree = {"x": 1}
    assert hosts.on_every_host(tree, None) is tree


@given(
    st.lists(st.integers(0, 99), min_size=1, max_size=4),
    st.dictionaries(st.integers(0, 99), st.floats(-5, 5), max_size=3),
    st.integers(0, 2**32 - 1),
    st.floats(0, 2),
)
def test_a_request_survives_the_way_to_another_process(prompt, bias, seed, temperature):
    params = s3.SamplingParams(logit_bias=bias, seed=seed, temperature=temperature, stop=["end"], stop_token_ids=[4])
    request = Request(prompt, params, (7,), "start: /[a-z]/")
    there = from_json(json.loads(json.dumps(as_json(request))))
    assert json.dumps(as_json(there)) == json.dumps(as_json(request))  # lists and tuples are one there
    assert there.params.logit_bias == bias and there.prompt == prompt and there.ends == (7,)
    assert there.grammar == request.grammar


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


# For an environment's sitecustomize.py: the engine's arrays find no memory on process 0.
NO_MEMORY = """
import sharding.arrays

def fail(*arguments):
    raise MemoryError("no memory")

sharding.arrays.zeros = fail
"""


def outcome(
    processes: int,
    *words: str,
    stdin: str = "",
    own_words: tuple[tuple[str, ...], ...] = ((), ()),
    folders: tuple[Path, ...] = (ROOT, ROOT),
    sitecustomize: Path | None = None,
) -> list[tuple[int, str, str]]:
    """Exit code, output and messages of each process of a command on two devices.

    Args:
      own_words, folders: of each process, its own words and where it runs.
      sitecustomize: a folder with a file of that name, for process 0 alone.
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    environment["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # processes compile together, and must all do so
    environment["JAX_NUM_CPU_DEVICES"] = str(2 // processes)
    job = ("--coordinator", f"127.0.0.1:{free_port()}", "--processes", "2", "--process")
    own = [(*job, str(i), *own_words[i]) if processes > 1 else () for i in range(processes)]
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "smollm3_jax", *words, "--mesh", "tensor=2", *job_words],
            env={**environment, **({"PYTHONPATH": f"{sitecustomize}:{ROOT}"} if sitecustomize and i == 0 else {})},
            cwd=folders[i],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i, job_words in enumerate(own)
    ]
    # Only process 0 reads.
    said = [process.communicate(stdin if i == 0 else "", timeout=300) for i, process in enumerate(running)]
    return [(process.returncode, *texts) for process, texts in zip(running, said, strict=True)]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return str(talking_checkpoint(tmp_path_factory.mktemp("talking") / "m"))


@FULL
def test_a_prompt(model):
    words = (
        "generate",
        model,
        "-p",
        "w5 w6",
        "--temp",
        "0.7",
        "--n",
        "2",
        "--logprobs",
        "2",
        "--json",
        "--max-tokens",
        "12",
    )
    ((code, expected, _),) = outcome(1, *words)
    (first, second) = outcome(2, *words)
    assert (code, first[0], second[0]) == (0, 0, 0), (first, second)
    assert first[1] == expected and second[1] == ""


@pytest.mark.slow
def test_many_prompts(model, tmp_path):
    file = tmp_path / "in.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    words = ("generate", model, "--input", str(file), "--slots", "2", "--max-tokens", "9", "--output")
    outcomes = [outcome(1, *words, str(tmp_path / "1.jsonl")), outcome(2, *words, str(tmp_path / "2.jsonl"))]
    # One line cannot be run: 3, where lines are read.
    assert [[code for code, *_ in one] for one in outcomes] == [[3], [3, 0]], outcomes
    one, two = (sorted((tmp_path / f"{n}.jsonl").read_text().splitlines()) for n in (1, 2))
    assert one == two and len(one) == len(LINES)


@FULL
def test_answers_that_keep_to_schemas(tmp_path):
    """Each process finds for itself which token may come next."""
    model, file = letters_checkpoint(tmp_path / "m"), tmp_path / "in.jsonl"
    schemas = [{"enum": ["abc", "abd", 12]}, {"type": "string", "pattern": "^[xyz]{3,6}$"}]
    lines = [
        {"prompt": "ab", "json_schema": schema, "temperature": 1.5, "n": 2, "max_thinking_tokens": 5}
        for schema in schemas
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in [*lines, {"prompt": "xyz", "max_new_tokens": 30}]))
    words = ("generate", str(model), "--input", str(file), "--slots", "2", "--max-tokens", "40", "--output")
    outcomes = [outcome(n, *words, str(tmp_path / f"{n}.jsonl")) for n in (1, 2)]
    assert [[code for code, *_ in one] for one in outcomes] == [[0], [0, 0]], outcomes
    one, two = (sorted((tmp_path / f"{n}.jsonl").read_text().splitlines()) for n in (1, 2))
    assert one == two
    texts = [[sample["text"].split("</think>")[-1] for sample in json.loads(line)["samples"]] for line in one[:2]]
    assert all(json.loads(text) in ("abc", "abd", 12) for text in texts[0]), texts
    assert all(set(json.loads(text)) <= {*"xyz"} for text in texts[1]), texts


@FULL
def test_a_chat(model):
    """Two turns, each of an engine of its own."""
    words = ("chat", model, "--temp", "0", "--max-tokens", "6")
    ((code, expected, _),) = outcome(1, *words, stdin="w5\nw6\n")
    (first, second) = outcome(2, *words, stdin="w5\nw6\n")
    assert (code, first[0], second[0]) == (0, 0, 0), (first, second)
    assert first[1] == expected != "" and second[1] == ""


@pytest.mark.slow
def test_a_mistake_of_the_first_ends_the_other(model):
    (first, second) = outcome(2, "generate", model, "-p", "")
    assert (first[0], second[0]) == (2, 0) and "empty" in first[2] and "Traceback" not in first[2] + second[2]


@pytest.mark.slow
def test_prompts_that_differ_are_no_job(model):
    """Tasks that were each given a prompt of their own."""
    (first, second) = outcome(2, "generate", model, "-p", "w5", own_words=(("--seed", "1"), ("--seed", "2")))
    assert (first[0], second[0]) == (3, 3)
    assert "have other options than process 0" in first[2] + second[2]


@pytest.mark.slow
def test_slots_that_do_not_fit_end_everyone(model, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(NO_MEMORY)
    (first, second) = outcome(2, "generate", model, "-p", "w5", "--max-tokens", "2", sitecustomize=tmp_path)
    assert (first[0], second[0]) == (3, 0), (first, second)
    assert "there is no memory for 1 slot of 128 tokens" in first[2] or "too little memory for 1 slot" in first[2]


@pytest.mark.slow
def test_a_model_that_is_not_everywhere_ends_everyone(model, tmp_path):
    """Only process 0 has the folder."""
    there = tmp_path / "m"
    words = ("generate", "m", "-p", "w5")
    (there).symlink_to(model)
    (first, second) = outcome(2, *words, folders=(tmp_path, ROOT))
    assert (first[0], second[0]) == (3, 3), (first, second)
    assert "process 1: " in first[2]
