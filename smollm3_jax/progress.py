"""Signs of life on standard error for what takes a while; silent, but for `tally`, where nobody is looking.

What is named there may be a file's name, or a shard's: rich reads no markup in it, and the terminal no escapes."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from .screen_text import plain

if TYPE_CHECKING:
    from rich.progress import TextColumn

SECONDS_BETWEEN_LINES = 10
# False with --quiet.
shown = True


@contextmanager
def progress(what: str, total_bytes: int) -> Iterator[Callable[[int], None]]:
    """Yields a function to call with the bytes that are done."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TransferSpeedColumn

    console = Console(stderr=True)
    columns = (_description(), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=console, transient=True, disable=not (shown and console.is_terminal)) as bar:
        task = bar.add_task(plain(what), total=total_bytes)
        yield lambda done: bar.advance(task, done)


@contextmanager
def busy(what: str) -> Iterator[None]:
    """A spinner and the time, for work whose length is not known."""
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (SpinnerColumn(), _description(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not (shown and console.is_terminal)) as bar:
        bar.add_task(plain(what), total=None)
        yield


def _description() -> "TextColumn":
    from rich.progress import TextColumn

    return TextColumn("{task.description}", markup=False)


@contextmanager
def tally(what: str, total: int, done: int = 0) -> Iterator[Callable[[int, int], None]]:
    """Yields a function to call with how many are done, and how many tokens have been generated for them.

    A file gets a line now and then: who runs something for hours without a terminal looks there. Where it has got one,
    the last one says how many were done at the end.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (_description(), BarColumn(), MofNCompleteColumn())
    columns += (TextColumn("{task.fields[rate]}"), TimeRemainingColumn())
    begin = said = time.monotonic()
    line = told = ""
    with Progress(*columns, console=console, transient=True, disable=not (shown and console.is_terminal)) as bar:
        task = bar.add_task(plain(what), total=total, completed=done, rate="")

        def report(done: int, tokens: int) -> None:
            nonlocal line, said, told
            now = time.monotonic()
            rate = f"{tokens / max(now - begin, 1e-9):.1f} tokens/s"
            bar.update(task, completed=done, rate=rate)
            line = f"smollm3: {done} of {total} {plain(what)}, {rate}"
            if shown and not console.is_terminal and now - said >= SECONDS_BETWEEN_LINES:
                said, told = now, line
                print(line, file=sys.stderr, flush=True)

        yield report
    if told and told != line:
        print(line, file=sys.stderr, flush=True)
