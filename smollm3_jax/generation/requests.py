"""What is asked of generation, what comes back, and what is refused."""

import dataclasses
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..config import GenerationConfig, ModelConfig
from ..errors import OptionError
from ..tokenizer import Tokenizer
from .grammar import check_grammar
from .prompt_lookup import MAX_DRAFT, can_draft
from .sampling import MAX_STOP_IDS, SamplingParams


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt, as text or token ids, and how to continue it.

    ends: ids that end it beside the model's own, unless params.ignore_eos; see `chat_ends`.
    cache_salt: beginnings of prompts are shared among requests of one salt; it changes no answer.
    grammar: None, or what the answer must be, after any thinking that it begins with; see `grammar`.
    adapter: the name of one of the model's adapters; None is the model without any. See `weights.served`.
    """

    prompt: Sequence[int] | str
    params: SamplingParams = dataclasses.field(default_factory=SamplingParams)
    ends: Sequence[int] = ()
    cache_salt: str = ""
    grammar: str | None = None
    adapter: str | None = None


@dataclasses.dataclass(frozen=True)
class Logprob:
    """A chosen token's log-probability, and the likeliest tokens' with their ids, likeliest first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclasses.dataclass(frozen=True)
class Delta:
    """What came of one sequence since the last time.

    request, sample: which one.
    token_ids: new ones only.
    text: new text, if there is a tokenizer.
    logprobs: of token_ids, if asked for.
    prompt_logprobs: once, with the first delta, if asked for.
    finish_reason: with the last delta "stop", "length", or "error" if its grammar could not be kept, or the model's
      numbers were NaN; else None.

    With the first delta come prompt_top, of each of prompt_logprobs the likeliest ids with theirs, if params.logprobs
    asks for some, and cached_tokens, how many tokens of the prompt were kept from an earlier one.
    """

    request: int
    sample: int
    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[Logprob, ...] | None
    prompt_logprobs: tuple[float, ...] | None
    finish_reason: str | None
    prompt_top: tuple[tuple[tuple[int, float], ...], ...] | None = None
    cached_tokens: int | None = None


@dataclasses.dataclass
class Completion:
    """A finished sequence. token_ids are the new ones, the stop token included; text ends before a stop."""

    token_ids: list[int]
    text: str
    finish_reason: str
    logprobs: list[Logprob] | None
    prompt_logprobs: list[float] | None

    @classmethod
    def empty(cls) -> "Completion":
        """One that has not begun."""
        return cls([], "", "", None, None)

    def add(self, delta: Delta) -> None:
        """What came of it since the last time."""
        self.token_ids += delta.token_ids
        self.text += delta.text
        if delta.logprobs is not None:
            self.logprobs = (self.logprobs or []) + list(delta.logprobs)
        if delta.prompt_logprobs is not None:
            self.prompt_logprobs = list(delta.prompt_logprobs)
        self.finish_reason = delta.finish_reason or ""


def chat_ends(tokenizer: Tokenizer, config: ModelConfig) -> tuple[int, ...]:
    """What ends an answer in a chat beside the model's own ends: the end that the tokenizer's files name.

    A template closes every turn with it, whatever config.json says, which may know the end of a document alone.
    """
    end = tokenizer.eos_token_id
    return () if end is None or end >= config.vocab_size else (end,)


def fitted(params: SamplingParams, prompt_tokens: int, context: int) -> SamplingParams:
    """The same with no more new tokens than the context leaves: for a number that nobody asked for."""
    room = max(1, context - prompt_tokens)
    return dataclasses.replace(params, max_new_tokens=min(params.max_new_tokens, room))


def with_ids(
    request: Request, config: ModelConfig, tokenizer: Tokenizer | None = None, name: str = "the prompt"
) -> Request:
    """The request with its prompt as a list of token ids.

    Raises:
      OptionError: it is a text that is too long or has no tokenizer, or is neither a text nor a list of ids.
    """
    prompt = request.prompt
    if isinstance(prompt, str):
        if tokenizer is None:
            raise OptionError(
                f"{name} is a text, and the model has no tokenizer: give one (tokenizer=smollm3_jax.load_tokenizer("
                "FOLDER)), or give token ids"
            )
        return dataclasses.replace(request, prompt=tokenizer.encode(prompt, context=config.max_position_embeddings))
    try:
        ids = [operator.index(token) for token in np.asarray(prompt).tolist()]
    except (TypeError, ValueError):
        raise OptionError(f"{name} is {prompt!r:.60}; it must be a text or a list of token ids") from None
    return dataclasses.replace(request, prompt=ids)


