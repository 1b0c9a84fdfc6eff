"""Where the sequences of an engine lie in its cache: each slot in a row of its own, or all in pages that they share.

A page is as long as a whole piece of a prompt, so that every piece lies in one page, and a beginning that is kept is a
chain of whole pages. What decoding writes is never shared: its pages are its slot's own.
"""

import dataclasses
import heapq
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from sharding.arrays import spec, zeros
from sharding.rules import Sharding

from .. import xla_cpu
from ..errors import OptionError
from ..kv_cache import KVCache, cache_specs
from ..model import SmolLM3
from ..sizes import power_of_two_from
from .device_loop import Slots, copy, slot_specs
from .prompts import Index, Prefixes, prefix_pages

MIN_CAPACITY = 128


def slots_for(model: SmolLM3, wanted: int) -> int:
    """How many slots an engine has that is asked for `wanted`: a power of two that the mesh divides."""
    slots = power_of_two_from(wanted)
    # As many as the mesh divides, though some of them stay empty.
    return slots if model.sharding is None else math.lcm(slots, model.sharding.parts("batch"))


def capacity_for(context: int, lookup: int = 0) -> int:
    """How many tokens a slot holds for sequences of at most `context`, and `lookup` drafted ones."""
    return max(MIN_CAPACITY, power_of_two_from(context + lookup))


def empty(
    model: SmolLM3,
    slots: int,
    capacity: int,
    cache_dtype: DTypeLike,
    pool: tuple[int, int] | None = None,
    drafts: bool = False,
) -> tuple[KVCache, Slots, jax.Array | None]:
    """Cache, slots and (for drafts) history, where calls of `decode` leave them: else its second call compiles anew.

    Args:
      pool: pages, and the tokens of each; None is rows.
    """
    history = spec(jnp.int32, batch=slots, places=capacity) if drafts else None
    cache = cache_specs(model.config, slots, capacity, xla_cpu.held_as(cache_dtype, model.platform), pool)
    of_slots = slot_specs(slots, model.config.vocab_size, bool(model.adapters))
    made = zeros((cache, of_slots, history), model.sharding)
    if model.sharding is not None:
        return made
    devices = list(model.norm[...].devices())
    return jax.device_put(made, devices[0] if len(devices) == 1 else None)


