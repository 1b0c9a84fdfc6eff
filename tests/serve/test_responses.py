"""Bodies of /v1/responses and their answers, with the released tokenizer and template."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter
from said import answer, ids_of, prompt_text

from smollm3_jax.chat.template import encode_chat
from smollm3_jax.generation import grammar
from smollm3_jax.serve.errors import ApiError
from smollm3_jax.serve.job import Job, Server, parse

END = "<|im_end|>"
THOUGHT = "<think>\nHm 👋🏽.\n</think>\n"
CALL = '<tool_call>\n{"name": "now", "arguments": {"zone": "Århus"}}\n</tool_call>'
NOW = {
    "type": "function",
    "name": "now",
    "description": "The time.",
    "parameters": {"type": "object", "properties": {"zone": {"type": "string"}}},
    "strict": True,
}
HI = {"role": "user", "content": "Hi"}
EVENT = TypeAdapter(ResponseStreamEvent)


def respond(server: Server, input: Any = "Hi", **fields: Any) -> Job:
    return parse("responses", {"input": input, **fields}, server)


def joined(events: list[Any]) -> dict[str, Any]:
    """The response that a client makes of a stream, whose events it checks."""
    output: list[dict[str, Any]] = []
    for number, (name, event) in enumerate(events):
        assert event["type"] == name and event["sequence_number"] == number
        parsed = EVENT.validate_python(event)
        assert parsed.type == name, f"{name} is read as {type(parsed)}"
        index = event.get("output_index")
        match name.removeprefix("response."):
            case "output_item.added":
                assert index == len(output)
                output.append(json.loads(json.dumps(event["item"])))
            case "content_part.added":
                assert event["item_id"] == output[index]["id"] and event["content_index"] == 0
                output[index]["content"].append(dict(event["part"]))
            case "output_text.delta" | "reasoning_text.delta":
                output[index]["content"][0]["text"] += event["delta"]
            case "output_text.done" | "reasoning_text.done":
                assert output[index]["content"][0]["text"] == event["text"]
            case "content_part.done":
                assert output[index]["content"] == [event["part"]]
            case "function_call_arguments.delta":
                output[index]["arguments"] += event["delta"]
            case "function_call_arguments.done":
                assert output[index]["arguments"] == event["arguments"]
            case "output_item.done":
                output[index]["status"] = event["item"]["status"]
                assert output[index] == event["item"] and index == len(output) - 1
            case other:
                where = 0 if other == "created" else 1 if other == "in_progress" else len(events) - 1
                assert number == where and other in ("created", "in_progress", "completed", "incomplete")
    last = events[-1][1]["response"]
    assert last["output"] == output and events[-1][0] == f"response.{last['status']}"
    return last


def test_a_plain_answer(server):
    job = respond(server, instructions="Be brief.", seed=3, max_output_tokens=50, metadata={"a": "b"}, store=False)
    messages = [{"role": "system", "content": "Be brief."}, HI]
    assert job.requests[0].prompt == encode_chat(server.tokenizer, messages, add_generation_prompt=True)
    events, body = answer(server, job, THOUGHT + "Hello" + END)
    assert joined(events) == body
    response = Response.model_validate(body, strict=True)
    assert response.output_text == "Hello" and response.status == "completed"
    reasoning, message = body["output"]
    assert reasoning["content"] == [{"type": "reasoning_text", "text": "Hm 👋🏽."}]
    assert message["role"] == "assistant" and message["status"] == "completed"
    counts = body["usage"]
    assert counts["output_tokens_details"]["reasoning_tokens"] == len(ids_of(server.tokenizer, THOUGHT[:-1]))
    assert counts["input_tokens"] + counts["output_tokens"] == counts["total_tokens"]
    assert (body["seed"], body["instructions"], body["metadata"]) == (3, "Be brief.", {"a": "b"})


def test_a_limit_makes_it_incomplete(server):
    events, body = answer(server, respond(server, max_output_tokens=2), "One two three")
    assert joined(events) == body
    assert (body["status"], body["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert body["output"][0]["status"] == "incomplete"
    Response.model_validate(body, strict=True)


def test_a_format_that_no_answer_has_is_named(server):
    with pytest.raises(ApiError) as error:
        respond(server, text={"format": {"type": "json_schema", "name": "x", "schema": {"$ref": "#"}}})
    assert (error.value.status, error.value.param) == (400, "text.format")


def test_a_call_and_its_result(server):
    job = respond(server, tools=[NOW])
    events, body = answer(server, job, f"{THOUGHT}Let me look.\n{CALL}{END}")
    assert joined(events) == body
    Response.model_validate(body, strict=True)
    reasoning, message, call = body["output"]
    assert (call["name"], call["arguments"]) == ("now", '{"zone": "Århus"}')
    # The client sends back all that came, and the result.
    result = {"type": "function_call_output", "call_id": call["call_id"], "output": "12:00"}
    job = respond(server, [HI, reasoning, message, call, result], tools=[NOW])
    text = prompt_text(server, job)
    turn = f"<|im_start|>assistant\n{THOUGHT}Let me look.\n{CALL}<|im_end|>\n<|im_start|>user\n12:00<|im_end|>"
    assert turn in text


def test_the_functions_are_those_of_chats(server):
    chat = {"type": "function", "function": {key: NOW[key] for key in ("name", "description", "parameters")}}
    [request] = parse("chat", {"messages": [HI], "tools": [chat]}, server).requests
    assert respond(server, tools=[NOW]).requests[0].prompt == request.prompt


def test_items(server):
    items = [
        {
            "role": "developer",
            "content": [{"type": "input_text", "text": "Be "}, {"type": "input_text", "text": "kind."}],
        },
        {"type": "message", "role": "user", "content": "Hi"},
        {"type": "reasoning", "id": "rs", "summary": []},
        {"type": "reasoning", "id": "rs", "summary": [{"type": "summary_text", "text": "Hm."}]},
        {"type": "function_call", "call_id": "a", "name": "now", "arguments": "{}"},
        {"type": "function_call", "call_id": "b", "name": "now", "arguments": '{"zone": "x"}'},
        {"type": "function_call_output", "call_id": "a", "output": [{"type": "input_text", "text": "12:00"}]},
        {"type": "function_call_output", "call_id": "b", "output": "13:00"},
        {"role": "assistant", "content": [{"type": "output_text", "text": "Noon.", "annotations": []}]},
        HI,
    ]
    calls = [
        {"type": "function", "function": {"name": "now", "arguments": arguments}} for arguments in ({}, {"zone": "x"})
    ]
    messages = [
        {"role": "system", "content": "All of it.\n\nBe kind."},
        HI,
        {"role": "assistant", "reasoning": "Hm.", "tool_calls": calls},
        {"role": "tool", "content": "12:00"},
        {"role": "tool", "content": "13:00"},
        {"role": "assistant", "content": "Noon."},
        HI,
    ]
    [request] = respond(server, items, instructions="All of it.").requests
    assert request.prompt == encode_chat(server.tokenizer, messages, add_generation_prompt=True)


def test_effort_and_format(server):
    assert respond(server, reasoning={"effort": "low"}).requests[0].params.max_thinking_tokens == 512
    job = respond(server, reasoning={"effort": "none"})
    assert prompt_text(server, job).endswith("</think>\n")
    form = {"type": "json_schema", "name": "x", "schema": {"type": "object"}, "strict": True}
    job = respond(server, text={"format": form})
    assert job.requests[0].grammar == grammar.json_schema(form["schema"]) and job.reply.body()["text"] == {
        "format": form
    }
    named = {"type": "function", "name": "now"}
    job = respond(server, tools=[NOW], tool_choice=named)
    assert job.requests[0].grammar == grammar.tool_calls([NOW], names=["now"], parallel=False, style="xml")
    assert job.reply.body()["tool_choice"] == named
    Response.model_validate(job.reply.body(), strict=True)


@pytest.mark.filterwarnings("ignore:Generating overly large repr")
@settings(max_examples=60)
@given(
    text=st.lists(st.sampled_from([THOUGHT, CALL, "\n", "Hello 👩‍👩‍👧", "STO", "STOP", "</think>"])).map("".join),
    cuts=st.lists(st.integers(1, 60)),
    fields=st.fixed_dictionaries({}, optional={"tools": st.just([NOW]), "stop": st.just(["STOP"])}),
)
def test_an_answer_in_pieces_is_the_answer_in_one(server, text, cuts, fields):
    events, body = answer(server, respond(server, seed=1, **fields), text + END, cuts=cuts)
    assert joined(events) == body
    Response.model_validate(body, strict=True)
    one = answer(server, respond(server, seed=1, **fields), text + END)[1]
    for item in (*body["output"], *one["output"]):
        item["id"] = item["call_id"] = None
    assert (body["output"], body["usage"]) == (one["output"], one["usage"])


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"input": None}, "input", "at least one item"),
    ({"input": []}, "input", "at least one item"),
    ({"input": [{}]}, "input[0].type", "message, function_call"),
    ({"input": [{"type": ["message"]}]}, "input[0].type", "message, function_call"),
    ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type", "message, function_call"),
    ({"input": [{"role": "tool", "content": "x"}]}, "input[0].role", "one of user"),
    ({"input": [{"role": "user"}]}, "input[0].content", "missing"),
    ({"input": [{"role": "user", "content": 5}]}, "input[0].content", "a string"),
    ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0]", "input_image"),
    ({"input": [{"role": "user", "content": "x", "name": "Bo"}]}, "input[0].name", "no field name"),
    ({"input": [{"type": "function_call", "name": "a"}]}, "input[0].arguments", "missing"),
    ({"input": [{"type": "function_call", "name": "a", "arguments": "{"}]}, "input", "not a JSON object"),
    ({"input": [{"type": "function_call_output"}]}, "input[0].output", "missing"),
    ({"input": [HI, {"role": "system", "content": "x"}]}, "input", "system message"),
    ({"previous_response_id": "resp_1"}, "previous_response_id", "remembers no answers"),
    ({"conversation": "conv_1"}, "conversation", "remembers no answers"),
    ({"background": True}, "background", "waits"),
    ({"include": ["reasoning.encrypted_content"]}, "include", "nothing to include"),
    ({"truncation": "auto"}, "truncation", "disabled"),
    ({"max_output_tokens": 0}, "max_output_tokens", "at least 1"),
    ({"max_output_tokens": 10**6}, "max_output_tokens", "maximum context length"),
    ({"max_tokens": 5}, "max_tokens", "use max_output_tokens"),
    ({"reasoning": {"effort": "minimal"}}, "reasoning.effort", "none, low"),
    ({"reasoning": {"summary": "auto"}}, "reasoning.summary", "whole"),
    ({"text": {"format": {"type": "x"}}}, "text.format.type", "json_schema"),
    ({"text": {"verbosity": "low"}}, "text.verbosity", "instructions"),
    ({"tools": [{"type": "web_search"}]}, "tools[0].type", "no tools of its own"),
]


@pytest.mark.parametrize(("fields", "param", "words"), REFUSED, ids=[str(fields)[:60] for fields, _, _ in REFUSED])
def test_refused(server, fields, param, words):
    with pytest.raises(ApiError) as error:
        parse("responses", {"input": "Hi"} | fields, server)
    assert (error.value.status, error.value.param) == (400, param), error.value
    assert words in error.value.message
