import dataclasses
import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from proxies import FULL
from tiny import talking_checkpoint

import smollm3_jax as s3
from smollm3_jax import progress
from smollm3_jax.chat.template import encode_for_answer
from smollm3_jax.commands.main import main
from smollm3_jax.config import ModelConfig
from smollm3_jax.errors import DataError, OptionError, SaveError, TokenizerError
from smollm3_jax.generation import jsonl, lines
from smollm3_jax.generation.api import complete
from smollm3_jax.generation.jsonl import Batch
from smollm3_jax.generation.prompts import SERVING_PIECES
from smollm3_jax.generation.requests import Completion, Request
from smollm3_jax.tokenizer import Tokenizer, load_tokenizer

ROOT = Path(__file__).resolve().parents[2]
PARAMS = s3.SamplingParams(max_new_tokens=5)


@pytest.fixture(scope="module")
def talking(tmp_path_factory) -> Path:
    return talking_checkpoint(tmp_path_factory.mktemp("batch") / "talking")


@pytest.fixture(scope="module")
def model(talking) -> s3.SmolLM3:
    return s3.from_pretrained(talking)


@pytest.fixture(scope="module")
def tokenizer(talking) -> Tokenizer:
    return load_tokenizer(talking, ModelConfig.from_hf(talking))


def write(path: Path, *lines: Any) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def answers(path: Path) -> dict[int, dict]:
    """By index; every line is whole, and none comes twice."""
    text = path.read_bytes()
    assert text.endswith(b"\n") or not text
    found = [json.loads(line) for line in text.splitlines()]
    by_index = {answer["index"]: answer for answer in found}
    assert len(by_index) == len(found)
    return by_index


def run(model, tokenizer, source, target, params=PARAMS, options: Any = None, **settings) -> Batch:
    with Batch(source, target, params, encode_messages=encode_for_answer, **settings) as job:
        known: dict[str, Any] = {"slots": 2, **(options or {})}  # few sizes, so that little is compiled
        job.run(model, tokenizer, **known)
    return job


def test_every_line_is_answered_as_if_alone(model, tokenizer, tmp_path):
    lines = [
        {"prompt": "w5 w6", "id": "a"},
        {"messages": [{"role": "user", "content": "w7"}], "max_new_tokens": 9},
        {"prompt": "w5 w6", "temperature": 2.0, "n": 3, "seed": 7},
        {"prompt": "w1 " * 40, "id": 4, "logit_bias": {"33": 100}},
        {"id": None, "prompt": "w8", "repetition_penalty": 1.5, "logprobs": 2, "prompt_logprobs": True},
        {"prompt": "w5 w6", "max_new_tokens": 90},
    ]
    job = run(model, tokenizer, write(tmp_path / "in", *lines), tmp_path / "out")
    got = answers(tmp_path / "out")
    assert (job.done, job.failed, job.left) == (6, 0, 0)
    assert [got[i].get("id", "none") for i in range(6)] == ["a", "none", "none", 4, None, "none"]

    def alone(prompt: list[int], **params: Any) -> list[Completion]:
        own = s3.SamplingParams(**{"max_new_tokens": 5, **params})
        return complete(model, [Request(prompt, own)], tokenizer=tokenizer, max_slots=2, capacity=128)

    expected = {
        0: alone([5, 6]),
        1: alone([9, 7], max_new_tokens=9),
        3: alone([1] * 40, logit_bias={33: 100.0}),
        4: alone([8], repetition_penalty=1.5, logprobs=2, prompt_logprobs=True),
        5: alone([5, 6], max_new_tokens=90),
    }
    for index, (completion,) in expected.items():
        assert got[index]["text"] == completion.text
        assert got[index]["completion_tokens"] == len(completion.token_ids)
        assert got[index]["finish_reason"] == completion.finish_reason
    assert [got[i]["prompt_tokens"] for i in range(6)] == [2, 2, 2, 40, 1, 2]
    assert got[3]["text"] == " w33 w33 w33 w33 w33"  # after the prompt's last word
    samples = alone([5, 6], temperature=2.0, n=3, seed=7)
    assert [sample["text"] for sample in got[2]["samples"]] == [sample.text for sample in samples]
    assert got[2]["completion_tokens"] == 15 and "text" not in got[2]
    assert [entry["token"] for entry in got[4]["logprobs"]] == got[4]["text"].split()
    assert all(len(entry["top"]) == 2 and entry["logprob"] <= 0 for entry in got[4]["logprobs"])
    assert got[4]["prompt_logprobs"] == [{"id": 8, "token": "w8", "logprob": None}]


