"""/tokenize and /detokenize, with the released tokenizer and template."""

import pytest

from smollm3_jax.serve.errors import ApiError
from smollm3_jax.serve.job import parse
from smollm3_jax.serve.texts import detokenize, tokenize


def test_a_text_and_its_tokens(server):
    found = tokenize({"prompt": "Grüße<|im_end|>", "model": "SmolLM3-3B"}, server, parse)
    assert found["count"] == len(found["tokens"]) and found["max_model_len"] == 4096
    assert detokenize({"tokens": found["tokens"]}, server) == {"prompt": "Grüße<|im_end|>"}
    assert detokenize({"tokens": []}, server) == {"prompt": ""}


def test_messages_are_the_tokens_that_a_chat_completion_has(server):
    body = {"messages": [{"role": "user", "content": "Hi"}], "chat_template_kwargs": {"enable_thinking": False}}
    found = tokenize(body, server, parse)["tokens"]
    assert found == parse("chat", body, server).requests[0].prompt


@pytest.mark.parametrize(
    "body, param",
    [
        ({}, "prompt"),
        ({"prompt": "a", "messages": []}, "prompt"),
        ({"prompt": 3}, "prompt"),
        ({"prompt": "a", "return_token_strs": True}, "return_token_strs"),
        ({"prompt": "\ud800"}, "prompt"),
        ({"prompt": "a " * 600_000}, "prompt"),
        ({"messages": [{"role": "king", "content": "a"}]}, "messages[0].role"),
    ],
)
def test_what_cannot_be_tokenized(server, body, param):
    with pytest.raises(ApiError) as error:
        tokenize(body, server, parse)
    assert (error.value.status, error.value.param) == (400, param)


@pytest.mark.parametrize("tokens", [None, "abc", [-1], [200_000], [True], [1.5], ["1"], {"a": 1}])
def test_what_are_no_tokens(server, tokens):
    with pytest.raises(ApiError) as error:
        detokenize({"tokens": tokens}, server)
    assert error.value.status == 400 and error.value.param.startswith("tokens")
