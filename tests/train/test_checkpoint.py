"""What checkpoints are checked by; what is done to them from outside is in test_faults.py."""

import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from smollm3_jax.train.checkpoint import digest


def digest_of(array):
    words, finite = digest({"x": jnp.asarray(array)})
    return words["x"], finite["x"]


@given(st.integers(0, 2**32 - 1), st.integers(0, 59), st.integers(0, 31))
@settings(max_examples=60, deadline=None)
def test_each_bit_counts(seed, place, bit):
    x = np.random.RandomState(seed).randint(0, 2**31, (3, 4, 5)).astype(np.uint32)
    y = x.copy()
    y.reshape(-1)[place] ^= np.uint32(1 << bit)
    assert digest_of(x)[0] != digest_of(y)[0]


@given(st.integers(0, 2**32 - 1), st.integers(0, 58))
@settings(max_examples=30, deadline=None)
def test_so_does_the_order(seed, place):
    x = np.random.RandomState(seed).permutation(60).astype(np.float32)
    y = x.copy()
    y[place : place + 2] = y[place : place + 2][::-1]
    assert digest_of(x)[0] != digest_of(y)[0]


def test_what_is_not_finite_is_seen():
    assert digest_of(np.ones(3, np.float32))[1]
    assert not digest_of(np.array([1, np.nan], np.float32))[1] and not digest_of(np.array([np.inf], np.float32))[1]
