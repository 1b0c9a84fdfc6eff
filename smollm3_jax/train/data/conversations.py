"""Records of conversations as token ids, with the tokens that are trained.

A record is an object with `messages`, perhaps `tools` and `chat_template_kwargs`; or with `prompt` and `completion`,
which are texts or lists of messages; and of a preference `chosen` and `rejected`, perhaps with their `prompt`.

What is trained is where the template's `{% generation %}` blocks are, or what comes after a prompt: never what a
token's id says, as SmolLM3 pads with the token that ends a turn.
"""

import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ...chat.template import encode_chat, encode_chat_mask, normalize
from ...config import ModelConfig
from ...errors import OptionError, SmolLM3Error
from ...reading import read_file, why
from ...text_files import decode
from ...tokenizer import Tokenizer
from ..settings_file import RECIPES, SHIPPED
from .records import BadRecord

MOST_BYTES = 2**20  # of a template
_RESERVED = ("messages", "tools", "add_generation_prompt", "special_tokens", "now", "context")
_THOUGHT = re.compile(r"\s*<think>.*?</think>\s*", re.DOTALL)


class Conversation(NamedTuple):
    """ids: int32 [n]. trained: bool [n], whether a token is learned (as what follows the one before it). left_out: how
    many turns lost their reasoning, as thinking is off in the record."""

    ids: np.ndarray
    trained: np.ndarray
    left_out: int = 0


class Completion(NamedTuple):
    """ids: int32 [n], of prompt and completion. first: the index of the first token that is learned."""

    ids: np.ndarray
    first: int


def conversation_encoder(
    tokenizer: Tokenizer, config: ModelConfig, *, date: str, train_on: str = "assistant"
) -> Callable[[Mapping[str, Any]], Conversation]:
    """What turns a record into a `Conversation`.

    Args:
      tokenizer: with the template to use, see `with_template`.
      date: the template's today, YYYY-MM-DD.
      train_on: "assistant": what `{% generation %}` blocks wrote, and of `prompt` and `completion` only what comes
        after the prompt; "all": everything.

    Returns:
      The function. It raises BadRecord for a record that is none, and OptionError where the template says nothing of
      what is to be trained.
    """
    render = _renderer(date)

    def encode(record: Mapping[str, Any]) -> Conversation:
        if "messages" in record:
            messages, prompt = record["messages"], None
        elif "prompt" in record and "completion" in record:
            messages, prompt = _joined(record["prompt"], record["completion"]), record["prompt"]
        else:
            raise BadRecord(
                f"neither messages nor prompt and completion, but {', '.join(map(str, record)) or 'nothing'}"
            )
        if prompt is not None and isinstance(messages, str):
            ids = _text_ids(tokenizer, config, messages)
            trained, left_out = np.ones(len(ids), bool), 0
        else:
            options = _options(record)
            messages, left_out = _without_reasoning(normalize(messages), options)
            found, trained = encode_chat_mask(tokenizer, messages, **options, **render)
            ids = np.asarray(found, np.int32)
            if prompt is None and train_on == "assistant":
                _require_blocks(tokenizer.template(options.get("tools")))
            if prompt is not None and not trained.any():  # the template has no blocks: all of the completion
                trained = np.ones(len(ids), bool)
        if train_on == "all":
            return Conversation(ids, np.ones(len(ids), bool), left_out)
        if prompt is not None:
            trained = trained & (np.arange(len(ids)) >= _common(_prompt_ids(tokenizer, record, prompt, render), ids))
        return Conversation(ids, trained, left_out)

    return _bad_records(encode)


def preference_encoder(
    tokenizer: Tokenizer, config: ModelConfig, *, date: str
) -> Callable[[Mapping[str, Any]], tuple[Completion, Completion]]:
    """What turns a record into (chosen, rejected). Both begin to be learned at the same index: after the longest common
    prefix of the prompt, with the opening of the assistant's turn, and of both (as TRL's DPOTrainer has it).

    Where there is no `prompt`, it is what `chosen` and `rejected` begin with alike.
    """
    render = _renderer(date)

    def encode(record: Mapping[str, Any]) -> tuple[Completion, Completion]:
        if not ("chosen" in record and "rejected" in record):
            raise BadRecord(f"no chosen and rejected, but {', '.join(record) or 'nothing'}")
        sides = [record["chosen"], record["rejected"]]
        if record.get("prompt") is None:
            common = _common_start(*sides)
            prompt, sides = sides[0][:common], [side[common:] for side in sides]
        else:
            prompt = record["prompt"]
        found = []
        for side in sides:
            whole = _joined(prompt, side)
            if isinstance(whole, str):
                found.append(_text_ids(tokenizer, config, whole))
            else:
                options = _options(record)
                messages, _ = _without_reasoning(normalize(whole), options)
                found.append(np.asarray(encode_chat(tokenizer, messages, **options, **render), np.int32))
        begin = _prompt_ids(tokenizer, record, prompt, render)
        first = min(_common(begin, ids) for ids in found)
        chosen, rejected = (Completion(ids, first) for ids in found)
        return chosen, rejected

    return _bad_records(encode)


def with_template(tokenizer: Tokenizer, template: str) -> Tokenizer:
    """The tokenizer with another chat template, its source, for all conversations."""
    return Tokenizer(tokenizer.backend, template, tokenizer.special_tokens, {"default": template}, tokenizer.rowless)


