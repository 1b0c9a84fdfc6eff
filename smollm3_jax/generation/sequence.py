"""One sample of a request on the host: its tokens, its text, and where it ends."""

import dataclasses
import logging
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from ..errors import OptionError
from ..model import SmolLM3
from ..tokenizer import Tokenizer
from .device_loop import DecodedTokens, PromptLogprobs, Slots
from .grammar import Matcher
from .requests import Delta, Logprob, Request, begins_thinking, end_ids, last_turn, stop_ids, think_ids
from .sampling import MAX_STOP_IDS, SamplingState

log = logging.getLogger(__name__)


class Sequence:
    """One sample of a request on the host: its tokens, and how far its text has been handed out."""

    def __init__(self, model: SmolLM3, index: int, sample: int, request: Request, tokenizer: Tokenizer | None):
        assert not isinstance(request.prompt, str)  # `with_ids` was here
        self.index, self.sample, self.request, self.tokenizer = index, sample, request, tokenizer
        self.prompt = request.prompt
        self.vocab_size = model.config.vocab_size
        self.adapter = adapter_number(model, request.adapter)
        # What an adapter has made of a prompt is nothing to another.
        self.salt = f"{self.adapter or 0} {request.cache_salt}"
        self.stop_ids = stop_ids(model.config, model.generation_config, request, tokenizer)
        self.think_ids = think_ids(tokenizer)
        ends = end_ids(model.config, model.generation_config, request)
        turn = last_turn(self.prompt, ends)
        self.thinking = begins_thinking(tokenizer, turn)
        self._of_grammar = self.vocab_size, ends, self.think_ids, turn
        self.matcher = self._new_matcher()
        self.begun = False  # whether it has ever been in a slot
        self.said = 0  # tokens that its slot has said: all of them, or fewer while a slot says them again
        # Of a request's samples the first has them.
        self.wants_prompt = request.params.prompt_logprobs and sample == 0
        self.cached_tokens: int | None = 0
        self.prompt_logprobs: tuple[float, ...] | None = None
        self.prompt_top: tuple[tuple[tuple[int, float], ...], ...] | None = None
        self.tokens: list[int] = []
        self.text = ""  # all that is decoded
        self.handed_out = 0  # characters of it
        self.decoder = None if tokenizer is None else tokenizer.decode_stream(prompt=self.prompt)

    @property
    def age(self) -> tuple[int, int]:
        """The least is that of the oldest."""
        return self.index, self.sample

    def places(self, ahead: int) -> int:
        """How many tokens it has in the cache when its slot has said as many again as ever, and `ahead` more."""
        return len(self.prompt) - 1 + min(len(self.tokens) + ahead, self.request.params.max_new_tokens)

    def begin_again(self) -> None:
        """From its prompt on, in another slot: it decodes what it has said once more, and hands nothing out twice."""
        self.said, self.matcher = 0, self._new_matcher()

    def _new_matcher(self) -> Matcher | None:
        if self.request.grammar is None:
            return None
        assert self.tokenizer is not None  # `check_request` was here
        return Matcher(self.request.grammar, self.tokenizer, *self._of_grammar)

    def slot(self) -> Slots:
        """Its state on the device, without the leading B."""
        params, prompt = self.request.params, self.prompt
        budget = params.max_thinking_tokens
        fields: dict[str, Any] = dict(  # NumPy's arrays, until they come to the device
            token=np.int32(prompt[-1]),
            active=np.bool_(True),
            generated=np.int32(0),
            limit=np.int32(params.max_new_tokens),
            stop_ids=np.array([*self.stop_ids, *[-1] * (MAX_STOP_IDS - len(self.stop_ids))], np.int32),
            think_ids=np.array(self.think_ids, np.int32),
            thinking=np.bool_(self.thinking),
            think_left=np.int32(-1 if budget is None else budget),
            choice=SamplingState.of(params, prompt, self.sample, self.vocab_size),
            adapter=self.adapter,
        )
        return Slots(**fields)

    def take_prompt(self, pieces: list[tuple[PromptLogprobs, int]]) -> None:
        """What the pieces of its prompt gave, each with how many of its tokens are real."""
        self.prompt_logprobs = tuple(float(x) for values, count in pieces for x in values.next[:count])
        wanted = self.request.params.logprobs
        if wanted is not None:
            self.prompt_top = tuple(
                tuple((int(token), float(x)) for token, x in zip(ids[:wanted], top[:wanted], strict=True))
                for values, count in pieces
                for ids, top in zip(values.top_ids[:count], values.top[:count], strict=True)
            )

    def take(self, slot: int, chosen: DecodedTokens) -> Delta:
        """What a call of `decode` chose for it; nothing of what it has said before."""
        row = chosen.tokens[slot]
        new = [int(token) for token in row[row >= 0]]
        again = min(len(new), len(self.tokens) - self.said)
        assert new[:again] == self.tokens[self.said : self.said + again], "a replay differs"
        self.said += len(new)
        if self.matcher is not None:
            for token in new[:again]:
                self.matcher.take(token)
        reason = None
        if chosen.logprobs is not None and (wrong := np.isnan(chosen.logprobs[slot, : len(new)])).any():
            log.warning("an answer ends where the model's numbers are no numbers any more")
            new, reason = new[: int(wrong.argmax())], "error"
        count = len(new)
        for i, token in enumerate(new[again:], again):
            self.tokens.append(token)
            stops = token in self.stop_ids
            self._decode(None if stops else token)
            if stops or self._meets_stop_text():
                failed = self.matcher is not None and self.matcher.failed
                reason, count = "error" if failed else "stop", i + 1
                break
            if self.matcher is not None:
                self.matcher.take(token)
        if reason is None and len(self.tokens) >= self.request.params.max_new_tokens:
            reason = "length"
        if reason is not None:
            self._decode(None)
        first = self.prompt_logprobs, self.prompt_top, self.cached_tokens
        self.prompt_logprobs, self.prompt_top, self.cached_tokens = None, None, None
        return Delta(
            request=self.index,
            sample=self.sample,
            token_ids=tuple(new[again:count]),
            text=self._hand_out(reason is not None),
            logprobs=self._logprobs(slot, chosen, range(again, count)),
            prompt_logprobs=first[0],
            finish_reason=reason,
            prompt_top=first[1],
            cached_tokens=first[2],
        )

    def _decode(self, token: int | None) -> None:
        if self.decoder is not None:
            self.text += self.decoder(token)

    def _meets_stop_text(self) -> bool:
        found = [self.text.find(stop, max(0, self.handed_out)) for stop in self.request.params.stop]
        found = [at for at in found if at >= 0]
        if found:
            self.text = self.text[: min(found)]
            self.decoder = None
        return bool(found)

    def _hand_out(self, finished: bool) -> str:
        """New text, without what may yet turn out to begin a stop text."""
        end = len(self.text)
        if not finished:
            for stop in self.request.params.stop:
                held = next((n for n in range(len(stop) - 1, 0, -1) if self.text.endswith(stop[:n])), 0)
                end = min(end, len(self.text) - held)
        end = max(end, self.handed_out)
        out, self.handed_out = self.text[self.handed_out : end], end
        return out

    def _logprobs(self, slot: int, chosen: DecodedTokens, steps: range) -> tuple[Logprob, ...] | None:
        wanted = self.request.params.logprobs
        if wanted is None:
            return None
        return tuple(
            Logprob(
                int(chosen.tokens[slot, i]),
                float(chosen.logprobs[slot, i]),
                tuple(
                    (int(token), float(value))
                    for token, value in zip(
                        chosen.top_ids[slot, i, :wanted], chosen.top_logprobs[slot, i, :wanted], strict=True
                    )
                ),
            )
            for i in steps
        )


