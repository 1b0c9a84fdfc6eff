"""The description of the API against what the server takes and gives."""

import json
import re
from typing import Any

import pytest
from bodies import bodies
from hypothesis import given, settings
from said import answer

from smollm3_jax.serve.errors import ApiError
from smollm3_jax.serve.job import Server, parse
from smollm3_jax.serve.models import detokenize, model_body, models_body, tokenize
from smollm3_jax.serve.openapi import described

TYPES: dict[str, Any] = {
    "string": str,
    "boolean": bool,
    "integer": int,
    "number": int | float,
    "object": dict,
    "array": list,
}
KNOWN = {"$ref", "anyOf", "enum", "const", "type", "properties", "required", "additionalProperties", "propertyNames"}
KNOWN |= {"maxProperties", "items", "minItems", "maxItems", "minimum", "maximum", "exclusiveMinimum", "pattern"}
KNOWN |= {"minLength", "maxLength"}


def is_a(value: object, kind: str) -> bool:
    """Whether a value is of one of JSON Schema's types."""
    if kind == "null":
        return value is None
    whole = kind == "integer" and isinstance(value, float) and value.is_integer()
    number = kind in ("integer", "number")
    return whole or (isinstance(value, TYPES[kind]) and not (number and isinstance(value, bool)))


def problem(value: Any, schema: dict[str, Any], schemas: dict[str, Any], at: str = "") -> str | None:
    """Why a value is not what JSON Schema says, in the words that the description uses; None if it is."""
    assert schema.keys() <= KNOWN, schema.keys() - KNOWN
    if "$ref" in schema:
        return problem(value, schemas[schema["$ref"].rpartition("/")[2]], schemas, at)
    if "anyOf" in schema:
        found = [problem(value, inner, schemas, at) for inner in schema["anyOf"]]
        return None if None in found else "; ".join(map(str, found))
    if "enum" in schema and not any(value == one and type(value) is type(one) for one in schema["enum"]):
        return f"{at} is {value!r:.50}, none of {schema['enum']}"
    if "const" in schema and value != schema["const"]:
        return f"{at} is {value!r:.50}, not {schema['const']}"
    if (kind := schema.get("type")) and not is_a(value, kind):
        return f"{at} is {value!r:.50}, no {kind}"
    limits = (
        ("minimum", lambda x, y: x >= y),
        ("maximum", lambda x, y: x <= y),
        ("exclusiveMinimum", lambda x, y: x > y),
    )
    for name, holds in limits:
        if name in schema and not holds(value, schema[name]):
            return f"{at} is {value!r:.50}; {name} {schema[name]}"
    if "pattern" in schema and not re.search(schema["pattern"], value):
        return f"{at} is {value!r:.50}; pattern {schema['pattern']}"
    for name in ("Length", "Items", "Properties"):
        if f"min{name}" in schema and len(value) < schema[f"min{name}"]:
            return f"{at} has less than min{name}"
        if f"max{name}" in schema and len(value) > schema[f"max{name}"]:
            return f"{at} has more than max{name}"
    inner = [(item, schema["items"], f"{at}[{i}]") for i, item in enumerate(value)] if "items" in schema else []
    if isinstance(value, dict):
        if missing := [name for name in schema.get("required", ()) if name not in value]:
            return f"{at} has no {missing[0]}"
        named, others = schema.get("properties", {}), schema.get("additionalProperties", {})
        for name, part in value.items():
            if name not in named and others is False:
                return f"{at} has {name!r:.50}"
            inner.append((part, named.get(name, others), f"{at}.{name}"))
            inner.append((name, schema.get("propertyNames", {}), f"{at}'s name"))
    return next((found for found in (problem(*one[:2], schemas, one[2]) for one in inner) if found), None)


@pytest.fixture(scope="module")
def description(server: Server) -> dict[str, Any]:
    return described("1.0", server)


def test_it_is_json_whose_references_are_there(description):
    text = json.dumps(description, allow_nan=False)
    names = set(re.findall('"#/components/schemas/([A-Za-z]+)"', text))
    assert names == description["components"]["schemas"].keys() - {"Unused"}


REQUESTS = {"chat": "ChatRequest", "completions": "CompletionRequest", "responses": "ResponsesRequest"}
ANSWERS = {"chat": "ChatCompletion", "completions": "Completion", "responses": "Response"}
USUAL = {
    "chat": {"messages": [{"role": "user", "content": "Hi"}]},
    "completions": {"prompt": "Hi"},
    "responses": {"input": "Hi"},
}


@pytest.mark.filterwarnings("ignore:Generating overly large repr")
@settings(max_examples=300)
@given(asked=bodies())
def test_what_is_taken_is_described(server, description, asked):
    kind, body = asked
    try:
        parse(kind, body, server)
    except ApiError:
        return
    schemas = description["components"]["schemas"]
    assert problem(body, schemas[REQUESTS[kind]], schemas) is None


EXAMPLES: list[tuple[str, dict[str, Any]]] = [
    ("chat", {"temperature": 1, "stop": "x", "n": 2, "logprobs": True, "top_logprobs": 2, "seed": 4.0}),
    ("chat", {"reasoning_effort": "low", "stream": True, "stream_options": {"include_usage": True}}),
    ("chat", {"tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}], "tool_choice": "auto"}),
    ("completions", {"prompt": [[1, 2], "Hi"], "echo": True, "logprobs": 1, "max_tokens": 5, "best_of": None}),
    ("responses", {"instructions": "Be brief.", "reasoning": {"effort": "none"}, "background": False}),
    ("responses", {"input": [{"role": "user", "content": [{"type": "input_text", "text": "Hi"}]}]}),
]


@pytest.mark.parametrize(("kind", "fields"), EXAMPLES)
def test_answers_are_described(server, description, kind, fields):
    schemas, body = description["components"]["schemas"], USUAL[kind] | fields
    assert problem(body, schemas[REQUESTS[kind]], schemas) is None
    job = parse(kind, body, server)
    texts = [" Hello<|im_end|>"] * len(job.requests) * job.requests[0].params.n
    found = answer(server, job, *texts)[1]
    assert problem(found, schemas[ANSWERS[kind]], schemas) is None


def test_other_answers_are_described(server, description):
    schemas = description["components"]["schemas"]
    with pytest.raises(ApiError) as error:
        parse("chat", {}, server)
    tokens = tokenize({"prompt": "Hi"}, server)
    for name, body in (
        ("Error", error.value.body()),
        ("Models", models_body(server, 1)),
        ("Model", model_body(server, 1, server.name)),
        ("Tokens", tokens),
        ("Prompt", detokenize({"tokens": tokens["tokens"]}, server)),
    ):
        assert problem(body, schemas[name], schemas) is None


@pytest.mark.parametrize(
    ("name", "body"),
    [
        ("ChatRequest", {}),
        ("ChatRequest", {"messages": [], "surprise": 1}),
        ("ChatRequest", {"messages": [{"role": "user", "content": 5}]}),
        ("ChatRequest", USUAL["chat"] | {"temperature": -1}),
        ("ChatRequest", USUAL["chat"] | {"logit_bias": {"x": 1}}),
        ("CompletionRequest", {"prompt": "Hi", "best_of": 2}),
        ("DetokenizeRequest", {"tokens": [-1]}),
    ],
)
def test_the_check_sees_what_is_wrong(description, name, body):
    schemas = description["components"]["schemas"]
    assert problem(body, schemas[name], schemas) is not None
