"""Arguments as people type them: a mistake is answered with the command's own usage, in short, and what was meant."""

import argparse
import difflib
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NoReturn

from ..screen_text import plain


def did_you_mean(word: str, names: Iterable[str]) -> str:
    """ "; did you mean NAME?", or nothing where no name is like the word."""
    close = difflib.get_close_matches(word.lower().replace("_", "-"), list(names), n=1)
    return f"; did you mean {close[0]}?" if close else ""


class Parser(argparse.ArgumentParser):
    """argparse, but for what it says to a mistake."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:  # pyright: ignore
        words = list(sys.argv[1:] if args is None else args)
        if self._subparsers is None:  # or they look at their own
            self._refuse_unknown_options(words)
        return super().parse_known_args(words, namespace)

    def _refuse_unknown_options(self, words: Sequence[str]) -> None:
        """argparse comes to these last, and would say before that something else is missing."""
        names = [name for name in self._option_string_actions if name.startswith("--")]
        for word in words:
            name = word.split("=", 1)[0]
            if word == "--":
                return
            if not re.fullmatch(r"--?[A-Za-z][\w.-]*", name):  # a number, a text that begins with a dash
                continue
            if name.startswith("--") and not any(known.startswith(name) for known in names):
                close = did_you_mean(name, names)
                if "." in name and any(action.dest == "settings" for action in self._actions):
                    close = f"; settings have no dashes: {word.lstrip('-')}"
                self.error(f"there is no option {name}{close}")
            if not name.startswith("--") and (f"-{name}" in names or name[:2] not in self._option_string_actions):
                self.error(f"there is no option {name}{did_you_mean(f'-{name}', names)}")

    def _check_value(self, action: argparse.Action, value: object) -> None:
        if action.choices is not None and value not in action.choices:
            names = list(map(str, action.choices))
            close = did_you_mean(str(value), names)
            raise argparse.ArgumentError(action, f"{value!r} is none of {', '.join(names)}{close}")

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.format_usage()}{self.prog}: {plain(message)} ({self.prog} --help says more)\n")


def leaves(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """The parser itself, or those of its subcommands."""
    found = [action.choices for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not found:
        yield parser
    for choices in found:
        for sub in choices.values():
            yield from leaves(sub)
