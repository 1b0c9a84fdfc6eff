"""The engine: sequences come and go by slot, while the others decode.

What a request is answered depends on the model, the request and the engine's shape alone: never on what else runs.
Several processes run one engine: process 0 is asked, and `follow` does on the others what it does.

Lengths are rounded up to a few sizes, so that few programs serve all requests: a prompt goes in by whole pieces and a
last one of a few sizes (see `prompts`); a slot holds a power of two of tokens, and slots come in powers of two.
"""

import collections
import contextlib
import dataclasses
import functools
import heapq
import logging
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from ..compile_cache import enable
from ..errors import OptionError, OutOfMemoryError, memory_for
from ..job import raise_everywhere
from ..model import SmolLM3, where_it_lies
from ..tokenizer import Tokenizer, tokenizer_of
from .device_loop import MAX_STEPS, DecodedTokens, Slots, decode, hold, insert, prefill
from .grammar import prepare
from .hosts import broadcast, broken, in_step, leads, spans_hosts
from .places import Pages, capacity_for, empty, places_for, pool_for, slots_for
from .prompt_lookup import decode_lookup, remember
from .prompts import Prefixes, pieces
from .prompts import piece_sizes as sizes_for
from .requests import Delta, Request, as_json, check_request, from_json, with_ids
from .sequence import Prefill, Sequence, adapter_number, held_back
from .stats import Stats, counted

log = logging.getLogger(__name__)


