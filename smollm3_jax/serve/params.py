"""How to sample, and how much, from the fields that OpenAI's APIs share; what others call them is understood."""

import secrets
from collections.abc import Mapping
from typing import Any

from ..config import ModelConfig
from ..errors import OptionError
from ..generation.grammar import check_grammar
from ..generation.requests import Request, check_request
from ..generation.sampling import ELSEWHERE, MAX_STOP_IDS, SamplingParams, with_defaults
from .contract import Server
from .errors import ApiError, bad, from_option, too_long
from .fields import Fields, shown

# The most that one body may ask for; what a slot can hold is in sampling.py.
MAX_N = 128
MAX_STOPS, MAX_STOP = 16, 1000  # stop texts, and characters of one
MAX_PROMPTS = 256  # of /v1/completions

NUMBERS = ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")
# Fields without effect on the answer.
WITHOUT_EFFECT = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key")
# What others call a field of a body -> its name here.
NAMES = {name: meant for name, meant in ELSEWHERE.items() if name not in ("max_tokens", "max_output_tokens")}
NAMES |= {"max_new_tokens": "max_tokens", "suppress_tokens": "logit_bias (-100 each)"}
NAMES |= {"guided_json": 'response_format ({"type": "json_schema", "json_schema": {"name": ..., "schema": ...}})'}
NAMES |= {"thinking": "reasoning_effort", "enable_thinking": "chat_template_kwargs", "num_predict": "max_tokens"}


def check_model(fields: Fields, server: Server) -> Server:
    """The server for the model that the body asks for; without a name that is the base.

    Raises:
      ApiError: there is no such model.
    """
    name = fields.take("model", str, server.name)
    if name not in server.names:
        raise unknown_model(name, server)
    return server.answering_as(name)


def unknown_model(name: str, server: Server) -> ApiError:
    there = ", ".join(map(repr, server.names))
    message = f"the model {name!r:.100} does not exist; this server has {there}"
    return ApiError(404, message, param="model", code="model_not_found")


def shared_fields(
    body: dict[str, Any], server: Server, refused: Mapping[str, str]
) -> tuple[Server, Fields, bool, str, dict[str, Any]]:
    """What every body that asks for an answer begins with: the model, the body's fields, of which these are read now,
    `stream_options`, and `sampling_fields`.

    Args:
      refused: fields that are not done here, and why.

    Raises:
      ApiError: one of them cannot be kept.
    """
    fields = Fields(body)
    server = check_model(fields, server)
    fields.refuse(refused)
    fields.ignore(*WITHOUT_EFFECT)
    return server, fields, *stream_options(fields), sampling_fields(fields)


def sampling_fields(fields: Fields) -> dict[str, Any]:
    """What a body says of sampling, as arguments of SamplingParams; a seed is drawn where it says none."""
    given: dict[str, Any] = {name: fields.take(name, float) for name in NUMBERS}
    given |= {name: fields.take(name, int) for name in ("top_k", "seed", "n")}
    given["top_k"] = 0 if given["top_k"] == -1 else given["top_k"]  # vLLM's way to say that it is off
    if given["n"] is not None and not 1 <= given["n"] <= MAX_N:
        raise fields.error("n", f"a whole number from 1 to {MAX_N}")
    given["seed"] = secrets.randbits(31) if given["seed"] is None else given["seed"]
    given["stop"] = _stop(fields)
    stop_ids = fields.take("stop_token_ids", list)
    if stop_ids is not None and not all(map(is_id, stop_ids)):
        raise fields.error("stop_token_ids", f"a list of at most {MAX_STOP_IDS} token ids")
    given["stop_token_ids"] = stop_ids and [int(token) for token in stop_ids]
    given["ignore_eos"] = fields.take("ignore_eos", bool)
    given["logit_bias"] = _logit_bias(fields)
    return {name: value for name, value in given.items() if value is not None}


def is_id(value: Any) -> bool:
    """Whether a JSON value can be a token's id, 5.0 too; whether the vocabulary has it is another question."""
    whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    return whole and not isinstance(value, bool) and 0 <= value < 2**31


