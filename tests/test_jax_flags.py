"""JAX_ENABLE_X64 and its like, in a process each."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax_flags
import numpy as np
import pytest
from proxies import FULL

TESTS = Path(__file__).parent
STRICT = {"JAX_NUMPY_DTYPE_PROMOTION": "strict", "JAX_NUMPY_RANK_PROMOTION": "raise"}
OTHERS = {"JAX_DEBUG_NANS": "true", "JAX_DEFAULT_MATMUL_PRECISION": "highest", "JAX_DEFAULT_PRNG_IMPL": "rbg"}
OTHERS |= {"JAX_THREEFRY_PARTITIONABLE": "false"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("flags")
    jax_flags.write_models(folder)
    return folder


@pytest.fixture(scope="module")
def expected(models: Path) -> dict[str, Any]:
    return json.loads(json.dumps(jax_flags.everything(models), default=np.ndarray.tolist))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "flags"),
    [
        pytest.param([], {"JAX_ENABLE_X64": "1", **STRICT}, marks=FULL),
        pytest.param(["x64"], OTHERS, marks=FULL),
    ],
    ids=["x64 and strict", "x64 by the caller"],
)
def test_flags_change_nothing(models: Path, expected: dict[str, Any], words: list[str], flags: dict[str, str]):
    done = subprocess.run(
        [sys.executable, TESTS / "jax_flags.py", models, *words],
        env=os.environ | {"PYTHONPATH": str(TESTS.parent), "JAX_DISABLE_MOST_OPTIMIZATIONS": "true", **flags},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout) == expected
