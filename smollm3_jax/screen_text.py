"""Text of foreign origin (names of files and tensors, messages, what a model says) as it may stand on a terminal."""

import re

# What moves a terminal's cursor, colours it, or turns text around; half a surrogate pair cannot be written at all.
UNSEEN = re.compile(r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")


def plain(text: object, lines: bool = False) -> str:
    """`text` with its control characters as Python would write them: an ESC is \\x1b, and does nothing.

    Args:
      text: anything; `str` makes a text of it.
      lines: leave line breaks and tabs as they are. Without it, the result is one line.
    """

    def visible(match: re.Match[str]) -> str:
        char = match[0]
        return char if lines and char in "\n\t" else repr(char)[1:-1]

    return UNSEEN.sub(visible, str(text))


def escaped(text: object, lines: bool = False) -> str:
    """`plain(text)` for where rich reads markup: "[/red]" stays text."""
    from rich.markup import escape

    return escape(plain(text, lines))
