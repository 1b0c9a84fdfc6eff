"""Text generation: the host's side of `device_loop`. It keeps slots full, and hands out tokens as they come.

Lengths are rounded up to a few sizes, so that few programs serve all requests: a prompt goes in as one
piece of a power of two (16 to CHUNK) and then whole CHUNKs; rows of the cache hold a power of two of
tokens; slots come in powers of two.
"""

import dataclasses
import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.sharding import NamedSharding

from sharding.rules import Sharding

from ..compile_cache import enable
from ..config import GenerationConfig, ModelConfig
from ..errors import OptionError, memory_for
from ..kv_cache import KVCache, empty_cache
from ..model import SmolLM3
from ..tokenizer import Tokenizer
from .device_loop import MAX_STEPS, Chosen, Slots, decode, free, insert, prefill, slot_shardings
from .prompt_lookup import MAX_DRAFT, can_draft, decode_lookup, remember
from .sampling import MAX_STOP_IDS, Choice, SamplingParams
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
    """A prompt, as token ids, and how to continue it."""

    prompt: Sequence[int]
    params: SamplingParams = dataclasses.field(default_factory=SamplingParams)


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
    prompts: Sequence[Sequence[int]],
    params: SamplingParams | None = None,
    *,
    sharding: Sharding | None = None,
) -> list[list[int]]:
    """New token ids for each prompt (for each sample of each prompt, if params.n > 1).

    A row that met an end-of-sequence token ends with it. Prompts may differ in length: a row's result
    does not depend on the other rows.

    Raises:
      OptionError: a prompt is empty, holds an id outside the vocabulary, or leaves no room in the context.
    """
    params = params or SamplingParams()
    # Row i draws with seed + i; the samples of a prompt follow each other.
    requests = [
        Request(prompt, dataclasses.replace(params, seed=(params.seed + row * params.n) % 2**32))
        for row, prompt in enumerate(prompts)
    ]
    return [completion.token_ids for completion in complete(model, requests, sharding=sharding)]


def complete(model: SmolLM3, requests: Sequence[Request], **options: Any) -> list[Completion]:
    """All requests to their end, in order, samples of one request side by side; options as for `stream`."""
    done = [[Completion.empty() for _ in range(request.params.n)] for request in requests]
    for delta in stream(model, requests, **options):
        done[delta.request][delta.sample].add(delta)
    return [completion for samples in done for completion in samples]


