"""A signal that asks a run to stop."""

import contextlib
import logging
import os
import signal
from collections.abc import Iterator
from types import FrameType

from ...job import gathered

log = logging.getLogger(__name__)


class Stop:
    """Whether a signal (SIGTERM, SIGINT) has asked the run to stop. A second one ends the process at once."""

    def __init__(self) -> None:
        self.asked = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            os._exit(128 + number)
        self.asked = True
        log.warning("%s: stopping after this step; once more to stop at once", signal.Signals(number).name)

    def agreed(self) -> bool:
        """Whether any process of the job was asked; all of them have to call it."""
        return bool(gathered(self.asked).any())

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        kinds = (signal.SIGTERM, signal.SIGINT)
        before = [signal.signal(kind, self) for kind in kinds]
        try:
            yield
        finally:
            for kind, handler in zip(kinds, before, strict=True):
                signal.signal(kind, handler)
