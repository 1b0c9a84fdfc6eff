"""Bodies of requests, right and wrong, for properties that hold of all."""

from hypothesis import strategies as st

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