def stream(
    model: SmolLM3,
    requests: Iterable[Request],
    *,
    tokenizer: Tokenizer | None = None,
    max_slots: int = 64,
    capacity: int | None = None,
    cache_dtype: Any = None,
    steps: int = MAX_STEPS,
    lookup: int = 0,
    stats: Stats | None = None,
    sharding: Sharding | None = None,
) -> Iterator[Delta]:
    """Runs requests side by side in slots of the cache, and yields what they say as it comes.

    A slot that has finished takes the next request at once. Closing the iterator stops everything.

    Args:
      requests: read as slots become free if `capacity` is given, at once if it is not.
      tokenizer: for text, stop texts and thinking budgets.
      max_slots: at most so many sequences at a time.
      capacity: the most tokens that a sequence may have, its prompt included.
      cache_dtype: None is what the checkpoint says, or else the activations'; "int8" halves it.
      steps: how many tokens of each sequence come at a time, at most 16.
      lookup: how many tokens to draft from the text so far and verify at once (see `prompt_lookup`); 0 is off.
        The share of them that was accepted is logged at the end.
      stats: gets what was done, how fast, and by which programs; to measure prompts, it waits for each of them.
      sharding: the mesh and rules that the model was placed by; None on one device, or for every device of the
        model's mesh to compute everything.

    Raises:
      OptionError: a request that cannot be run, when its turn comes.
      OutOfMemoryError: so many slots of so many tokens do not fit.
    """
    enable()
    sharding = sharding or Sharding.of_array(model.norm[...])
    config = model.config, model.generation_config
    if capacity is None:
        requests = list(requests)
        for index, request in enumerate(requests):
            check_request(*config, request, tokenizer, lookup=lookup, name=f"prompt {index}")
        capacity = max((len(r.prompt) + r.params.max_new_tokens for r in requests), default=0)
        max_slots = min(max_slots, sum(r.params.n for r in requests))
    if not max_slots:
        return
    batch = 1 << (max_slots - 1).bit_length()
    if sharding is not None:
        sharding = sharding.fitted(config[0].axis_sizes)
        # As many slots as the mesh divides, though some of them stay empty.
        batch = math.lcm(batch, sharding.parts("batch"))
    room = max(MIN_CAPACITY, 1 << (capacity + lookup - 1).bit_length())
    with memory_for(
        f"{counted(batch, 'slot')} of {room:,} tokens",
        "fewer new tokens (max_new_tokens), slots or prompts, or a cache of int8, take less",
    ):
        cache_dtype = cache_dtype or model.cache_dtype
        yield from _run(
            *(model, requests, tokenizer, batch, room, capacity, cache_dtype, steps, lookup, stats, sharding)
        )


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
    sharding: Sharding | None,
) -> Iterator[Delta]:
    """The loop of `stream`, with `batch` slots of `room` tokens."""
    config = model.config, model.generation_config
    wait, stats = stats is not None, stats or Stats()
    with stats.timed():
        cache = empty_cache(model.config, batch, room, cache_dtype, sharding)
        history = np.full((batch, room), -1, np.int32) if lookup else None
        cache, slots, history = _place(model, cache, _no_slots(model, batch), history, sharding)
    chunk = CHUNK.get(sharding.platform if sharding else jax.default_backend(), ACCELERATOR_CHUNK)
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
                    cache, logprobs = _prefill(model, cache, slot, sequence.request, chunk, stats, sharding)
                    sequence.prompt_logprobs, source = logprobs, slot
                    if wait:
                        jax.block_until_ready(cache)
                first = None if source == slot else np.int32(source)
                length = np.int32(len(sequence.request.prompt) - 1)
                cache, slots = insert(cache, slots, np.int32(slot), sequence.slot(), length, first)
                if history is not None:
                    told = np.full(room, -1, np.int32)
                    told[: len(sequence.request.prompt)] = sequence.request.prompt
                    history = remember(history, np.int32(slot), told)
            running[slot] = sequence
        if not running:
            break
        with stats.timed("seconds"):
            if history is None:
                cache, slots, chosen = decode(model, cache, slots, np.int32(steps), sharding=sharding)
            else:
                cache, slots, history, tokens, tally = decode_lookup(
                    model, cache, slots, history, np.int32(steps), draft=lookup, sharding=sharding
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
    sharding: Sharding | None,
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
            sharding=sharding,
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
    prompt, params = request.prompt, request.params
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
    if len(generation_config.eos_token_id) + len(params.stop_token_ids) > MAX_STOP_IDS:
        raise OptionError(f"stop_token_ids: with the model's own, a sequence has at most {MAX_STOP_IDS}")


def think_ids(tokenizer: Tokenizer | None) -> tuple[int, int]:
    """The tokens that open and close thinking; -1 where there are none."""
    ids = [None if tokenizer is None else tokenizer.backend.token_to_id(text) for text in ("<think>", "</think>")]
    return tuple(-1 if i is None else i for i in ids)  # pyright: ignore[reportReturnType]


def _no_slots(model: SmolLM3, batch: int) -> Slots:
    one = _Sequence(model, 0, 0, Request([0]), None).slot()
    return jax.tree.map(lambda x: np.zeros((batch, *np.shape(x)), np.asarray(x).dtype), one)


def _place(
    model: SmolLM3, cache: KVCache, slots: Slots, history: Any, sharding: Sharding | None
) -> tuple[KVCache, Slots, Any]:
    """Everything where calls of `decode` leave it: if it came from elsewhere, the second call was compiled anew."""
    if sharding is not None:
        of_slot = NamedSharding(sharding.mesh, sharding.spec("batch"))
        return cache, *jax.device_put((slots, history), (slot_shardings(sharding), of_slot))
    devices = list(model.norm[...].devices())
    return jax.device_put((cache, slots, history), devices[0] if len(devices) == 1 else None)


class _Sequence:
    """One sample of a request on the host: its tokens, and how far its text has been handed out."""

    def __init__(self, model: SmolLM3, index: int, sample: int, request: Request, tokenizer: Tokenizer | None):
        self.index, self.sample, self.request, self.tokenizer = index, sample, request, tokenizer
        self.vocab_size = model.config.vocab_size
        ends = () if request.params.ignore_eos else model.generation_config.eos_token_id
        self.stop_ids = (*ends, *request.params.stop_token_ids)
        self.prompt_logprobs: tuple[float, ...] | None = None
        self.tokens: list[int] = []
        self.text = ""  # all that is decoded
        self.handed_out = 0  # characters of it
        self.decoder = None if tokenizer is None else tokenizer.decode_stream()

    def slot(self) -> Slots:
        """Its state on the device, without the leading B."""
        params, prompt = self.request.params, self.request.prompt
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
