"""Signs of life on standard error for what takes a while; silent, but for `tally`, where nobody is looking."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SECONDS_BETWEEN_LINES = 10


@contextmanager
def progress(what: str, total_bytes: int) -> Iterator[Callable[[int], None]]:
    """Yields a function to call with the bytes that are done."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=total_bytes)
        yield lambda done: bar.advance(task, done)


@contextmanager
def busy(what: str) -> Iterator[None]:
    """A spinner, for work whose length is not known."""
    from rich.console import Console

    with Console(stderr=True).status(what):
        yield


@contextmanager
def tally(what: str, total: int, done: int = 0) -> Iterator[Callable[[int, int], None]]:
    """Yields a function to call with how many are done, and how many tokens have been generated for them.

    A file gets a line now and then: who runs something for hours without a terminal looks there.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    columns += (TextColumn("{task.fields[rate]}"), TimeRemainingColumn())
    begin = said = time.monotonic()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=total, completed=done, rate="")

        def report(done: int, tokens: int) -> None:
            nonlocal said
            now = time.monotonic()
            rate = f"{tokens / max(now - begin, 1e-9):.1f} tokens/s"
            bar.update(task, completed=done, rate=rate)
            if not console.is_terminal and now - said >= SECONDS_BETWEEN_LINES:
                said = now
                print(f"smollm3: {done} of {total} {what}, {rate}", file=sys.stderr, flush=True)

        yield report
