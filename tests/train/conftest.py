"""A small model and corpus for runs of `smollm3 train`, and a run that nothing disturbs."""

import pytest
import tiny
from runs import train, write_corpus

TOML = """
[run]
steps = 8
[model]
dtype = "float32"
[data]
length = 16
rows = 4
[optimizer]
learning_rate = 1e-3
warmup_steps = 2
[checkpoint]
every = 2
"""


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """A model of 160 words, a corpus, and settings."""
    folder = tmp_path_factory.mktemp("train")
    tiny.talking_checkpoint(folder / "model")
    (folder / "run.toml").write_text(TOML)
    write_corpus(folder / "corpus.jsonl")
    return folder


@pytest.fixture(scope="session")
def whole(place):
    """A run that nothing disturbs. Several files of tests have it; each names its own runs in `place` otherwise."""
    train(place, place / "whole")
    return place / "whole"
