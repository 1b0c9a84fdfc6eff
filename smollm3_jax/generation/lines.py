"""Lines of JSON that ask, answered by a model: what `jsonl` reads from a file, and `on_ray` from Ray.

What a line may say, and what its answer is, is in jsonl.py. A line that cannot be run is answered with an "error".
"""

import contextlib
import dataclasses
import difflib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from jax.typing import DTypeLike

from ..config import GenerationConfig, ModelConfig
from ..errors import OptionError, SmolLM3Error
from ..model import SmolLM3
from ..nesting import check_depth
from ..tokenizer import Tokenizer
from .api import stream
from .grammar import json_schema
from .prompts import SERVING_PIECES
from .requests import Completion, Request, chat_ends, check_request, fitted
from .sampling import SamplingParams
from .stats import Stats

SLOTS = 16
SAMPLING_FIELDS = tuple(field.name for field in dataclasses.fields(SamplingParams))
MAX_ERROR = 1000  # characters
MAX_LINE = 2**26  # bytes; more than any context holds


@dataclasses.dataclass(frozen=True)
class LineOptions:
    """What holds for lines that say nothing else.

    params: a line without a seed draws with seed + index * n.
    encode_messages: chat.template.encode_for_answer; None refuses lines with "messages".
    chat: a "prompt" is a user's message, and the chat template is applied to it.
    thinking: what the chat template is told about thinking.
    fit: params.max_new_tokens is no wish of anybody's: a prompt that leaves less room gets less.
    """

    params: SamplingParams = dataclasses.field(default_factory=SamplingParams)
    encode_messages: Callable[..., list[int]] | None = None
    chat: bool = False
    thinking: bool = True
    fit: bool = False


@dataclasses.dataclass(frozen=True)
class Shape:
    """The engine's: what an answer's bits depend on beside the model and the line.

    slots: how many sequences at a time, rounded up to a power of two.
    context: the most tokens that a sequence may have, its prompt included.
    as_served: prompts are cut into pieces as a server's are.
    """

    slots: int
    context: int
    as_served: bool


@dataclasses.dataclass
class _Line:
    """A line that is being answered."""

    index: int
    id: dict[str, Any]
    request: Request
    samples: list[Completion]


def shape_for(
    lines: Iterable[tuple[int, bytes]],
    options: LineOptions,
    config: ModelConfig,
    generation_config: GenerationConfig,
    tokenizer: Tokenizer,
    slots: int | None = None,
    context: int | None = None,
) -> Shape:
    """The engine's shape for these lines, of (index, line).

    Args:
      slots, context: as for `Batch.run`; without a context all lines are tokenized.

    Raises:
      OptionError: one of these is out of range.
      TokenizerError: options.chat, and there is no template.
    """
    as_served = slots is not None and context is not None
    slots = SLOTS if slots is None else slots
    if slots < 1:
        raise OptionError(f"slots is {slots}; it must be at least 1")
    if context is not None and context < 2:
        raise OptionError(f"context is {context}; it must be at least 2")
    if options.chat:
        tokenizer.template()  # says once, not in every line, that there is none
    longest, sequences = 0, 0
    for index, line in () if as_served else lines:
        if context is not None:
            sequences += options.params.n
            continue
        with contextlib.suppress(Exception):  # it is that line's answer, later
            request = _request(index, _parse(line), options, config, tokenizer)
            check_request(config, generation_config, request, tokenizer)
            longest = max(longest, len(request.prompt) + request.params.max_new_tokens)
            sequences += request.params.n
    context = min(longest if context is None else context, config.max_position_embeddings)
    return Shape(slots if as_served else max(1, min(slots, sequences)), context, as_served)


def answers(
    model: SmolLM3,
    tokenizer: Tokenizer,
    lines: Iterable[tuple[int, bytes]],
    options: LineOptions,
    shape: Shape,
    *,
    cache_dtype: DTypeLike | None = None,
    stats: Stats | None = None,
) -> Iterator[list[tuple[int, dict[str, Any]]]]:
    """After each step of the engine what is finished, as (index, answer ready for JSON); nothing, at most times.

    Args:
      lines: (index, line), read as slots become free.
      cache_dtype, stats: as for `stream`.

    Raises:
      OutOfMemoryError: the slots do not fit into memory.
    """
    running: dict[int, _Line] = {}
    finished: list[tuple[int, dict[str, Any]]] = []

    def requests() -> Iterator[Request]:
        """The lines, each at its turn: to `running` and out, or answered with what is wrong."""
        count = 0
        for index, line in lines:
            name: dict[str, Any] = {}
            try:
                fields = _parse(line)
                name = {"id": fields["id"]} if "id" in fields else {}
                request = _request(index, fields, options, model.config, tokenizer, shape.context)
                check_request(model.config, model.generation_config, request, tokenizer, shape.context)
            except Exception as error:  # whatever it is: the other lines can do nothing about it
                text = str(error) if isinstance(error, SmolLM3Error) else f"{type(error).__name__}: {error}"
                text = text if len(text) <= MAX_ERROR else f"{text[:MAX_ERROR]}..."
                finished.append((index, name | {"error": text}))
                continue
            running[count] = _Line(index, name, request, [Completion.empty() for _ in range(request.params.n)])
            count += 1
            yield request

    for delta in stream(
        model,
        requests(),
        tokenizer=tokenizer,
        max_slots=shape.slots,
        capacity=shape.context,
        piece_sizes=SERVING_PIECES if shape.as_served else None,
        cache_dtype=cache_dtype,
        stats=stats,
    ):
        line = running[delta.request]
        line.samples[delta.sample].add(delta)
        if all(sample.finish_reason for sample in line.samples):
            finished.append((line.index, line.id | _answer(running.pop(delta.request), tokenizer)))
        yield finished
        finished = []
    yield finished


