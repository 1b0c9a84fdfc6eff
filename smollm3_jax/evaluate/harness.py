"""lm-evaluation-harness's view of a model: its requests, answered by packed log-likelihoods and the engine's slots.

The one room that imports lm_eval (the extra `eval`), and what is to stand between its requests and ours: tokens as its
HFLM makes them, windows of long texts, stop texts, and thinking, which is not graded.
"""

import collections
import dataclasses
import datetime
import json
import logging
from collections.abc import Iterator, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from ..chat.template import render
from ..errors import OptionError
from ..generation.engine import Engine
from ..generation.requests import Completion, Request, begins_thinking, chat_ends, last_turn
from ..generation.sampling import SamplingParams
from ..model import SmolLM3
from ..progress import tally
from ..tokenizer import Tokenizer
from .answers import Answers
from .likelihood import Span, log_likelihoods

log = logging.getLogger(__name__)

SLOTS = 16
CONVERSATION = "\0conversation "  # how the text of one begins that is no text; see `conversation`
MAX_NEW_TOKENS = 256  # where a task does not say, as in lm-eval
# What a task's generation_kwargs may say beside what lm-eval itself reads -> that it asks for nothing.
PARAMS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
NOTHING = {"num_beams": (1,), "use_cache": (True, False), "num_return_sequences": (1,), "early_stopping": (False,)}


