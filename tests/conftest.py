import os
import signal
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tests neither write to the user's cache of compiled programs nor depend on what is in it.
os.environ.setdefault("JAX_ENABLE_COMPILATION_CACHE", "false")
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
