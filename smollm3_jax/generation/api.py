"""Text generation: the host's side of `device_loop`. It keeps slots full, and hands out tokens as they come.

Lengths are rounded up to a few sizes, so that few programs serve all requests: a prompt goes in as one
piece of a power of two (16 to CHUNK) and then whole CHUNKs; rows of the cache hold a power of two of
tokens; slots come in powers of two.
"""

import dataclasses
import logging
import math
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from sharding.arrays import spec, zeros

from ..compile_cache import enable
from ..config import GenerationConfig, ModelConfig
from ..errors import OptionError, memory_for, unknown_name
from ..kv_cache import KVCache, cache_specs
from ..model import SmolLM3, where_it_lies
from ..tokenizer import Tokenizer, tokenizer_of
from .device_loop import MAX_STEPS, Chosen, Slots, decode, free, insert, prefill, slot_specs
from .prompt_lookup import MAX_DRAFT, can_draft, decode_lookup, remember
from .sampling import ELSEWHERE, MAX_STOP_IDS, Choice, SamplingParams, with_defaults
from .stats import Stats, counted

log = logging.getLogger(__name__)

# The most tokens of a prompt that go through the model at once: enough to keep it busy, and a bound on
# what prefill takes in memory.
CHUNK = {"cpu": 512}
ACCELERATOR_CHUNK = 2048
MIN_PIECE = 16
MIN_CAPACITY = 128


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt, as text or token ids, and how to continue it.

    ends: ids that end it beside the model's own, unless params.ignore_eos; see `chat_ends`.
    """

    prompt: Sequence[int] | str
    params: SamplingParams = dataclasses.field(default_factory=SamplingParams)
    ends: Sequence[int] = ()


@dataclasses.dataclass(frozen=True)
class Logprob:
    """A chosen token's log-probability, and the likeliest tokens' with their ids, likeliest first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclasses.dataclass(frozen=True)
class Delta:
    """What came of one sequence since the last time.

    request, sample: which one; token_ids: new ones only; text: new text, if there is a tokenizer;
    logprobs: of token_ids, if asked for; prompt_logprobs: once, with the first delta, if asked for;
    finish_reason: "stop" or "length" with the last delta, else None.
    """

    request: int
    sample: int
    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[Logprob, ...] | None
    prompt_logprobs: tuple[float, ...] | None
    finish_reason: str | None


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


def generate(
    model: SmolLM3,
    prompts: Any,
    params: SamplingParams | None = None,
    *,
    tokenizer: Tokenizer | None = None,
    **fields: Any,
) -> Any:
    """What the model says after each prompt: text after text, token ids after token ids.

    Prompts may differ in length: a row's result does not depend on the other rows.

    Args:
      prompts: a text, a list of texts, or a list of lists of token ids.
      params: None is what the model's generation_config.json says (see `with_defaults`), which may be to sample.
      tokenizer: for texts; None is the one that came with the model, see `from_pretrained`.
      **fields: of SamplingParams, over those of `params`: generate(model, "Hi", max_new_tokens=8).

    Returns:
      For a text its continuation, or a list of them if params.n > 1. For a list one result for each prompt (for each
      sample of each prompt): texts, or new ids, which end with the end-of-sequence token that was met.

    Raises:
      OptionError: a prompt is empty, no text or list of ids, holds an id outside the vocabulary, is a text where there
        is no tokenizer, or leaves no room in the context; or a field is none.
    """
    known = [field.name for field in dataclasses.fields(SamplingParams)]
    for name in fields:
        if name not in known:
            raise unknown_name("generate", name, [*known, "params", "tokenizer"], ELSEWHERE)
    rows = [prompts] if isinstance(prompts, str) else _rows(prompts)
    texts = isinstance(prompts, str) or (len(rows) > 0 and isinstance(rows[0], str))
    if any(isinstance(row, str) != texts for row in rows):
        raise OptionError("prompts are texts or lists of token ids, not both at once")
    tokenizer = tokenizer or tokenizer_of(model)
    requests = [with_ids(Request(row), model.config, tokenizer, f"prompt {i}") for i, row in enumerate(rows)]
    free = params is None and "max_new_tokens" not in fields  # nobody asked for this number: it need not fit
    own = model.generation_config, model.config.vocab_size
    params = dataclasses.replace(params, **fields) if params else with_defaults(*own, **fields)
    for i, request in enumerate(requests):
        own = fitted(params, len(request.prompt), model.config.max_position_embeddings) if free else params
        # Row i draws with seed + i; the samples of a prompt follow each other.
        own = dataclasses.replace(own, seed=(params.seed + i * params.n) % 2**32)
        requests[i] = dataclasses.replace(request, params=own)
    done = complete(model, requests, tokenizer=tokenizer)
    if not texts:
        return [completion.token_ids for completion in done]
    found = [completion.text for completion in done]
    return found[0] if isinstance(prompts, str) and params.n == 1 else found


