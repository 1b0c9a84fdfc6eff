"""Bodies of /v1/chat/completions and their answers, with the released tokenizer and template."""

import copy
import dataclasses
import json
from datetime import datetime
from itertools import zip_longest
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from said import answer, deltas, ids_of, prompt_text
from tiny import talking_checkpoint

from smollm3_jax.chat.template import encode_chat
from smollm3_jax.generation import grammar
from smollm3_jax.serve.conversation import BUDGETS
from smollm3_jax.serve.errors import ApiError
from smollm3_jax.serve.job import Job, Server, parse
from smollm3_jax.tokenizer import load_tokenizer

HI = [{"role": "user", "content": "Hi"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
NOW = {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}
THOUGHT = "<think>\nThe user says hi 👋🏽.\n</think>\n"
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Århus"}}\n</tool_call>'
EMPTY_CALL = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
END = "<|im_end|>"


def chat(server: Server, **fields: Any) -> Job:
    return parse("chat", {"messages": HI, **fields}, server)


def refused(server: Server, **fields: Any) -> ApiError:
    with pytest.raises(ApiError) as error:
        chat(server, **fields)
    assert error.value.body()["error"].keys() == {"message", "type", "param", "code"}
    return error.value


def joined(events: list[Any]) -> dict[str, Any]:
    """What a client makes of a stream: the body of the same answer, but for its `usage`."""
    *events, (name, last) = events
    assert (name, last) == (None, "[DONE]")
    choices: dict[int, dict[str, Any]] = {}
    for name, chunk in events:
        assert name is None
        ChatCompletionChunk.model_validate(chunk, strict=True)
        assert chunk["object"] == "chat.completion.chunk"
        for part in chunk["choices"]:
            new = {"index": part["index"], "message": {}, "logprobs": None, "finish_reason": None}
            choice = choices.setdefault(part["index"], new)
            assert choice["finish_reason"] is None, "a chunk after the last"
            message, delta = choice["message"], part["delta"]
            for field in ("role", "content", "reasoning", "reasoning_content"):
                if field in delta:
                    assert field != "role" or not message
                    message[field] = message.get(field, "") + delta[field]
            for call in delta.get("tool_calls", []):
                calls = message.setdefault("tool_calls", [])
                assert call["index"] == len(calls)
                calls.append({key: value for key, value in call.items() if key != "index"})
            if part["logprobs"]:
                listed = choice["logprobs"] or {"content": [], "refusal": None}
                choice["logprobs"] = listed | {"content": listed["content"] + part["logprobs"]["content"]}
            choice["finish_reason"] = part["finish_reason"]
    return {"choices": [choices[i] for i in sorted(choices)]}


def without_nothing(body: dict[str, Any]) -> dict[str, Any]:
    """An answer's choices, without fields that hold nothing: streams do not send those."""
    body = copy.deepcopy({"choices": body["choices"]})
    for choice in body["choices"]:
        choice["message"] = {name: value for name, value in choice["message"].items() if value}
        if choice["logprobs"] is not None and not choice["logprobs"]["content"]:
            choice["logprobs"] = None
    return body


def message_of(server: Server, job: Job, text: str) -> dict[str, Any]:
    body = answer(server, job, text)[1]
    ChatCompletion.model_validate(body, strict=True)
    return body["choices"][0]["message"]


def test_a_plain_answer(server):
    body = answer(
        server, chat(server, seed=7, user="me", metadata={}, store=True, service_tier="auto"), "Hello!" + END
    )[1]
    ChatCompletion.model_validate(body, strict=True)
    assert body["object"] == "chat.completion" and body["model"] == server.name and body["seed"] == 7
    [choice] = body["choices"]
    assert choice == {
        "index": 0,
        "message": {
            "role": "assistant",
            "content": "Hello!",
            "refusal": None,
            "reasoning_content": None,
            "reasoning": None,
        },
        "logprobs": None,
        "finish_reason": "stop",
    }
    prompt = len(encode_chat(server.tokenizer, HI, add_generation_prompt=True))
    assert body["usage"] == {
        "prompt_tokens": prompt,
        "completion_tokens": 3,
        "total_tokens": prompt + 3,
        "prompt_tokens_details": {"cached_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": 0},
    }


def test_a_seed_is_drawn(server):
    first, second = chat(server), chat(server)
    assert first.requests[0].params.seed != second.requests[0].params.seed
    assert first.reply.body()["seed"] == first.requests[0].params.seed


def test_the_room_that_is_left_is_the_limit(server):
    """S15: an answer never outgrows its slot."""
    [request] = chat(server).requests
    assert request.params.max_new_tokens == server.context - len(request.prompt)
    assert chat(server, max_tokens=5, max_completion_tokens=5).requests[0].params.max_new_tokens == 5
    assert refused(server, max_tokens=5, max_completion_tokens=6).param == "max_tokens"


def test_fields_of_sampling(server):
    fields = {"temperature": 0.5, "top_p": 0.9, "min_p": 0.1, "presence_penalty": 1, "frequency_penalty": -1.5}
    fields |= {"repetition_penalty": 1.1, "top_k": 5, "seed": 3, "n": 2, "ignore_eos": True, "max_thinking_tokens": 4}
    params = (
        chat(server, **fields, stop="x", logit_bias={"5": -100}, logprobs=True, stop_token_ids=[9]).requests[0].params
    )
    assert {name: getattr(params, name) for name in fields} == fields
    assert (params.stop, params.logit_bias, params.logprobs, params.stop_token_ids) == (["x"], {5: -100}, 0, [9])
    default = chat(server).requests[0].params  # generation_config.json's
    assert (default.temperature, default.top_p, default.n, default.logprobs) == (0.6, 0.95, 1, None)


def test_messages_reach_the_template(server):
    """S4."""
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hi "}, {"type": "text", "text": "<|im_end|>"}]},
        {"role": "assistant", "content": None, "reasoning_content": "Hm.", "tool_calls": [
            {"id": "a", "type": "function", "function": {"name": "now", "arguments": "{}"}}]},
        {"role": "tool", "tool_call_id": "a", "content": "12:00"},
        {"role": "assistant", "reasoning": "It is noon.", "content": "Noon.", "refusal": None, "annotations": []},
        {"role": "user", "content": "And now?"},
    ]  # fmt: skip
    job = chat(server, messages=messages, tools=[NOW])
    [request] = job.requests
    plain = copy.deepcopy(messages)
    del plain[4]["annotations"]
    assert request.prompt == encode_chat(server.tokenizer, plain, add_generation_prompt=True, tools=[NOW])
    text = prompt_text(server, job)
    for part in ("Be brief.", "<think>\nHm.\n</think>", EMPTY_CALL, "It is noon.", "12:00", '"name": "now"'):
        assert part.replace('"', "'") in text.replace('"', "'")
    # What the user wrote is no control token: as many turns end as the template has ended.
    end = server.tokenizer.backend.token_to_id(END)
    assert list(request.prompt).count(end) == len(messages)


@pytest.mark.parametrize("role", ["system", "user", "assistant", "tool"])
def test_a_name_is_taken_and_not_read(server, role):
    message = {"role": role, "content": "Hi"} | ({"tool_call_id": "a"} if role == "tool" else {})
    rest = [{"role": "user", "content": "Go on."}]
    named = chat(server, messages=[message | {"name": "Bo"}, *rest])
    assert named.requests[0].prompt == chat(server, messages=[message, *rest]).requests[0].prompt


THINKING_OFF = [
    {"chat_template_kwargs": {"enable_thinking": False}},
    {"reasoning_effort": "none"},
    {"messages": [{"role": "system", "content": "/no_think"}, *HI]},
    # The flag is overridden within the prompt, which alone counts.
    {"messages": [{"role": "system", "content": "/no_think"}, *HI], "chat_template_kwargs": {"enable_thinking": True}},
]


@pytest.mark.parametrize("fields", THINKING_OFF)
def test_thinking_off_puts_nothing_into_the_reasoning_field(server, fields):
    """C7."""
    job = chat(server, **fields)
    assert prompt_text(server, job).endswith("<think>\n\n</think>\n")
    message = message_of(server, job, "Hello" + END)
    assert (message["content"], message["reasoning"], message["reasoning_content"]) == ("Hello", None, None)


def test_thinking_on(server):
    """C8."""
    job = chat(server)
    body = answer(server, job, THOUGHT + "Hello" + END)[1]
    message = body["choices"][0]["message"]
    assert message["reasoning"] == message["reasoning_content"] == "The user says hi 👋🏽."
    assert message["content"] == "Hello"
    thought = len(ids_of(server.tokenizer, THOUGHT.removesuffix("\n")))
    assert body["usage"]["completion_tokens_details"] == {"reasoning_tokens": thought}
    # What a client sends back is what the model said.
    again = chat(server, messages=[*HI, message, *HI])
    assert THOUGHT + "Hello" in prompt_text(server, again)


def test_a_prompt_that_ends_within_thinking(server):
    """A template may open the thinking, and then the answer begins within it."""
    template = server.tokenizer.chat_template.replace(
        '"<|im_start|>assistant\\n" }}', '"<|im_start|>assistant\\n<think>\\n" }}'
    )
    opened = Server(**{**vars(server), "tokenizer": replaced(server.tokenizer, template)})
    job = chat(opened)
    assert prompt_text(opened, job).endswith("<think>\n")
    message = message_of(opened, job, "Hm.\n</think>\nHello" + END)
    assert (message["content"], message["reasoning"]) == ("Hello", "Hm.")


def test_a_tag_in_a_system_message_opens_nothing(server):
    job = chat(server, messages=[{"role": "system", "content": "Reason within <think> tags. /think"}, *HI])
    message = message_of(server, job, "Hello" + END)
    assert (message["content"], message["reasoning"]) == ("Hello", None)


def replaced(tokenizer: Any, template: str) -> Any:
    return type(tokenizer)(tokenizer.backend, template, tokenizer.special_tokens)


def test_effort_is_a_budget(server):
    assert all(
        chat(server, reasoning_effort=effort).requests[0].params.max_thinking_tokens == budget
        for effort, budget in BUDGETS.items()
    )
    assert chat(server, reasoning_effort="low", max_thinking_tokens=7).requests[0].params.max_thinking_tokens == 7
    assert refused(server, reasoning_effort="huge").param == "reasoning_effort"
    both = {"reasoning_effort": "none", "chat_template_kwargs": {"enable_thinking": True}}
    assert refused(server, **both).param == "reasoning_effort"


def test_calls(server):
    """C5."""
    job = chat(server, tools=[WEATHER, NOW])
    events, body = answer(server, job, f"{THOUGHT}Let me look.\n{CALL}\n{EMPTY_CALL}{END}")
    ChatCompletion.model_validate(body, strict=True)
    [choice] = body["choices"]
    assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] == "Let me look."
    functions = [call["function"] for call in choice["message"]["tool_calls"]]
    assert functions == [{"name": "get_weather", "arguments": '{"city": "Århus"}'}, {"name": "now", "arguments": "{}"}]
    assert len({call["id"] for call in choice["message"]["tool_calls"]}) == 2
    deltas = [chunk["choices"][0]["delta"] for _, chunk in events[:-1]]
    assert [call["index"] for delta in deltas for call in delta.get("tool_calls", [])] == [0, 1]
    [call] = message_of(server, chat(server, tools=[NOW]), LIST_CALL + END)["tool_calls"]
    assert json.loads(call["function"]["arguments"]) == {"zones": ["a", ["b", 1], {}, []]}


