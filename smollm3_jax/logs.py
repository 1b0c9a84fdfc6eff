"""What is logged once."""

import functools
import logging


@functools.cache
def say_once(log: logging.Logger, level: int, message: str) -> None:
    """Logs what would otherwise be said for every layer and every program."""
    log.log(level, "%s", message)
