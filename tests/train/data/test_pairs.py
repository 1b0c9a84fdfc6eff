"""Pairs of preferences as items of rows."""

from collections import Counter

import numpy as np
import pytest

from smollm3_jax.train.data.conversations import Completion
from smollm3_jax.train.data.pairs import items_of_pair, key_of
from smollm3_jax.train.data.windows import LONG, NOTHING, lay


def completion(length, first, begin=100):
    return Completion(np.arange(begin, begin + length, dtype=np.int32), first)


def items(chosen, rejected, length=16, overflow="drop"):
    tally = Counter()
    return items_of_pair(chosen, rejected, length, overflow, tally), tally


def test_a_pair_is_one_item_of_two_documents():
    """Where the token before the first one learned predicts it, and the last one predicts nothing."""
    chosen, rejected = completion(6, 4), completion(5, 4, 200)
    (item,), tally = items(chosen, rejected)
    tokens, documents, weights, keys = item
    assert tokens.tolist() == [*range(100, 106), *range(200, 205)]
    assert documents.tolist() == [1] * 6 + [2] * 5
    assert weights.tolist() == [0, 0, 0, 1, 1, 0, 0, 0, 0, 1, 0]
    assert keys.tolist() == [key_of(chosen)] * 6 + [key_of(rejected)] * 5
    assert [x.dtype.name for x in item] == ["int32", "int32", "float32", "int64"]
    assert tally == {"records": 1, "tokens": 11, "trained": 3, "cut": 0}


def test_pairs_side_by_side_have_segment_ids_of_their_own():
    """Odd ones are chosen, as the objective wants it, whatever order pairs come in."""
    pairs = [items(completion(3, 1, 10 * i), completion(4, 1, 10 * i))[0][0] for i in range(1, 4)]
    tokens, segments, _, keys = lay(pairs, 24)
    assert segments.tolist() == [1] * 3 + [2] * 4 + [3] * 3 + [4] * 4 + [5] * 3 + [6] * 4 + [0] * 3
    assert tokens[segments == 5].tolist() == [30, 31, 32] and keys[-1] == 0
    assert len(set(keys[:-3].tolist())) == 6


def test_a_key_is_of_the_tokens_and_where_they_begin_to_be_learned():
    """trl #2423, #7083: so that no order, and no shuffling, can bring a sum to another completion."""
    keys = [key_of(completion(*args)) for args in ((6, 4), (6, 4), (6, 3), (7, 4), (6, 4, 101))]
    assert keys[0] == keys[1] and len(set(keys)) == 4 and all(0 < key < 2**63 for key in keys)


@pytest.mark.parametrize(("overflow", "found"), [("drop", None), ("truncate", [8, 8])])
def test_a_pair_longer_than_a_row(overflow, found):
    """Is left out, or each completion is cut to half a row, as TRL's max_length cuts it."""
    got, tally = items(completion(20, 4), completion(9, 4, 200), overflow=overflow)
    if found is None:
        assert got == [] and tally[LONG] == 1 and tally["cut"] == 29
    else:
        assert np.bincount(got[0][1])[1:].tolist() == found and tally["cut"] == 29 - 16
        assert got[0][3][0] == key_of(completion(8, 4))  # of what is left of it
    assert items(completion(12, 4), completion(4, 3, 200), overflow=overflow)[0][0][0].size == 16  # fits as it is


@pytest.mark.parametrize("overflow", ["drop", "truncate"])
@pytest.mark.parametrize(("chosen", "rejected"), [((4, 4), (6, 4)), ((6, 4), (4, 4)), ((30, 8), (30, 8))])
def test_a_pair_of_which_one_completion_has_nothing_to_learn_is_left_out(overflow, chosen, rejected):
    """trl #3927: a prompt that fills what is kept leaves nothing."""
    got, tally = items(completion(*chosen), completion(*rejected), overflow=overflow)
    assert got == [] and tally[LONG if (overflow, chosen) == ("drop", (30, 8)) else NOTHING] == 1


def test_the_first_token_of_a_text_without_a_prompt_is_not_learned():
    (item,), tally = items(completion(3, 0), completion(2, 0, 200))
    assert item[2].tolist() == [1, 1, 0, 1, 0] and tally["trained"] == 3