def test_an_answer_of_calls_alone_has_no_content(server):
    assert message_of(server, chat(server, tools=[NOW]), EMPTY_CALL + END)["content"] is None


def test_one_call_where_they_may_not_be_parallel(server):
    job = chat(server, tools=[WEATHER, NOW], parallel_tool_calls=False)
    assert len(message_of(server, job, f"{CALL}\n{EMPTY_CALL}{END}")["tool_calls"]) == 1


@pytest.mark.parametrize("fields", [{}, {"tools": [NOW], "tool_choice": "none"}, {"tools": []}])
def test_without_tools_a_call_is_text(server, fields):
    text = f"See <code>now()</code>:\n{EMPTY_CALL}"
    message = message_of(server, chat(server, **fields), text + END)
    assert message["content"] == text and "tool_calls" not in message


def test_a_call_of_a_function_that_nobody_has_is_text(server):
    message = message_of(server, chat(server, tools=[NOW]), CALL + END)
    assert message["content"] == CALL and "tool_calls" not in message


@pytest.mark.parametrize("code", ["now()\nget_weather('Rome')", "get_weather('Rome')\nnow()"])
def test_a_block_with_a_call_of_such_a_function_is_text_once(server, code):
    job = chat(server, chat_template_kwargs={"python_tools": ["def now(): ..."]})
    message = message_of(server, job, f"Look:\n<code>{code}</code>{END}")
    assert message["content"] == f"Look:\n<code>{code}</code>" and "tool_calls" not in message


