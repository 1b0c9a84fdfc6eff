import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smollm3_jax.errors import DataError
from smollm3_jax.train.data.packing import EndOfData, Rows
from smollm3_jax.train.data.records import BadRecord

DOCUMENTS = st.lists(st.integers(1, 9), min_size=1, max_size=12)


class Corpus(dict):
    def __missing__(self, index):
        raise BadRecord(f"document {index}")


def corpus(lengths):
    """Documents of these lengths: token 100 d + i is the i-th of document d."""
    return Corpus({d: np.arange(length, dtype=np.int32) + 100 * (d + 1) for d, length in enumerate(lengths)})


def rows_of(documents, count, **options):
    order = options.pop("order", range(10**9))
    if options.get("epochs", 0) != 1:
        order = [k % count for k in range(1000)]
    return Rows("toy", documents, np.asarray, order=order, epoch=count, **options)


@given(DOCUMENTS, st.integers(1, 7))
def test_no_token_is_lost_or_doubled(lengths, length):
    documents = corpus(lengths)
    rows, tokens = rows_of(documents, len(lengths), epochs=1), []
    with pytest.raises(EndOfData):
        while True:
            row, segments = rows.next(length)
            assert row.shape == segments.shape == (length,)
            tokens += row[segments > 0].tolist()
            assert (segments[1:] >= segments[:-1])[segments[1:] > 0].all()
    assert tokens == np.concatenate([documents[d] for d in range(len(lengths))]).tolist()


@given(DOCUMENTS, st.integers(2, 7))
def test_a_segment_is_one_document(lengths, length):
    rows = rows_of(corpus(lengths), len(lengths))
    for _ in range(5):
        tokens, segments = rows.next(length)
        for segment in set(segments.tolist()):
            own = tokens[segments == segment]
            assert len(set(own // 100)) == 1 and (np.diff(own) == 1).all()


@given(DOCUMENTS, st.integers(1, 7), st.integers(0, 5), st.integers(0, 5))
@settings(max_examples=50)
def test_rows_go_on_from_a_state(lengths, length, before, after):
    rows = rows_of(corpus(lengths), len(lengths))
    for _ in range(before):
        rows.next(length)
    state = rows.state()
    others = rows_of(corpus(lengths), len(lengths))
    others.restore(state)
    for _ in range(after):
        for a, b in zip(rows.next(length), others.next(length), strict=True):
            np.testing.assert_array_equal(a, b)


def test_bad_records_are_passed_over_and_counted():
    """T8."""
    documents = corpus([3, 3, 3])
    del documents[1]
    rows = rows_of(documents, 3, bad_records=1)
    tokens, _ = rows.next(12)
    assert tokens.tolist() == [100, 101, 102, 300, 301, 302] * 2
    assert rows.skipped == 1  # of the first epoch alone
    with pytest.raises(DataError, match=r"1 bad records, more than data\.bad_records=0; the last: document 1"):
        rows_of(documents, 3).next(12)
    with pytest.raises(DataError, match="none of its 3 documents can be read"):
        rows_of(Corpus(), 3, bad_records=9).next(12)


def test_documents_do_not_see_each_other():
    """T13: Other documents before and after one, of the same lengths: its loss stays the same to the bit."""
    import jax.numpy as jnp
    import tiny
    from flax import nnx

    import smollm3_jax as s3
    from smollm3_jax.train.objectives.pretrain import Pretrain
    from smollm3_jax.train.options import StepOptions
    from smollm3_jax.train.state import Batch

    config = s3.ModelConfig.from_hf(tiny.raw_config("plain"))
    model = s3.SmolLM3(config, rngs=nnx.Rngs(0))
    random = np.random.RandomState(0)
    first, own, last, another = (random.randint(3, 160, 9).astype(np.int32) for _ in range(4))

    def loss_of_own(*documents):
        row, segments = rows_of(Corpus(enumerate(documents)), len(documents)).next(27)
        assert (row[9:18] == own).all()
        # A document of one token has no label: so only its own count.
        alone = np.where(segments == 2, 2, 100 + np.arange(27))
        batch = Batch(jnp.asarray(row)[None], jnp.asarray(alone, jnp.int32)[None])
        return float(Pretrain()(model, batch, StepOptions(dtype="float32"))[0])

    wanted = loss_of_own(first, own, last)
    assert loss_of_own(last, own, first) == loss_of_own(another, own, last) == wanted
