"""Packed log-likelihoods are those of one forward pass over each text."""

import jax.numpy as jnp
import numpy as np
import pytest
import rounding
from tiny import tiny_checkpoint

import smollm3_jax as s3
from sharding.mesh import make_mesh
from smollm3_jax.evaluate import likelihood
from smollm3_jax.evaluate.likelihood import Sizes, Span, batches, log_likelihoods

SMALL = Sizes(row=16, tokens=32, judged=8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("likelihood") / "tiny")


@pytest.fixture(scope="module")
def model(folder) -> s3.SmolLM3:
    return s3.from_pretrained(folder, "float32")


def random_spans(count: int = 30) -> list[Span]:
    """Of all lengths up to 33, with answers of one token to one question, a text that begins another, and twins."""
    random = np.random.RandomState(0)
    spans = []
    for _ in range(count):
        length = random.randint(2, 34)
        spans.append(Span(random.randint(3, 100, length).tolist(), random.randint(1, length)))
    question = spans[0].ids
    spans += [Span([*question, token], len(question)) for token in (5, 6, 7)]
    return [*spans, Span(question[:6], 1), spans[3]]


def one_by_one(model: s3.SmolLM3, spans: list[Span]) -> tuple[np.ndarray, np.ndarray]:
    """Each in a row of its own."""
    logits = np.asarray(model(jnp.array([[*ids, *[0] * (40 - len(ids))] for ids, _ in spans])), np.float64)
    logits -= logits.max(-1, keepdims=True)
    logps = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    sums, greedy = [], []
    for (ids, start), logps_TV in zip(spans, logps, strict=True):
        of_end = logps_TV[start - 1 : len(ids) - 1]
        sums.append(of_end[np.arange(len(of_end)), ids[start:]].sum())
        greedy.append(bool((of_end.argmax(-1) == ids[start:]).all()))
    return np.array(sums), np.array(greedy)


def collected(*arguments, **options) -> dict[int, tuple[float, bool]]:
    found: dict[int, tuple[float, bool]] = {}
    for batch in log_likelihoods(*arguments, **options):
        assert not found.keys() & batch.keys()
        found |= batch
    return found


@pytest.fixture(scope="module")
def bounded(model) -> tuple[np.ndarray, np.ndarray]:
    """What each span's log-likelihood is, and how far from it another way to compute it may be."""
    return rounding.shaken(lambda model: one_by_one(model, random_spans())[0], model)[0]


def values(found: dict[int, tuple[float, bool]]) -> list[float]:
    return [found[number][0] for number in sorted(found)]


def test_they_are_those_of_each_text_alone(model, bounded):
    spans = random_spans()
    found = collected(model, spans, sizes=SMALL)
    assert found.keys() == set(range(len(spans)))
    assert rounding.within(values(found), bounded) <= 1
    assert rounding.within(values(found)[::-1], bounded) > 1


def test_whether_every_token_is_the_likeliest(model):
    text = [9, 10, 11]
    for _ in range(2):
        text.append(int(np.asarray(model(jnp.array([[*text, *[0] * (40 - len(text))]])))[0, len(text) - 1].argmax()))
    spans = [Span(text, 3), Span([*text[:3], 4, text[4]], 3), Span([*text[:4], 4], 3), *random_spans()]
    found = collected(model, spans, sizes=SMALL)
    greedy = one_by_one(model, spans)[1]
    assert greedy[:3].tolist() == [True, False, False]
    assert [found[number][1] for number in range(len(spans))] == greedy.tolist()


def test_rows_are_of_few_lengths_and_no_text_is_computed_twice():
    spans = random_spans()
    found = list(batches(spans, SMALL))
    assert {batch.length for batch in found} == {16, 32}
    assert all(len(batch.rows) * batch.length <= 32 for batch in found)
    groups = [group for batch in found for row in batch.rows for group in row]
    assert sorted(number for group in groups for number in group) == list(range(len(spans)))
    # The three answers are one input, which the question and its beginning begin; the twins are one.
    together = next(group for group in groups if 30 in group)
    assert {0, 30, 31, 32, 33} <= set(together)
    assert {3, 34} <= set(next(group for group in groups if 3 in group))
    for batch in found:
        assert all(sum(len(spans[group[0]].ids) - 1 for group in row) <= batch.length for row in batch.rows)


def test_who_goes_on_finds_the_same_to_the_bit(model):
    spans = random_spans()
    whole = list(log_likelihoods(model, spans, sizes=SMALL))
    done = whole[0].keys() | whole[1].keys()
    left = list(log_likelihoods(model, spans, set(range(len(spans))) - done, SMALL))
    assert left == whole[2:] and len(left) > 1
    assert list(log_likelihoods(model, spans, set(), SMALL)) == []


@pytest.mark.parametrize(
    "axes, rules", [({"data": 4, "tensor": 2}, "serve_tp"), pytest.param({"data": 8}, "dp", marks=pytest.mark.slow)]
)
def test_on_a_mesh(folder, bounded, axes, rules):
    there = s3.from_pretrained(folder, "float32", make_mesh(axes), rules)
    found = collected(there, random_spans(), sizes=SMALL)
    assert rounding.within(values(found), bounded) <= 1


def test_of_quantized_weights(folder):
    model = s3.from_pretrained(folder, "float32", weights="int8")
    expected = one_by_one(model, random_spans())[0]
    np.testing.assert_allclose(values(collected(model, random_spans(), sizes=SMALL)), expected, rtol=2e-3)


@pytest.mark.parametrize(("steps", "most"), [(1, 2.0), (4, 1.25)])
def test_rows_have_few_lengths_and_little_padding(steps, most):
    sizes = Sizes(row=512, tokens=2048, judged=128, steps=steps)
    lengths = [likelihood._row_for(tokens, sizes) for tokens in range(1, 8193)]
    assert all(tokens <= length <= max(512, most * tokens) for tokens, length in enumerate(lengths, 1))
    assert len(set(lengths)) == 1 + 4 * steps and max(lengths) == 8192