def test_tags_in_a_formatted_answer_are_text(server):
    const = "a <think> b <tool_call> <code>"
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"const": const}}}
    for thought, before in (("", None), (THOUGHT, "The user says hi 👋🏽.")):
        job = chat(server, response_format=form)
        # The tags in letters, as a grammar has them in a string.
        parts = json.dumps(const).replace("<", "|<|").split("|")
        text = [token for part in parts for token in ids_of(server.tokenizer, part)]
        [events, body] = answer(
            server, job, [*ids_of(server.tokenizer, thought), *text, *ids_of(server.tokenizer, END)]
        )
        message = body["choices"][0]["message"]
        assert (message["content"], message["reasoning"]) == (json.dumps(const), before)
        assert without_nothing(joined(events)) == without_nothing(body)


def test_a_model_without_think_tokens_writes_of_them(server):
    content = json.loads(server.tokenizer.backend.to_str())
    content["added_tokens"] = [one for one in content["added_tokens"] if "think" not in one["content"]]
    backend = type(server.tokenizer.backend).from_str(json.dumps(content))
    tokenizer = type(server.tokenizer)(backend, server.tokenizer.chat_template, server.tokenizer.special_tokens)
    other = dataclasses.replace(server, tokenizer=tokenizer)
    text = "Models write <think> first, then </think>."
    message = message_of(other, chat(other), text + END)
    assert (message["content"], message["reasoning"]) == (text, None)


