"""Foreign text does nothing to a terminal."""

import io

import pytest
from rich.console import Console

from smollm3_jax.screen_text import escaped, plain

TEXTS = [
    ("plain text, ÄÖÜ, 日本語, 👩‍👩‍👧", "plain text, ÄÖÜ, 日本語, 👩‍👩‍👧"),
    ("\x1b[31mred\x1b[0m", "\\x1b[31mred\\x1b[0m"),
    ("a\rb\bc\x00d\x7f", "a\\rb\\x08c\\x00d\\x7f"),
    ("\x9b2J and \x9d0;title\x9c", "\\x9b2J and \\x9d0;title\\x9c"),
    ("one\ntwo\tthree", "one\\ntwo\\tthree"),
    ("right\u202eto left\u2066", "right\\u202eto left\\u2066"),
    ("line\u2028paragraph\u2029", "line\\u2028paragraph\\u2029"),
    ("half a pair \ud800", "half a pair \\ud800"),
    (r"C:\new\x1b", r"C:\new\x1b"),
    ("", ""),
]


@pytest.mark.parametrize(("text", "shown"), TEXTS)
def test_control_characters_are_seen(text, shown):
    assert plain(text) == shown
    shown.encode()


def test_lines_may_stay():
    assert plain("one\n\ttwo\r\n\x1b", lines=True) == "one\n\ttwo\\r\n\\x1b"
    assert plain(OSError("a\nb")) == "a\\nb"


@pytest.mark.parametrize("text", ["[/red]", "[/x]", "[bold]x", "a[red]b[/]", "\\[red]x", "end\\", ":smile: [link=x]y"])
def test_markup_stays_text(text):
    out = io.StringIO()
    Console(file=out, width=100, emoji=False).print(f"[bold]{escaped(text)}[/bold]")
    assert out.getvalue() == text + "\n"
