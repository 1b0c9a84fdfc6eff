import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tests neither write to the user's cache of compiled programs nor depend on what is in it: what several of them
# compile is kept for one run of the tests, for its workers and the commands they start.
if "PYTEST_XDIST_WORKER" not in os.environ:
    _compiled = tempfile.TemporaryDirectory(prefix="smollm3-compiled-", ignore_cleanup_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _compiled.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # on tiny models, torch's threads wait more than they work

import jax
import pytest

# Where a shell started the tests in the background, Ctrl-C is ignored, and would be by the programs under test.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Tiny models take longer to compile than to run: leave out what only makes programs fast. (LLVM's passes;
# XLA's own stay, and so do the programs of test_real_weights.py.)
jax.config.update("jax_disable_most_optimizations", True)

SHARED = Path(__file__).resolve().parents[1].parent / "shared" / "fixtures"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The released tokenizer, template and config, and text in six languages; not part of this repository."""
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED} is absent: the released tokenizer and config are not part of this repository")
    return SHARED


@pytest.fixture(scope="session")
def demo_folder() -> Path:
    """The demo model in bfloat16, fetched at first use."""
    from smollm3_jax.errors import HubError
    from smollm3_jax.weights.demo import pull_demo

    try:
        return pull_demo()
    except HubError as error:
        pytest.skip(f"the demo model cannot be fetched: {error}")


@pytest.fixture
def programs_as_users_run_them() -> Iterator[None]:
    """With all optimizations, for models that are not tiny."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first, so that no process is left with one at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
