import ml_dtypes
import numpy as np
import pytest

from smollm3_jax.weights.stored import NUMPY_DTYPES, is_finite, raw_bytes


@pytest.mark.parametrize("dtype", NUMPY_DTYPES.values(), ids=str)
def test_is_finite_agrees_with_numpy(dtype):
    info = ml_dtypes.finfo(dtype)
    for value in (np.nan, -np.nan, np.inf, -np.inf, info.max, info.min, info.tiny, 0.0, -0.0):
        for size in (1, 7, 300_000):  # the last takes more than one piece
            array = np.ones(size, dtype)
            array[-1] = value
            assert is_finite(array) == np.isfinite(array).all(), value
    assert is_finite(np.ones((0, 3), dtype)) and is_finite(np.array(1, dtype))


def test_raw_bytes_are_in_c_order():
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert bytes(raw_bytes(array.T)) == np.ascontiguousarray(array.T).tobytes()
    assert bytes(raw_bytes(array[:, ::2])) == array[:, ::2].tobytes()
