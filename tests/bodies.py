"""Bodies of requests for properties that hold of all: right, and with one field that is wrong."""

from typing import Any

from hypothesis import strategies as st

TEXT = st.sampled_from(
    ["", "Hi", "auto", "none", "user", "text", "function", "\ud800", "<|im_end|>", "é\x00", "a" * 200]
)
NUMBER = st.sampled_from([0, 1, -1, 2, 0.5, 2**31, 2**32, 10**25, -(10**400), 1e308, float("nan"), float("inf"), True])
VALUE = st.recursive(
    st.none() | NUMBER | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)

WORDS = st.sampled_from(["Hi", "", "Hé 👋🏽", "<|im_end|>", "<think>", "/no_think", "</tool_call>\n"])
JSON = st.sampled_from(["{}", '{"x": 1}', "", "[1]", "{", '{"x": NaN}'])
PARTS = st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": WORDS}), max_size=2)
CONTENT = WORDS | PARTS
FUNCTION = st.fixed_dictionaries({"name": st.sampled_from(["f", "g"]), "arguments": JSON | VALUE})
CALLS = st.lists(st.fixed_dictionaries({"type": st.just("function"), "function": FUNCTION}), max_size=2)
USER = st.fixed_dictionaries({"role": st.just("user"), "content": CONTENT})
ASSISTANT = st.fixed_dictionaries(
    {"role": st.just("assistant"), "content": CONTENT | st.none()},
    optional={
        "tool_calls": CALLS,
        "reasoning": WORDS,
        "reasoning_content": WORDS,
        "refusal": st.none(),
        "parsed": VALUE,
    },
)
TOOL_RESULT = st.fixed_dictionaries({"role": st.just("tool"), "content": CONTENT}, optional={"tool_call_id": WORDS})
SYSTEM = st.fixed_dictionaries({"role": st.sampled_from(["system", "developer"]), "content": CONTENT})
MESSAGES = st.tuples(
    st.lists(SYSTEM, max_size=1), st.lists(USER | ASSISTANT | TOOL_RESULT, min_size=1, max_size=3)
).map(lambda both: [*both[0], *both[1]])

ITEM = st.one_of(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": CONTENT}),
    st.fixed_dictionaries({"type": st.just("function_call"), "name": st.just("f"), "arguments": JSON}),
    st.fixed_dictionaries({"type": st.just("function_call_output"), "output": CONTENT}),
    st.fixed_dictionaries(
        {"type": st.just("reasoning")},
        optional={"content": st.just([{"type": "reasoning_text", "text": "Hm."}]), "id": WORDS},
    ),
)
INPUT = WORDS | st.lists(ITEM, min_size=1, max_size=4)
PROMPT = st.sampled_from(["Hi", [1, 2], ["Hi", [1]], [[1, 2]], "<think>"])

SCHEMA = st.sampled_from(
    [{}, {"type": "object", "properties": {"x": {"type": "integer"}}}, {"type": "array"}, {"type": 5}]
)
DESCRIBED = st.fixed_dictionaries(
    {"name": st.sampled_from(["f", "g"])}, optional={"parameters": SCHEMA, "strict": st.booleans()}
)
TOOLS = st.lists(st.fixed_dictionaries({"type": st.just("function"), "function": DESCRIBED}), max_size=2)
FLAT_TOOLS = st.lists(DESCRIBED.map(lambda function: {"type": "function", **function}), max_size=2)
CHOICE = st.sampled_from(["auto", "none", "required", {"type": "function", "function": {"name": "f"}}])
FLAT_CHOICE = st.sampled_from(["auto", "none", "required", {"type": "function", "name": "f"}])
TEMPLATE = st.fixed_dictionaries(
    {},
    optional={
        "enable_thinking": st.booleans(),
        "custom_instructions": WORDS,
        "xml_tools": st.just(["f()"]),
        "python_tools": st.just(["def f(x): ..."]),
    },
)
FORMAT = st.sampled_from([{"type": "text"}, {"type": "json_object"}])
SHARED: dict[str, st.SearchStrategy[Any]] = {
    "temperature": st.sampled_from([0, 1, 0.5]),
    "top_p": st.sampled_from([1, 0.5]),
    "min_p": st.sampled_from([0, 0.5]),
    "top_k": st.sampled_from([-1, 0, 5]),
    "presence_penalty": st.sampled_from([-1.5, 0]),
    "repetition_penalty": st.sampled_from([1, 1.5]),
    "seed": st.sampled_from([0, 2**32 - 1, 5.0]),
    "stop": st.sampled_from(["x", ["x", "<|im_end|>"], []]),
    "stop_token_ids": st.sampled_from([[], [5]]),
    "logit_bias": st.sampled_from([{}, {"5": -100}]),
    "ignore_eos": st.booleans(),
    "stream": st.booleans(),
    "stream_options": st.sampled_from([{}, {"include_usage": True}]),
    "cache_salt": WORDS,
    "user": VALUE,
    "metadata": VALUE,
}
CHAT = SHARED | {
    "n": st.integers(1, 3),
    "tools": TOOLS,
    "tool_choice": CHOICE,
    "parallel_tool_calls": st.booleans(),
    "chat_template_kwargs": TEMPLATE,
    "reasoning_effort": st.sampled_from(["none", "low"]),
    "max_thinking_tokens": st.integers(0, 9),
    "max_tokens": st.integers(1, 9),
    "max_completion_tokens": st.integers(1, 9),
    "logprobs": st.booleans(),
    "top_logprobs": st.integers(0, 20),
    "response_format": FORMAT | SCHEMA.map(lambda schema: {"type": "json_schema", "json_schema": {"schema": schema}}),
    "functions": st.just([]),
}
COMPLETION = SHARED | {
    "n": st.integers(1, 3),
    "max_tokens": st.integers(0, 9),
    "logprobs": st.integers(0, 20),
    "echo": st.booleans(),
    "response_format": FORMAT,
    "best_of": st.none(),
}
RESPONSE = SHARED | {
    "instructions": WORDS,
    "tools": FLAT_TOOLS,
    "tool_choice": FLAT_CHOICE,
    "parallel_tool_calls": st.booleans(),
    "chat_template_kwargs": TEMPLATE,
    "reasoning": st.fixed_dictionaries({}, optional={"effort": st.sampled_from(["none", "low"]), "summary": st.none()}),
    "text": st.fixed_dictionaries({}, optional={"format": FORMAT}),
    "max_output_tokens": st.integers(1, 9),
    "truncation": st.just("disabled"),
    "background": st.just(False),
    "previous_response_id": st.none(),
}
KINDS = {"chat": ("messages", MESSAGES, CHAT), "completions": ("prompt", PROMPT, COMPLETION)}
KINDS |= {"responses": ("input", INPUT, RESPONSE)}


@st.composite
def bodies(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    """A kind, and a body of it: most of them are right, and some have one field with any value."""
    kind = draw(st.sampled_from(sorted(KINDS)))
    first, usual, others = KINDS[kind]
    chosen = draw(st.lists(st.sampled_from(sorted(others)), max_size=5, unique=True))
    body = {first: draw(usual)} | {name: draw(others[name]) for name in chosen}
    if draw(st.integers(0, 3)) == 0:
        body[draw(st.sampled_from([first, *sorted(others), "model", "surprise", "best_of"]))] = draw(VALUE)
    return kind, body
