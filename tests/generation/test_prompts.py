"""Which beginnings of prompts are kept: found again by their tokens and salt, the least recently used dropped first."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smollm3_jax.errors import OptionError
from smollm3_jax.generation.prompts import Index, piece_sizes

PIECE = 2
CALLS = st.lists(
    st.tuples(st.sampled_from("ab"), st.lists(st.integers(0, 1), max_size=9), st.booleans()), min_size=1, max_size=30
)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 5), CALLS)
def test_what_is_found_is_what_was_kept(pages, calls):
    """Pages say what was put into them last: a prompt finds its own pieces, in order, or fewer."""
    kept, held = Index(pages, PIECE), {}
    for salt, tokens, asks in calls:
        whole = len(tokens) // PIECE * PIECE
        found = kept.find(salt, tokens)
        for i, page in enumerate(found):
            assert held[page] == (salt, tokens[: (i + 1) * PIECE])
        if not asks:
            for end in range(PIECE, whole + 1, PIECE):
                page = kept.add(salt, tokens[:end])
                if page is not None:
                    held[page] = (salt, tokens[:end])
            assert len(kept.find(salt, tokens)) == min(whole // PIECE, pages)
        assert len(kept._kept) + len(kept._free) == pages


def test_the_least_recently_used_is_dropped():
    kept = Index(2, PIECE)
    first, second = kept.add("", [1, 1]), kept.add("", [2, 2])
    assert kept.find("", [1, 1, 5]) == [first]
    third = kept.add("", [3, 3])
    assert third == second and kept.find("", [2, 2]) == [] and kept.find("", [1, 1]) == [first]
    kept.clear()
    assert kept.find("", [1, 1]) == []


def test_sizes_fit_into_a_slot():
    assert piece_sizes("cpu", 128) == (16, 32, 64, 128)
    assert piece_sizes("gpu", 8192) == (16, 32, 64, 128, 256, 512, 1024, 2048)
    assert piece_sizes("cpu", 128, (16, 64, 256)) == (16, 64, 128)
    assert piece_sizes("cpu", 1024, (16, 64, 256)) == (16, 64, 256)
    for sizes in ((), (0, 16), (32, 16), (16, 16), (16, 48), (-1,)):  # the last piece would begin before its place
        with pytest.raises(OptionError, match=r"piece_sizes is .*ascend"):
            piece_sizes("cpu", 128, sizes)
