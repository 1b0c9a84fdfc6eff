"""/v1/models, /tokenize and /detokenize."""

from typing import Any

from ..errors import OptionError, TokenizerError
from .contract import Server
from .conversation import check_messages, encode_messages, read_template_fields
from .errors import bad
from .fields import Fields, check_json
from .params import check_ids, check_model, unknown_model
from .tools import read_tools


def models_body(server: Server, created: int) -> dict[str, Any]:
    """The models that there are, the base first. created: when they were loaded, in seconds of Unix time."""
    return {"object": "list", "data": [model_body(server, created, name) for name in server.names]}


def model_body(server: Server, created: int, name: str) -> dict[str, Any]:
    """What /v1/models/NAME says of a model, in vLLM's fields.

    max_model_len: tokens of a request and its answer; of an adapter `root` is its folder, and `parent` the model that
    it is of.

    Raises:
      ApiError: there is no such model.
    """
    if name not in server.names:
        raise unknown_model(name, server)
    found = {"id": name, "object": "model", "created": created, "owned_by": "smollm3-jax"}
    of = {"root": server.adapters.get(name, name), "parent": server.name if name in server.adapters else None}
    return found | of | {"max_model_len": server.context}


def tokenize(body: Any, server: Server) -> dict[str, Any]:
    """The tokens of a prompt, or of messages as a chat's template writes them.

    Raises:
      ApiError: 400 or 404, as `parse`.
    """
    fields = Fields(check_json(body))
    check_model(fields, server)
    prompt = fields.take("prompt", str)
    if prompt is not None:
        special = fields.take("add_special_tokens", bool, True)
        fields.finish()
        try:
            ids = server.tokenizer.encode(prompt, special)
        except (OptionError, TokenizerError) as error:
            raise bad(str(error), "prompt") from None
    else:
        messages = fields.any("messages")
        wishes = read_template_fields(fields, read_tools(fields))
        opens = fields.take("add_generation_prompt", bool, True)
        fields.finish()
        ids = encode_messages(server, check_messages(messages), wishes, "messages", opens)
    return {"tokens": ids, "count": len(ids), "max_model_len": server.context}


def detokenize(body: Any, server: Server) -> dict[str, Any]:
    """The text of tokens, special ones included.

    Raises:
      ApiError: 400 or 404, as `parse`.
    """
    fields = Fields(check_json(body))
    check_model(fields, server)
    tokens = fields.take("tokens", list)
    fields.finish()
    if tokens is None:
        raise bad("tokens is missing; it must be a list of token ids", "tokens")
    ids = check_ids(tokens, server.config, "tokens")
    return {"prompt": server.tokenizer.decode(ids, skip_special_tokens=False)}
