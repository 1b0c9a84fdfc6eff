"""Splits the text that the model writes into thinking, text and tool calls, while it is still writing.

What SmolLM3 writes is thinking, text, and calls in JSON or in Python:

    <think>
    The user wants ...
    </think>
    Let me look.
    <tool_call>
    {"name": "get_weather", "arguments": {"city": "Copenhagen"}}
    </tool_call>
    <code>get_weather(city="Copenhagen")</code>

A model can write anything, so nothing here fails: a call that cannot be understood is text with a reason. The
first closing tag ends a block, even within a string; until then all other tags are part of it. Think blocks and
calls may come anywhere and in any number.

Nothing is lost. The thinking, the text and the markup of the calls, in order, are what the model wrote, but for
the think tags and this whitespace: one newline after <think> and one before </think>; the newlines after </think>;
one newline before a call; and whitespace with nothing but calls, think blocks and the ends of the answer around it.
So `parse` undoes what `template.normalize` writes, where no text has a tag in it. The events, joined, do not depend
on how the text was cut into pieces, and the work is proportional to its length.
"""

import ast
import functools
import json
import re
import threading
import warnings
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

MAX_CALL = 1 << 20  # characters between the tags of a call; the model's context holds fewer, so longer is text
MAX_DEPTH = 100  # levels of objects and lists in a call, few enough for recursion in whatever handles it next


@dataclass(frozen=True)
class Thinking:
    """A piece of what the model wrote between <think> and </think>."""

    text: str


@dataclass(frozen=True)
class Text:
    """A piece of the answer, or with a reason the whole markup of a call that is none."""

    text: str
    reason: str | None = None


@dataclass(frozen=True)
class ToolCall:
    """A call with arguments that JSON can hold; a positional one of Python code is named by its place, "0", "1", ..."""

    name: str
    arguments: dict[str, Any]
    # What the model wrote, for who has no such tool; of several calls in one block the first has all of it.
    markup: str = field(default="", compare=False, repr=False)


Event = Thinking | Text | ToolCall


@dataclass(frozen=True)
class Message:
    """A whole answer; `problems` are the reasons for which parts of the text are not calls."""

    thinking: str
    text: str
    tool_calls: tuple[ToolCall, ...]
    problems: tuple[str, ...]


def parse(text: str, thinking: bool = False) -> Message:
    """A whole answer at once; see `Parser`."""
    parser = Parser(thinking)
    events = parser.feed(text) + parser.finish()
    return Message(
        thinking="".join(event.text for event in events if isinstance(event, Thinking)),
        text="".join(event.text for event in events if isinstance(event, Text)),
        tool_calls=tuple(event for event in events if isinstance(event, ToolCall)),
        problems=tuple(event.reason for event in events if isinstance(event, Text) and event.reason),
    )


CALLS = ("<tool_call>", "<code>")  # the tags that open one
_LONGEST = len("</tool_call>")