BAD = {
    "w5 w6": "not JSON",
    '{"prompt": "w5"': "not JSON",
    '{"prompt": "w5", "temperature": NaN}': "NaN",
    "[" * 100_000: "not JSON",
    "[1]": "a JSON list",
    "{}": '"prompt" and "messages"',
    '{"prompt": "w5", "messages": []}': '"prompt" and "messages"',
    '{"prompt": 5}': "prompt is a int",
    '{"prompt": ""}': "empty",
    '{"prompt": "\\ud800"}': "surrogate",
    '{"prompt": "w5", "temprature": 1}': "temprature",
    '{"prompt": "w5", "temperature": -1}': "temperature is -1",
    '{"prompt": "w5", "temperature": "hot"}': "temperature is 'hot'",
    '{"prompt": "w5", "stop": 5}': "stop is 5",
    '{"prompt": "w5", "stop_token_ids": [160]}': "stop_token_ids names the id 160",
    '{"prompt": "w5", "stop_token_ids": 1}': "stop_token_ids is 1",
    '{"prompt": "w5", "logit_bias": {"w5": 1}}': "logit_bias names the id 'w5'",
    '{"prompt": "w5", "logit_bias": [5]}': "logit_bias is [5]",
    '{"prompt": "w5", "ignore_eos": "no"}': "ignore_eos is 'no'",
    '{"prompt": "w5", "max_tokens": 3}': "the field 'max_tokens' is unknown; did you mean max_new_tokens?",
    '{"prompt": "w5", "max_new_tokens": 1e3}': "max_new_tokens is 1000.0; it must be a whole number of at least 1",
    '{"prompt": "w5", "top_k": 99999999999}': "a whole number, 0 (off) or more, below 2**31",
    '{"prompt": "w5", "temperature": "1"}': "temperature is '1'; it must be a number",
    '{"prompt": "w5", "presence_penalty": 1e300}': "a number that float32 can hold",
    '{"prompt": "w5", "max_thinking_tokens": 3}': "max_thinking_tokens",
    '{"prompt": "w5", "json_schema": {"not": {}}}': "the JSON schema: not cannot be kept by a grammar",
    '{"prompt": "w5", "json_schema": {}}': "no grammar can be kept with this model's tokenizer",
    '{"messages": []}': "messages must be a list",
    '{"messages": [{"role": "king", "content": "w5"}]}': "messages[0].role",
    '{"prompt": "w5", "x": ' + "[" * 600 + "]" * 600 + "}": "nested deeper than 100 levels",
    '{"prompt": "w5", "id": ' + '{"a": ' * 600 + "1" + "}" * 601: "nested deeper than 100 levels",
    '{"messages": [{"role": "user", "content": ' + "[" * 600 + "]" * 600 + "}]}": "nested deeper than 100 levels",
    '{"prompt": "w5", "logit_bias": {"' + "9" * 5000 + '": 1}}': "logit_bias names the id '999",
    '{"prompt": "w5", "logit_bias": {"' + "²" + '": 1}}': "logit_bias names the id '²'",
    '{"prompt": "w5", "seed": ' + "9" * 5000 + "}": "not JSON",
    '{"prompt": "w5", "seed": ' + "9" * 4000 + "}": "seed is 999",
    '{"prompt": "w5", "id": 1e999}': "1e999 is beyond every float",
    '{"prompt": "w5", "\\ud800": 1}': "the field '\\ud800' is unknown",
    '{"messages": [{"role": "user", "content": "\\udfff"}]}': "surrogate",
    '{"messages": [{"role": "\\ud800", "content": ""}]}': "messages[0].role",
    json.dumps({"prompt": "w5 " * 511}): "511 tokens; with max_new_tokens 5 that exceeds the model's context of 512",
}