def adapter_number(model: SmolLM3, name: str | None) -> np.int32 | None:
    """The number of an adapter of the model, 0 for the model without one; None where it has no adapters.

    Raises:
      OptionError: it has none of this name.
    """
    if name is None:
        return np.int32(0) if model.adapters else None
    if name not in model.adapters:
        there = f"it has {', '.join(model.adapters)}" if model.adapters else "it has none"
        raise OptionError(f"adapter is {name!r}, and the model has no adapter of this name: {there}")
    return np.int32(1 + model.adapters.index(name))


@dataclasses.dataclass
class Prefill:
    """A prompt on its way into a slot: which pieces are left, and the log-probabilities of those that are in."""

    sequence: Sequence
    slot: int
    left: Iterator[tuple[int, int, int]]
    logprobs: list[tuple[PromptLogprobs, int]] = dataclasses.field(default_factory=list)


def held_back(running: Mapping[int, Sequence], slots: int) -> tuple[np.ndarray, np.ndarray] | None:
    """What the grammars of running sequences, by slot, do not have next: bool [B], whether a slot has a grammar, and
    bits int32 [B, V / 32]; None if none has one. A call may then say one token: the next bits depend on it."""
    rows = {slot: one.matcher.forbidden() for slot, one in running.items() if one.matcher is not None}
    if not rows:
        return None
    masks = np.zeros((slots, len(next(iter(rows.values())))), np.int32)
    masks[list(rows)] = list(rows.values())
    return np.isin(np.arange(slots), list(rows)), masks
