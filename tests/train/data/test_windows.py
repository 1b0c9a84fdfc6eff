"""Packing: bins as TRL's, windows that a run can leave and come back to."""

from collections import Counter

import numpy as np
import pytest

from smollm3_jax.errors import DataError
from smollm3_jax.train.data.conversations import Conversation
from smollm3_jax.train.data.packing import EndOfData
from smollm3_jax.train.data.records import BadRecord
from smollm3_jax.train.data.windows import LONG, NOTHING, Windows, best_fit, items_of

LENGTH = 32


def talk(number, length, trained=None):
    """A conversation whose tokens are its number; the second half of it is trained, or `trained`."""
    mask = np.arange(length) >= length // 2 if trained is None else np.asarray(trained, bool)
    return Conversation(np.full(length, number, np.int32), mask)


def lengths_of(count, seed=0, most=LENGTH):
    return np.random.RandomState(seed).randint(2, most + 1, count)


def windows(talks, *, overflow="drop", order=None, **options):
    def encode(record, length, tally):
        if record is None:
            raise BadRecord("no record")
        return items_of(record, length, overflow, tally)

    order = np.tile(np.arange(len(talks)), 10) if order is None else order
    return Windows("toy", talks, encode, order=order, epoch=len(talks), **options)


def all_rows(rows, length=LENGTH):
    found = []
    while True:
        try:
            found.append(rows.next(length))
        except EndOfData:
            return found


def same(a, b):
    return len(a) == len(b) and all(
        np.array_equal(x, y) for p, q in zip(a, b, strict=True) for x, y in zip(p, q, strict=True)
    )


@pytest.mark.torch
@pytest.mark.parametrize(("most", "overflow"), [(32, "truncate"), (90, "truncate"), (90, "split")])
def test_bins_are_those_of_trl(most, overflow):
    from datasets import Dataset
    from trl.data_utils import pack_dataset

    lengths = lengths_of(700, most=most)
    packed = pack_dataset(
        Dataset.from_dict({"input_ids": [[1] * n for n in lengths]}),
        LENGTH,
        {"truncate": "bfd", "split": "bfd_split"}[overflow],
    )
    talks = [talk(0, n, np.ones(n)) for n in lengths]
    items = [x for t in talks for x in items_of(t, LENGTH, overflow, Counter())]
    # A single token has nothing to be predicted from it; we leave it out, TRL packs it.
    theirs = sorted(sorted(x for x in row if x > 1) for row in packed["seq_lengths"])
    ours = sorted(sorted(len(items[i][0]) for i in row) for row in best_fit([len(x[0]) for x in items], LENGTH))
    assert ours == theirs if overflow == "truncate" else sum(map(sum, ours)) == sum(map(sum, theirs))
    assert abs(len(ours) - len(theirs)) <= 1


def test_documents_are_apart_and_nothing_is_lost():
    """trl #1230, #3067, #5316: what shares a row has segments of its own; no weight predicts across their border."""
    talks = [talk(i, n) for i, n in enumerate(lengths_of(60))]
    rows = all_rows(windows(talks, epochs=1, size=1000))
    seen = Counter()
    for tokens, segments, weights in rows:
        for segment in range(1, segments.max() + 1):
            (at,) = np.nonzero(segments == segment)
            (number,) = set(tokens[at].tolist())
            assert (np.diff(at) == 1).all() and len(at) == len(talks[number].ids)
            np.testing.assert_array_equal(weights[at], [*talks[number].trained[1:], False])
            seen[number] += 1
        assert not tokens[segments == 0].any() and not weights[segments == 0].any()
        assert tokens.dtype == segments.dtype == np.int32 and weights.dtype == np.float32
    assert seen == Counter(range(60))


def test_an_epochs_rows_do_not_depend_on_the_order_in_a_window():
    talks = [talk(i, n) for i, n in enumerate(lengths_of(50))]
    mixed = np.random.RandomState(1).permutation(50)
    assert same(all_rows(windows(talks, epochs=1)), all_rows(windows(talks, epochs=1, order=mixed)))