def _rows(prompts: Any) -> list[Any]:
    """The prompts of a list, an array of ids [B, T], ...

    Raises:
      OptionError: it is one prompt as a flat list of ids, a chat's messages, or no list.
    """
    try:
        rows = list(prompts)
    except TypeError:
        raise OptionError(
            f"prompts is a {type(prompts).__name__}; give a text, a list of texts, or a list of lists of token ids"
        ) from None
    if any(isinstance(row, Mapping) for row in rows):
        raise OptionError(
            "prompts are texts or lists of token ids, not messages; smollm3_jax.chat.template.encode_chat makes ids of "
            "messages, smollm3_jax.generation.api.chat_ends what ends an answer"
        )
    if any(np.ndim(row) == 0 and not isinstance(row, str) for row in rows):
        raise OptionError(
            f"prompts is a flat list of {len(rows)} ids; give a list of prompts, each a list of ids: [[1, 2, 3]]"
        )
    return rows


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


def complete(model: SmolLM3, requests: Sequence[Request], **options: Any) -> list[Completion]:
    """All requests to their end, in order, samples of one request side by side; options as for `stream`."""
    done = [[Completion.empty() for _ in range(request.params.n)] for request in requests]
    for delta in stream(model, requests, **options):
        done[delta.request][delta.sample].add(delta)
    return [completion for samples in done for completion in samples]


def stream(
    model: SmolLM3,
    requests: Iterable[Request | str] | str,
    *,
    tokenizer: Tokenizer | None = None,
    max_slots: int = 64,
    capacity: int | None = None,
    cache_dtype: Any = None,
    steps: int = MAX_STEPS,
    lookup: int = 0,
    stats: Stats | None = None,
) -> Iterator[Delta]:
    """Runs requests side by side in slots of the cache, and yields what they say as it comes.

    A slot that has finished takes the next request at once. Closing the iterator stops everything.

    Args:
      requests: read as slots become free if `capacity` is given, at once if it is not. A text is a request with the
        model's own settings, as for `generate`.
      tokenizer: for text, stop texts and thinking budgets; None is the one that came with the model.
      max_slots: at most so many sequences at a time.
      capacity: the most tokens that a sequence may have, its prompt included.
      cache_dtype: None is what the checkpoint says, or else the activations'; "int8" halves it.
      steps: how many tokens of each sequence come at a time, at most 16.
      lookup: how many tokens to draft from the text so far and verify at once (see `prompt_lookup`); 0 is off.
        The share of them that was accepted is logged at the end.
      stats: gets what was done, how fast, and by which programs; to measure prompts, it waits for each of them.

    Raises:
      OptionError: a request that cannot be run, when its turn comes.
      OutOfMemoryError: the slots do not fit into memory.
    """
    enable()
    tokenizer = tokenizer or tokenizer_of(model)
    model = where_it_lies(model)
    config = model.config, model.generation_config
    queue: Iterable[Request] = _requests(model, [requests] if isinstance(requests, str) else requests, tokenizer)
    if capacity is None:
        queue = list(queue)
        for index, request in enumerate(queue):
            check_request(*config, request, tokenizer, lookup=lookup, name=f"prompt {index}")
        capacity = max((len(r.prompt) + r.params.max_new_tokens for r in queue), default=0)
        max_slots = min(max_slots, sum(r.params.n for r in queue))
    if not max_slots:
        return
    batch = 1 << (max_slots - 1).bit_length()
    if model.sharding is not None:
        # As many slots as the mesh divides, though some of them stay empty.
        batch = math.lcm(batch, model.sharding.parts("batch"))
    room = max(MIN_CAPACITY, 1 << (capacity + lookup - 1).bit_length())
    with memory_for(
        f"{counted(batch, 'slot')} of {room:,} tokens",
        "fewer new tokens (max_new_tokens), slots or prompts, or a cache of int8, take less",
    ):
        cache_dtype = cache_dtype or model.cache_dtype
        yield from _run(*(model, queue, tokenizer, batch, room, capacity, cache_dtype, steps, lookup, stats))