def check_ids(ids: list[Any], config: ModelConfig, where: str) -> list[int]:
    """Token ids of the vocabulary.

    Raises:
      ApiError: one of them is none, by its place.
    """
    for i, token in enumerate(ids):
        if not is_id(token) or token >= config.vocab_size:
            must = f"a token id from 0 to {config.vocab_size - 1}"
            raise bad(f"{where}[{i}] is {shown(token)}; it must be {must}", f"{where}[{i}]")
    return [int(token) for token in ids]


def _stop(fields: Fields) -> list[str] | None:
    stop = fields.any("stop")
    stop = [stop] if isinstance(stop, str) else stop
    if stop is None:
        return None
    if (
        not isinstance(stop, list)
        or len(stop) > MAX_STOPS
        or not all(isinstance(text, str) and 0 < len(text) <= MAX_STOP for text in stop)
    ):
        raise fields.error("stop", f"a text or a list of at most {MAX_STOPS} texts of 1 to {MAX_STOP} characters")
    return stop


def _logit_bias(fields: Fields) -> dict[int, float] | None:
    biases = fields.take("logit_bias", dict)
    if biases is None:
        return None
    for token, value in biases.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not (token.isascii() and token.isdecimal() and len(token) < 10 and str(int(token)) == token and number):
            path = f"logit_bias.{token:.20}"
            raise bad(f"{path} is {shown(value)}; logit_bias maps token ids, as texts, to numbers", path)
    return {int(token): value for token, value in biases.items()}


def stream_options(fields: Fields) -> tuple[bool, str]:
    """Whether to stream, and where a stream tells the usage: at the "end", with "each" chunk, or ""."""
    stream = fields.take("stream", bool, False)
    options = fields.object("stream_options")
    if options is None:
        return stream, ""
    if not stream:
        raise bad("stream_options is there, but stream is not true: leave it out", "stream_options")
    at_end, each = (options.take(name, bool, False) for name in ("include_usage", "continuous_usage_stats"))
    options.take("include_obfuscation", bool)  # of OpenAI's own connections
    options.finish()
    return stream, "" if not at_end else "each" if each else "end"


def make_request(
    server: Server,
    prompt: list[int],
    given: dict[str, Any],
    limit: int | None,
    limit_name: str,
    prompt_name: str,
    grammar_name: str = "response_format",
    **options: Any,
) -> Request:
    """A request that the engine takes.

    Args:
      prompt: token ids.
      given: arguments of SamplingParams but for max_new_tokens.
      limit: the most new tokens; None is all that fit into the context.
      limit_name, prompt_name, grammar_name: the fields that these came in, for errors.
      **options: of Request.

    Raises:
      ApiError, OptionError: it does not fit into the context, or the engine would refuse it.
    """
    if "grammar" in options and given.get("ignore_eos"):
        raise bad("ignore_eos goes on after the end that a format or a forced call has: leave it out", "ignore_eos")
    context = min(server.context, server.config.max_position_embeddings)
    if limit is not None and limit < 1:
        raise bad(f"{limit_name} is {shown(limit)}; it must be a whole number of at least 1", limit_name)
    if len(prompt) >= context:
        what = f"{prompt_name} has {len(prompt)} tokens, which leaves no room for an answer: shorten it"
        raise too_long(what, context, prompt_name)
    if limit is not None and len(prompt) + limit > context:
        what = f"{prompt_name} has {len(prompt)} tokens, and {limit_name} asks for {shown(limit)} more: lower it"
        raise too_long(what, context, limit_name)
    if "grammar" in options:
        try:
            check_grammar(options["grammar"], server.tokenizer)
        except OptionError as error:
            raise from_option(error, grammar_name) from None
    limit = context - len(prompt) if limit is None else limit
    own = server.config, server.generation_config
    params: SamplingParams = with_defaults(own[1], own[0].vocab_size, max_new_tokens=limit, **given)
    request = Request(prompt, params, adapter=server.adapter, **options)
    check_request(*own, request, server.tokenizer, context, name=prompt_name)
    return request