class Parser:
    """Takes an answer piece by piece; each piece of text comes out as soon as it cannot be part of a tag.

    Args:
      thinking: the prompt ended with <think>, so the answer begins within the block.
      calls: the tags that open a call; all else is text. Who offers no tools expects no calls.
      names: of the functions that can be called, None for any; a block with a call of another one is text.
      thinks: <think> opens a block; without it, as for a model that has no such token, it is text.
      one_text: from its first letter on the answer is text, whatever tags are in it, as in a string of JSON.
    """

    def __init__(
        self,
        thinking: bool = False,
        calls: Sequence[str] = CALLS,
        *,
        names: Container[str] | None = None,
        thinks: bool = True,
        one_text: bool = False,
    ):
        opening = ("<think>", *calls) if thinks else tuple(calls)
        # The block that is open, by its tag, "" for none -> the tags that matter within it.
        self._tags = {"": opening} | {tag: (f"</{tag[1:]}",) for tag in ("<think>", *calls)}
        self._names, self._one_text = names, one_text
        self._tail = ""  # of what came in: perhaps the beginning of a tag
        self._enter("<think>" if thinking else "", trim=thinking)

    def feed(self, text: str) -> list[Event]:
        text, self._tail, at = self._tail + text, "", 0
        events: list[Event] = []
        while at < len(text):
            room = MAX_CALL - self._size if self._block in _READERS else len(text)
            # Only as far as a call may reach: a search to the end for each call would not be linear.
            match = _pattern(self._tags[self._block]).search(text, at, at + room + _LONGEST)
            end = match.start() if match else _unfinished_tag(text, at, self._tags[self._block])
            if end - at > room:
                events += self._take(text[at : at + room])
                events += self._refuse(f"the call is longer than {MAX_CALL} characters")
                at += room
                continue
            events += self._take(text[at:end])
            if self._one_text and not (self._block or self._blank) and self._tags[""]:
                self._tags[""], at = (), end
                continue
            if not match:
                self._tail = text[end:]
                break
            events += self._turn(match[0])
            at = match.end()
        return events

    def finish(self) -> list[Event]:
        """What was held back; after it the parser is ready for an answer that starts without thinking."""
        events = self._take(self._tail)
        if self._block in _READERS:
            events += self._refuse(f"the call has no </{self._block[1:]}")
        events += self._release()
        self._tail = ""
        self._enter("")
        return events

    def _enter(self, block: str, *, blank: bool = True, trim: bool = False) -> None:
        self._block = block
        self._blank = blank  # no text yet that counts
        self._trim = trim  # newlines that come now belong to the think tag
        self._held: list[str] = []  # whitespace that counts unless a tag comes
        self._markup: list[str] = []  # of the call that is open
        self._size = 0  # of the markup without its tag

    def _take(self, text: str) -> list[Event]:
        """Text without tags, in the block that is open."""
        if self._block in _READERS:
            self._markup.append(text)
            self._size += len(text)
            return []
        if self._trim:
            text = text.removeprefix("\n") if self._block else text.lstrip("\n")
            self._trim = not self._block and not text
        if not text:
            return []
        if self._blank and text.isspace() and not self._block:
            self._held.append(text)
            return []
        text = "".join([*self._held, text])
        shown = text.removesuffix("\n")
        self._held, self._blank = [text[len(shown) :]], False
        return [self._event(shown)] if shown else []

    def _turn(self, tag: str) -> list[Event]:
        """A tag, of those that matter in the block that is open."""
        if tag == "<think>":
            events = self._release()
            self._enter(tag, trim=True)
            return events
        if tag == "</think>":
            self._enter("", trim=True)
            return []
        if not self._block:
            self._block, self._markup = tag, [tag]  # and what is held waits for what the call turns out to be
            return []
        markup = "".join([*self._markup, tag])
        self._markup = [markup]
        try:
            calls = _READERS[self._block](markup[len(self._block) : -len(tag)])
        except (RecursionError, MemoryError):
            return self._refuse(f"the call is nested deeper than {MAX_DEPTH} levels")
        except (json.JSONDecodeError, SyntaxError) as error:
            return self._refuse(f"the call cannot be read: {error.msg}")
        except Exception as error:  # what a model writes can fail in every way there is
            return self._refuse(str(error) or type(error).__name__)
        if self._names is not None and (unknown := [name for name, _ in calls if name not in self._names]):
            return self._refuse(f"there is no function {unknown[0]!r:.60}")
        self._enter("")
        return [ToolCall(name, arguments, "" if i else markup) for i, (name, arguments) in enumerate(calls)]

    def _refuse(self, reason: str) -> list[Event]:
        """The call that is open is text after all, and so is the whitespace before it."""
        before, markup = "".join(self._held), "".join(self._markup)
        self._enter("", blank=False)
        return [*([Text(before)] if before else []), Text(markup, reason)]

    def _release(self) -> list[Event]:
        """What was held in case of a tag that did not come."""
        held = "".join(self._held)
        return [self._event(held)] if held and not self._blank else []

    def _event(self, text: str) -> Event:
        return Thinking(text) if self._block else Text(text)


@functools.cache
def _pattern(tags: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(tags) or "(?!)")


def _unfinished_tag(text: str, at: int, tags: Iterable[str]) -> int:
    """Where the beginning of a tag ends the text; its length if nothing there is one."""
    start = text.rfind("<", max(at, len(text) - _LONGEST + 1))
    return start if start >= 0 and any(tag.startswith(text[start:]) for tag in tags) else len(text)


_Call = tuple[str, dict[str, Any]]
ARGUMENTS = ("arguments", "parameters", "args", "input")


def _read_json(payload: str) -> list[_Call]:
    call = _load(payload)
    if not isinstance(call, dict):
        raise ValueError("the call is not a JSON object")
    name, arguments = read_call(call)
    if isinstance(arguments, str) and arguments:
        arguments = _load(arguments)
    arguments = {} if arguments in (None, "") else arguments  # as in `template.normalize`
    if not isinstance(arguments, dict):
        raise ValueError("the arguments are not a JSON object")
    return [(name, arguments)]


