"""One sample of a request on the host: its tokens, its text, and where it ends."""

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..model import SmolLM3
from ..tokenizer import Tokenizer
from .device_loop import PromptLogprobs, Slots
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
        self.stop_ids = stop_ids(model.config, model.generation_config, request, tokenizer)
        self.think_ids = think_ids(tokenizer)
        ends = end_ids(model.config, model.generation_config, request)
        turn = last_turn(self.prompt, ends)
        self.thinking = begins_thinking(tokenizer, turn)
        self.matcher: Matcher | None = None
        if request.grammar is not None:
            assert tokenizer is not None  # `check_request` was here
            self.matcher = Matcher(request.grammar, tokenizer, self.vocab_size, ends, self.think_ids, turn)
        # Of a request's samples the first has them.
        self.wants_prompt = request.params.prompt_logprobs and sample == 0
        self.cached_tokens: int | None = 0
        self.prompt_logprobs: tuple[float, ...] | None = None
        self.prompt_top: tuple[tuple[tuple[int, float], ...], ...] | None = None
        self.tokens: list[int] = []
        self.text = ""  # all that is decoded
        self.handed_out = 0  # characters of it
        self.decoder = None if tokenizer is None else tokenizer.decode_stream(prompt=self.prompt)

    def slot(self) -> Slots:
        """Its state on the device, without the leading B."""
        params, prompt = self.request.params, self.prompt
        budget = params.max_thinking_tokens
        return Slots(
            token=np.int32(prompt[-1]),
            active=np.bool_(True),
            generated=np.int32(0),
            limit=np.int32(params.max_new_tokens),
            stop_ids=np.array([*self.stop_ids, *[-1] * (MAX_STOP_IDS - len(self.stop_ids))], np.int32),
            think_ids=np.array(self.think_ids, np.int32),
            thinking=np.bool_(self.thinking),
            think_left=np.int32(-1 if budget is None else budget),
            choice=SamplingState.of(params, prompt, self.sample, self.vocab_size),
        )

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

    def take(self, slot: int, chosen: Any) -> Delta:
        """What a call of `decode` chose for it."""
        row = chosen.tokens[slot]
        new = [int(token) for token in row[row >= 0]]
        reason = None
        if chosen.logprobs is not None and (wrong := np.isnan(chosen.logprobs[slot, : len(new)])).any():
            log.warning("an answer ends where the model's numbers are no numbers any more")
            new, reason = new[: int(wrong.argmax())], "error"
        count = len(new)
        for i, token in enumerate(new):
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
            token_ids=tuple(new[:count]),
            text=self._hand_out(reason is not None),
            logprobs=self._logprobs(slot, chosen, count),
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

    def _logprobs(self, slot: int, chosen: Any, count: int) -> tuple[Logprob, ...] | None:
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
            for i in range(count)
        )


def held_back(running: Mapping[int, Sequence], slots: int) -> tuple[np.ndarray, np.ndarray] | None:
    """What the grammars of running sequences, by slot, do not have next: bool [B], whether a slot has a grammar, and
    bits int32 [B, V / 32]; None if none has one. A call may then say one token: the next bits depend on it."""
    rows = {slot: one.matcher.forbidden() for slot, one in running.items() if one.matcher is not None}
    if not rows:
        return None
    masks = np.zeros((slots, len(next(iter(rows.values())))), np.int32)
    masks[list(rows)] = list(rows.values())
    return np.isin(np.arange(slots), list(rows)), masks
