"""What the chat shows and how it reads lines, on a terminal and without one.

On a terminal, thinking is dim while it comes, in a window of a few lines, and folds to one line. Where standard
output is a file or a pipe, answers and what commands print are all that goes there: no control codes, and no
thinking (/thinking prints it); everything else goes to standard error.
"""

import contextlib
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text as Styled

from .parse import Event, Text, Thinking

PROMPT = "> "  # what is read with this prompt is remembered
HISTORY = 1000  # lines
WINDOW = 8  # lines of thinking


class Screen:
    """Standard output, and where notices go when that is no terminal."""

    def __init__(self, out: Console, notes: Console):
        self.out, self.notes = out, out if out.is_terminal else notes

    def say(self, text: str, end: str = "\n") -> None:
        """An answer, or what a command prints, as it is: rich would turn tabs into spaces, and break lines."""
        self.out.file.write((clean(text) if self.out.is_terminal else text) + end)
        self.out.file.flush()

    def note(self, text: str, style: str = "dim") -> None:
        """What is neither."""
        self.notes.print(Styled(clean(text), style=style), soft_wrap=True)


def clean(text: str) -> str:
    """Without control characters, by which a model or a tool could command the terminal or turn a line around."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", "", text)


class Answer:
    """An answer while it comes: a spinner until it begins, thinking in a window, then the text."""

    def __init__(self, screen: Screen, count_tokens: Callable[[str], int]):
        self.screen, self.count_tokens = screen, count_tokens
        self.status = screen.out.status("reading")
        self.window: Live | None = None
        self.thought, self.began = "", 0.0
        self.ended = "\n"  # how what is written so far ended

    def __enter__(self) -> "Answer":
        if self.screen.out.is_terminal:
            self.status.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.status.stop()
        self._fold()
        self._end_line()

    def show(self, event: Event) -> None:
        self.status.stop()
        if isinstance(event, Thinking):
            if self.screen.out.is_terminal:
                self._think(event.text)
            return
        self._fold()
        if isinstance(event, Text) and event.text:
            self.screen.say(event.text, end="")
            self.ended = event.text

    def _think(self, text: str) -> None:
        console = self.screen.out
        if self.window is None:
            self._end_line()
            self.began = time.perf_counter()
            self.window = Live(console=console, transient=True, auto_refresh=False, redirect_stdout=False)
            self.window.start()
        self.thought += clean(text)
        # No more than fits the window has to be broken into lines.
        lines = Styled(self.thought[-WINDOW * console.width :], style="dim").wrap(console, console.width)
        self.window.update(Styled("\n").join(lines[-WINDOW:]), refresh=True)

    def _fold(self) -> None:
        if self.window is not None:
            self.window.stop()
            seconds, tokens = time.perf_counter() - self.began, self.count_tokens(self.thought)
            self.screen.note(f"thought for {seconds:.0f} s, {tokens:,} tokens (/thinking shows it)")
            self.window, self.thought = None, ""

    def _end_line(self) -> None:
        if not self.ended.endswith("\n"):
            self.screen.say("")
            self.ended = "\n"


def is_interactive() -> bool:
    """Whether standard input is a terminal; a process may also be started with none at all."""
    return sys.stdin is not None and sys.stdin.isatty()


def line_reader(history: Path) -> Callable[[str], str]:
    """A function that reads a line, given a prompt; at a terminal with line editing, and a history that lasts."""
    if not (is_interactive() and sys.stdout.isatty()):
        return _read_plain
    try:
        import readline
    except ImportError:  # Windows has none
        return input
    readline.set_auto_history(False)
    readline.set_history_length(HISTORY)
    with contextlib.suppress(OSError):
        history.parent.mkdir(parents=True, exist_ok=True)
        history.touch(mode=0o600)
        readline.read_history_file(history)

    def read(prompt: str) -> str:
        try:
            line = input(prompt)
        except (EOFError, KeyboardInterrupt):
            print()
            raise
        if prompt == PROMPT and line.strip():
            readline.add_history(line)
            with contextlib.suppress(OSError):
                # Line by line: the terminal may be closed at any time, and other chats write here, too.
                if hasattr(readline, "append_history_file"):
                    readline.append_history_file(1, history)
                else:
                    readline.write_history_file(history)
        return line

    return read


def _read_plain(prompt: str) -> str:
    if is_interactive():
        print(prompt, end="", file=sys.stderr, flush=True)
    if sys.stdin is not None and (line := sys.stdin.readline()):
        return line.removesuffix("\n")
    raise EOFError
