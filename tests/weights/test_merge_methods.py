"""The arithmetic of merges where its numbers are known."""

import numpy as np
import pytest

from smollm3_jax.weights import merge_methods as methods

# A dozen roundings of numbers of up to 1.
ROUNDED = 12 * 2.0**-24


def array(*values):
    return np.array(values, np.float32)


def test_slerp_keeps_the_length_of_unit_vectors_and_ends_where_it_should():
    a, b = array(1, 0, 0), array(0, 1, 0)
    half = methods.slerp(a, b, 0.5)
    np.testing.assert_allclose(half, array(1, 1, 0) / np.sqrt(np.float32(2)), rtol=0, atol=ROUNDED)
    np.testing.assert_allclose([methods.slerp(a, b, t) for t in (0, 1)], [a, b], rtol=0, atol=ROUNDED)
    # One line, in either direction, has no circle.
    np.testing.assert_allclose(methods.slerp(a, 3 * a, 0.5), 2 * a)
    np.testing.assert_allclose(methods.slerp(a, -a, 0.25), 0.5 * a)
    np.testing.assert_allclose(methods.slerp(0 * a, b, 0.5), np.sin(np.pi / 4) * b, rtol=0, atol=ROUNDED)


def test_ties_keeps_the_largest_and_of_equals_the_first():
    np.testing.assert_array_equal(methods.largest(array(1, -3, 2, 0.5), 0.5), array(0, -3, 2, 0))
    np.testing.assert_array_equal(methods.largest(array(1, -1, 1, 1), 0.5), array(1, -1, 0, 0))
    np.testing.assert_array_equal(methods.largest(array(1, 5), 0.01), array(0, 5))
    np.testing.assert_array_equal(methods.largest(array(1, 5), 0), array(0, 0))


def test_ties_elects_the_sign_of_the_sum():
    deltas = [array(1, -1, 2, 0), array(-3, -1, 1, 0)]
    out = methods.added(array(10, 10, 10, 10), deltas, [1, 1], normalize=True, elect=True)
    np.testing.assert_allclose(out, array(7, 9, 11.5, 10))


def test_dare_keeps_the_sum_of_the_differences_and_draws_the_same_again():
    delta = np.random.RandomState(0).standard_normal((200, 100)).astype(np.float32)
    kept = methods.drawn(delta.shape, 0.3, "a", 1)
    assert abs(kept.mean() - 0.3) < 0.01
    out = methods.dropped(delta, 0.3, True, kept)
    assert np.count_nonzero(out) == np.count_nonzero(kept)
    # Sums of 20,000 numbers, in float32 as `dropped` has them: theirs are within the root of as many roundings.
    np.testing.assert_allclose(np.abs(out).sum(), np.abs(delta).sum(), rtol=4 * 20_000**0.5 * 2.0**-24)
    np.testing.assert_array_equal(methods.dropped(delta, 0.3, False, kept), delta * kept)
    assert np.array_equal(kept, methods.drawn(delta.shape, 0.3, "a", 1))
    assert not np.array_equal(kept, methods.drawn(delta.shape, 0.3, "a", 2))


@pytest.mark.slow
@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_dare_as_mergekit_does_with_the_same_numbers_dropped(monkeypatch, method):
    import torch
    from mergekit import merge_methods as theirs
    from mergekit.merge_methods.base import TensorGroup  # noqa: F401
    from mergekit.sparsify import RescaleNorm, SparsificationMethod, sparsify

    deltas = [np.random.RandomState(seed).standard_normal((40, 50)).astype(np.float32) for seed in (1, 2)]
    masks = [methods.drawn(delta.shape, 0.5, "w", i) for i, delta in enumerate(deltas)]
    queue = iter(masks)
    monkeypatch.setattr(torch, "bernoulli", lambda x: torch.from_numpy(next(queue).astype(np.float32)))
    random = SparsificationMethod.random
    found = [sparsify(torch.from_numpy(x), 0.5, random, rescale_norm=RescaleNorm.l1).numpy() for x in deltas]
    ours = [methods.dropped(delta, 0.5, True, mask) for delta, mask in zip(deltas, masks, strict=True)]
    # The sums that rescale are of 2,000 numbers, the largest number about 8.
    np.testing.assert_allclose(ours, found, rtol=0, atol=8 * (2 * 2000**0.5 + 4) * 2.0**-24)
    assert theirs.get(method).default_rescale
