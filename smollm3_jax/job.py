"""What the processes of a job tell each other, so that either all of them go on, or all stop with one reason."""

import contextlib
import hashlib
import json
from collections.abc import Iterator

import jax
import numpy as np
from numpy.typing import ArrayLike

from .errors import SmolLM3Error, TrainingError

MESSAGE_BYTES = 500


def gathered(value: ArrayLike) -> np.ndarray:
    """A value of each process, [processes, ...]; all have to call it."""
    if jax.process_count() == 1:
        return np.asarray(value)[None]
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(np.asarray(value))


def agree(what: str, value: object) -> None:
    """Raises TrainingError where a value, ready for JSON, is another on some processes, and names them."""
    text = json.dumps(value, sort_keys=True)
    all_of_them = gathered(np.frombuffer(hashlib.sha256(text.encode()).digest()[:8], np.uint32))
    odd = [i for i, words in enumerate(all_of_them) if (words != all_of_them[0]).any()]
    if odd:
        raise TrainingError(f"processes {odd} have other {what} than process 0")


@contextlib.contextmanager
def raise_everywhere() -> Iterator[None]:
    """For a block in which one process may fail alone: then all of them raise its kind of error with its message."""
    error: SmolLM3Error | None = None
    try:
        yield
    except SmolLM3Error as own:
        error = own
    text = f"{type(error).__name__}: {error}" if error else ""
    words = text.encode()[:MESSAGE_BYTES].ljust(MESSAGE_BYTES, b"\0")
    for i, said in enumerate(gathered(np.frombuffer(words, np.uint8))):
        if not said.any():
            continue
        if error is not None and i == jax.process_index():
            raise error
        name, _, message = said.tobytes().rstrip(b"\0").decode(errors="replace").partition(": ")
        kinds = {kind.__name__: kind for kind in SmolLM3Error.__subclasses__()}
        raise kinds.get(name, TrainingError)(f"process {i}: {message}")
