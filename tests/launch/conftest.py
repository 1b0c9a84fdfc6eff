"""Runs to launch."""

import pytest

from smollm3_jax.launch.job import TrainJob, train_job


@pytest.fixture
def job() -> TrainJob:
    return train_job("quick", ["run.dir=gs://bucket/run"])
