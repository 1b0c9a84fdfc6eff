"""Which beginnings of prompts are kept: found again by their tokens and salt, the least recently used dropped first."""

import jax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sharding.mesh import make_mesh
from sharding.rules import Sharding
from smollm3_jax.errors import OptionError
from smollm3_jax.generation.prompts import Index, piece_sizes

PIECE = 2
CALLS = st.lists(
    st.tuples(st.sampled_from("ab"), st.lists(st.integers(0, 1), max_size=9), st.booleans()), min_size=1, max_size=30
)


class Kept:
    """An index, and pages that it may fill: the least recently used is dropped for another."""

    def __init__(self, pages: int):
        self.index, self.free = Index(PIECE), list(range(pages))

    def add(self, salt: str, tokens: list[int]) -> int | None:
        found = self.index.find(salt, tokens)
        if len(found) != len(tokens) // PIECE - 1:
            return None
        page = self.free.pop() if self.free else self.index.drop(lambda page: page not in found)
        if page is not None:
            self.index.add(salt, tokens, page)
        return page


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 5), CALLS)
def test_what_is_found_is_what_was_kept(pages, calls):
    """Pages say what was put into them last: a prompt finds its own pieces, in order, or fewer."""
    kept, held = Kept(pages), {}
    for salt, tokens, asks in calls:
        whole = len(tokens) // PIECE * PIECE
        found = kept.index.find(salt, tokens)
        for i, page in enumerate(found):
            assert held[page] == (salt, tokens[: (i + 1) * PIECE])
        if not asks:
            for end in range(PIECE, whole + 1, PIECE):
                page = kept.add(salt, tokens[:end])
                if page is not None:
                    held[page] = (salt, tokens[:end])
            assert len(kept.index.find(salt, tokens)) == min(whole // PIECE, pages)
        assert len(kept.index.pages) == len(kept.index._kept) == pages - len(kept.free)


def test_the_least_recently_used_is_dropped():
    kept = Kept(2)
    first, second = kept.add("", [1, 1]), kept.add("", [2, 2])
    assert kept.index.find("", [1, 1, 5]) == [first]
    third = kept.add("", [3, 3])
    assert third == second and kept.index.find("", [2, 2]) == [] and kept.index.find("", [1, 1]) == [first]
    assert kept.index.drop(lambda page: page == third) == third and kept.index.drop(lambda page: page == third) is None
    assert kept.index.find("", [3, 3]) == [] and kept.index.pages == {first}


def test_sizes_fit_into_a_slot():
    assert piece_sizes("cpu", 128) == (16, 32, 64, 128)
    assert piece_sizes("gpu", 8192) == (16, 32, 64, 128, 256, 512, 1024, 2048)
    assert piece_sizes("cpu", 128, (16, 64, 256)) == (16, 64, 128)
    assert piece_sizes("cpu", 1024, (16, 64, 256)) == (16, 64, 256)
    split = Sharding.of(make_mesh({"context": 8}, jax.devices()), "serve_cp")  # each device has so much of a piece
    assert piece_sizes("cpu", 1024, (16, 64), split) == (128, 512)
    assert piece_sizes("cpu", 65536, sharding=split)[-1] == 4096
    for sizes in ((), (0, 16), (32, 16), (16, 16), (16, 48), (-1,)):  # the last piece would begin before its place
        with pytest.raises(OptionError, match=r"piece_sizes is .*ascend"):
            piece_sizes("cpu", 128, sizes)
