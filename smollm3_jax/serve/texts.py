"""/tokenize and /detokenize, in vLLM's form."""

from collections.abc import Callable
from typing import Any

from ..errors import OptionError
from .contract import Job, Server
from .errors import bad, from_option
from .fields import Fields, check_json


def tokenize(body: Any, server: Server, parse: Callable[[str, Any, Server], Job]) -> dict[str, Any]:
    """The tokens of `prompt`, or of the prompt that a chat completion makes of `messages`, `tools` and what else its
    template reads.

    Raises:
      ApiError: as `parse`; or the body has neither, or both.
    """
    body = check_json(body)
    if ("prompt" in body) == ("messages" in body):
        raise bad("give either prompt or messages", "prompt")
    if "messages" in body:
        tokens = list(parse("chat", {**body, "max_tokens": 1}, server).requests[0].prompt)
    else:
        fields = Fields(body)
        fields.ignore("model")
        text, special = fields.take("prompt", str), fields.take("add_special_tokens", bool, True)
        fields.finish()
        try:
            tokens = server.tokenizer.encode(text, special, context=server.context)
        except OptionError as error:
            raise from_option(error, "prompt") from None
    return {"tokens": tokens, "count": len(tokens), "max_model_len": server.context}


def detokenize(body: Any, server: Server) -> dict[str, Any]:
    """The text of `tokens`, special ones included.

    Raises:
      ApiError: they are no ids of the vocabulary.
    """
    fields = Fields(check_json(body))
    fields.ignore("model")
    tokens = fields.take("tokens", list)
    fields.finish()
    for i, token in enumerate(tokens or ()):
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < server.config.vocab_size:
            raise fields.error(f"tokens[{i}]", f"a token id from 0 to {server.config.vocab_size - 1}")
    if tokens is None:
        raise bad("tokens is missing: give a list of token ids", "tokens")
    return {"prompt": server.tokenizer.decode(tokens, skip_special_tokens=False)}