def check_request(
    config: ModelConfig,
    generation_config: GenerationConfig,
    request: Request,
    tokenizer: Tokenizer | None = None,
    capacity: int | None = None,
    lookup: int = 0,
    name: str = "the prompt",
) -> None:
    """Refuses a request that `stream`, with the same options, would refuse.

    Raises:
      OptionError: naming the field, or the prompt by its name here.
    """
    prompt, params = with_ids(request, config, tokenizer, name).prompt, request.params
    assert not isinstance(prompt, str)
    if len(prompt) == 0:
        raise OptionError(f"{name} is empty; give at least one token")
    if bad := [i for i in prompt if not 0 <= i < config.vocab_size]:
        raise OptionError(f"{name} holds the id {bad[0]}; the vocabulary has {config.vocab_size} tokens")
    for room, what in ((config.max_position_embeddings, "the model's context"), (capacity, "the room of a slot")):
        if room is not None and len(prompt) + params.max_new_tokens > room:
            raise OptionError(
                f"{name} has {len(prompt)} tokens; with max_new_tokens {params.max_new_tokens} that exceeds "
                f"{what} of {room}"
            )
    params.check_ids(config.vocab_size)
    if not 0 <= lookup <= MAX_DRAFT:
        raise OptionError(f"lookup is {lookup}; it must be from 0 (off) to {MAX_DRAFT}")
    if lookup and not (can_draft(params) and request.grammar is None):
        raise OptionError(
            "prompt lookup verifies greedy decoding: it needs temperature 0, and takes no penalties, logit_bias, "
            "logprobs, max_thinking_tokens or grammar"
        )
    if tokenizer is None and params.stop:
        raise OptionError("stop texts need a tokenizer; give one, or use stop_token_ids")
    if params.max_thinking_tokens is not None and -1 in think_ids(tokenizer):
        raise OptionError("max_thinking_tokens needs a tokenizer that has <think> and </think> as tokens")
    if request.grammar is not None:
        if not end_ids(config, generation_config, request):
            raise OptionError("an answer that keeps to a grammar needs a token to end with; leave out ignore_eos")
        check_grammar(request.grammar, tokenizer)
    if len(stop_ids(config, generation_config, request, tokenizer)) > MAX_STOP_IDS:
        raise OptionError(f"stop_token_ids: with the model's own, a sequence has at most {MAX_STOP_IDS}")


def stop_ids(
    config: ModelConfig, generation_config: GenerationConfig, request: Request, tokenizer: Tokenizer | None
) -> tuple[int, ...]:
    """All ids that end a request, each once: the model's own and the request's, and stop texts that are one token."""
    params, ends = request.params, end_ids(config, generation_config, request)
    # A special token is not in the text, so that it would never be found there.
    special = [] if tokenizer is None else [tokenizer.special_id(stop) for stop in params.stop]
    found = [token for token in special if token is not None and token < config.vocab_size]
    return tuple(dict.fromkeys([*ends, *params.stop_token_ids, *found]))


def end_ids(config: ModelConfig, generation_config: GenerationConfig, request: Request) -> tuple[int, ...]:
    """Those of them that the model says by itself where its answer is over."""
    ends = () if request.params.ignore_eos else (*generation_config.eos_token_id, *request.ends)
    return tuple(token for token in ends if token < config.vocab_size)  # what has no row is never chosen


def think_ids(tokenizer: Tokenizer | None) -> tuple[int, int]:
    """The tokens that open and close thinking; -1 where there are none."""
    ids = [None if tokenizer is None else tokenizer.backend.token_to_id(text) for text in ("<think>", "</think>")]
    return tuple(-1 if i is None else i for i in ids)  # pyright: ignore[reportReturnType]


def last_turn(prompt: Sequence[Any], ends: Sequence[int]) -> Sequence[Any]:
    """What follows the last of `ends` in a prompt: the beginning of the answer, as a template writes it."""
    begins = next((i + 1 for i in reversed(range(len(prompt))) if prompt[i] in ends), 0)
    return prompt[begins:]


def begins_thinking(tokenizer: Tokenizer | None, turn: Sequence[Any]) -> bool:
    """Whether the answer begins within thinking, which its template has opened. turn: see `last_turn`."""
    opens, closes = think_ids(tokenizer)
    last = next((token for token in reversed(turn) if token in (opens, closes)), None)
    return last is not None and last == opens


def as_json(request: Request) -> dict[str, Any]:
    """A request whose prompt is ids, ready for JSON; `from_json` makes it again."""
    params = dataclasses.asdict(request.params) | {"logit_bias": list(request.params.logit_bias.items())}
    own = {name: getattr(request, name) for name in ("cache_salt", "grammar", "adapter")}
    return {"prompt": list(request.prompt), "params": params, "ends": list(request.ends)} | own


def from_json(content: Mapping[str, Any]) -> Request:
    params = content["params"] | {"logit_bias": {token: value for token, value in content["params"]["logit_bias"]}}
    rest = {name: content[name] for name in ("cache_salt", "grammar", "adapter")}
    return Request(content["prompt"], SamplingParams(**params), tuple(content["ends"]), **rest)
