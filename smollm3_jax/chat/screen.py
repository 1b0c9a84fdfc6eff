"""What the chat shows and how it reads lines, on a terminal and without one.

On a terminal, thinking is dim while it comes, in a window of a few lines, and folds to one line. Where standard
output is a file or a pipe, answers and what commands print are all that goes there: no control codes, and no
thinking (/thinking prints it); everything else goes to standard error.
"""

import atexit
import contextlib
import functools
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.text import Text as Styled

from .. import files
from ..screen_text import UNSEEN
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
        """A notice, which is neither. A terminal gets whole words, a file gets whole lines."""
        self.notes.print(Styled(clean(text), style=style), soft_wrap=not self.notes.is_terminal)


def clean(text: str) -> str:
    """The text without control characters, by which a model or a tool could command the terminal."""
    return UNSEEN.sub(lambda match: match[0] if match[0] in "\n\t" else "", text)


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

    def __exit__(self, *_: object) -> None:
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


def line_reader(history: Path) -> Callable[..., str]:
    """A function that reads a line, given a prompt and perhaps a text to change.

    At a terminal it has line editing and a history that lasts, and what is pasted is one line, whatever its breaks.
    """
    if not (is_interactive() and sys.stdout.isatty()):
        return _read_plain
    try:
        import readline
    except ImportError:
        return _read_plain
    readline.set_auto_history(False)
    # Python switches it off. Where libedit stands in for readline, this says nothing to it.
    readline.parse_and_bind("set enable-bracketed-paste on")
    for line in _remembered(history):
        readline.add_history(line)
    atexit.register(_mark_pastes, False)

    def read(prompt: str, text: str = "") -> str:
        readline.set_startup_hook(functools.partial(readline.insert_text, text))
        try:
            line = input(prompt)
        except (EOFError, KeyboardInterrupt):
            print()
            raise
        finally:
            readline.set_startup_hook(None)
            _mark_pastes(True)  # what is pasted while an answer comes waits for the next prompt, whole
        if prompt == PROMPT and line.strip():
            readline.add_history(line)
            _remember(history, line)
        return line

    return read


def _mark_pastes(on: bool) -> None:
    """Whether the terminal says where what is pasted begins and ends: bracketed paste."""
    if os.environ.get("TERM", "dumb") != "dumb":
        print(f"\x1b[?2004{'h' if on else 'l'}", end="", flush=True)


def _remembered(history: Path) -> list[str]:
    """The newest lines of the file; a line of it has a carriage return for each break of what was pasted."""
    with contextlib.suppress(OSError):
        lines = history.read_bytes().decode(errors="replace").split("\n")[:-1]
        if len(lines) > 2 * HISTORY:
            lines = lines[-HISTORY:]
            files.write(history, "".join(line + "\n" for line in lines))
        return [line.replace("\r", "\n") for line in lines[-HISTORY:]]
    return []


def _remember(history: Path, line: str) -> None:
    """One by one: the terminal may be closed at any time, and other chats write here, too."""
    line = line.encode(errors="replace").decode().replace("\r", "\n").replace("\n", "\r")
    with contextlib.suppress(OSError):
        history.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            history.touch(mode=0o600, exist_ok=False)
        files.append(history, line + "\n")


def _read_plain(prompt: str, text: str = "") -> str:
    if is_interactive():
        print(prompt, end="", file=sys.stderr, flush=True)
    if sys.stdin is not None and (line := sys.stdin.readline()):
        return line.removesuffix("\n")
    raise EOFError
