"""One sample of a request as its deltas come: counts of tokens, log-probabilities, and where tokens begin."""

import codecs
import dataclasses
from collections.abc import Sequence
from typing import Any

from ..generation.requests import Delta, Request, begins_thinking, end_ids, last_turn, stop_ids, think_ids
from ..tokenizer import Tokenizer
from .contract import Server

LOWEST = -9999.0  # a log-probability that JSON can hold, for what the model rules out


@dataclasses.dataclass(frozen=True)
class Token:
    """A token of a text, its log-probability (None: it has none), the likeliest tokens', and where it begins.

    offset: in characters of the text; a part of a character begins where the character does.
    """

    token_id: int
    logprob: float | None
    top: Sequence[tuple[int, float]]
    offset: int


class Offsets:
    """Where each of a text's tokens begins, in characters.

    Args:
      start: where the first one does.
      special: special tokens are part of the text.
    """

    def __init__(self, tokenizer: Tokenizer, start: int = 0, special: bool = False):
        self._tokenizer, self._special = tokenizer, special
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._at = start

    def next(self, token: int) -> int:
        start = self._at
        if self._special or not self._tokenizer.is_special(token):
            self._at += len(self._decoder.decode(self._tokenizer.token_bytes(token)))
        return start


class Sample:
    """Counts what a sample's deltas bring.

    generated: tokens, the end included; reasoning: those of thinking, its tags included; cached: tokens of the prompt
    that were not computed for it; finish_reason: None while it goes on.

    Args:
      start: characters that the text has before the sample's own.
      ends: list an end token, too.
    """

    def __init__(self, server: Server, request: Request, start: int = 0, ends: bool = False):
        self._ends = stop_ids(server.config, server.generation_config, request, server.tokenizer)
        self._list_ends = ends
        self._opens, self._closes = think_ids(server.tokenizer)
        turn = last_turn(request.prompt, end_ids(server.config, server.generation_config, request))
        # The prompt says it: a flag may have been overridden in it.
        self.begins_thinking = self._thinking = begins_thinking(server.tokenizer, turn)
        self._offsets = Offsets(server.tokenizer, start)
        self._waiting: list[Token] = []
        self.characters = start
        self.generated = self.reasoning = self.cached = 0
        self.finish_reason: str | None = None

    def add(self, delta: Delta) -> list[Token]:
        """The tokens whose text has been handed out now, if they have log-probabilities.

        Text that may begin a stop text is held back, and so are its tokens: those of a stop text never come, nor does
        the token that ends the answer.
        """
        self.cached = max(self.cached, delta.cached_tokens or 0)
        self.generated += len(delta.token_ids)
        for token in delta.token_ids:
            before, self._thinking = self._thinking, (self._thinking or token == self._opens) and token != self._closes
            self.reasoning += before or self._thinking
        self.characters += len(delta.text)
        self.finish_reason = delta.finish_reason
        for found in delta.logprobs or ():
            self._waiting.append(Token(found.token_id, found.logprob, found.top, self._offsets.next(found.token_id)))
        return self._take()

    def _take(self) -> list[Token]:
        waiting = self._waiting
        ready = next((i for i, token in enumerate(waiting) if token.offset >= self.characters), len(waiting))
        if self.finish_reason is not None and waiting:
            at_end = self.finish_reason == "stop" and waiting[-1].token_id in self._ends
            if at_end or self.finish_reason != "stop":
                ready = len(waiting) - (at_end and not self._list_ends)
        found, self._waiting = waiting[:ready], waiting[ready:]
        return found


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """A token as a text; one that is no whole characters as "bytes:\\xe2\\x82"."""
    content = tokenizer.token_bytes(token)
    try:
        return content.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)


def listed(tokenizer: Tokenizer, tokens: Sequence[Token]) -> list[dict[str, Any]]:
    """Log-probabilities as chat completions and responses list them."""

    def entry(token: int, logprob: float | None) -> dict[str, Any]:
        found = {"token": token_text(tokenizer, token), "logprob": finite(logprob)}
        return found | {"bytes": list(tokenizer.token_bytes(token))}

    return [
        entry(token.token_id, token.logprob) | {"top_logprobs": [entry(*pair) for pair in token.top]}
        for token in tokens
    ]


def finite(logprob: float | None) -> float:
    """What JSON can hold of a log-probability; NaN is the lowest value, too."""
    return logprob if logprob is not None and logprob > LOWEST else LOWEST


def usage(prompt_tokens: int, samples: Sequence[Sample]) -> dict[str, Any]:
    """OpenAI's account of tokens; a prompt counts once, however many samples continue it."""
    generated = sum(sample.generated for sample in samples)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": generated,
        "total_tokens": prompt_tokens + generated,
        "prompt_tokens_details": {"cached_tokens": max((sample.cached for sample in samples), default=0)},
        "completion_tokens_details": {"reasoning_tokens": sum(sample.reasoning for sample in samples)},
    }