def _run(
    model: SmolLM3,
    requests: Iterable[Request],
    tokenizer: Tokenizer | None,
    batch: int,
    room: int,
    capacity: int,
    cache_dtype: Any,
    steps: int,
    lookup: int,
    stats: Stats | None,
) -> Iterator[Delta]:
    """The loop of `stream`, with `batch` slots of `room` tokens."""
    config = model.config, model.generation_config
    wait, stats = stats is not None, stats or Stats()
    with stats.timed():
        cache, slots, history = _empty(model, batch, room, cache_dtype, drafts=lookup > 0)
    chunk = CHUNK.get(model.platform, ACCELERATOR_CHUNK)
    running: dict[int, _Sequence] = {}
    waiting = enumerate(requests)
    samples: list[_Sequence] = []  # of the request at hand that have no slot yet
    drafted, accepted = 0, 0
    drafting = f", {lookup} drafted" if lookup else ""
    program = f"decoding of {counted(batch, 'slot')} of {room:,} tokens, up to {steps} tokens a call{drafting}"
    log.info("%d slots of %d tokens; prompts in pieces of %d to %d", batch, room, MIN_PIECE, chunk)
    while True:
        source, first = None, None
        for slot in [slot for slot in range(batch) if slot not in running]:
            if not samples:
                source = None
                index, request = next(waiting, (0, None))
                if request is None:
                    break
                check_request(*config, request, tokenizer, capacity, lookup, f"prompt {index}")
                samples = [_Sequence(model, index, i, request, tokenizer) for i in range(request.params.n)]
            sequence = samples.pop(0)
            with stats.timed("prompt_seconds"):
                if source is None:
                    cache, logprobs = _prefill(model, cache, slot, sequence.request, chunk, stats)
                    sequence.prompt_logprobs, source = logprobs, slot
                    if wait:
                        jax.block_until_ready(cache)
                first = None if source == slot else np.int32(source)
                length = np.int32(len(sequence.request.prompt) - 1)
                cache, slots = insert(
                    cache, slots, np.int32(slot), sequence.slot(), length, first, sharding=model.sharding
                )
                if history is not None:
                    told = np.full(room, -1, np.int32)
                    told[: len(sequence.request.prompt)] = sequence.request.prompt
                    history = remember(history, np.int32(slot), told)
            running[slot] = sequence
        if not running:
            break
        with stats.timed("seconds"):
            if history is None:
                cache, slots, chosen = decode(model, cache, slots, np.int32(steps))
            else:
                cache, slots, history, tokens, tally = decode_lookup(
                    model, cache, slots, history, np.int32(steps), draft=lookup
                )
                chosen = Chosen(tokens, None, None, None)
                tried, kept = jax.device_get(tally)
                drafted, accepted = drafted + int(tried), accepted + int(kept)
            chosen = jax.device_get(chosen)
        stats.programs[program] += 1
        for slot, sequence in list(running.items()):
            delta = sequence.take(slot, chosen)
            stats.tokens += len(delta.token_ids)
            if delta.finish_reason:
                del running[slot]
                slots = free(slots, np.int32(slot))
            yield delta
    if drafted:
        share = 100 * accepted / drafted
        log.info("prompt lookup: %d of %d drafted tokens accepted (%.0f %%)", accepted, drafted, share)