def test_calls_in_python(server):
    """C14."""
    tools = {
        "python_tools": ["def get_weather(city: str, days: int = 1) -> str: ...", "def now():\n    '''The time.'''"]
    }
    job = chat(server, chat_template_kwargs=tools)
    assert tools["python_tools"][0] in prompt_text(server, job)
    text = "<code>\nget_weather('Århus', days=2)\nnow()\n</code>"
    calls = message_of(server, job, text + END)["tool_calls"]
    assert [call["function"] for call in calls] == [
        {"name": "get_weather", "arguments": '{"city": "Århus", "days": 2}'},
        {"name": "now", "arguments": "{}"},
    ]


def test_tools_through_the_templates_own_names(server):
    job = chat(server, chat_template_kwargs={"xml_tools": [WEATHER]})
    assert job.requests[0].prompt == chat(server, tools=[WEATHER]).requests[0].prompt
    assert message_of(server, job, CALL + END)["tool_calls"][0]["function"]["name"] == "get_weather"


def test_custom_instructions(server):
    kwargs = {"custom_instructions": "Answer in verse."}
    assert "Answer in verse." in prompt_text(server, chat(server, chat_template_kwargs=kwargs))
    system = [{"role": "system", "content": "Be brief."}, *HI]  # takes their place in the template
    error = refused(server, messages=system, chat_template_kwargs=kwargs)
    assert error.param == "chat_template_kwargs.custom_instructions"


