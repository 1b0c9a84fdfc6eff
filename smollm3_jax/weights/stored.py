"""StoredTensor: one tensor of a checkpoint, under its Hugging Face name, wherever it is stored."""

import dataclasses
import math
from collections.abc import Callable

import ml_dtypes
import numpy as np

# Name in config.json and in torch -> numpy's type, and the tag that safetensors headers use.
NUMPY_DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
SAFETENSORS_TAGS = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor that can be read, but has not been.

    `shape` is Hugging Face's (linear weights are [out, in]); `read()` returns a numpy array of that
    shape and of `dtype` (a key of NUMPY_DTYPES), memory-mapped where the format allows.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    read: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor in `dtype`."""
        return math.prod(self.shape) * NUMPY_DTYPES[self.dtype].itemsize