class Engine:
    """Runs requests side by side in the slots of one cache.

    Args:
      tokenizer: for texts, stop texts and thinking budgets; None is the one that came with the model.
      slots: at most this many sequences at a time; see `slots_for`.
      context: the most tokens that a sequence may have, its prompt included.
      cache_dtype: None is what the checkpoint says, or else the activations'; "int8" halves it.
      steps: how many tokens of each sequence come at a time, at most 16; `Engine.steps` may be set between two steps.
      lookup: how many tokens to draft from the text so far and verify at once (see `prompt_lookup`); 0 is off.
      prefill_tokens: how many tokens of prompts go in between two calls of decoding, in whole pieces: 1 is a piece, so
        that a long prompt keeps nobody waiting; None is every prompt that a slot is free for, which is the fastest.
      piece_sizes: the lengths that pieces of prompts are padded to, ascending; the last is that of whole pieces. None
        is powers of two, and programs that are made as they are needed. Where a mesh splits pieces, of each part.
      prefix_tokens: with piece_sizes, how many tokens of prompts are kept at most, in whole pieces, for requests that
        begin alike and have the same `cache_salt`: beside the slots, or in pages of theirs that nobody wants; none
        where a slot's places lie on several devices.
      cache_tokens: with piece_sizes, how many tokens the slots share, in pages of a whole piece each, which sequences
        get as they grow; when there are none, the youngest begins again later. None is rows, in which all have theirs.
      stats: gets what was done, how fast, and by which programs; to measure prompts, it waits for each of them.

    Raises:
      OptionError: piece_sizes cannot be, or are not given where prefixes or pages are wanted; see also `pool_for`.
      OutOfMemoryError: the slots do not fit into memory; also from `step`.
    """

    def __init__(
        self,
        model: SmolLM3,
        *,
        tokenizer: Tokenizer | None = None,
        slots: int = 64,
        context: int,
        cache_dtype: DTypeLike | None = None,
        steps: int = MAX_STEPS,
        lookup: int = 0,
        prefill_tokens: int | None = 1,
        piece_sizes: tuple[int, ...] | None = None,
        prefix_tokens: int = 0,
        cache_tokens: int | None = None,
        stats: Stats | None = None,
    ):
        enable()
        self.tokenizer = tokenizer or tokenizer_of(model)
        self.model = model = where_it_lies(model)
        self.context, self.steps, self.lookup = context, steps, lookup
        self.slots, self.capacity = slots_for(model, slots), capacity_for(context, lookup)
        self._prefill_tokens, self._measured, self._stats = prefill_tokens, stats is not None, stats or Stats()
        # Where programs are made as they are needed, a prompt that is one piece has a simpler one, made sooner.
        self._lazy = piece_sizes is None
        for name, value in (("prefix_tokens", prefix_tokens), ("cache_tokens", cache_tokens)):
            if value and self._lazy:
                raise OptionError(f"{name} is {value}; it needs piece_sizes, such as SERVING_PIECES")
        self.piece_sizes = sizes_for(model.platform, self.capacity, piece_sizes, model.sharding)
        pool = pool_for(cache_tokens, self.piece_sizes[-1], context, lookup, model.sharding)
        shape = {"slots": slots, "context": context, "steps": steps, "lookup": lookup, "prefill_tokens": prefill_tokens}
        shape |= {"piece_sizes": piece_sizes, "prefix_tokens": prefix_tokens, "cache_tokens": cache_tokens}
        dtype = jnp.dtype(cache_dtype or model.cache_dtype)
        self._leads = leads()
        if self._leads:
            broadcast({"kind": "engine", "shape": {**shape, "cache_dtype": dtype.name}})
        of = f"{counted(self.slots, 'slot')} of {self.capacity:,} tokens"
        of += "" if pool is None else " that share {:,} pages of {}".format(*pool)
        less = "fewer new tokens (max_new_tokens), slots or prompts, or a cache of int8, take less"
        self._memory = functools.partial(memory_for, of, less)
        everywhere = raise_everywhere() if spans_hosts(model.sharding) else contextlib.nullcontext()
        with self._stats.timed(), everywhere, self._memory():
            made = jax.block_until_ready(empty(model, self.slots, self.capacity, dtype, pool, drafts=lookup > 0))
            self._cache, self._state, self._history = made
            size = self.slots, self.capacity
            self._places = places_for(model, *size, dtype, pool, prefix_tokens, self.piece_sizes[-1])
        # A heap, the lowest slot first: what runs beside each other is the same whatever ended before.
        self._free = list(range(self.slots))
        nobody = Sequence(model, 0, 0, Request([0]), None).slot()
        self._nothing = dataclasses.replace(nobody, active=np.bool_(False))
        self._running: dict[int, Sequence] = {}  # by slot
        self._waiting: collections.deque[Sequence] = collections.deque()
        self._prefill: Prefill | None = None
        self._submitted, self._short = 0, False  # short: the first that waits does so for pages
        self._ended: list[int] = []  # slots of sequences that are over, on the host
        self._events: list[list[Any]] = []  # since the last step, for the other processes
        self.drafted, self.accepted, self.preemptions = 0, 0, 0
        self._program = f"decoding of {of}, up to {steps} tokens a call" + (f", {lookup} drafted" if lookup else "")
        log.info("%s; prompts in pieces of %d to %d", of, self.piece_sizes[0], self.piece_sizes[-1])

    @property
    def prefixes(self) -> Prefixes | Pages | None:
        """What counts the tokens of prompts that are kept; None if none are."""
        return self._places.prefixes

    @property
    def usage(self) -> float | None:
        """The part of the pages, from 0 to 1, that slots have; None where these have rows."""
        return self._places.usage

    @property
    def has_room(self) -> bool:
        """Whether a sample that is submitted now begins with the next step, if it is short."""
        return len(self._free) > len(self._waiting) and not self._short

    @property
    def is_filling(self) -> bool:
        """Whether samples wait though slots and pages are free: prompts go in one after the other."""
        return bool(self._waiting and self._free) and not self._short

    @property
    def is_idle(self) -> bool:
        """Whether nothing runs and nothing waits."""
        return not (self._running or self._waiting or self._prefill)

    @property
    def prefilling(self) -> int | None:
        """The number of the request whose prompt is on its way into a slot."""
        return None if self._prefill is None else self._prefill.sequence.index

    def submit(self, request: Request, name: str = "the prompt") -> int:
        """Takes a request, whose samples begin in turn as slots become free; returns the number that deltas name it by.

        Raises:
          OptionError: it cannot be run; by its name here.
        """
        request = with_ids(request, self.model.config, self.tokenizer, name)
        own = self.model.config, self.model.generation_config
        check_request(*own, request, self.tokenizer, self.context, self.lookup, name)
        adapter_number(self.model, request.adapter)
        number, self._submitted = self._submitted, self._submitted + 1
        if self._leads:
            self._events.append(["submit", as_json(request)])
        for sample in range(request.params.n):
            self._waiting.append(Sequence(self.model, number, sample, request, self.tokenizer))
        return number

    def cancel(self, number: int) -> bool:
        """Stops all samples of a request, and gives their slots to others; False if it has none that runs or waits."""
        if self._leads:
            self._events.append(["cancel", number])
        slots = [slot for slot, sequence in self._in_slots().items() if sequence.index == number]
        left = [sequence for sequence in self._waiting if sequence.index != number]
        found = bool(slots) or len(left) < len(self._waiting)
        self._waiting = collections.deque(left)
        for slot in slots:
            self._stop(slot)
        return found

    def step(self) -> list[Delta]:
        """Lets prompts in, and decodes a call's tokens of every sequence that runs: what each of them said."""
        if self._leads:
            broadcast({"kind": "step", "events": self._events, "steps": self.steps})
            self._events = []
        with in_step(), self._memory():
            return self._step()

    def warm_up(self) -> None:
        """Makes every program that requests can need, before the first of them; for engines with `piece_sizes`."""
        assert self.is_idle and self._submitted == 0 and not self._lazy
        if self._leads:
            broadcast({"kind": "warm up"})
        zero, sharding = np.int32(0), self.model.sharding
        with in_step(), self._stats.timed(), self._memory():
            self._cache = self._places.placed(self._cache)
            for size in self.piece_sizes:
                tokens = np.zeros((2, size), np.int32)
                piece = zero, zero, tokens[:1], tokens[1], np.int32(size), self._nothing.adapter
                for logprobs in (False, True):
                    self._cache, _ = prefill(self.model, self._cache, *piece, logprobs=logprobs)
            self._cache = self._places.warm_up(self._cache)
            self._place(0, self._nothing, 0)
            if self._history is not None:
                self._history = remember(self._history, zero, np.full(self.capacity, -1, np.int32))
            else:
                masks = np.zeros((self.slots, -(-self.model.config.vocab_size // 32)), np.int32)
                self._state = hold(self._state, np.zeros(self.slots, bool), masks, sharding=sharding)
            self._decode()
        prepare(self.tokenizer)

    def close(self) -> None:
        """The last call, on process 0: lets the other processes leave the engine. Nothing may be asked of it after."""
        if self._leads and not broken():
            broadcast({"kind": "close"})

    def follow(self, events: list[list[Any]], steps: int) -> None:
        """On the other processes: the step that process 0 makes, after what it was asked before."""
        self.steps = steps
        for kind, content in events:
            if kind == "cancel":
                self.cancel(content)
            else:
                self.submit(from_json(content))
        with in_step(), self._memory():
            self._step()

    def _step(self) -> list[Delta]:
        self._make_room()
        for slot in self._ended:
            self._place(slot, self._nothing, 0)
        self._ended = []
        self._admit()
        if not self._running:
            return []
        with self._stats.timed("seconds"):
            decoded = self._decode()
        self._stats.programs[self._program] += 1
        deltas = [sequence.take(slot, decoded) for slot, sequence in self._running.items()]
        for slot, delta in zip(list(self._running), deltas, strict=True):
            self._stats.tokens += len(delta.token_ids)
            if delta.finish_reason:
                self._stop(slot)
        return deltas

    def drain(self) -> Iterator[Delta]:
        """Steps until all that was submitted is done."""
        while not self.is_idle:
            yield from self.step()

    def _in_slots(self) -> dict[int, Sequence]:
        """What decodes, and the prompt on its way into a slot."""
        at = self._prefill
        return self._running | ({} if at is None else {at.slot: at.sequence})

    def _stop(self, slot: int) -> None:
        self._running.pop(slot, None)
        if self._prefill is not None and self._prefill.slot == slot:
            self._prefill = None
        self._ended.append(slot)
        self._places.release(slot)
        heapq.heappush(self._free, slot)

    def _make_room(self) -> None:
        """Gives sequences, the oldest first, the places that they may need in the next call; while these are not to be
        had, the youngest of all that are in a slot begins again later. None that is older waits then."""
        for slot, sequence in sorted(self._running.items(), key=lambda item: item[1].age):
            while slot in self._running and not self._places.grow(slot, sequence.places(MAX_STEPS)):
                last, youngest = max(self._in_slots().items(), key=lambda item: item[1].age)
                self._stop(last)
                youngest.begin_again()
                self._waiting.appendleft(youngest)
                self.preemptions += 1

    def _decode(self) -> DecodedTokens:
        self._cache = self._places.placed(self._cache)
        if self._history is None:
            held = held_back(self._running, self.slots)
            if held is not None:
                self._state = hold(self._state, *held, sharding=self.model.sharding)
            arguments = (self.model, self._cache, self._state, np.int32(self.steps if held is None else 1))
            self._cache, self._state, decoded = decode(*arguments)
            return jax.device_get(decoded)
        arguments = (self.model, self._cache, self._state, self._history, np.int32(self.steps))
        self._cache, self._state, self._history, tokens, tally = decode_lookup(*arguments, draft=self.lookup)
        tried, kept = jax.device_get(tally)
        self.drafted, self.accepted = self.drafted + int(tried), self.accepted + int(kept)
        return DecodedTokens(jax.device_get(tokens), None, None, None)  # pyright: ignore[reportArgumentType]

    def _admit(self) -> None:
        """Puts prompts into free slots, piece by piece; while anything decodes, at most `prefill_tokens` and what the
        last piece has beyond them."""
        done, self._short = 0, False
        while self._prefill is not None or (self._waiting and self._free):
            if self._running and self._prefill_tokens is not None and done >= self._prefill_tokens:
                return
            if self._prefill is None and not self._begin():
                self._short = True
                return
            with self._stats.timed("prompt_seconds"):
                done += self._piece()

    def _begin(self) -> bool:
        """Gives the first that waits a slot; False if its places are not to be had yet."""
        sequence, slot = self._waiting[0], self._free[0]
        # Log-probabilities of a prompt only the model has.
        salt = None if sequence.wants_prompt else sequence.salt
        begun = self._places.begin(self._cache, slot, salt, sequence.prompt[:-1], sequence.places(MAX_STEPS))
        if begun is None:
            return False
        self._waiting.popleft()
        heapq.heappop(self._free)
        self._cache, there = begun
        if not sequence.begun:
            sequence.begun, sequence.cached_tokens = True, there
        self._prefill = Prefill(sequence, slot, pieces(len(sequence.prompt) - 1, self.piece_sizes, there))
        return True

    def _piece(self) -> int:
        """One piece of the prompt at hand: how many tokens the model computed for it."""
        assert self._prefill is not None
        at, padded = self._prefill, 0
        piece = next(at.left, None)
        if piece is not None:
            start, count, padded = piece
            prompt, tokens = at.sequence.prompt, np.zeros((2, padded), np.int32)
            tokens[:, :count] = prompt[start : start + count], prompt[start + 1 : start + count + 1]
            # Of a request's samples the first has them, whichever prompts go in again for others.
            wanted = at.sequence.wants_prompt
            whole = self._lazy and count == len(prompt) - 1
            self._cache = self._places.placed(self._cache)
            place = self.model, self._cache, np.int32(at.slot), None if whole else np.int32(start)
            rest = tokens[:1], tokens[1], np.int32(count), at.sequence.adapter
            self._cache, values = prefill(*place, *rest, logprobs=wanted)
            if values is not None:
                at.logprobs.append((values, count))
            else:
                self._places.keep(self._cache, at.slot, at.sequence.salt, prompt[: start + count])
            self._stats.prompt_tokens += count
            self._stats.programs[f"prefill of {padded} tokens" + (" with log-probabilities" if wanted else "")] += 1
            if start + count < len(prompt) - 1:
                return padded
        self._prefill = None
        self._start(at)
        return padded

    def _start(self, done: Prefill) -> None:
        """Lets a sequence decode whose prompt is in its slot, and copies of the slot the request's other samples."""
        if done.sequence.wants_prompt and not done.sequence.tokens:
            done.sequence.take_prompt(jax.device_get(done.logprobs))
        if self._measured:
            jax.block_until_ready(self._cache)
        self._insert(done.sequence, done.slot)
        while self._waiting and self._waiting[0].index == done.sequence.index and self._free:
            slot, sequence = self._free[0], self._waiting[0]
            places = done.slot, slot, len(sequence.prompt) - 1, sequence.places(MAX_STEPS)
            copied = self._places.copied(self._cache, *places)
            if copied is None:
                return
            self._cache = copied
            self._insert(self._waiting.popleft(), heapq.heappop(self._free))

    def _insert(self, sequence: Sequence, slot: int) -> None:
        self._place(slot, sequence.slot(), len(sequence.prompt) - 1)
        if self._history is not None:
            told = np.full(self.capacity, -1, np.int32)
            told[: len(sequence.prompt)] = sequence.prompt
            self._history = remember(self._history, np.int32(slot), told)
        self._running[slot] = sequence

    def _place(self, slot: int, one: Slots, length: int) -> None:
        self._cache, self._state = insert(self._cache, self._state, np.int32(slot), one, np.int32(length))


def follow(model: SmolLM3, tokenizer: Tokenizer | None = None) -> None:
    """What processes other than 0 do: run each engine that process 0 runs, until that says that there are no more.

    Args:
      model: on a mesh of all processes, as process 0 has it; tokenizer: the same.
    """
    engine = None
    while (said := broadcast(None))["kind"] != "end":
        if said["kind"] == "engine":
            engine = None  # its cache is given back before the next one is made
            with contextlib.suppress(OutOfMemoryError):  # process 0 says so
                engine = Engine(model, tokenizer=tokenizer, **said["shape"])
        elif said["kind"] == "step":
            assert engine is not None
            engine.follow(said["events"], said["steps"])
        elif said["kind"] == "warm up":
            assert engine is not None
            engine.warm_up()
        else:
            engine = None