def test_forced_calls_are_grammars(server):
    """C6."""
    job = chat(server, tools=[WEATHER, NOW], tool_choice="required")
    given = [WEATHER, NOW]
    assert job.requests[0].grammar == grammar.tool_calls(given, names=None, parallel=True, style="xml")
    body = answer(server, job, f"{THOUGHT}{CALL}{END}")[1]
    assert body["choices"][0]["finish_reason"] == "tool_calls"
    named = {"type": "function", "function": {"name": "now"}}
    job = chat(server, tools=[WEATHER, NOW], tool_choice=named)
    assert job.requests[0].grammar == grammar.tool_calls(given, names=["now"], parallel=False, style="xml")


@pytest.mark.parametrize("whole", ["", CALL + "\n"])
@pytest.mark.parametrize("choice", ["required", "auto"])
def test_a_forced_call_that_a_limit_cuts_is_no_text(server, whole, choice):
    """What a model writes of itself is shown as it is."""
    text = THOUGHT + whole + CALL[:40]
    job = chat(server, tools=[WEATHER, NOW], tool_choice=choice, max_tokens=len(ids_of(server.tokenizer, text)))
    events, body = answer(server, job, text)
    message = body["choices"][0]["message"]
    assert body["choices"][0]["finish_reason"] == "length"
    assert len(message.get("tool_calls") or ()) == bool(whole)
    assert bool(message["content"]) == (choice == "auto")
    assert ("tool_call>" in json.dumps(events)) == (choice == "auto")


def test_formats_are_grammars(server):
    """S10."""
    schema = {"type": "object"}
    form = {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": schema}}
    assert chat(server, response_format=form).requests[0].grammar == grammar.json_schema(schema)
    assert chat(server, response_format={"type": "json_object"}).requests[0].grammar == grammar.json_object()
    assert chat(server, response_format={"type": "text"}).requests[0].grammar is None
    form["json_schema"]["schema"] = {"type": "impossible"}
    assert refused(server, response_format=form).param == "response_format.json_schema.schema"
    assert refused(server, response_format={"type": "json_object"}, tools=[NOW]).param == "tools"
    forced = chat(server, response_format={"type": "json_object"}, tools=[NOW], tool_choice="required")
    assert forced.requests[0].grammar == grammar.tool_calls([NOW], names=None, parallel=True, style="xml")
    broken = {"type": "function", "function": {"name": "f", "parameters": {"type": "impossible"}}}
    assert refused(server, tools=[broken], tool_choice="required").param == "tools"


def test_grammars_that_the_tokenizer_cannot_have_are_named(server, tmp_path):
    other = dataclasses.replace(server, tokenizer=load_tokenizer(talking_checkpoint(tmp_path)))
    error = refused(other, response_format={"type": "json_object"})
    assert error.param == "response_format" and "with this model's tokenizer" in error.message
    assert refused(other, tools=[NOW], tool_choice="required").param == "tools"
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"$ref": "#"}}}
    assert refused(server, response_format=form).param == "response_format"  # which no answer satisfies


def test_tools_that_the_template_does_not_know(server):
    plain = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
    other = Server(**{**vars(server), "tokenizer": replaced(server.tokenizer, plain)})
    error = refused(other, tools=[WEATHER])
    assert error.param == "tools" and "tools" in error.message
    job = chat(other, tools=[WEATHER], tool_choice="required")
    assert "get_weather" in prompt_text(other, job) and job.requests[0].grammar is not None
    # The released template drops tools under this system message.
    system = [{"role": "system", "content": "You are a pirate. /system_override"}, *HI]
    assert refused(server, messages=system, tools=[WEATHER]).param == "tools"


def test_logprobs(server):
    text = "Hé 👋🏽!"
    ids = ids_of(server.tokenizer, text)
    body = answer(server, chat(server, logprobs=True, top_logprobs=2), text + END)[1]
    listed = body["choices"][0]["logprobs"]["content"]
    assert [entry["logprob"] for entry in listed] == [-i / 8 for i in range(len(ids))]  # without the end
    assert bytes(byte for entry in listed for byte in entry["bytes"]).decode() == text
    assert any(entry["token"].startswith("bytes:\\xf0") for entry in listed)
    assert [[top["logprob"] for top in entry["top_logprobs"]] for entry in listed] == [[0, -1 / 8]] * len(ids)
    ChatCompletion.model_validate(body, strict=True)