def test_with_slots_and_context_prompts_are_cut_as_a_server_cuts_them(model, tokenizer, tmp_path):
    """So that the bits are those that it would answer."""
    prompt = [8 + i * i % 89 for i in range(300)]
    text = " ".join(f"w{token}" for token in prompt)
    source, target = write(tmp_path / "in.jsonl", {"prompt": text, "logprobs": 1}), tmp_path / "out.jsonl"
    run(model, tokenizer, source, target, options={"context": 512})
    got = [entry["logprob"] for entry in answers(target)[0]["logprobs"]]
    request = Request(prompt, dataclasses.replace(PARAMS, logprobs=1))
    served, usual = (
        complete(model, [request], tokenizer=tokenizer, max_slots=2, capacity=512, piece_sizes=sizes)[0]
        for sizes in (SERVING_PIECES, None)
    )
    expected, other = ([token.logprob for token in one.logprobs or ()] for one in (served, usual))
    assert got == expected != other


def test_bad_lines_are_answered_with_errors(model, tokenizer, tmp_path):
    source, target = tmp_path / "in", tmp_path / "out"
    write(source, *BAD, {"prompt": "w5", "id": "good"}, '{"prompt": "", "id": "bad"}', '{"id": "\\udfff"}')
    job = run(model, tokenizer, source, target)
    got = answers(target)
    assert (job.done, job.failed) == (len(BAD) + 3, len(BAD) + 2)
    for index, (line, words) in enumerate(BAD.items()):
        assert words in got[index]["error"], line
        assert got[index].keys() == {"index", "error", "digest"} and len(got[index]["error"]) < 1100
    good, bad, odd = (got[len(BAD) + i] for i in range(3))
    assert good["id"] == "good" and good["completion_tokens"] == 5
    assert bad["id"] == "bad" and "empty" in bad["error"]
    assert odd["id"] == "\udfff"


@pytest.mark.parametrize("error", [RecursionError("deep"), MemoryError(), RuntimeError("odd"), ValueError("x" * 5000)])
def test_whatever_a_line_raises_is_its_answer(model, tokenizer, tmp_path, monkeypatch, error):
    real = Tokenizer.encode

    def encode(self: Tokenizer, text: str, *rest: Any, **options: Any) -> list[int]:
        if text == "w13":
            raise error
        return real(self, text, *rest, **options)

    monkeypatch.setattr(Tokenizer, "encode", encode)
    job = run(model, tokenizer, write(tmp_path / "in", {"prompt": "w13"}, {"prompt": "w5"}), tmp_path / "out")
    got = answers(tmp_path / "out")
    assert (job.done, job.failed, job.left) == (2, 1, 0) and "text" in got[1]
    assert got[0]["error"].startswith(type(error).__name__) and len(got[0]["error"]) < 1100


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec=None), max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)
FIELDS = st.sampled_from([*lines.SAMPLING_FIELDS, "id", "prompt", "messages", "role", "content", "tool_calls"])


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    records=st.lists(st.dictionaries(FIELDS | st.text(max_size=3), JSON, max_size=4) | JSON, min_size=20, max_size=40)
)
def test_lines_of_any_kind_have_answers(model, tokenizer, records):
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "in"
        source.write_text("".join(json.dumps(record) + "\n" for record in [*records, {"prompt": "w5"}]))
        run(model, tokenizer, source, Path(folder) / "out", options={"context": 64})
        got = answers(Path(folder) / "out")
    assert got.keys() == set(range(len(records) + 1)) and "text" in got[len(records)]


def test_nothing_but_bad_lines(model, tokenizer, tmp_path):
    assert run(model, tokenizer, write(tmp_path / "in", "x", "y"), tmp_path / "out").failed == 2
    assert answers(tmp_path / "out").keys() == {0, 1}


def test_context_limits_lines(model, tokenizer, tmp_path, monkeypatch):
    source = write(tmp_path / "in", {"prompt": "w5 " * 40}, {"prompt": "w5"})
    run(model, tokenizer, source, tmp_path / "out", options={"context": 44})
    got = answers(tmp_path / "out")
    assert got[1]["completion_tokens"] == 5
    assert got[0]["error"] == "the prompt has 40 tokens; with max_new_tokens 5 that exceeds the room of a slot of 44"
    rooms = []
    monkeypatch.setattr(lines, "stream", lambda *_, capacity, **__: rooms.append(capacity) or [])
    for context in (None, 100, 10**9):
        run(model, tokenizer, source, tmp_path / "more", options={"context": context})
    assert rooms == [45, 100, 512]  # what is needed, what is asked for, what the model can


