from pathlib import Path

import pytest
from said import server_of

from smollm3_jax.serve.job import Server


@pytest.fixture(scope="session")
def server(full_release: Path) -> Server:
    """The released model, but for its weights."""
    return server_of(full_release)