def pool_for(
    tokens: int | None, page: int, context: int, lookup: int, sharding: Sharding | None
) -> tuple[int, int] | None:
    """How many pages a pool of `tokens` tokens has, and the tokens of each; None if there is no pool.

    Raises:
      OptionError: one sequence of `context` tokens does not fit, the mesh splits what a slot has, or there are drafts.
    """
    if tokens is None:
        return None
    if lookup:
        raise OptionError(f"lookup is {lookup} and cache_tokens {tokens}; drafts need rows of their own: leave one out")
    if splits_slots(sharding):
        raise OptionError(
            f"cache_tokens is {tokens}; these rules split slots or their tokens over devices, where each slot has its "
            "own part of the cache: leave it out, or split heads alone"
        )
    least = -(-context // page) * page
    if tokens < least:
        raise OptionError(
            f"cache_tokens is {tokens}; one sequence of {context} tokens takes {least}, in pages of {page}: give at "
            "least that, or a smaller context"
        )
    return tokens // page, page


def pool_tokens(model: SmolLM3, slots: int, context: int) -> int | None:
    """How many tokens a server's slots share unless somebody says otherwise: as many as rows of theirs would hold. None
    is rows: on a CPU, where pages are gathered for every token, and where slots lie on several devices."""
    if model.platform == "cpu" or splits_slots(model.sharding):
        return None
    return slots_for(model, slots) * capacity_for(context)


def splits_slots(sharding: Sharding | None) -> bool:
    """Whether slots, or the tokens of one, lie on several devices: then each slot has its own part of the cache."""
    return sharding is not None and sharding.parts("batch") * sharding.parts("context") > 1


class Rows:
    """Every slot has a row: nothing is ever wanting, and what is kept of prompts lies beside the rows.

    Args:
      prefixes: keeps it; None keeps nothing.
    """

    usage = None

    def __init__(self, prefixes: Prefixes | None, sharding: Sharding | None):
        self.prefixes, self._sharding = prefixes, sharding

    def begin(
        self, cache: KVCache, slot: int, salt: str | None, tokens: Sequence[int], total: int
    ) -> tuple[KVCache, int] | None:
        """See `Pages.begin`."""
        if self.prefixes is None or salt is None:
            return cache, 0
        return self.prefixes.reuse(cache, slot, salt, tokens)

    def keep(self, cache: KVCache, slot: int, salt: str, tokens: Sequence[int]) -> None:
        if self.prefixes is not None and len(tokens) % self.prefixes.piece == 0:
            self.prefixes.keep(cache, slot, salt, tokens)

    def copied(self, cache: KVCache, source: int, slot: int, length: int, total: int) -> KVCache | None:
        return copy(cache, np.int32(source), np.int32(slot), sharding=self._sharding)

    def grow(self, slot: int, total: int) -> bool:
        return True

    def release(self, slot: int) -> None:
        pass

    def placed(self, cache: KVCache) -> KVCache:
        return cache

    def warm_up(self, cache: KVCache) -> KVCache:
        """Makes the programs; nothing is in a slot."""
        cache = copy(cache, np.int32(0), np.int32(0), sharding=self._sharding)
        return cache if self.prefixes is None else self.prefixes.warm_up(cache)


class Pages:
    """Which pages of a pool each slot has, and which are kept for prompts that begin alike: those wait, the least
    recently used first, to be given to a slot that wants them.

    Args:
      count: pages of the pool; page: tokens of each; width: pages that a slot can have at most.
      kept: how many are kept at most.

    Attributes:
      used: how many pages slots have.
      queries, hits: tokens of prompts that were looked for, and those that were kept.
    """

    def __init__(self, count: int, page: int, slots: int, width: int, kept: int, sharding: Sharding | None):
        self.count, self.page, self.used, self.queries, self.hits = count, page, 0, 0, 0
        self.index = Index(page)
        self._kept, self._sharding = kept, sharding
        self._free = list(range(count))  # a heap: which page is whose depends on nothing but what was asked
        self._users = [0] * count  # slots that have the page
        self._held: dict[int, list[int]] = {}  # by slot
        self._table = np.full((slots, width), count, np.int32)
        self._changed = True

    @property
    def prefixes(self) -> "Pages | None":
        return self if self._kept else None

    @property
    def usage(self) -> float:
        """The part of the pages, from 0 to 1, that slots have."""
        return self.used / self.count

    def begin(
        self, cache: KVCache, slot: int, salt: str | None, tokens: Sequence[int], total: int
    ) -> tuple[KVCache, int] | None:
        """Gives a slot places for `total` tokens, of which what is kept of `tokens`, its prompt's beginning, is there
        already.

        Args:
          salt: whose kept pieces it shares; None shares nothing.

        Returns:
          The cache, and how many tokens are there; None, and nothing has changed, if there is no room.
        """
        found = [] if salt is None or not self._kept else self.index.find(salt, tokens)
        if not self._give(slot, found, total):
            return None
        if salt is not None and self._kept:
            self.queries, self.hits = self.queries + len(tokens), self.hits + len(found) * self.page
        return cache, len(found) * self.page

    def keep(self, cache: KVCache, slot: int, salt: str, tokens: Sequence[int]) -> None:
        """Keeps the last piece of what a slot holds of a prompt, `tokens`, if it is whole; what another slot has kept
        meanwhile the slot shares from now on."""
        if not self._kept or len(tokens) % self.page:
            return
        found, held = self.index.find(salt, tokens), self._held[slot]
        for i, page in enumerate(found):
            if held[i] != page:  # computed twice, by the same programs
                self._take([page])
                self._let_go([held[i]])
                held[i] = page
        self._tell(slot)
        if len(found) == len(tokens) // self.page - 1:
            if len(self.index.pages) >= self._kept:
                dropped = self.index.drop(lambda page: page not in found)
                if dropped is None:
                    return
                self._free_if_nobodys(dropped)
            self.index.add(salt, tokens, held[len(found)])

    def copied(self, cache: KVCache, source: int, slot: int, length: int, total: int) -> KVCache | None:
        """The cache with the first `length` tokens of one slot in another as well, which has places for `total`: whole
        pages are shared, and one that is partly filled is copied. None, and nothing has changed, if there is no room.
        """
        whole, rest = divmod(length, self.page)
        pages = self._held[source]
        if not self._give(slot, pages[:whole], total):
            return None
        if not rest:
            return cache
        return copy(cache, np.int32(pages[whole]), np.int32(self._held[slot][whole]), sharding=self._sharding)

    def grow(self, slot: int, total: int) -> bool:
        """Gives a slot the pages that it lacks for `total` tokens; False if they are not to be had."""
        more = self._new(-(-total // self.page) - len(self._held[slot]))
        if more:
            self._held[slot] += more
            self._tell(slot)
        return more is not None

    def release(self, slot: int) -> None:
        """Takes a slot's pages from it."""
        self._let_go(self._held.pop(slot))
        self._tell(slot)

    def placed(self, cache: KVCache) -> KVCache:
        """The cache with the table as it is now: before every program that reads it."""
        if not self._changed or cache.table is None:
            return cache
        self._changed, now = False, self._table.copy()
        table = jax.make_array_from_callback(now.shape, cache.table.sharding, lambda index: now[index])
        return dataclasses.replace(cache, table=table)

    def warm_up(self, cache: KVCache) -> KVCache:
        return copy(cache, np.int32(0), np.int32(0), sharding=self._sharding)

    def _give(self, slot: int, shared: list[int], total: int) -> bool:
        self._take(shared)
        more = self._new(-(-total // self.page) - len(shared))
        if more is None:
            self._let_go(shared)
            return False
        self._held[slot] = [*shared, *more]
        self._tell(slot)
        return True

    def _new(self, count: int) -> list[int] | None:
        """Pages that nobody has, of those that are kept too; None if there are too few."""
        if self.count - self.used < count:
            return None
        while len(self._free) < count:
            page = self.index.drop(lambda page: self._users[page] == 0)
            assert page is not None
            heapq.heappush(self._free, page)
        pages = [heapq.heappop(self._free) for _ in range(count)]
        self._take(pages)
        return pages

    def _take(self, pages: list[int]) -> None:
        for page in pages:
            self.used += self._users[page] == 0
            self._users[page] += 1

    def _let_go(self, pages: list[int]) -> None:
        for page in pages:
            self._users[page] -= 1
            self.used -= self._users[page] == 0
            self._free_if_nobodys(page)

    def _free_if_nobodys(self, page: int) -> None:
        if self._users[page] == 0 and page not in self.index.pages:
            heapq.heappush(self._free, page)

    def _tell(self, slot: int) -> None:
        pages = self._held.get(slot, ())
        self._table[slot] = self.count
        self._table[slot, : len(pages)] = pages
        self._changed = True


def places_for(
    model: SmolLM3,
    slots: int,
    capacity: int,
    cache_dtype: DTypeLike,
    pool: tuple[int, int] | None,
    kept: int,
    piece: int,
) -> Rows | Pages:
    """What says where sequences lie.

    Args:
      pool: pages, and the tokens of each; None is rows.
      kept: how many tokens of prompts are kept at most, in whole pieces; beside rows, where there can be any.
    """
    rules = model.sharding
    if pool is not None:
        return Pages(*pool, slots, capacity // piece, min(kept // piece, pool[0]), rules)
    count = prefix_pages(kept, piece, capacity, rules)
    return Rows(Prefixes(empty(model, count, piece, cache_dtype)[0], rules) if count else None, rules)