def test_a_line_without_end(model, tokenizer, tmp_path, monkeypatch):
    """It takes no more memory than a line may, and is answered with what is wrong; the others are as ever."""
    for module in (jsonl, lines):
        monkeypatch.setattr(module, "MAX_LINE", 100)
    monkeypatch.setattr(jsonl, "MAX_ANSWER", 2000)
    long = b'{"prompt": "' + b"w5 " * 1000 + b'"}\n'
    (tmp_path / "in").write_bytes(b'{"prompt": "w5"}\n' + long + b'{"prompt": "w6"}\n')
    run(model, tokenizer, tmp_path / "in", tmp_path / "out")
    got = answers(tmp_path / "out")
    assert [index for index in got if "error" in got[index]] == [1]
    assert got[1]["error"] == "the line is longer than 100 bytes" and got.keys() == {0, 1, 2}
    assert run(model, tokenizer, tmp_path / "in", tmp_path / "out").done == 3
    (tmp_path / "mine").write_bytes(b'{"index": 0, "text": "' + b"x" * 3000)  # too long for the torn end of an answer
    with pytest.raises(SaveError, match="line 1 is no answer"):
        Batch(tmp_path / "in", tmp_path / "mine")
    assert (tmp_path / "mine").stat().st_size > 3000


def test_what_a_line_is(model, tokenizer, tmp_path):
    """A mark at the beginning, Windows' ends, blank lines, no newline at the end: as other tools write them."""
    (tmp_path / "in").write_bytes(b'\xef\xbb\xbf{"prompt": "w5"}\r\n\r\n  \n\xef\xbb\xbf{"prompt": "w6\xe2\x80\xa8"}')
    run(model, tokenizer, tmp_path / "in", tmp_path / "out")
    got = answers(tmp_path / "out")
    assert {index: "error" in answer for index, answer in got.items()} == {0: False, 3: False}
    (tmp_path / "empty").write_text("")
    assert run(model, tokenizer, tmp_path / "empty", tmp_path / "none").done == 0
    assert (tmp_path / "none").read_bytes() == b""


def test_chat_makes_prompts_messages(model, tokenizer, tmp_path):
    source = write(tmp_path / "in", {"prompt": "w5"}, {"messages": [{"role": "user", "content": "w5"}]})
    run(model, tokenizer, source, tmp_path / "plain")
    run(model, tokenizer, source, tmp_path / "chat", chat=True)
    run(model, tokenizer, source, tmp_path / "brief", chat=True, thinking=False)
    plain, chat, brief = (answers(tmp_path / name) for name in ("plain", "chat", "brief"))
    assert plain[0]["text"] != plain[1]["text"] == chat[0]["text"] == chat[1]["text"]
    assert brief[0]["text"] == brief[1]["text"] != chat[0]["text"]
    with pytest.raises(TokenizerError, match="no chat template"):
        run(model, Tokenizer(tokenizer.backend, None, {}), source, tmp_path / "none", chat=True)


def test_the_seed_is_the_lines(model, tokenizer, tmp_path):
    """Equal prompts differ, and what a line draws does not depend on which others were done before."""
    source = write(tmp_path / "in", *[{"prompt": "w5"}] * 3)
    params = s3.SamplingParams(max_new_tokens=20, temperature=2.0, seed=4)
    run(model, tokenizer, source, tmp_path / "out", params)
    whole = answers(tmp_path / "out")
    assert len({answer["text"] for answer in whole.values()}) == 3
    (tmp_path / "out").write_text(json.dumps(whole[1]) + "\n")
    run(model, tokenizer, source, tmp_path / "out", params)
    assert answers(tmp_path / "out") == whole


