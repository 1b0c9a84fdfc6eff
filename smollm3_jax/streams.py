"""Standard output and error whose reader has left, or whose disk is full: no run and no server ends because of it."""

import contextlib
import io
import os
import select
import sys
from typing import Any, NoReturn


class _Unfailing(io.FileIO):
    """A file in which is lost what cannot be written. Unbuffered, so that a signal's handler may write, too."""

    def write(self, content: Any, /) -> int:
        rest = memoryview(content).cast("B")
        with contextlib.suppress(OSError):
            while rest and (written := super().write(rest)):
                rest = rest[written:]
        return len(content)


def go_on_without_stderr() -> None:
    """From here on, what cannot be written to standard error is lost, and raises nothing."""
    own = sys.stderr
    with contextlib.suppress(OSError, ValueError, AttributeError):  # a test's or a notebook's own, which has no number
        if own.fileno() == 2 and not isinstance(own.buffer, _Unfailing):
            raw: Any = _Unfailing(2, "wb", closefd=False)
            sys.stderr = io.TextIOWrapper(raw, own.encoding, own.errors, line_buffering=True)


def nobody_reads_stdout() -> bool:
    """Whether standard output is a pipe or a socket whose reader has left."""
    with contextlib.suppress(OSError, ValueError, AttributeError):  # a test's or a notebook's own, which has no number
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
        return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
    return False


def give_up_stdout() -> None:
    """What is still to be written to standard output, and could not be, is lost: else Python tries again as it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def end_now(code: int) -> NoReturn:
    """Ends the process without waiting for threads that are in the midst of something, or for who reads nothing."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)