def read_call(call: Mapping[str, Any]) -> tuple[str, Any]:
    """The name and the arguments, as they are, of a call in any spelling; None for arguments that are not there.

    Models write "parameters", "args" and "input" for "arguments", and may put both into "function", as OpenAI does.

    Raises:
      ValueError: it has no name, arguments twice, or a key that nobody knows: it would be lost, and a function with a
        default in its place would answer another question.
    """
    function = call.get("function")
    if isinstance(function, Mapping) and not {"name", *ARGUMENTS} & call.keys():
        known, outer, call = {"name", *ARGUMENTS}, call.keys() - {"function", "id", "type", "index"}, function
    else:
        known, outer = {"name", "id", "type", *ARGUMENTS}, set()
    name = call.get("name")
    if not isinstance(name, str) or not name:
        raise ValueError("the call has no name, or one that is not a string")
    if unknown := sorted(map(str, (call.keys() - known) | outer)):
        raise ValueError(f"the call has {unknown[0]!r:.60}, which is neither its name nor its arguments")
    given = [key for key in ARGUMENTS if key in call]
    if any(call[key] != call[given[0]] for key in given):
        raise ValueError(f"the call has {' and '.join(given)}, which differ")
    return name, call[given[0]] if given else None


def _load(source: str) -> Any:
    """A JSON value that can be written as JSON in UTF-8 again, which NaN and half of a surrogate pair cannot."""
    # Not strict: models write line breaks into strings as they are, and what is meant is clear.
    value = json.loads(source, object_pairs_hook=_unique, strict=False)
    depth, level = 0, [value]
    while level := [inner for inner in level if isinstance(inner, dict | list)]:
        depth += 1
        if depth > MAX_DEPTH:
            raise RecursionError
        level = [child for inner in level for child in (inner.values() if isinstance(inner, dict) else inner)]
    json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    return value


def _unique(pairs: Iterable[tuple[Any, Any]]) -> dict[Any, Any]:
    """Refuses a key that is there twice: which of its values is meant, nobody knows."""
    found: dict[Any, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"{key!r:.60} is there twice")
        found[key] = value
    return found


_warnings = threading.Lock()  # their filters are global; two threads could restore each other's


def signature(code: str) -> tuple[str, list[str]] | None:
    """The name of a Python function and of its parameters, from `def` and what follows it; None of anything else."""
    head = code.strip()[:MAX_CALL]
    for source in (head, f"{head.removesuffix(':')}: ..."):
        try:
            match _statements(source):
                case [ast.FunctionDef(name, parameters)]:
                    return name, [p.arg for p in (*parameters.posonlyargs, *parameters.args, *parameters.kwonlyargs)]
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            continue
    return None


def _statements(code: str) -> list[ast.stmt]:
    with _warnings, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about others' code, such as "\d" in a string
        return ast.parse(code).body


def _read_python(payload: str) -> list[_Call]:
    statements = _statements(payload.strip())
    if not statements:
        raise ValueError("the code has no call")
    calls = [_python_call(statement) for statement in statements]
    arguments = _load(json.dumps([arguments for _, arguments in calls]))  # all at once, which is far quicker
    return [(name, portable) for (name, _), portable in zip(calls, arguments, strict=True)]


def _python_call(statement: ast.stmt) -> _Call:
    match statement:
        case ast.Expr(ast.Call(ast.Name(name), positional, keywords)) if all(k.arg for k in keywords):
            pairs = [(str(i), value) for i, value in enumerate(positional)] + [(k.arg, k.value) for k in keywords]
            return name, _unique((key, _literal(value)) for key, value in pairs)
    raise ValueError("the code is more than calls of functions")


def _literal(node: ast.expr | None) -> Any:
    match node:
        case ast.Constant(value):
            return value
        case ast.UnaryOp(ast.USub(), ast.Constant(int() | float() as value)):
            return -value
        case ast.List(items) | ast.Tuple(items):
            return [_literal(item) for item in items]
        case ast.Dict(keys, values):
            return _unique(zip(map(_literal, keys), map(_literal, values), strict=True))
    raise ValueError("an argument is not a literal")


_READERS = {"<tool_call>": _read_json, "<code>": _read_python}
