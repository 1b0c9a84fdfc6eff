"""/openapi.json: what the server takes and gives, as OpenAPI 3.1. What a body may hold is all that is read of it."""

from collections.abc import Mapping
from typing import Any

from ..generation.sampling import MAX_BIASES, MAX_LOGPROBS, MAX_STOP_IDS
from . import chat, completions, responses
from .contract import Server
from .conversation import EFFORTS
from .params import MAX_N, MAX_PROMPTS, MAX_STOP, MAX_STOPS, NUMBERS, WITHOUT_EFFECT
from .tools import MAX_TOOLS

Schema = dict[str, Any]

ANY: Schema = {}
TEXT: Schema = {"type": "string"}
BOOL: Schema = {"type": "boolean"}
NUMBER: Schema = {"type": "number"}
COUNT: Schema = {"type": "integer", "minimum": 0}
OBJECT: Schema = {"type": "object"}
FLOAT32 = 3.4028234663852886e38  # the largest
NOTHING: Schema = {"enum": [None, False, "", [], {}]}  # a field that is not done here may say that it asks for nothing


def described(version: str, server: Server) -> dict[str, Any]:
    """The description, with the names and limits of the models that are served.

    version: the package's.
    """
    schemas = _requests(server) | _answers() | {"Error": _ERROR}
    return {
        "openapi": "3.1.0",
        "info": {"title": "smollm3-jax", "version": version, "description": "An OpenAI-compatible server."},
        "paths": {
            "/v1/chat/completions": _post("ChatRequest", "ChatCompletion", "The next turn of a chat.", streams=True),
            "/v1/completions": _post("CompletionRequest", "Completion", "What comes after a prompt.", streams=True),
            "/v1/responses": _post("ResponsesRequest", "Response", "An answer to input items.", streams=True),
            "/tokenize": _post("TokenizeRequest", "Tokens", "The tokens of a text or of messages."),
            "/detokenize": _post("DetokenizeRequest", "Prompt", "The text of tokens."),
            "/v1/models": _get("Models", "The models that are served."),
            "/v1/models/{model}": _get("Model", "One of them by its name.", path="model"),
            "/health": _get(None, "Whether answers come."),
            "/ready": _get(None, "Whether requests are taken."),
            "/metrics": _get(None, "Prometheus metrics."),
        },
        "components": {
            "schemas": schemas,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def _json(schema: Schema) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}


_FAILED = {"description": "It cannot be answered.", "content": _json(_ref("Error"))}


def _post(request: str, answer: str, summary: str, streams: bool = False) -> dict[str, Any]:
    content = _json(_ref(answer)) | ({"text/event-stream": {}} if streams else {})
    responses = {"200": {"description": summary, "content": content}, "default": _FAILED}
    body = {"required": True, "content": _json(_ref(request))}
    return {"post": {"summary": summary, "requestBody": body, "responses": responses}}


def _get(answer: str | None, summary: str, path: str | None = None) -> dict[str, Any]:
    found: dict[str, Any] = {"description": summary} | ({} if answer is None else {"content": _json(_ref(answer))})
    default = {"default": _FAILED} if answer is not None else {"503": {"description": "Not now."}}
    operation: dict[str, Any] = {"summary": summary, "responses": {"200": found, **default}}
    if path is not None:
        operation["parameters"] = [{"name": path, "in": "path", "required": True, "schema": TEXT}]
    return {"get": operation}


def _object(required: Mapping[str, Schema], optional: Mapping[str, Schema], closed: bool = False) -> Schema:
    """An object. Optional fields may be null, which is the same as not there; a closed one has no others."""
    properties = {**required, **{name: _or_null(schema) for name, schema in optional.items()}}
    found: Schema = {"type": "object", "properties": properties, "required": list(required)}
    return found | ({"additionalProperties": False} if closed else {})


def _or_null(schema: Schema) -> Schema:
    return schema if schema == ANY else {"anyOf": [schema, {"type": "null"}]}


def _any_of(*schemas: Schema) -> Schema:
    return {"anyOf": list(schemas)}


def _list(items: Schema, least: int = 0, most: int | None = None) -> Schema:
    return {"type": "array", "items": items, "minItems": least} | ({} if most is None else {"maxItems": most})


def _within(low: float, high: float | None = None, kind: str = "integer") -> Schema:
    return {"type": kind, "minimum": low} | ({} if high is None else {"maximum": high})


def _one_of(*values: object) -> Schema:
    return {"enum": list(values)}


_ERROR = _object(
    {"error": _object({"message": TEXT, "type": TEXT, "param": _or_null(TEXT), "code": _or_null(TEXT)}, {})}, {}
)
_FUNCTION = {"description": TEXT, "parameters": OBJECT, "strict": BOOL}
_NAME: Schema = {"type": "string", "pattern": "^[a-zA-Z0-9_-]{1,64}$"}
_TEMPLATE = _object(
    {},
    {
        "enable_thinking": BOOL,
        "custom_instructions": TEXT,
        "xml_tools": _list(_any_of(TEXT, OBJECT)),
        "python_tools": _list(_any_of(TEXT, OBJECT)),
    },
    closed=True,
)
_THINKING = {"chat_template_kwargs": _TEMPLATE, "max_thinking_tokens": COUNT}
_STREAM_FIELDS = ("include_usage", "continuous_usage_stats", "include_obfuscation")
_STREAM = _object({}, dict.fromkeys(_STREAM_FIELDS, BOOL), closed=True)


def _function_tools(flat: bool) -> Schema:
    kind = {"type": _one_of("function")}
    if flat:
        return _list(_object({**kind, "name": _NAME}, _FUNCTION, closed=True), most=MAX_TOOLS)
    return _list(_object({**kind, "function": _object({"name": _NAME}, _FUNCTION, True)}, {}, True), most=MAX_TOOLS)


def _tool_fields(flat: bool) -> dict[str, Schema]:
    kind = {"type": _one_of("function")}
    named = {**kind, "name": TEXT} if flat else {**kind, "function": _object({"name": TEXT}, {}, True)}
    choice = _any_of(_one_of("auto", "none", "required"), _object(named, {}, closed=True))
    return {"tools": _function_tools(flat), "tool_choice": choice, "parallel_tool_calls": BOOL}


def _formats(flat: bool) -> Schema:
    schema = {"schema": _any_of(OBJECT, BOOL)}
    rest = {"name": TEXT, "description": TEXT, "strict": BOOL}
    kind = {"type": _one_of("json_schema")}
    whole = _object({**kind, **schema}, rest, True) if flat else None
    nested = whole or _object({**kind, "json_schema": _object(schema, rest, True)}, {}, True)
    return _any_of(_object({"type": _one_of("text", "json_object")}, {}, True), nested)


def _shared(server: Server) -> dict[str, Schema]:
    """What the three generating requests have in common."""
    numbers = {name: _within(-FLOAT32, FLOAT32, "number") for name in NUMBERS}
    numbers |= {"temperature": _within(0, FLOAT32, "number"), "min_p": _within(0, 1, "number")}
    numbers |= {"top_p": {"type": "number", "exclusiveMinimum": 0, "maximum": 1}}
    numbers |= {"repetition_penalty": {"type": "number", "exclusiveMinimum": 0, "maximum": FLOAT32}}
    stop = {"type": "string", "minLength": 1, "maxLength": MAX_STOP}
    biases = {"propertyNames": {"pattern": "^(0|[1-9][0-9]*)$"}}
    biases |= {"additionalProperties": _within(-FLOAT32, FLOAT32, "number")}
    return {
        "model": _one_of(*server.names),
        **numbers,
        "top_k": _within(-1, 2**31 - 1),
        "seed": _within(0, 2**32 - 1),
        "stop": _any_of(stop, _list(stop, most=MAX_STOPS)),
        "stop_token_ids": _list(_within(0, server.config.vocab_size - 1), most=MAX_STOP_IDS),
        "ignore_eos": BOOL,
        "logit_bias": {"type": "object", **biases, "maxProperties": MAX_BIASES},
        "stream": BOOL,
        "stream_options": _STREAM,
        "cache_salt": TEXT,
        **dict.fromkeys(WITHOUT_EFFECT, ANY),
    }


def _messages() -> Schema:
    # Of parts and calls more is read than is said here: whoever writes them as OpenAI does writes them so.
    parts = _list(_object({"type": _one_of("text"), "text": TEXT}, {}))
    content = _any_of(TEXT, parts)
    reasoning = {"reasoning_content": TEXT, "reasoning": TEXT, "thinking": TEXT}
    empty = dict.fromkeys(("refusal", "audio", "function_call", "annotations"), NOTHING)
    said = {"content": content, "tool_calls": _list(OBJECT), "parsed": ANY, **reasoning}
    given, name = {"content": content}, {"name": TEXT}
    return _list(
        _any_of(
            _object({"role": _one_of("system", "developer", "user"), **given}, name, True),
            _object({"role": _one_of("assistant")}, {**said, **empty, **name}, True),
            _object({"role": _one_of("tool"), **given}, {"tool_call_id": ANY, **name}, True),
        ),
        least=1,
    )


def _items() -> Schema:
    parts = _list(_object({"type": _one_of("input_text", "output_text", "text"), "text": TEXT}, {}))
    content, ids = _any_of(TEXT, parts), {"id": ANY, "status": ANY}
    thought = {"content": _list(OBJECT), "summary": _list(OBJECT), "encrypted_content": NOTHING}
    role = _one_of("user", "assistant", "system", "developer")
    output = {"type": _one_of("function_call_output"), "output": content}
    return _list(
        _any_of(
            _object({"role": role, "content": content}, {"type": _one_of("message"), "phase": NOTHING, **ids}, True),
            _object(
                {"type": _one_of("function_call"), "name": TEXT, "arguments": TEXT}, {"call_id": TEXT, **ids}, True
            ),
            _object(output, {"call_id": TEXT, **ids}, True),
            _object({"type": _one_of("reasoning")}, {**thought, **ids}, True),
        ),
        least=1,
    )


def _requests(server: Server) -> dict[str, Schema]:
    """What the bodies of requests may hold."""
    ids = _within(0, server.config.vocab_size - 1)
    text, model = {"type": "string", "minLength": 1}, {"model": _one_of(*server.names)}
    prompts = _any_of(text, _list(ids, 1), _list(_any_of(text, _list(ids, 1)), 1, MAX_PROMPTS))
    of_messages = {
        **model,
        **_tool_fields(flat=False),
        "chat_template_kwargs": _TEMPLATE,
        "add_generation_prompt": BOOL,
    }
    return {
        "ChatRequest": _object({"messages": _messages()}, _chat(server), closed=True),
        "CompletionRequest": _object({"prompt": prompts}, _completion(server), closed=True),
        "ResponsesRequest": _object({"input": _any_of(TEXT, _items())}, _response(server), closed=True),
        "TokenizeRequest": _any_of(
            _object({"prompt": TEXT}, {**model, "add_special_tokens": BOOL}, closed=True),
            _object({"messages": _messages()}, of_messages, closed=True),
        ),
        "DetokenizeRequest": _object({"tokens": _list(ids)}, model, closed=True),
    }


def _chat(server: Server) -> dict[str, Schema]:
    tokens = _within(1, server.context)
    return {
        **dict.fromkeys(chat.REFUSED, NOTHING),
        **_shared(server),
        **_tool_fields(flat=False),
        **_THINKING,
        "n": _within(1, MAX_N),
        "max_tokens": tokens,
        "max_completion_tokens": tokens,
        "logprobs": BOOL,
        "top_logprobs": _within(0, MAX_LOGPROBS),
        "reasoning_effort": _one_of(*EFFORTS),
        "response_format": _formats(flat=False),
        "modalities": {"const": ["text"]},
    }


def _completion(server: Server) -> dict[str, Schema]:
    return {
        **dict.fromkeys(completions.REFUSED, NOTHING),
        **_shared(server),
        "n": _within(1, MAX_N),
        "max_tokens": _within(0, server.context),
        "logprobs": _within(0, MAX_LOGPROBS),
        "echo": BOOL,
        "response_format": _formats(flat=False),
    }


def _response(server: Server) -> dict[str, Schema]:
    effort = {"effort": _one_of(*EFFORTS), **dict.fromkeys(("summary", "generate_summary"), NOTHING)}
    return {
        **dict.fromkeys(responses.REFUSED, NOTHING),
        **_shared(server),
        **_tool_fields(flat=True),
        **_THINKING,
        "instructions": TEXT,
        "max_output_tokens": _within(1, server.context),
        "reasoning": _object({}, effort, closed=True),
        "text": _object({}, {"format": _formats(flat=True), "verbosity": NOTHING}, closed=True),
        "truncation": _one_of("disabled"),
        **dict.fromkeys(("prompt_cache_retention", "prompt_cache_options"), ANY),
    }


def _answers() -> dict[str, Schema]:
    """What comes back."""
    usage = _object({"prompt_tokens": COUNT, "completion_tokens": COUNT, "total_tokens": COUNT}, {})
    call = {"id": TEXT, "type": _one_of("function"), "function": _object({"name": TEXT, "arguments": TEXT}, {})}
    message = _object(
        {"role": _one_of("assistant"), "content": _or_null(TEXT)},
        {"reasoning_content": TEXT, "reasoning": TEXT, "tool_calls": _list(_object(call, {}))},
    )
    entry = _object({"token": TEXT, "logprob": NUMBER}, {"bytes": _list(_within(0, 255))})
    logprobs = _object({"content": _list(entry)}, {})
    reasons = _one_of("stop", "length", "tool_calls")
    choice = _object({"index": COUNT, "message": message, "finish_reason": reasons}, {"logprobs": logprobs})
    lists = {"tokens": _list(TEXT), "token_logprobs": _list(_or_null(NUMBER)), "text_offset": _list(COUNT)}
    legacy = _object(lists, {"top_logprobs": _list(_or_null(OBJECT))})
    completed = {"index": COUNT, "text": TEXT, "finish_reason": _one_of("stop", "length")}
    head = {"id": TEXT, "created": COUNT, "model": TEXT, "seed": COUNT, "usage": usage}
    of_chat = {**head, "object": _one_of("chat.completion"), "choices": _list(choice)}
    of_completion = {
        **head,
        "object": _one_of("text_completion"),
        "choices": _list(_object(completed, {"logprobs": legacy})),
    }
    item = _object({"type": _one_of("message", "reasoning", "function_call"), "id": TEXT, "status": TEXT}, {})
    response = {"id": TEXT, "object": _one_of("response"), "created_at": COUNT, "model": TEXT, "output": _list(item)}
    response |= {"status": _one_of("completed", "incomplete"), "usage": OBJECT}
    model = {"id": TEXT, "object": _one_of("model"), "created": COUNT, "owned_by": TEXT, "max_model_len": COUNT}
    model |= {"root": TEXT, "parent": _or_null(TEXT)}
    return {
        "ChatCompletion": _object(of_chat, {}),
        "Completion": _object(of_completion, {}),
        "Response": _object(response, {"incomplete_details": OBJECT, "error": OBJECT}),
        "Model": _object(model, {}),
        "Models": _object({"object": _one_of("list"), "data": _list(_ref("Model"))}, {}),
        "Tokens": _object({"tokens": _list(COUNT), "count": COUNT, "max_model_len": COUNT}, {}),
        "Prompt": _object({"prompt": TEXT}, {}),
    }