def _requests(model: SmolLM3, requests: Iterable[Request | str], tokenizer: Tokenizer | None) -> Iterator[Request]:
    for i, request in enumerate(requests):
        name = f"prompt {i}"
        if not isinstance(request, Request | str):
            raise OptionError(f"{name} is a {type(request).__name__}; it must be a Request or a text")
        one = with_ids(Request(request) if isinstance(request, str) else request, model.config, tokenizer, name)
        if isinstance(request, str):
            params = with_defaults(model.generation_config, model.config.vocab_size)
            one = dataclasses.replace(one, params=fitted(params, len(one.prompt), model.config.max_position_embeddings))
        yield one


def pieces(length: int, chunk: int, capacity: int) -> Iterator[tuple[int, int, int, int]]:
    """How a prompt goes in: (start, tokens, tokens with padding, bound on what is there before) of each piece."""
    first = (length - 1) % chunk + 1 if length else 0
    start, count = 0, first
    while start < length:
        padded = max(MIN_PIECE, 1 << (count - 1).bit_length())
        past = 0 if start == 0 else min(capacity, max(chunk, 1 << (start - 1).bit_length()))
        yield start, count, padded, past
        start, count = start + count, chunk


def _prefill(
    model: SmolLM3,
    cache: KVCache,
    slot: int,
    request: Request,
    chunk: int,
    stats: Stats,
) -> tuple[KVCache, tuple[float, ...] | None]:
    """All but the last token of a prompt into a slot, and the log-probabilities of all but its first."""
    prompt = np.asarray(request.prompt, np.int32)
    logprobs: list[tuple[Array, int]] = []
    for start, count, padded, past in pieces(len(prompt) - 1, chunk, cache.capacity):
        tokens = np.zeros((2, padded), np.int32)
        tokens[:, :count] = prompt[start : start + count], prompt[start + 1 : start + count + 1]
        cache, values = prefill(
            model,
            cache,
            np.int32(slot),
            tokens[:1],
            tokens[1],
            np.int32(count),
            past=past,
            logprobs=request.params.prompt_logprobs,
        )
        if values is not None:
            logprobs.append((values, count))
        stats.prompt_tokens += count
        stats.programs[f"prefill of {padded} tokens" + (f" after up to {past}" if past else "")] += 1
    if not request.params.prompt_logprobs:
        return cache, None
    return cache, tuple(float(value) for piece, count in jax.device_get(logprobs) for value in piece[:count])


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
    if lookup and not can_draft(params):
        raise OptionError(
            "prompt lookup verifies greedy decoding: it needs temperature 0, and takes no penalties, logit_bias, "
            "logprobs or max_thinking_tokens"
        )
    if tokenizer is None and params.stop:
        raise OptionError("stop texts need a tokenizer; give one, or use stop_token_ids")
    if params.max_thinking_tokens is not None and -1 in think_ids(tokenizer):
        raise OptionError("max_thinking_tokens needs a tokenizer that has <think> and </think> as tokens")
    if len(stop_ids(config, generation_config, request, tokenizer)) > MAX_STOP_IDS:
        raise OptionError(f"stop_token_ids: with the model's own, a sequence has at most {MAX_STOP_IDS}")


def stop_ids(
    config: ModelConfig, generation_config: GenerationConfig, request: Request, tokenizer: Tokenizer | None
) -> tuple[int, ...]:
    """All ids that end a request, each once: the model's own and the request's, and stop texts that are one token."""
    params = request.params
    ends = () if params.ignore_eos else (*generation_config.eos_token_id, *request.ends)
    ends = [token for token in ends if token < config.vocab_size]  # what has no row is never chosen
    # A special token is not in the text, so that it would never be found there.
    special = [] if tokenizer is None else [tokenizer.special_id(stop) for stop in params.stop]
    found = [token for token in special if token is not None and token < config.vocab_size]
    return tuple(dict.fromkeys([*ends, *params.stop_token_ids, *found]))