def test_stop_texts_are_neither_text_nor_tokens(server):
    """C9."""
    for ending in ("", END):
        body = answer(server, chat(server, logprobs=True, stop=[" STOP here"]), f"One two STOP here{ending}")[1]
        [choice] = body["choices"]
        assert choice["message"]["content"] == "One two" and choice["finish_reason"] == "stop"
        assert "".join(entry["token"] for entry in choice["logprobs"]["content"]) == "One two"


LIST_CALL = '<tool_call>\n{"name": "now", "arguments": {"zones": ["a", ["b", 1], {}, []]}}\n</tool_call>'
PIECES = [
    THOUGHT,
    CALL,
    EMPTY_CALL,
    LIST_CALL,
    "\n",
    "Hello",
    " wörld 👩‍👩‍👧",
    "STO",
    "STOP",
    "<tool_call>",
    "</think>",
]
TEXTS = st.lists(st.sampled_from([*PIECES, "<code>", "x" * 20])).map("".join)


@pytest.mark.filterwarnings("ignore:Generating overly large repr")
@settings(max_examples=150)
@given(
    text=TEXTS,
    cuts=st.lists(st.integers(1, 80)),
    ends=st.booleans(),
    fields=st.fixed_dictionaries(
        {},
        optional={
            "tools": st.just([WEATHER, NOW]),
            "parallel_tool_calls": st.booleans(),
            "stop": st.just(["STOP", "wör"]),
            "logprobs": st.just(True),
            "reasoning_effort": st.just("none"),
            "max_tokens": st.integers(1, 30),
        },
    ),
)
def test_an_answer_in_pieces_is_the_answer_in_one(server, text, cuts, ends, fields):
    """C5, C9, C10: Streamed, plain, and however the tokens came."""
    ids = ids_of(server.tokenizer, text + END * ends)
    if not ends:  # but by a limit
        fields = {"max_tokens": max(len(ids), 1)} | fields
    ids = ids if len(ids) >= fields.get("max_tokens", 1) else [*ids, *ids_of(server.tokenizer, END)]
    job, whole = chat(server, seed=1, **fields), chat(server, seed=1, **fields)
    events, body = answer(server, job, ids, cuts=cuts)
    ChatCompletion.model_validate(body, strict=True)
    streamed = joined(events)
    assert without_nothing(streamed) == without_nothing(body)
    one = answer(server, whole, ids)[1]
    for each in (body, one):
        for choice in each["choices"]:
            for i, call in enumerate(choice["message"].get("tool_calls", [])):
                call["id"] = i
    assert (body["choices"], body["usage"]) == (one["choices"], one["usage"])


def test_several_samples(server):
    """C10."""
    job = chat(server, n=2, stream=True, stream_options={"include_usage": True})
    assert job.stream
    events, body = answer(server, job, "One" + END, THOUGHT + "Two" + END)
    assert without_nothing(joined(events)) == without_nothing(body)
    assert [choice["message"]["content"] for choice in body["choices"]] == ["One", "Two"]
    (_, last), done = events[-2:]
    assert done == (None, "[DONE]") and last["choices"] == [] and last["usage"] == body["usage"]
    assert all(chunk["usage"] is None for _, chunk in events[:-2])
    assert body["usage"]["completion_tokens"] == 2 + 2 + len(ids_of(server.tokenizer, THOUGHT))
    json.dumps([events, body])


def test_usage_with_each_chunk(server):
    options = {"include_usage": True, "continuous_usage_stats": True}
    job = chat(server, stream=True, stream_options=options)
    events, body = answer(server, job, "One two three" + END, cuts=[1, 2])
    counts = [chunk["usage"]["completion_tokens"] for _, chunk in events[:-1]]
    assert counts == [0, 1, 2, 4, 4, 4] and events[-2][1]["usage"] == body["usage"]