def test_goes_on_from_any_byte(model, tokenizer, tmp_path):
    lines = [{"prompt": f"w{i}", "max_new_tokens": 1 + i} for i in range(4)]
    source, target = write(tmp_path / "in", *lines, "no JSON"), tmp_path / "out"
    run(model, tokenizer, source, target)
    content, whole = target.read_bytes(), answers(target)
    ends = [i + 1 for i, byte in enumerate(content) if byte == ord("\n")]
    cuts = {0, 1, 9, 12, *ends, *(end - 1 for end in ends), *(end + 5 for end in ends[:-1])}
    for cut in sorted(cuts):
        target.write_bytes(content[:cut] + (b"\0" * 3 if cut % 3 == 0 and cut not in ends else b""))
        kept = content[:cut].rfind(b"\n") + 1
        job = run(model, tokenizer, source, target)
        assert target.read_bytes()[:kept] == content[:kept]
        assert answers(target) == whole and (job.done, job.failed) == (5, 1)


def test_a_longer_input_goes_on(model, tokenizer, tmp_path):
    source, target = write(tmp_path / "in", {"prompt": "w5"}), tmp_path / "out"
    run(model, tokenizer, source, target)
    before = target.read_bytes()
    write(source, {"prompt": "w5"}, {"prompt": "w6"})
    run(model, tokenizer, source, target)
    assert target.read_bytes().startswith(before) and answers(target).keys() == {0, 1}


@pytest.mark.parametrize(
    "change",
    [
        {"lines": [{"prompt": "w7"}, {"prompt": "w6"}]},
        {"lines": [{"prompt": "w6"}, {"prompt": "w5"}]},
        {"lines": [{"prompt": "w5"}]},
        {"params": s3.SamplingParams(max_new_tokens=6)},
        {"chat": True},
        {"thinking": False},
        {"settings": {"model": "another"}},
    ],
    ids=["changed", "swapped", "shorter", "params", "chat", "thinking", "model"],
)
def test_another_input_or_option_is_refused(model, tokenizer, tmp_path, change):
    now: dict[str, Any] = {"settings": {"model": "this"}, **change}
    source, target = write(tmp_path / "in", {"prompt": "w5"}, {"prompt": "w6"}), tmp_path / "out"
    run(model, tokenizer, source, target, settings={"model": "this"})
    before = target.read_bytes()
    write(source, *now.pop("lines", [{"prompt": "w5"}, {"prompt": "w6"}]))
    with pytest.raises(SaveError, match=r"line [12] is an answer to another input, model or option"):
        run(model, tokenizer, source, target, **now)
    assert target.read_bytes() == before


@pytest.mark.parametrize(
    "content", [b"my notes\n", b"my notes", b'{"index": 0}\n', b'{"index": [], "digest": 0}\n', b'{"inde\n', b"7\n"]
)
def test_a_strangers_file_is_left_alone(tmp_path, content):
    source, target = write(tmp_path / "in", {"prompt": "w5"}), tmp_path / "out"
    target.write_bytes(content)
    with pytest.raises(SaveError, match="line 1 is no answer"):
        Batch(source, target)
    assert target.read_bytes() == content


def test_files_that_cannot_be(tmp_path):
    source, target = write(tmp_path / "in", {"prompt": "w5"}), tmp_path / "out"
    for bad, words in (
        ("a\0b", "cannot be read: embedded null byte"),
        (tmp_path / "nothing", "cannot be read: No such file"),
        (tmp_path, "is not a regular file"),
        (tmp_path / ("x" * 300), "cannot be read: File name too long"),
    ):
        with pytest.raises(OptionError, match=words):
            Batch(bad, target)
    with pytest.raises(OptionError, match="the input itself"):
        Batch(source, source)
    for bad, words in (
        (tmp_path, "Is a directory"),
        (tmp_path / "no" / "out", "No such file"),
        (Path("/dev/full"), "not a regular file"),
    ):
        with pytest.raises(SaveError, match=words):
            Batch(source, bad)


def test_one_writer_at_a_time(tmp_path):
    source = write(tmp_path / "in", {"prompt": "w5"})
    with Batch(source, tmp_path / "out"):
        with pytest.raises(SaveError, match="being written by another process"):
            Batch(source, tmp_path / "out")
        Batch(source, tmp_path / "other").close()
    Batch(source, tmp_path / "out").close()


