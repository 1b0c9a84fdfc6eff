"""How prompts go into slots: in pieces, of which whole ones are kept for prompts that begin alike.

Every piece begins at a multiple of the largest size from its prompt's start, so that what is kept was computed by the
program that would compute it again: an answer is the same, to the bit, with it and without it.
"""

import collections
import functools
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
from jax import Array

from sharding.rules import Sharding

from ..errors import OptionError
from ..kv_cache import KVCache, copy_places

# The most tokens of a prompt that go through the model at once: enough to keep it busy, and a bound on
# what prefill takes in memory.
CHUNK = {"cpu": 512}
ACCELERATOR_CHUNK = 2048
MIN_PIECE = 16
# Where all programs are compiled before the first request: fewer sizes, and shorter waits for those who decode.
SERVING_PIECES = (16, 64, 256)


def kept_tokens(slots: int, context: int) -> int:
    """How many tokens of prompts a server keeps for those that begin alike: half of what its answers may have."""
    return slots * context // 2


def prefix_pages(tokens: int, piece: int, capacity: int, sharding: Sharding | None) -> int:
    """In how many pages of `piece` tokens an engine keeps beginnings of prompts that is asked to keep `tokens` of them;
    0 where it can keep none."""
    # A slot that a piece fills has no place for what follows it.
    if piece >= capacity or (sharding is not None and sharding.parts("context") > 1):
        return 0
    pages = tokens // piece
    return pages - pages % (1 if sharding is None else sharding.parts("batch"))


