"""JSON and server-sent events as bytes."""

import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from .contract import Event

MANY = 256  # entries of a list that are written at once; answers and prompts are at most as many
Write = Callable[[object], bytes]
_compact: dict[str, Any] = {"allow_nan": False, "separators": (",", ":")}
_encode, _escape = json.JSONEncoder(ensure_ascii=False, **_compact).encode, json.JSONEncoder(**_compact).encode


def as_json(content: object) -> bytes:
    try:
        return _encode(content).encode()
    except UnicodeEncodeError:  # half a surrogate pair, which the client has sent
        return _escape(content).encode()


def in_pieces(content: object) -> bytes:
    """As `as_json`, for a thread: no other runs during a call of json's, which of a long list may take a second."""
    return b"".join(_pieces(content))


def _pieces(content: Any) -> Iterator[bytes]:
    if isinstance(content, dict):
        yield b"{"
        for i, (key, value) in enumerate(content.items()):
            yield (b"," if i else b"") + as_json(key) + b":"
            yield from _pieces(value)
        yield b"}"
    elif isinstance(content, list):
        yield b"["
        if len(content) > MANY:  # small ones
            for i in range(0, len(content), MANY):
                yield (b"," if i else b"") + as_json(content[i : i + MANY])[1:-1]
        else:
            for i, value in enumerate(content):
                yield b"," if i else b""
                yield from _pieces(value)
        yield b"]"
    else:
        yield as_json(content)


def framed(events: Iterable[Event], write: Write = as_json) -> bytes:
    """Server-sent events."""
    return b"".join(_frame(*event, write) for event in events)


def _frame(name: str | None, data: dict[str, Any] | str, write: Write) -> bytes:
    event = b"" if name is None else f"event: {name}\n".encode()
    return event + b"data: " + (data.encode() if isinstance(data, str) else write(data)) + b"\n\n"
