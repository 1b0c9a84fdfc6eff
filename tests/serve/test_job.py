"""Whatever a body holds, it makes a job, or an error that a client can read."""

import json
import subprocess
import sys
from typing import Any

import pytest
from bodies import TEXT, VALUE, bodies
from hypothesis import given, settings
from hypothesis import strategies as st

from smollm3_jax.errors import OptionError
from smollm3_jax.serve.errors import ApiError, from_option
from smollm3_jax.serve.job import Job, parse
from smollm3_jax.serve.models import detokenize, tokenize


@pytest.mark.filterwarnings("ignore:Generating overly large repr")
@settings(max_examples=400)
@given(asked=bodies())
def test_a_body_makes_a_job_or_an_error(server, asked):
    kind, body = asked
    try:
        job = parse(kind, body, server)
    except ApiError as error:
        assert error.status in (400, 404) and error.message
        json.dumps(error.body(), allow_nan=False, ensure_ascii=False).encode()
        return
    assert isinstance(job, Job) and job.kind == kind and job.requests
    said = json.dumps([job.reply.begin(), job.reply.body()], allow_nan=False, ensure_ascii=False)
    said.encode()


NAMES = st.sampled_from(["prompt", "messages", "tokens", "tools", "add_special_tokens", "chat_template_kwargs"])


@pytest.mark.filterwarnings("ignore:Generating overly large repr")
@settings(max_examples=100)
@given(call=st.sampled_from([tokenize, detokenize]), body=st.dictionaries(NAMES | TEXT, VALUE, max_size=3) | VALUE)
def test_tokenize_answers_or_refuses(server, call, body):
    try:
        json.dumps(call(body, server), allow_nan=False)
    except ApiError as error:
        assert error.status in (400, 404)


@pytest.mark.parametrize("kind", ["chat", "completions", "responses"])
@pytest.mark.parametrize("body", [None, [], "Hi", 5, True])
def test_a_body_is_an_object(server, kind, body):
    """S1."""
    with pytest.raises(ApiError, match="must be a JSON object"):
        parse(kind, body, server)


@pytest.mark.parametrize("kind", ["chat", "completions", "responses"])
def test_bodies_as_deep_as_can_be_are_refused(server, kind):
    """S2."""
    deep: Any = []
    for _ in range(10_000):
        deep = [deep]
    for field in ("metadata", "tools", "messages", "prompt", "input", "surprise"):
        with pytest.raises(ApiError, match="nested deeper than 100 levels"):
            parse(kind, {field: deep}, server)


def test_errors_quote_nothing_harmful():
    error = ApiError(400, "\ud800\x1b[31m" + "x" * 10**6, param="\ud800" * 1000)
    body = json.dumps(error.body(), ensure_ascii=False)
    assert len(body.encode()) < 20_000 and "\x1b" not in body


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ("temperature is -1; it must be a number", "temperature"),
        ("messages[0].content[1] is a part", "messages[0].content[1]"),
        ("stop names the id 5", "stop"),
        ("stop texts need a tokenizer", None),
        ("max_thinking_tokens needs a tokenizer that has <think>", "max_thinking_tokens"),
        ("the text holds a token", None),
    ],
)
def test_an_error_is_about_what_it_begins_with(message, param):
    assert from_option(OptionError(message)).param == param


def test_no_http_is_loaded():
    names = "starlette uvicorn llguidance"
    code = f"import sys, smollm3_jax.serve.job; print([m for m in '{names}'.split() if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"