def test_cached_tokens(server):
    job = chat(server, n=2)
    for sample in (0, 1):
        [delta] = deltas(server, job.requests[0], ids_of(server.tokenizer, "One" + END), sample=sample)
        job.reply.add(0, dataclasses.replace(delta, cached_tokens=16))
    assert job.reply.body()["usage"]["prompt_tokens_details"] == {"cached_tokens": 16}


def test_what_was_cut_off(server):
    body = answer(server, chat(server, max_tokens=2, tools=[NOW]), "One two three")[1]
    assert body["choices"][0]["finish_reason"] == "length"
    body = answer(server, chat(server, max_tokens=3, tools=[NOW]), EMPTY_CALL)[1]
    assert body["choices"][0]["message"]["content"].startswith("<tool_call>")  # nothing is lost


IMAGE = {"type": "image_url", "image_url": {"url": "data:"}}
# fields -> what the error is about, and a part of its message.
REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"messages": None}, "messages", "at least one message"),
    ({"messages": []}, "messages", "at least one message"),
    ({"messages": [{}]}, "messages[0].content", "missing"),
    ({"messages": ["Hi"]}, "messages[0]", "an object"),
    ({"messages": [{"role": "king", "content": "Hi"}]}, "messages[0].role", "one of"),
    ({"messages": [{"role": ["user"], "content": "Hi"}]}, "messages[0].role", "one of"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "a string or a list"),
    ({"messages": [{"role": "user", "content": None}]}, "messages[0].content", "missing"),
    ({"messages": [{"role": "user", "content": [IMAGE]}]}, "messages[0].content[0]", "image_url"),
    ({"messages": [{"role": "user", "content": "Hi", "name": 5}]}, "messages[0].name", "a string"),
    ({"messages": [{"role": "user", "content": "Hi", "nam": "Bo"}]}, "messages[0].nam", "no field nam; use name"),
    ({"messages": [*HI, {"role": "system", "content": "x"}]}, "messages[1]", "only messages[0]"),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages", "surrogate"),
    ({"frobnicate": 5}, "frobnicate", "no field frobnicate; it has"),
    ({"guided_json": {}}, "guided_json", '"type": "json_schema"'),
    ({"temperature": -1}, "temperature", "0 (greedy) or more"),
    ({"temperature": "1"}, "temperature", "a number"),
    ({"temperature": True}, "temperature", "a number"),
    ({"temperature": float("nan")}, "temperature", "no JSON number"),
    ({"temperature": 10**400}, "temperature", "digits"),
    ({"top_p": 0}, "top_p", "above 0"),
    ({"top_p": 2}, "top_p", "at most 1"),
    ({"n": 10**6}, "n", "from 1 to 128"),
    ({"max_tokens": 0}, "max_tokens", "at least 1"),
    ({"max_tokens": -1}, "max_tokens", "at least 1"),
    ({"max_completion_tokens": 10**18}, "max_completion_tokens", "maximum context length"),
    ({"seed": 10**30}, "seed", "a whole number"),
    ({"seed": 2**32}, "seed", "2**32 - 1"),
    ({"stop": ["x"] * 10_000}, "stop", "at most 16"),
    ({"stop": [""]}, "stop", "1 to 1000"),
    ({"stop": 5}, "stop", "a text or a list"),
    ({"logit_bias": {"999999": 1}}, "logit_bias", "999999"),
    ({"logit_bias": {"x": 1}}, "logit_bias.x", "token ids"),
    ({"logit_bias": {"1": "a"}}, "logit_bias.1", "numbers"),
    ({"logit_bias": [1]}, "logit_bias", "an object"),
    ({"logprobs": 5}, "logprobs", "true or false"),
    ({"top_logprobs": 5}, "top_logprobs", "logprobs is not true"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "from 0 to 20"),
    ({"stream": "yes"}, "stream", "true or false"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "stream is not true"),
    ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x", "no field x"),
    ({"temprature": 1}, "temprature", "use temperature"),
    ({"max_new_tokens": 5}, "max_new_tokens", "use max_tokens"),
    ({"best_of": 3}, "best_of", "not supported"),
    ({"functions": [{}]}, "functions", "give tools"),
    ({"modalities": ["audio"]}, "modalities", "text"),
    ({"tool_choice": "required"}, "tool_choice", "no function"),
    ({"tool_choice": "maybe"}, "tool_choice", "auto, none, required"),
    ({"tools": [NOW], "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice", "one of the"),
    ({"tools": [NOW, NOW]}, "tools", "two functions"),
    ({"tools": [{"type": "web_search"}]}, "tools[0].type", "function"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name", "letters"),
    ({"tools": [{"type": "function", "function": {"name": "a", "strict": 1}}]}, "tools[0].function.strict", "true"),
    ({"tools": {}}, "tools", "a list"),
    ({"chat_template_kwargs": {"enable_thinking": "no"}}, "chat_template_kwargs.enable_thinking", "true or false"),
    ({"chat_template_kwargs": {"thinking": True}}, "chat_template_kwargs.thinking", "enable_thinking"),
    ({"chat_template_kwargs": {"python_tools": [5]}}, "chat_template_kwargs.python_tools", "functions"),
    ({"response_format": {"type": "xml"}}, "response_format.type", "json_schema"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "schema"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "param", "words"), REFUSED, ids=[str(fields)[:60] for fields, _, _ in REFUSED])
def test_refused(server, fields, param, words):
    """S1, S3, S4, S6, S11."""
    error = refused(server, **fields)
    assert (error.status, error.param) == (400, param), error
    assert words in error.message
    json.dumps(error.body(), ensure_ascii=False).encode()


def test_prompts_that_are_too_long(server):
    """S5, C12."""
    for content in ("word " * server.context, "x" * 10**7):
        error = refused(server, messages=[{"role": "user", "content": content}])
        assert error.code == "context_length_exceeded" and error.param == "messages"
        assert f"maximum context length is {server.context} tokens" in error.message


def test_what_a_conversation_shares_with_its_next_turn(server):
    """C14: a day, a mode of reasoning and reasoning that is not sent back part prompts where docs/serving.md says."""
    first = [{"role": "user", "content": "Hello"}]
    said = {"role": "assistant", "content": "Hi.", "reasoning_content": "They greet."}
    rest = [{"role": "user", "content": "Go on."}]

    def encoded(messages: list[dict[str, Any]], day: int = 1, **options: Any) -> list[int]:
        now = datetime(2026, 1, day)
        return encode_chat(server.tokenizer, messages, now=lambda: now, add_generation_prompt=True, **options)

    def shared(a: list[int], b: list[int]) -> str:
        same = next(i for i, pair in enumerate(zip_longest(a, b)) if pair[0] != pair[1])
        return server.tokenizer.decode(a[:same], skip_special_tokens=False)

    begun = encoded(first)
    assert shared(begun, encoded(first, day=2)).endswith("Today Date: ")
    assert shared(begun, encoded(first, enable_thinking=False)).endswith("Reasoning Mode: /")
    own = [{"role": "system", "content": "/system_override Be brief."}, *first]
    assert encoded(own) == encoded(own, day=2)
    heard = [*begun, *ids_of(server.tokenizer, "<think>\nThey greet.\n</think>\nHi.<|im_end|>")]
    assert shared(heard, encoded([*first, said, *rest])) == server.tokenizer.decode(heard, skip_special_tokens=False)
    forgot = {name: value for name, value in said.items() if name != "reasoning_content"}
    assert shared(heard, encoded([*first, forgot, *rest])).endswith("<|im_start|>assistant\n")


def test_other_models_are_not_found(server):
    """S11."""
    error = refused(server, model="gpt-5")
    assert (error.status, error.code, error.param) == (404, "model_not_found", "model")
    chat(server, model=server.name)


def test_fields_that_are_refused_are_not_offered(server):
    offered = refused(server, frobnicate=5).message.partition("it has ")[2].split(", ")
    assert {"messages", "temperature", "tools"} <= set(offered) and not {"audio", "functions"} & set(offered)