def tokenizer_for(tokenizer: Tokenizer, template: str) -> Tokenizer:
    """What a run encodes conversations with. template: data.template; "" is the tokenizer's own. Raises OptionError."""
    return with_template(tokenizer, read_template(template)) if template else tokenizer


def read_template(path: str) -> str:
    """A chat template's file, or one that the package ships, recipe:NAME. Raises OptionError."""
    shipped = path.startswith(SHIPPED)
    file = RECIPES / path.removeprefix(SHIPPED) if shipped else Path(path).expanduser()
    try:
        return decode(read_file(file, MOST_BYTES))
    except (OSError, UnicodeError) as error:
        raise OptionError(f"data.template={path} cannot be read: {why(error)}") from None


def _bad_records(encode: Callable[[Mapping[str, Any]], Any]) -> Callable[[Mapping[str, Any]], Any]:
    @functools.wraps(encode)
    def wrapped(record: Mapping[str, Any]) -> Any:
        try:
            return encode(record)
        except _NoBlocks as error:
            raise OptionError(str(error)) from None
        except SmolLM3Error as error:
            raise BadRecord(str(error)) from None

    return wrapped


class _NoBlocks(OptionError):
    """It is no record's fault."""


def _require_blocks(template: str) -> None:
    if not re.search(r"{%[-+]?\s*generation\b", template):
        raise _NoBlocks(
            "the chat template has no {% generation %} blocks, so it does not say which tokens are the assistant's: "
            "give one that has them, data.template=FILE, or train on all tokens, objective.train_on=all"
        )


def _renderer(date: str) -> dict[str, Any]:
    day = datetime.fromisoformat(date)
    return {"now": lambda: day}


def _options(record: Mapping[str, Any]) -> dict[str, Any]:
    """What goes to the template beside the messages. A variable that is None is not given: columns of Parquet have None
    where a record lacks a field, and a template would take it for false."""
    tools, variables = record.get("tools"), record.get("chat_template_kwargs") or {}
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise BadRecord(f"tools is no JSON: {error}"[:200]) from None
    if not isinstance(variables, Mapping):
        raise BadRecord(f"chat_template_kwargs is a {type(variables).__name__}; it must be an object")
    if taken := [name for name in _RESERVED if name in variables]:
        raise BadRecord(f"chat_template_kwargs has {taken[0]!r}, which is no variable of a template")
    return {"tools": tools or None} | {str(name): value for name, value in variables.items() if value is not None}


def _without_reasoning(messages: list[dict[str, Any]], options: Mapping[str, Any]) -> tuple[list[dict[str, Any]], int]:
    """(the messages, of how many reasoning was left out): where thinking is off, the template itself writes an empty
    block, and a second one would be what no prompt of that mode leads to."""
    system = messages[0]["content"] if messages[0]["role"] == "system" else ""
    off = not options.get("enable_thinking", True)
    if "/no_think" in system or "/think" in system:
        off = "/no_think" in system
    if not off:
        return messages, 0
    kept = [
        message | {"content": _THOUGHT.sub("", message["content"], count=1)}
        if message["role"] == "assistant" and _THOUGHT.match(message["content"])
        else message
        for message in messages
    ]
    return kept, sum(a != b for a, b in zip(kept, messages, strict=True))


def _joined(prompt: Any, completion: Any) -> Any:
    """Prompt and completion as one text, or one list of messages."""
    if isinstance(prompt, str) and isinstance(completion, str):
        return prompt + completion
    if all(isinstance(x, Sequence) and not isinstance(x, str) for x in (prompt, completion)):
        return [*prompt, *completion]
    raise BadRecord("a prompt and what follows it must be two texts, or two lists of messages")


def _prompt_ids(tokenizer: Tokenizer, record: Mapping[str, Any], prompt: Any, render: Mapping[str, Any]) -> np.ndarray:
    if isinstance(prompt, str):
        return np.asarray(tokenizer.encode(prompt), np.int32)
    if not prompt:
        return np.zeros(0, np.int32)
    options = _options(record)
    messages, _ = _without_reasoning(normalize(prompt), options)
    return np.asarray(encode_chat(tokenizer, messages, add_generation_prompt=True, **options, **render), np.int32)


def _text_ids(tokenizer: Tokenizer, config: ModelConfig, text: str) -> np.ndarray:
    """Of a text and the token that ends it, unless it is there."""
    eos = config.eos_token_id
    ends = [tokenizer.eos_token_id, *(eos if isinstance(eos, tuple) else (eos,))]
    ids = tokenizer.encode(text)
    if not ids or ids[-1] not in ends:
        ids = [*ids, *[end for end in ends if end is not None][:1]]
    return np.asarray(ids, np.int32)


def _common(a: np.ndarray, b: np.ndarray) -> int:
    """How many tokens both begin with."""
    length = min(len(a), len(b))
    differ = np.flatnonzero(a[:length] != b[:length])
    return int(differ[0]) if len(differ) else length


def _common_start(chosen: Any, rejected: Any) -> int:
    """Where a pair begins to differ, in messages or characters; a space before that belongs to what differs."""
    _joined(chosen, rejected)
    length = min(len(chosen), len(rejected))
    at = next((i for i in range(length) if chosen[i] != rejected[i]), max(0, length - 1))
    return at - 1 if isinstance(chosen, str) and at and chosen[at - 1] == " " else at