class EngineLM(TemplateLM):
    """A model as lm-eval asks it.

    Args:
      chat: prompts are chats of the model's template, and thinking is left out of what it answers.
      thinking: what the template is told about it; None is its own default.
      max_length: the most tokens of a text; longer ones lose their beginning, or are cut into windows. None is the
        model's context.
      slots: how many answers are generated side by side at most.
      cache_dtype: as for `Engine`.
    """

    def __init__(
        self,
        model: SmolLM3,
        tokenizer: Tokenizer,
        answers: Answers,
        *,
        chat: bool = False,
        thinking: bool | None = None,
        max_length: int | None = None,
        slots: int = SLOTS,
        cache_dtype: Any = None,
    ):
        super().__init__()
        context = model.config.max_position_embeddings
        if max_length is not None and not 2 <= max_length <= context:
            raise OptionError(f"max_length is {max_length}; it must be from 2 to {context}, the model's context")
        self._model, self._text, self._answers = model, tokenizer, answers
        self._chat, self._thinking = chat, thinking
        self.max_length = max_length or context
        self._slots, self._cache_dtype = slots, cache_dtype
        # Prompts, texts whose log-likelihood is asked for, and "..._cut", those of either that lost their beginning.
        self.counted: collections.Counter[str] = collections.Counter()

    @property
    def eot_token_id(self) -> int:
        ends = [self._text.eos_token_id, *self._model.generation_config.eos_token_id]
        found = next((end for end in ends if end is not None), None)
        if found is None:
            raise OptionError("the model's files name no end of a text, which one without a context would follow")
        return found

    @property
    def prefix_token_id(self) -> int:
        """What a text without a context follows: the tokenizer's beginning, or else the end of another one."""
        begins = self._text.special_tokens.get("bos_token")
        found = None if begins is None else self._text.backend.token_to_id(begins)
        return self.eot_token_id if found is None else found

    @property
    def tokenizer_name(self) -> str:
        return type(self._text).__name__

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Without what the tokenizer adds where the text begins with it, as a rendered chat does."""
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self._text.decode([self.prefix_token_id], False))
        return self._text.encode(string, add_special_tokens)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return self._text.template() if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of a chat up to the opening of the answer; or, without that, up to the end of the last message."""
        midnight = datetime.datetime.combine(self._answers.date, datetime.time())
        options = {} if self._thinking is None else {"enable_thinking": self._thinking}
        options |= {"special_tokens": self._text.special_tokens, "now": lambda: midnight}
        *before, asked = chat_history
        if asked["content"].startswith(CONVERSATION):
            content = json.loads(asked["content"].removeprefix(CONVERSATION))
            chat_history, tools = [*before, *content["messages"]], content["tools"]
            bare = render(self._text.template(), chat_history, add_generation_prompt=add_generation_prompt, **options)
            options["tools"] = tools
        else:
            bare = None
        text = render(self._text.template(), chat_history, add_generation_prompt=add_generation_prompt, **options)
        if text == bare:
            raise OptionError("the model's chat template shows no tools, and the task offers some")
        if add_generation_prompt:
            return text
        last = chat_history[-1]["content"].strip()
        return text[: text.rindex(last) + len(last)]

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(self, requests: list[Any], **_: Any) -> list[tuple[float, bool]]:
        for (_context, continuation), before, after in requests:
            if not 0 < len(after) <= self.max_length:
                raise OptionError(
                    f"{continuation!r:.80} is {len(after)} tokens after its context; it must be from 1 to max_length, "
                    f"{self.max_length}"
                )
            self._count("texts", len(before) + len(after) > self.max_length + 1)
        return self._spans([self._span(before, after) for _, before, after in requests])

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        spans, owners = [], []
        for number, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            for window in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1):
                spans.append(self._span(*make_disjoint_window(window)))
                owners.append(number)
            self._count("texts", False)
        sums = [0.0] * len(requests)
        for number, (value, _) in zip(owners, self._spans(spans), strict=True):
            sums[number] += value
        return sums

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        asked = [self._request(*request.args) for request in requests]
        # The same request may come several times, for several samples.
        seen: collections.Counter[str] = collections.Counter()
        keys, by_length = [], collections.defaultdict(list)
        for number, (request, until) in enumerate(asked):
            same = self._answers.key("same", list(request.prompt), dataclasses.asdict(request.params), until)
            keys.append(self._answers.key(same, seen[same], self._chat))
            seen[same] += 1
            by_length[request.params.max_new_tokens].append(number)
        with tally("answers", len(asked)) as report:
            done, tokens = sum(self._answers.get(key) is not None for key in keys), 0
            for numbers in by_length.values():
                left = [number for number in numbers if self._answers.get(keys[number]) is None]
                # The engine is of one shape whatever is left to do, so that answers are the same to the bit.
                context = max(
                    len(asked[number][0].prompt) + asked[number][0].params.max_new_tokens for number in numbers
                )
                slots = min(self._slots, len(numbers))
                for number, text, count in self._generated([(i, keys[i], *asked[i]) for i in left], slots, context):
                    self._answers.add([(keys[number], text)])
                    done, tokens = done + 1, tokens + count
                    report(done, tokens)
        return [self._answers.get(key) for key in keys]

    def _count(self, what: str, cut: bool) -> None:
        self.counted.update({what: 1, f"{what}_cut": int(cut)})

    def _span(self, before: Sequence[int], after: Sequence[int]) -> Span:
        ids = [*before, *after][-(self.max_length + 1) :]
        return Span(ids, len(ids) - len(after))

    def _spans(self, spans: Sequence[Span]) -> list[tuple[float, bool]]:
        keys = [self._answers.key("log-likelihood", list(span.ids), span.start) for span in spans]
        left = {number for number, key in enumerate(keys) if self._answers.get(key) is None}
        done, tokens = len(spans) - len(left), 0
        with tally("texts", len(spans), done) as report:
            for found in log_likelihoods(self._model, spans, left):
                # What is known stays: it may be of another batch.
                new = [number for number in found if number in left]
                self._answers.add((keys[number], found[number]) for number in new)
                done, tokens = done + len(new), tokens + sum(len(spans[number].ids) for number in new)
                report(done, tokens)
        return [(value, greedy) for value, greedy in map(self._answers.get, keys)]

    def _request(self, context: str, gen_kwargs: dict[str, Any]) -> tuple[Request, list[str]]:
        """What the engine is asked, without stop texts, and those."""
        kwargs: dict[str, Any] = {**normalize_gen_kwargs(gen_kwargs, MAX_NEW_TOKENS)}
        until = [text for text in handle_stop_sequences(kwargs.pop("until", None), eos=None) if text]
        limit, sample = kwargs.pop("max_gen_toks"), kwargs.pop("do_sample", False)
        unknown = [name for name in kwargs if name not in PARAMS and kwargs[name] not in NOTHING.get(name, ())]
        if unknown:
            raise OptionError(
                f"generation_kwargs.{unknown[0]} is {kwargs[unknown[0]]!r}, which is not done here; there are "
                f"do_sample, until, max_gen_toks, {', '.join(PARAMS)}"
            )
        if not 0 < limit < self.max_length:
            raise OptionError(
                f"max_gen_toks is {limit}; it must be from 1 to less than max_length, {self.max_length}: give another "
                "one of either (--gen-kwargs max_gen_toks=N)"
            )
        given: dict[str, Any] = {name: kwargs[name] for name in PARAMS if name in kwargs}
        given = {"temperature": 1.0} | given if sample else given | {"temperature": 0.0}
        params = SamplingParams(**given, max_new_tokens=limit)
        whole, most = self.tok_encode(context), self.max_length - limit
        self._count("prompts", len(whole) > most)
        prompt = whole[-most:] or [self.prefix_token_id]
        return Request(prompt, params, chat_ends(self._text, self._model.config)), until

    def _generated(
        self, asked: Sequence[tuple[int, str, Request, list[str]]], slots: int, context: int
    ) -> Iterator[tuple[int, str, int]]:
        """(the number of each request, its answer, of how many tokens), as they are finished.

        asked: (number, key, request, stop texts). A stop text counts in the answer, not in the thinking before it; so
        in a chat it is looked for here, and the rest is cancelled.
        """
        if not asked:
            return
        engine = Engine(
            self._model,
            tokenizer=self._text,
            slots=slots,
            context=context,
            cache_dtype=self._cache_dtype,
            prefill_tokens=None,
        )
        waiting, running = collections.deque(asked), dict[int, tuple[int, list[str], str, Completion]]()
        while waiting or running:
            while waiting and engine.has_room:
                number, key, request, until = waiting.popleft()
                at_once = [text for text in until if not self._chat or self._text.special_id(text) is not None]
                # Samples of one request differ; an answer does not depend on the others.
                seed = int(key[:8], 16) if request.params.temperature else 0
                params = dataclasses.replace(request.params, stop=at_once, seed=seed)
                opened = self._chat and begins_thinking(self._text, last_turn(request.prompt, request.ends))
                before = "<think>" if opened else ""
                name = engine.submit(dataclasses.replace(request, params=params), f"request {number}")
                running[name] = number, until, before, Completion.empty()
            for delta in engine.step():
                number, until, before, completion = running[delta.request]
                completion.add(delta)
                text = after_thinking(before + completion.text) if self._chat else completion.text
                ends = [text.index(stop) for stop in until if stop in text]
                if not completion.finish_reason and not ends:
                    continue
                if not completion.finish_reason:
                    engine.cancel(delta.request)
                if completion.finish_reason == "error":
                    log.warning("request %d: the model's numbers were NaN; its answer ends there", number)
                del running[delta.request]
                yield number, text[: min(ends, default=len(text))], len(completion.token_ids)
        engine.close()


def conversation(messages: Sequence[dict[str, str]], tools: Sequence[dict[str, Any]]) -> str:
    """What a task's doc_to_text gives for a question that is a conversation with tools: with `chat` it is rendered."""
    return CONVERSATION + json.dumps({"messages": list(messages), "tools": list(tools)})


def after_thinking(text: str) -> str:
    """The answer that follows thinking; nothing where that has not ended."""
    _, closed, after = text.rpartition("</think>")
    return after.lstrip() if closed else text.partition("<think>")[0]
