"""One process stands for several: what the others say is put into its mouth."""

import numpy as np
import pytest

from smollm3_jax import job
from smollm3_jax.errors import DataError, TrainingError
from smollm3_jax.train.run.checkpoint import Damaged


@pytest.fixture
def others(monkeypatch):
    """Makes this process the first of a job, whose others say something else in its place."""

    def say(*values):
        monkeypatch.setattr(job, "gathered", lambda own: np.stack([own, *values]))

    return say


def words(text):
    return np.frombuffer(text.encode().ljust(job.MESSAGE_BYTES, b"\0"), np.uint8)


def test_alone_nothing_is_said():
    with job.raise_everywhere():
        pass
    with pytest.raises(DataError, match="gone"), job.raise_everywhere():
        raise DataError("gone")
    job.agree("settings", {"a": 1})


def test_what_one_fails_at_all_fail_at(others):
    others(words(""), words("Damaged: a bit is another"))
    with pytest.raises(Damaged, match="process 2: a bit is another"), job.raise_everywhere():
        pass
    others(words("KeyError: of no kind that is known"))
    with pytest.raises(TrainingError, match="process 1: of no kind"), job.raise_everywhere():
        pass
    others(words("DataError: later"))
    with pytest.raises(Damaged, match="first"), job.raise_everywhere():
        raise Damaged("first")


def test_a_message_may_be_long(others):
    others(words(""))
    with pytest.raises(DataError), job.raise_everywhere():
        raise DataError("ä" * 2 * job.MESSAGE_BYTES)


def test_who_differs_is_named(others):
    others(np.zeros(2, np.uint32))
    with pytest.raises(TrainingError, match=r"processes \[1\] have other data than process 0"):
        job.agree("data", [])