def piece_sizes(
    platform: str, capacity: int, sizes: Sequence[int] | None = None, sharding: Sharding | None = None
) -> tuple[int, ...]:
    """The lengths that pieces are padded to in slots of `capacity` tokens, by default powers of two; the last is that
    of whole pieces.

    Args:
      sizes: on each of the devices that a piece is split over.

    Raises:
      OptionError: `sizes` do not ascend, or whole pieces do not divide a slot.
    """
    if sizes is None:
        largest = CHUNK.get(platform, ACCELERATOR_CHUNK)
        sizes = [MIN_PIECE << i for i in range((largest // MIN_PIECE).bit_length())]
    sizes = [size * (1 if sharding is None else sharding.parts("length")) for size in sizes]
    if not sizes or sorted({*sizes, 0})[1:] != list(sizes) or capacity % min(sizes[-1], capacity):
        raise OptionError(f"piece_sizes is {tuple(sizes)}; they must ascend, and the last must divide {capacity}")
    return (*(size for size in sizes if size < capacity), *((capacity,) if sizes[-1] >= capacity else ()))


def pieces(length: int, sizes: Sequence[int], start: int = 0) -> Iterator[tuple[int, int, int]]:
    """How a prompt's tokens go in from `start` on: (start, tokens, tokens with padding) of each piece."""
    while start < length:
        count = min(sizes[-1], length - start)
        yield start, count, next(size for size in sizes if size >= count)
        start += count


class Index:
    """Which whole pieces are kept, and in which page, by the tokens before them and their own.

    Args:
      piece: tokens in each.
    """

    def __init__(self, piece: int):
        self.piece = piece
        self.pages: set[int] = set()
        # (the piece before it, or whose it is; its tokens) -> (its number, its page); the least recently used first.
        # A piece is used after those that follow it: what is dropped has none.
        self._kept: collections.OrderedDict[tuple[int | str, bytes], tuple[int, int]] = collections.OrderedDict()
        self._made = 0

    def find(self, salt: str, tokens: Sequence[int]) -> list[int]:
        """The pages of the longest beginning of `tokens` that is kept. salt: only what was kept under it is found."""
        return [self._kept[key][1] for key in self._chain(salt, tokens)]

    def add(self, salt: str, tokens: Sequence[int], page: int) -> None:
        """Keeps the last piece of `tokens`, whole pieces of which all others are kept."""
        chain = self._chain(salt, tokens)
        parent, self._made = self._kept[chain[-1]][0] if chain else salt, self._made + 1
        key = parent, _bytes(tokens[-self.piece :])
        self._kept[key] = self._made, page
        self.pages.add(page)
        for used in (key, *reversed(chain)):
            self._kept.move_to_end(used)

    def drop(self, may: Callable[[int], bool]) -> int | None:
        """Forgets the piece that was used least recently of those whose page `may` be had; the page, or None."""
        for key, (_, page) in self._kept.items():
            if may(page):
                del self._kept[key]
                self.pages.remove(page)
                return page
        return None

    def _chain(self, salt: str, tokens: Sequence[int]) -> list[tuple[int | str, bytes]]:
        parent: int | str = salt
        chain = []
        for start in range(0, len(tokens) - self.piece + 1, self.piece):
            key = parent, _bytes(tokens[start : start + self.piece])
            if key not in self._kept:
                break
            chain.append(key)
            parent = self._kept[key][0]
        for key in reversed(chain):
            self._kept.move_to_end(key)
        return chain


class Prefixes:
    """The beginnings of prompts that are kept beside the slots; a slot gets copies of them.

    Args:
      pages: a cache, every row of which holds a whole piece.
    """

    def __init__(self, pages: KVCache, sharding: Sharding | None):
        self.piece, self.sharding = pages.capacity, sharding
        self.index = Index(self.piece)
        self._pages, self._free = pages, list(range(pages.length.shape[0]))
        self.queries, self.hits = 0, 0  # tokens of prompts, and those of them that were kept

    def reuse(self, cache: KVCache, slot: int, salt: str, tokens: Sequence[int]) -> tuple[KVCache, int]:
        """The cache with what is kept of a prompt's beginning in a slot, and how many tokens that is."""
        found = self.index.find(salt, tokens)
        for i, page in enumerate(found):
            cache = self._reuse(cache, page, slot, i * self.piece)
        self.queries, self.hits = self.queries + len(tokens), self.hits + len(found) * self.piece
        return cache, len(found) * self.piece

    def keep(self, cache: KVCache, slot: int, salt: str, tokens: Sequence[int]) -> None:
        """Keeps the last piece of what a slot holds of a prompt, `tokens`, which are whole pieces; not if it is kept
        already, or no page can be had."""
        found = self.index.find(salt, tokens)
        if len(found) != len(tokens) // self.piece - 1:
            return
        page = self._free.pop() if self._free else self.index.drop(lambda page: page not in found)
        if page is not None:
            self.index.add(salt, tokens, page)
            self._keep(cache, slot, len(tokens) - self.piece, page)

    def warm_up(self, cache: KVCache) -> KVCache:
        """Makes the two programs; slot 0 and page 0 are nobody's."""
        self._keep(cache, 0, 0, 0)
        return self._reuse(cache, 0, 0, 0)

    def _keep(self, cache: KVCache, slot: int, start: int, page: int) -> None:
        self._pages = _put(cache, self._pages, np.int32(slot), np.int32(start), np.int32(page), sharding=self.sharding)

    def _reuse(self, cache: KVCache, page: int, slot: int, start: int) -> KVCache:
        return _get(cache, self._pages, np.int32(page), np.int32(slot), np.int32(start), sharding=self.sharding)


def _bytes(tokens: Sequence[int]) -> bytes:
    return np.asarray(tokens, np.int32).tobytes()


@functools.partial(jax.jit, static_argnames="sharding", donate_argnames="pages")
def _put(
    cache: KVCache, pages: KVCache, slot: Array, start: Array, page: Array, *, sharding: Sharding | None = None
) -> KVCache:
    """The pages with a piece that a slot holds from `start` on."""
    return copy_places(cache, pages, (slot, start), (page, np.int32(0)), pages.capacity, sharding)


@functools.partial(jax.jit, static_argnames="sharding", donate_argnames="cache")
def _get(
    cache: KVCache, pages: KVCache, page: Array, slot: Array, start: Array, *, sharding: Sharding | None = None
) -> KVCache:
    """The cache with a page in a slot from `start` on."""
    return copy_places(pages, cache, (page, np.int32(0)), (slot, start), pages.capacity, sharding)
