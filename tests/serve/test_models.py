"""/v1/models, /tokenize and /detokenize, with the released tokenizer and template."""

import pytest
from openai.types import Model

from smollm3_jax.chat.template import encode_chat
from smollm3_jax.serve.errors import ApiError
from smollm3_jax.serve.models import detokenize, model_body, models_body, tokenize

HI = [{"role": "user", "content": "Hi"}]
TOOL = {"type": "function", "function": {"name": "now"}}


def test_models(server):
    body = models_body(server, 5)
    assert body["object"] == "list" and body["data"] == [model_body(server, 5, server.name)]
    assert Model.model_validate(body["data"][0], strict=True).id == server.name


def test_there_and_back(server):
    text = "Hé 👋🏽 <think><|im_end|>"
    body = tokenize({"prompt": text, "model": server.name}, server)
    assert body["tokens"] == server.tokenizer.encode(text) and body["count"] == len(body["tokens"])
    assert detokenize({"tokens": body["tokens"]}, server) == {"prompt": text}
    assert tokenize({"prompt": ""}, server)["tokens"] == []


def test_messages(server):
    expected = encode_chat(server.tokenizer, HI, add_generation_prompt=True, tools=[TOOL], enable_thinking=False)
    kwargs = {"enable_thinking": False}
    body = {"messages": HI, "tools": [TOOL], "chat_template_kwargs": kwargs}
    assert tokenize(body, server)["tokens"] == expected
    closed = tokenize({"messages": HI, "add_generation_prompt": False}, server)["tokens"]
    assert closed == encode_chat(server.tokenizer, HI)


@pytest.mark.parametrize(
    ("call", "body", "param"),
    [
        (tokenize, [], None),
        (tokenize, {}, "messages"),
        (tokenize, {"prompt": 5}, "prompt"),
        (tokenize, {"prompt": "a" * 3 + "\ud800"}, "prompt"),
        (tokenize, {"prompt": "a", "messages": HI}, "messages"),
        (tokenize, {"messages": [{"role": "x"}]}, "messages[0].content"),
        (detokenize, {}, "tokens"),
        (detokenize, {"tokens": ["a"]}, "tokens[0]"),
        (detokenize, {"tokens": [1, -1]}, "tokens[1]"),
        (detokenize, {"tokens": [10**9]}, "tokens[0]"),
    ],
)
def test_refused(server, call, body, param):
    with pytest.raises(ApiError) as error:
        call(body, server)
    assert (error.value.status, error.value.param) == (400, param), error.value