def test_a_window_ends_with_its_epoch():
    """The rows of two epochs are those of one, twice: nothing of the second fills up the first one's."""
    talks = [talk(i, n) for i, n in enumerate(lengths_of(25))]
    once, twice = all_rows(windows(talks, epochs=1, size=10)), all_rows(windows(talks, epochs=2, size=10))
    assert same(twice, once + once)


@pytest.mark.parametrize("seed", [None, 3])
def test_rows_go_on_from_any_window_and_row(seed):
    talks = [talk(i, n) if i % 7 else None for i, n in enumerate(lengths_of(40))]
    options = {"epochs": 2, "size": 15, "bad_records": 99, "seed": seed}
    whole = windows(talks, **options)
    rows, states = [], [whole.state()]
    while True:
        try:
            rows.append(whole.next(LENGTH))
        except EndOfData:
            break
        states.append(whole.state())
    for i in range(0, len(rows), 3):
        again = windows(talks, **options)
        again.restore(states[i])
        assert same(all_rows(again), rows[i:])
        assert again.tally == whole.tally
    assert whole.tally["bad"] == 6 and whole.tally["records"] == 34


def test_rows_are_drawn_anew_in_each_window():
    talks = [talk(i, n) for i, n in enumerate(lengths_of(50))]
    first, second = (all_rows(windows(talks, epochs=1, seed=seed)) for seed in (0, 1))
    assert not same(first, second)
    key = lambda row: row[0].tobytes()  # noqa: E731
    assert same(sorted(first, key=key), sorted(second, key=key))


def test_another_length_begins_with_the_next_window():
    talks = [talk(i, n, np.ones(n)) for i, n in enumerate(lengths_of(30, most=16))]
    rows = windows(talks, size=10)
    rows.next(32)
    assert rows.state()["window"] == 0 and rows.state()["row"] == 1
    assert rows.next(16)[0].shape == (16,) and rows.state()["window"] == 1


def test_records_without_a_trained_token_are_left_out_and_counted():
    """trl #3927, transformers #34494: of SmolLM3 the header alone may be longer than a row, so that all that is left of
    a record is masked; such records, and answers that a cut leaves nothing of, would train on nothing."""
    header = np.arange(40) >= 36
    talks = [talk(0, 40, header), talk(1, 10), talk(2, 10, np.zeros(10)), talk(3, 12, np.arange(12) == 0)]
    for overflow, numbers, counted in (
        ("truncate", {1}, {NOTHING: 3}),
        ("drop", {1}, {NOTHING: 2, LONG: 1}),
        ("split", {0, 1}, {NOTHING: 2}),
    ):
        rows = windows(talks, overflow=overflow, epochs=2)
        found = [rows.next(LENGTH)]
        assert {int(x) for x in found[0][0][found[0][1] > 0]} == numbers
        assert all(row[2].any() for row in found)
        all_rows(rows)
        assert {key: rows.tally[key] for key in (NOTHING, LONG) if rows.tally[key]} == counted
        assert rows.tally["records"] == 4


def test_how_much_is_cut_is_known():
    """trl #4554, #5075: of long records truncation leaves next to nothing; split leaves out nothing."""
    talks = [talk(i, 10_000, np.ones(10_000)) for i in range(3)]
    cut = {}
    for overflow in ("truncate", "split"):
        rows = windows(talks, overflow=overflow, epochs=2)
        all_rows(rows)
        cut[overflow] = rows.tally["cut"] / rows.tally["tokens"]
    assert cut["truncate"] == 1 - LENGTH / 10_000 and cut["split"] == 0
    pieces = items_of(talks[0], LENGTH, "split", Counter())
    assert sum(len(piece[0]) for piece in pieces) == 10_000
    with pytest.raises(DataError, match=r"nothing of its 3 records is to be trained: .*3 longer than a row"):
        windows(talks, overflow="drop").next(LENGTH)


def test_too_many_bad_records_end_it():
    with pytest.raises(DataError, match=r"2 bad records, more than data.bad_records=1; the last: no record"):
        windows([None, talk(1, 5), None], bad_records=1).next(LENGTH)
