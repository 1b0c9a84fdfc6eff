"""The commands of the chat in a terminal: their names, and their help."""

import functools
import textwrap
from typing import Any

COMMANDS = {
    "/think, /no_think": "whether the model reasons before its next answers",
    "/thinking": "show its last reasoning",
    "/regenerate": "answer the last message anew",
    "/edit TEXT": "put TEXT in the place of the last message, and answer it; without TEXT, change it at the prompt",
    "/undo": "take back the last message and its answer",
    "/system TEXT": "set the system message (none without TEXT); the conversation so far stays",
    "/save FILE": "write the conversation as JSON",
    "/load FILE": "go on with a conversation that was saved",
    "/reset": "forget the conversation, but neither the system message nor the mode",
    "/tokens": "how much of the context is used, and how fast the last answer came",
    "/help": "this",
    "/exit": "leave, as Ctrl-D does",
}
OF_SEVERAL_LINES = {"system", "edit"}  # commands
ADVICE = (
    "A message that begins with a slash is written with two. Pasted text is one message, whatever its lines; a typed "
    "line that ends with a backslash goes on in the next. Ctrl-C stops an answer; what has come of it stays in the "
    "conversation."
)


def is_command(text: str) -> bool:
    """Whether a message is none. One of several lines (a comment in C, say) has to begin as such a command does."""
    if not text.startswith("/") or text.startswith("//"):
        return False
    return "\n" not in text or text[1:].split(maxsplit=1)[:1] in [[name] for name in OF_SEVERAL_LINES]


def from_user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text[1:] if text.startswith("//") else text}


def help_text(width: int) -> str:
    """The commands, in lines of less than this width."""
    column = max(map(len, COMMANDS)) + 2
    wrap = functools.partial(textwrap.fill, width=max(width - 1, column + 20), break_on_hyphens=False)
    lines = [
        wrap(text, initial_indent=usage.ljust(column), subsequent_indent=" " * column)
        for usage, text in COMMANDS.items()
    ]
    return "\n".join([*lines, wrap(ADVICE)])
