"""Whatever a body holds, it makes a job, or an error that a client can read."""

import json
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smollm3_jax.errors import OptionError
from smollm3_jax.serve.errors import ApiError, from_option
from smollm3_jax.serve.job import Job, parse
from smollm3_jax.serve.models import detokenize, tokenize

TEXT = st.sampled_from(
    ["", "Hi", "auto", "none", "required", "user", "text", "function", "\ud800", "<|im_end|>", "é\x00"]
)
NUMBER = st.sampled_from([0, 1, -1, 2, 0.5, 2**31, 2**32, 10**25, -(10**400), 1e308, float("nan"), float("inf"), True])
VALUE = st.recursive(
    st.none() | NUMBER | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
PART = st.fixed_dictionaries({"type": st.sampled_from(["text", "input_text", "image_url"])}, optional={"text": VALUE})
CALL = st.fixed_dictionaries({"type": st.just("function")}, optional={"function": VALUE, "id": VALUE})
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "user", "assistant", "tool", "developer"]) | VALUE},
    optional={
        "content": st.just("Hi") | st.lists(PART | VALUE, max_size=2) | VALUE,
        "tool_calls": st.lists(CALL | VALUE, max_size=2) | VALUE,
        "reasoning": VALUE,
        "reasoning_content": VALUE,
        "tool_call_id": VALUE,
        "name": VALUE,
    },
)
ITEM = MESSAGE | st.fixed_dictionaries(
    {"type": st.sampled_from(["message", "function_call", "function_call_output", "reasoning"])},
    optional={name: VALUE for name in ("arguments", "name", "call_id", "output", "content", "summary", "role", "id")},
)
TOOL = st.fixed_dictionaries(
    {"type": st.just("function")},
    optional={
        "name": TEXT,
        "function": st.fixed_dictionaries(
            {"name": st.just("f") | VALUE}, optional={"parameters": VALUE, "strict": VALUE}
        ),
    },
)
FIELDS = {
    "model": VALUE,
    "messages": st.just([{"role": "user", "content": "Hi"}]) | st.lists(MESSAGE | VALUE, max_size=3),
    "prompt": st.lists(VALUE, max_size=3) | VALUE,
    "tokens": st.lists(NUMBER, max_size=3) | VALUE,
    "input": st.lists(ITEM | VALUE, max_size=3) | VALUE,
    "tools": st.lists(TOOL | VALUE, max_size=2) | VALUE,
    "stream_options": st.fixed_dictionaries({}, optional={"include_usage": VALUE}) | VALUE,
    "response_format": st.fixed_dictionaries({"type": TEXT}, optional={"json_schema": VALUE}) | VALUE,
    "chat_template_kwargs": st.fixed_dictionaries(
        {}, optional={name: VALUE for name in ("enable_thinking", "custom_instructions", "xml_tools", "python_tools")}
    ),
    "reasoning": st.fixed_dictionaries({}, optional={"effort": VALUE}) | VALUE,
    "text": st.fixed_dictionaries({}, optional={"format": VALUE}) | VALUE,
}
PLAIN = "temperature top_p min_p top_k n seed stop stop_token_ids logit_bias logprobs top_logprobs presence_penalty"
PLAIN += " frequency_penalty repetition_penalty max_tokens max_completion_tokens max_output_tokens max_thinking_tokens"
PLAIN += " stream echo suffix best_of ignore_eos tool_choice parallel_tool_calls reasoning_effort instructions include"
PLAIN += " previous_response_id background truncation metadata user store modalities cache_salt functions surprise"
FIELDS |= {name: VALUE for name in PLAIN.split()}
BODY = st.dictionaries(st.sampled_from(sorted(FIELDS)), st.none(), max_size=4).flatmap(
    lambda chosen: st.fixed_dictionaries({name: FIELDS[name] for name in chosen})
)


@pytest.mark.filterwarnings("ignore:Generating overly large repr")
@settings(max_examples=400)
@given(kind=st.sampled_from(["chat", "completions", "responses"]), body=BODY, whole=st.booleans())
def test_a_body_makes_a_job_or_an_error(server, grammars_always, kind, body, whole):
    first = {"chat": "messages", "completions": "prompt", "responses": "input"}[kind]
    usual = {"messages": [{"role": "user", "content": "Hi"}], "prompt": "Hi", "input": "Hi"}[first]
    body = {first: usual} | body if whole else body
    try:
        job = parse(kind, body, server)
    except ApiError as error:
        assert error.status in (400, 404) and error.message
        json.dumps(error.body(), allow_nan=False, ensure_ascii=False).encode()
        return
    assert isinstance(job, Job) and job.kind == kind and job.requests
    said = json.dumps([job.reply.begin(), job.reply.body()], allow_nan=False, ensure_ascii=False)
    said.encode()


@pytest.mark.filterwarnings("ignore:Generating overly large repr")
@settings(max_examples=100)
@given(call=st.sampled_from([tokenize, detokenize]), body=BODY | VALUE)
def test_tokenize_answers_or_refuses(server, call, body):
    try:
        json.dumps(call(body, server), allow_nan=False)
    except ApiError as error:
        assert error.status in (400, 404)


@pytest.mark.parametrize("kind", ["chat", "completions", "responses"])
@pytest.mark.parametrize("body", [None, [], "Hi", 5, True])
def test_a_body_is_an_object(server, kind, body):
    with pytest.raises(ApiError, match="must be a JSON object"):
        parse(kind, body, server)


@pytest.mark.parametrize("kind", ["chat", "completions", "responses"])
def test_bodies_as_deep_as_can_be_are_refused(server, kind):
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
        ("the text holds a token", None),
    ],
)
def test_an_error_is_about_what_it_begins_with(message, param):
    assert from_option(OptionError(message)).param == param


def test_no_http_is_loaded():
    code = "import sys, smollm3_jax.serve.job; print([m for m in 'starlette uvicorn llguidance'.split() if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"