def _request(
    index: int,
    fields: Mapping[str, Any],
    options: LineOptions,
    config: ModelConfig,
    tokenizer: Tokenizer,
    context: int | None = None,
) -> Request:
    own = ("id", "prompt", "messages", "json_schema")
    given = {name: value for name, value in fields.items() if name not in own}
    if unknown := [name for name in given if name not in SAMPLING_FIELDS]:
        close = difflib.get_close_matches(unknown[0], SAMPLING_FIELDS, n=1)
        meant = f"; did you mean {close[0]}?" if close else ""
        raise OptionError(
            f"the field {unknown[0]!r} is unknown{meant}; a line has prompt or messages, and may have id, "
            + ", ".join(("json_schema", *SAMPLING_FIELDS))
        )
    if ("prompt" in fields) == ("messages" in fields):
        raise OptionError('a line needs one of "prompt" and "messages"')
    biases = given.get("logit_bias")
    if isinstance(biases, Mapping):  # JSON has no other keys than texts
        given["logit_bias"] = {
            int(token) if token.isdecimal() and len(token) < 20 else token: biases[token] for token in biases
        }
    seed = (options.params.seed + index * options.params.n) % 2**32
    params = dataclasses.replace(options.params, **{"seed": seed} | given)
    prompt, messages = fields.get("prompt"), fields.get("messages")
    if "prompt" in fields and not isinstance(prompt, str):
        raise OptionError(f"prompt is a {type(prompt).__name__}; it must be a text")
    if options.chat and "prompt" in fields:
        messages = [{"role": "user", "content": prompt}]
    ids, ends = _encode(options, config, tokenizer, prompt, messages)
    fit = options.fit and "max_new_tokens" not in given
    grammar = json_schema(fields["json_schema"]) if "json_schema" in fields else None
    request = fitted_request(config, ids, params, ends, fit=fit, context=context)
    return dataclasses.replace(request, grammar=grammar)


def _encode(
    options: LineOptions, config: ModelConfig, tokenizer: Tokenizer, prompt: str | None, messages: object
) -> tuple[list[int], tuple[int, ...]]:
    """Token ids of a line's messages or else of its prompt, and what ends the answer."""
    limit = config.max_position_embeddings
    if isinstance(prompt, str) and messages is None:
        return tokenizer.encode(prompt, context=limit), ()
    if options.encode_messages is None:
        raise OptionError('"messages" need a chat template; a line of this batch has a "prompt"')
    ids = options.encode_messages(tokenizer, messages, context=limit, thinking=options.thinking)
    return ids, chat_ends(tokenizer, config)


def fitted_request(
    config: ModelConfig,
    prompt: Sequence[int],
    params: SamplingParams,
    ends: Sequence[int] = (),
    *,
    fit: bool = False,
    context: int | None = None,
) -> Request:
    """A request to go on from a prompt's token ids; `fit` as for `Batch`, `context` as for `run`."""
    limit = min(context or config.max_position_embeddings, config.max_position_embeddings)
    return Request(prompt, fitted(params, len(prompt), limit) if fit else params, ends)


def spell_logprobs(completion: Completion, tokenizer: Tokenizer) -> dict[str, Any]:
    """The JSON field "logprobs", if it was asked for."""
    if completion.logprobs is None:
        return {}
    entries = [
        _entry(tokenizer, one.token_id, one.logprob)
        | {"top": [_entry(tokenizer, token, logprob) for token, logprob in one.top]}
        for one in completion.logprobs
    ]
    return {"logprobs": entries}


def spell_prompt_logprobs(completion: Completion, prompt: Sequence[int], tokenizer: Tokenizer) -> dict[str, Any]:
    """The JSON field "prompt_logprobs", if it was asked for; the first token, which nothing precedes, has null."""
    if completion.prompt_logprobs is None:
        return {}
    values = (None, *completion.prompt_logprobs)
    return {"prompt_logprobs": [_entry(tokenizer, *pair) for pair in zip(prompt, values, strict=True)]}


def _entry(tokenizer: Tokenizer, token: int, logprob: float | None) -> dict[str, Any]:
    if logprob is not None and not math.isfinite(logprob):  # JSON has no such numbers
        logprob = None
    return {"id": token, "token": tokenizer.decode([token], skip_special_tokens=False), "logprob": logprob}


def _parse(line: bytes) -> dict[str, Any]:
    if len(line) > MAX_LINE:
        raise OptionError(f"the line is longer than {MAX_LINE:,} bytes")

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    def finite(number: str) -> float:
        if not math.isfinite(value := float(number)):
            raise ValueError(f"{number} is beyond every float")
        return value

    try:
        fields = json.loads(line, parse_constant=refuse, parse_float=finite)
    except (ValueError, RecursionError) as error:
        raise OptionError(f"the line is not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise OptionError(f"the line is a JSON {type(fields).__name__}; it must be an object")
    check_depth(fields, "the line")
    return fields


def _answer(line: _Line, tokenizer: Tokenizer) -> dict[str, Any]:
    prompt = line.request.prompt
    assert not isinstance(prompt, str)  # lines are encoded as they are read
    samples = [
        {
            "text": sample.text,
            "completion_tokens": len(sample.token_ids),
            "finish_reason": sample.finish_reason,
            **spell_logprobs(sample, tokenizer),
        }
        for sample in line.samples
    ]
    shared = {"prompt_tokens": len(prompt), **spell_prompt_logprobs(line.samples[0], prompt, tokenizer)}
    if len(samples) == 1:
        return samples[0] | shared
    return {"samples": samples, "completion_tokens": sum(len(sample.token_ids) for sample in line.samples)} | shared