def think_ids(tokenizer: Tokenizer | None) -> tuple[int, int]:
    """The tokens that open and close thinking; -1 where there are none."""
    ids = [None if tokenizer is None else tokenizer.backend.token_to_id(text) for text in ("<think>", "</think>")]
    return tuple(-1 if i is None else i for i in ids)  # pyright: ignore[reportReturnType]


def _empty(model: SmolLM3, batch: int, room: int, cache_dtype: Any, drafts: bool) -> tuple[KVCache, Slots, Any]:
    """Cache, slots and (for drafts) history, where calls of `decode` leave them: else the second call is compiled anew."""
    history = spec(jnp.int32, batch=batch, places=room) if drafts else None
    slots = slot_specs(batch, model.config.vocab_size)
    cache = cache_specs(model.config, batch, room, cache_dtype)
    made = zeros((cache, slots, history), model.sharding)
    if model.sharding is not None:
        return made
    devices = list(model.norm[...].devices())
    return jax.device_put(made, devices[0] if len(devices) == 1 else None)


class _Sequence:
    """One sample of a request on the host: its tokens, and how far its text has been handed out."""

    def __init__(self, model: SmolLM3, index: int, sample: int, request: Request, tokenizer: Tokenizer | None):
        assert not isinstance(request.prompt, str)  # `with_ids` was here
        self.index, self.sample, self.request, self.tokenizer = index, sample, request, tokenizer
        self.prompt = request.prompt
        self.vocab_size = model.config.vocab_size
        self.stop_ids = stop_ids(model.config, model.generation_config, request, tokenizer)
        self.prompt_logprobs: tuple[float, ...] | None = None
        self.tokens: list[int] = []
        self.text = ""  # all that is decoded
        self.handed_out = 0  # characters of it
        self.decoder = None if tokenizer is None else tokenizer.decode_stream(prompt=self.prompt)

    def slot(self) -> Slots:
        """Its state on the device, without the leading B."""
        params, prompt = self.request.params, self.prompt
        opens, closes = think_ids(self.tokenizer)
        budget = params.max_thinking_tokens
        # A prompt may end inside the thinking that its template opened.
        last = next((i for i in reversed(prompt) if i in (opens, closes)), None)
        return Slots(
            token=np.int32(prompt[-1]),
            active=np.bool_(True),
            generated=np.int32(0),
            limit=np.int32(params.max_new_tokens),
            stop_ids=np.array([*self.stop_ids, *[-1] * (MAX_STOP_IDS - len(self.stop_ids))], np.int32),
            think_ids=np.array([opens, closes], np.int32),
            thinking=np.bool_(last is not None and last == opens),
            think_left=np.int32(-1 if budget is None else budget),
            choice=Choice.of(params, prompt, self.sample, self.vocab_size),
        )

    def take(self, slot: int, chosen: Any) -> Delta:
        """What a call of `decode` chose for it."""
        row = chosen.tokens[slot]
        new = [int(token) for token in row[row >= 0]]
        reason = None
        count = len(new)
        for i, token in enumerate(new):
            self.tokens.append(token)
            stops = token in self.stop_ids
            self._decode(None if stops else token)
            if stops or self._meets_stop_text():
                reason, count = "stop", i + 1
                break
        if reason is None and len(self.tokens) >= self.request.params.max_new_tokens:
            reason = "length"
        if reason is not None:
            self._decode(None)
        prompt_logprobs, self.prompt_logprobs = self.prompt_logprobs, None
        return Delta(
            request=self.index,
            sample=self.sample,
            token_ids=tuple(new[:count]),
            text=self._hand_out(reason is not None),
            logprobs=self._logprobs(slot, chosen, count),
            prompt_logprobs=prompt_logprobs,
            finish_reason=reason,
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