def test_the_input_changes_under_way(model, tokenizer, tmp_path):
    source = write(tmp_path / "in", {"prompt": "w5"})
    with Batch(source, tmp_path / "out", PARAMS) as job:
        write(source, {"prompt": "w6"})
        with pytest.raises(DataError, match="has changed"):
            job.run(model, tokenizer)


@pytest.mark.parametrize("change", ["cut", "grown", "replaced", "gone"])
@pytest.mark.parametrize("context", [None, 100])
def test_the_end_of_a_changed_input_is_not_taken_for_its_end(model, tokenizer, tmp_path, monkeypatch, change, context):
    """Cut at a line's end, every line that is left is right; only the file tells that some are missing."""
    source, target = write(tmp_path / "in", *[{"prompt": f"w{i}"} for i in range(20)]), tmp_path / "out"
    whole = source.read_bytes()

    def spoil() -> None:
        if change == "cut":
            os.truncate(source, whole.index(b"\n", len(whole) // 2) + 1)
        elif change == "grown":
            source.write_bytes(whole + b'{"prompt": "w30"}\n')
        elif change == "replaced":  # by one whose every line is the same
            (tmp_path / "other").write_bytes(whole)
            os.replace(tmp_path / "other", source)
        else:
            source.unlink()

    with Batch(source, target, PARAMS) as job:
        real = job._lines

        def lines():
            for index, line in real():
                if index == 0:
                    spoil()
                yield index, line

        monkeypatch.setattr(job, "_lines", lines)
        words = (
            "cannot be read" if change == "gone" and context is None else r"has changed .* \d+ answers in .* are kept"
        )
        with pytest.raises((DataError, OptionError), match=words):
            job.run(model, tokenizer, slots=2, context=context)
    source.write_bytes(whole)
    assert run(model, tokenizer, source, target).done == 20
    assert answers(target).keys() == set(range(20))


def test_a_changed_input_has_exit_code_3(talking, tmp_path, monkeypatch, capsys):
    source = write(tmp_path / "in", {"prompt": "w5"}, {"prompt": "w6"})
    real = lines.stream

    def stream(*arguments: Any, **options: Any):
        yield from real(*arguments, **options)
        write(source, {"prompt": "w5"})

    monkeypatch.setattr(lines, "stream", stream)
    command = ["generate", "--model", talking, "--input", source, "--output", tmp_path / "out", "--max-new-tokens", 3]
    assert main([*map(str, command)]) == 3
    assert "has changed while it was read" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["slots", "context"])
def test_options_out_of_range(model, tokenizer, tmp_path, option):
    with pytest.raises(OptionError, match=f"{option} is 0"):
        run(model, tokenizer, write(tmp_path / "in"), tmp_path / "out", options={option: 0})


def test_a_full_disk(model, tokenizer, tmp_path, monkeypatch):
    """The line that did not fit is gone, those before it stay, and the run goes on once there is room."""
    source, target = write(tmp_path / "in", *[{"prompt": f"w{i}"} for i in range(5)]), tmp_path / "out"
    real, room = os.write, 300

    def full(file: int, data: Any) -> int:
        nonlocal room
        if room == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = real(file, bytes(data)[: min(room, 50)])  # in small pieces
        room -= written
        return written

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(SaveError, match=r"out cannot be written: No space left on device; the 2 lines in it are kept"):
        run(model, tokenizer, source, target)
    assert len(answers(target)) == 2
    monkeypatch.undo()
    run(model, tokenizer, source, target)
    assert answers(target).keys() == set(range(5))


# The command's file handling, with answers of many lengths that no model has to think of.
QUICK = """
import sys, time
from smollm3_jax.generation import jsonl, lines
from smollm3_jax.generation.requests import Delta

def stream(model, requests, **options):
    for number, request in enumerate(requests):
        time.sleep(0.0003)
        yield Delta(number, 0, (1,), "x" * request.params.seed, None, None, "stop")

class Anything:
    vocab_size, max_position_embeddings, eos_token_id, chat_template = 10, 10**9, (), None
    encode = lambda self, text, **options: [1]
    config = generation_config = property(lambda self: self)

lines.stream = stream
with jsonl.Batch(sys.argv[1], sys.argv[2]) as job:
    print("started", flush=True)
    job.run(Anything(), Anything(), context=1000)
"""


@FULL
def test_killed_at_any_moment(tmp_path):
    moments = random.Random(0)
    source, target = tmp_path / "in", tmp_path / "out"
    lines = [{"prompt": "x", "seed": moments.choice([10, 1000, 100_000])} for _ in range(3000)]
    write(source, *lines)
    killed, done = 0, 0
    while True:
        process = subprocess.Popen(
            [sys.executable, "-W", "error", "-c", QUICK, str(source), str(target)],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stdout and process.stderr
        assert process.stdout.readline() == "started\n", process.stderr.read()
        time.sleep(0.25 * moments.random())
        if killed < 6:
            process.kill()
        error = process.communicate()[1]
        found = [json.loads(line) for line in target.read_bytes().split(b"\n")[:-1]]
        assert len(found) >= done
        done = len(found)
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, error
        killed += 1
    got = answers(target)
    assert got.keys() == set(range(3000)) and killed >= 3
    assert all(len(got[i]["text"]) == lines[i]["seed"] for i in got)


@pytest.mark.slow
def test_killed_and_interrupted_for_real(talking, tmp_path):
    """The command itself: killed in the middle, then Ctrl-C, then to the end."""
    lines = [{"prompt": f"w{i % 160}", "max_new_tokens": 60, "ignore_eos": True} for i in range(150)]
    source, target = write(tmp_path / "in", *lines), tmp_path / "out"
    code = "import sys; from smollm3_jax.commands.main import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "generate", "--model", talking, "--input", source, "--output", target]
    seen = 0
    for end in (signal.SIGKILL, signal.SIGINT, None):
        process = subprocess.Popen(
            [*map(str, command), "--slots", "4"],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stderr=subprocess.PIPE,
            text=True,
        )
        deadline = time.monotonic() + 120
        while end and time.monotonic() < deadline and process.poll() is None:
            if target.exists() and target.read_bytes().count(b"\n") > seen + 5:
                process.send_signal(end)
                break
            time.sleep(0.01)
        error = process.communicate()[1]
        assert process.returncode == {signal.SIGKILL: -9, signal.SIGINT: 130, None: 0}[end], error
        if end == signal.SIGINT:
            assert "smollm3: interrupted; " in error and "the same command goes on" in error
        seen = target.read_bytes().count(b"\n")
    got = answers(target)
    assert got.keys() == set(range(150))
    assert {answer["completion_tokens"] for answer in got.values()} == {60}


def test_ctrl_c_keeps_what_is_done(talking, tmp_path, monkeypatch, capsys):
    source, target = write(tmp_path / "in", *[{"prompt": f"w{i}"} for i in range(5)]), tmp_path / "out"
    real = lines.stream

    def stream(*arguments: Any, **options: Any):
        for delta in real(*arguments, **options):
            if delta.request == 2:
                raise KeyboardInterrupt
            yield delta

    monkeypatch.setattr(lines, "stream", stream)
    command = ["generate", "--model", talking, "--input", source, "--output", target, "--max-new-tokens", 3]
    assert main([*map(str, command), "--slots", "1"]) == 130
    message = f"smollm3: interrupted; 2 of 5 lines are in {target}; the same command goes on from there\n"
    assert capsys.readouterr().err == message
    monkeypatch.undo()
    assert main([*map(str, command)]) == 0
    assert answers(target).keys() == set(range(5))


def test_the_command(talking, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0)
    source, target = write(tmp_path / "in", {"prompt": "w5"}, {"prompt": "w6", "n": 0}), tmp_path / "out"
    command = ["generate", "--model", talking, "--input", source, "--output", target, "--max-new-tokens", 3]
    assert main([*map(str, command)]) == 3
    out, err = capsys.readouterr()
    assert out == ""
    assert " of 2 lines, " in err
    assert f"smollm3: 2 lines in {target}, 1 of them errors; generated: 3 tokens in " in err
    assert main([*map(str, command)]) == 3
    assert capsys.readouterr().err == f"smollm3: 2 lines in {target}, 1 of them errors\n"
    assert main([*map(str, command), "--temperature", "1"]) == 3
    assert "another input, model or option" in capsys.readouterr().err
    # The same folder under another name is the same model.
    monkeypatch.chdir(talking.parent)
    command[2] = "talking/"
    assert main([*map(str, command)]) == 3
    assert "another" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--input", "{in}"], "--output"),
        (["--input", "{in}", "--output", "{out}", "--json"], "--json"),
        (["--input", "{in}", "--output", "{out}", "--slots", "0"], "slots"),
        (["--input", "{in}", "--output", "{out}", "--context", "1"], "context"),
        (["--input", "{out}", "--output", "{out}"], "No such file"),
        (["--prompt", "w5", "--output", "{out}"], "--output"),
        (["--prompt", "w5", "--slots", "2"], "--slots"),
        (["--prompt", "w5", "--context", "2"], "--context"),
    ],
)
def test_mistakes_of_the_command(talking, tmp_path, capsys, arguments, words):
    write(tmp_path / "in", {"prompt": "w5"})
    names = {"{in}": str(tmp_path / "in"), "{out}": str(tmp_path / "out")}
    assert main(["generate", "--model", str(talking), *[names.get(word) or word for word in arguments]]) == 2
    out, err = capsys.readouterr()
    assert out == "" and words in err and len(err.splitlines()) == 1


