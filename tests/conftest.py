import functools
import gc
import hashlib
import os
import re
import shutil
import signal
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tests neither write to the user's cache of compiled programs nor depend on what is in it: what the commands that they
# start compile is kept for one run of the tests.
if "PYTEST_XDIST_WORKER" not in os.environ:
    _compiled = tempfile.TemporaryDirectory(prefix="smollm3-compiled-", ignore_cleanup_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _compiled.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # on tiny models, torch's threads wait more than they work

import hypothesis
import jax
import pytest

# How long an example takes says more of the machine than of the code.
hypothesis.settings.register_profile("untimed", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("untimed")

# Where a shell started the tests in the background, Ctrl-C is ignored, and would be by the programs under test.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Tiny models take longer to compile than to run: leave out what only makes programs fast. (LLVM's passes;
# XLA's own stay, and so do the programs of test_real_weights.py.)
jax.config.update("jax_disable_most_optimizations", True)

# Fused loops are half of what is left. jax before 0.11 has an older compiler for them, which takes a fraction of that.
# The newer one is what users have: it compiles the commands of the pages (test_docs.py), and all of `make test-light`.
if jax.__version_info__ < (0, 11):
    quick = "--xla_cpu_use_fusion_emitters=false"
    os.environ["XLA_FLAGS"] = " ".join(filter(None, [os.environ.get("XLA_FLAGS"), quick]))

# What jax and torch import is never garbage, and is half a million objects to look through.
gc.freeze()
gc.set_threshold(20_000, 20, 20)

# As a caller may have it: several devices, and no dtype or rank that changes without being asked to.
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_enable_compilation_cache", False)  # for several devices on one CPU, see compile_cache.enable
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

HERE = Path(__file__).resolve().parent
SHARED = HERE.parents[1] / "shared" / "fixtures"
TOKENIZER_SHA256 = "7b6a500b662a34eb3f0374db856ba4ad7de4c81040571d78dc0d357238930005"


@pytest.fixture(scope="session")
def release() -> Path:
    """SmolLM3-3B's config, template, token maps and index; neither its weights nor its tokenizer.json."""
    return HERE / "data" / "smollm3-3b"


@pytest.fixture(scope="session")
def full_release(release: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with tokenizer.json, 17 MB, from beside this repository or from a hub."""
    folder = tmp_path_factory.mktemp("released") / "smollm3-3b"
    shutil.copytree(release, folder)
    own = SHARED / "smollm3-3b" / "tokenizer.json"
    source = own if own.exists() else _tokenizer_of_the_hub()
    assert hashlib.sha256(source.read_bytes()).hexdigest() == TOKENIZER_SHA256
    (folder / "tokenizer.json").symlink_to(source)
    return folder


@functools.cache
def _tokenizer_of_the_hub() -> Path:
    from huggingface_hub import hf_hub_download

    from smollm3_jax.config import RELEASE

    try:
        return Path(hf_hub_download(RELEASE, "tokenizer.json", etag_timeout=5))
    except Exception as error:  # of httpx, of the library, ...: whatever a network can bring
        reason = (str(error).strip().splitlines() or [""])[0][:200]
        pytest.skip(f"no tokenizer.json of {RELEASE}: none is in {SHARED}, and no hub gives it ({reason})")


@pytest.fixture(scope="session")
def corpus() -> Path:
    """Text in six languages, JSON lines; its licences are not this repository's."""
    if not (SHARED / "corpus").is_dir():
        pytest.skip(f"no text in six languages: {SHARED / 'corpus'} is not part of this repository")
    return SHARED / "corpus"


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


# The files that take longest, in runs of `smollm3 train` and in compilers.
LONG = ("test_faults.py", "test_loop.py", "test_compiled_for_gpu.py", "test_training_compiled_for_gpu.py")
LONG += ("test_compiled_ahead.py", "test_several_processes.py", "test_docs.py", "test_model.py")


@pytest.fixture(scope="module")
def compiled_as_for_users() -> Iterator[None]:
    """For GPUs that are not there, with all optimizations."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What is marked full is skipped where FULL is not set. Files that take longest first, so that no process is left
    with one at the end; then those with slow tests."""
    if not os.environ.get("FULL"):
        for item in items:
            if item.get_closest_marker("full"):
                item.add_marker(pytest.mark.skip(reason="takes minutes: `make test-full`"))
    slow = {item.path for item in items if item.get_closest_marker("slow")}

    def turn(item: pytest.Item) -> tuple[int, bool]:
        return LONG.index(item.path.name) if item.path.name in LONG else len(LONG), item.path not in slow

    items.sort(key=turn)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """How many tests were skipped, by the reason."""
    reasons: Counter[str] = Counter()
    for report in terminalreporter.stats.get("skipped", []):
        if isinstance(report.longrepr, tuple):
            reasons[re.sub(r"^Skipped: ", "", report.longrepr[2])] += 1
    if reasons:
        terminalreporter.section(f"{sum(reasons.values())} tests were skipped")
        for reason, count in reasons.most_common():
            terminalreporter.line(f"{count:5} {reason}")
