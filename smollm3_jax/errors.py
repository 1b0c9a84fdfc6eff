"""The typed errors of the package. The CLI prints their message and exits with their code."""

import contextlib
import difflib
from collections.abc import Iterable, Iterator, Mapping

from .screen_text import plain

MAX_CHARACTERS = 10_000


class SmolLM3Error(Exception):
    """Base of every error that a user can cause; the message names the culprit and the way out."""

    exit_code = 3

    def __str__(self) -> str:
        # It quotes names of files and tensors, which may be anyone's: none of them steers a terminal or fills it.
        # One line, therefore: a line break in a name would begin a line of its own.
        text = super().__str__()
        return plain(text if len(text) <= MAX_CHARACTERS else f"{text[:MAX_CHARACTERS]} ...")


class OptionError(SmolLM3Error, ValueError):
    """An option or argument with a value that is not allowed."""

    exit_code = 2


class TextTooLong(OptionError):
    """A text that cannot fit into the context, however it is cut into tokens."""


def unknown_name(
    where: str, name: str, known: Iterable[str], elsewhere: Mapping[str, str], kind: str = "argument"
) -> OptionError:
    """The error about an argument that is not there, with the name that is meant.

    Args:
      elsewhere: what other libraries call something -> what it is here; kind: what it is where it is named.
    """
    near = difflib.get_close_matches(name, list(known), 1)
    meant = elsewhere.get(name) or (near[0] if near else None)
    return OptionError(
        f"{where} has no {kind} {name}; " + (f"use {meant}" if meant else f"it has {', '.join(sorted(known))}")
    )


class ConfigError(SmolLM3Error, ValueError):
    """A config.json that is missing, garbled, or asks for what this model does not do."""


class CheckpointFormatError(SmolLM3Error, ValueError):
    """A weight file that is damaged, or whose tensors are not those that its config asks for."""


class TokenizerError(SmolLM3Error, ValueError):
    """A tokenizer or chat template that is missing, unreadable, or belongs to another model."""


class HubError(SmolLM3Error, OSError):
    """A model that could not be fetched."""


class SaveError(SmolLM3Error, OSError):
    """A checkpoint that could not be written; what was there before is untouched."""


class SupportError(SmolLM3Error, RuntimeError):
    """An installation that this package does not support, or an optional part that is missing."""


class DataError(SmolLM3Error, ValueError):
    """Training data, or a file of prompts, that is missing, damaged, or not what the run began with."""


class TrainingError(SmolLM3Error, RuntimeError):
    """A training run that cannot go on; its last checkpoint stands."""


class OutOfMemoryError(SmolLM3Error, MemoryError):
    """What was asked for does not fit in the memory of the device or of this machine."""


def lacks_memory(error: BaseException) -> bool:
    """Whether an error is how JAX or Python reports too little memory."""
    if isinstance(error, SmolLM3Error):
        return False
    of_device = isinstance(error, RuntimeError | ValueError) and "RESOURCE_EXHAUSTED" in str(error)
    return of_device or isinstance(error, MemoryError) or "out of memory" in str(error).lower()


@contextlib.contextmanager
def memory_for(what: str, way_out: str) -> Iterator[None]:
    """Turns a lack of memory in the block into OutOfMemoryError."""
    try:
        yield
    except Exception as error:
        if not lacks_memory(error):
            raise
        raise OutOfMemoryError(f"too little memory for {what}; {way_out}") from None