def test_a_chat_ends_with_the_tokenizers_end_too(talking: Path, model: s3.SmolLM3, tmp_path: Path):
    """config.json may know the end of a document alone, and the tokenizer that of a turn."""
    folder = tmp_path / "model"
    shutil.copytree(talking, folder)
    (folder / "tokenizer_config.json").write_text('{"eos_token": "w33"}')
    tokenizer = load_tokenizer(folder, ModelConfig.from_hf(folder))
    forced = {"max_new_tokens": 3, "logit_bias": {"33": 100.0}}
    messages = [{"role": "user", "content": "w5"}]
    source = write(
        tmp_path / "in",
        {"messages": messages, **forced},
        {"prompt": "w5", **forced},
        {"messages": messages, "ignore_eos": True, **forced},
        {"prompt": "w5", "stop": ["w33"], **forced},
    )
    run(model, tokenizer, source, tmp_path / "out")
    got = answers(tmp_path / "out")
    reasons = [(got[i]["finish_reason"], got[i]["completion_tokens"]) for i in range(4)]
    assert reasons == [("stop", 1), ("length", 3), ("length", 3), ("stop", 1)]


def test_a_stop_text_that_is_a_special_token_is_its_id(talking: Path, model: s3.SmolLM3, tmp_path: Path):
    """The text leaves special tokens out, so that it would never be found there."""
    tokenizer = load_tokenizer(talking, ModelConfig.from_hf(talking))
    tokenizer.backend.add_special_tokens(["w33"])
    forced = s3.SamplingParams(max_new_tokens=3, logit_bias={33: 100.0}, stop=["w33"])
    [found] = complete(model, [Request([5], forced)], tokenizer=tokenizer)
    assert (found.finish_reason, found.token_ids, found.text) == ("stop", [33], "")
    more = s3.SamplingParams(stop=["w33"], stop_token_ids=[*range(40, 55)])
    with pytest.raises(OptionError, match="stop_token_ids"):
        complete(model, [Request([5], more)], tokenizer=tokenizer)
    text = s3.SamplingParams(max_new_tokens=3, logit_bias={34: 100.0}, stop=["w34"])
    assert complete(model, [Request([5], text)], tokenizer=tokenizer)[0].finish_reason == "stop"


def test_a_prompt_too_long_for_its_default_gets_what_is_left(model, tokenizer, tmp_path):
    """512 tokens of context: 128 new ones are nobody's wish, 200 are."""
    source = write(tmp_path / "in", {"prompt": "w5 " * 500}, {"prompt": "w5 " * 500, "max_new_tokens": 20})
    run(model, tokenizer, source, tmp_path / "out", s3.SamplingParams(ignore_eos=True), fit=True)
    got = answers(tmp_path / "out")
    assert got[0]["completion_tokens"] == 12 and "exceeds" in got[1]["error"]
