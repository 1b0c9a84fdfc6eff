import time
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from smollm3_jax.errors import DataError
from smollm3_jax.train.data.packing import EndOfData
from smollm3_jax.train.data.prefetch import on_mesh, prefetch
from smollm3_jax.train.state import Batch


class Numbers:
    """As many batches as there are, each of its step's number; their state counts them."""

    def __init__(self, count):
        self.count, self.made = count, 0

    def next(self, step):
        if self.made == self.count:
            raise EndOfData("numbers")
        self.made += 1
        return np.full((2, 3), step)

    def state(self):
        return {"made": self.made}


def numbers(count) -> Any:
    return Numbers(count)


def only(**functions) -> Any:
    return SimpleNamespace(**functions)


def test_batches_come_in_order_each_with_the_state_after_it():
    came = list(filter(None, prefetch(numbers(9), 2, 5, 10, asked=lambda: False)))
    assert [(step, batch[0, 0], state["made"]) for step, batch, state in came] == [(2, 2, 1), (3, 3, 2), (4, 4, 3)]


def test_they_end_with_the_data():
    assert [step for step, *_ in filter(None, prefetch(numbers(4), 0, 100, 10, asked=lambda: True))] == [0, 1, 2, 3]


def test_no_more_are_made_than_its_depth_and_the_one_in_hand():
    hundred = numbers(100)
    came = prefetch(hundred, 0, 100, 10, asked=lambda: False, depth=2)
    next(came)
    time.sleep(0.3)
    assert hundred.made <= 4  # that one, two in the queue, one that waits to enter it
    came.close()


def test_a_thread_that_fails_or_hangs_is_told_of():
    hanging = only(next=lambda step: time.sleep(5))
    begin = time.monotonic()
    with pytest.raises(DataError, match=r"no batch came within data.timeout=0.2 seconds"):
        list(prefetch(hanging, 0, 3, 0.2, asked=lambda: False))
    assert time.monotonic() - begin < 2
    assert next(prefetch(hanging, 0, 3, 5, asked=lambda: True)) is None  # who was asked to stop does not wait for it

    def fail(step):
        raise DataError("broken")

    with pytest.raises(DataError, match="broken"):
        list(prefetch(only(next=fail), 0, 3, 5, asked=lambda: False))


def test_a_process_that_was_stopped_has_not_waited():
    """As by SIGSTOP, for longer than a batch may take: here by who is asked in between."""
    slow = only(next=lambda step: time.sleep(0.7) or np.zeros((2, 3)), state=dict)
    assert [x[0] for x in prefetch(slow, 0, 1, 1.0, asked=lambda: time.sleep(1.2) is not None) if x] == [0]


def test_a_batch_goes_onto_one_device_as_it_is():
    tokens: Any = np.arange(6, dtype=np.int32).reshape(2, 3)
    host = Batch(tokens, np.ones_like(tokens))
    batch = on_mesh(host, None)
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(batch))
    np.testing.assert_array_equal(batch.tokens, host.tokens)
