"""Reads the fields of a JSON body, each once and with its type; what nobody reads is refused by name."""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from ..errors import unknown_name
from ..nesting import check_depth
from .errors import ApiError, bad

HUGE = 10**20  # whole numbers of more digits are refused
_HALF = re.compile("[\ud800-\udfff]")
WORDS = {str: "a string", bool: "true or false", int: "a whole number", float: "a number", list: "a list"}
WORDS |= {dict: "an object"}


def check_json(body: Any) -> dict[str, Any]:
    """The body, if it is an object that can be walked through and written again.

    Raises:
      ApiError, OptionError: it is none, is nested too deep, or holds NaN, infinity or half of a surrogate pair.
    """
    if not isinstance(body, dict):
        raise bad(f"the body is {WORDS.get(type(body), 'no JSON object')}; it must be a JSON object")
    for name, value in body.items():
        check_depth(value, f"{name!r:.60}")
        left = [name, value]
        while left:
            item = left.pop()
            if isinstance(item, dict):
                left += [*item.keys(), *item.values()]
            elif isinstance(item, list):
                left += item
            elif isinstance(item, float) and not math.isfinite(item):
                raise bad(f"{name!r:.60} holds {item}, which is no JSON number", name)
            elif isinstance(item, str) and not is_unicode(item):
                raise bad(f"{name!r:.60} holds half of a surrogate pair, which is no Unicode text", name)
    return body


def is_unicode(text: str) -> bool:
    """Whether a text is whole characters."""
    return text.isascii() or not _HALF.search(text)


class Fields:
    """An object of a body, and which of its fields nobody has read; for those that are, null is as not there.

    Args:
      where: its path in the body; "" is the body itself.
    """

    def __init__(self, value: object, where: str = ""):
        if not isinstance(value, dict):
            raise bad(f"{where} is {shown(value)}; it must be an object", where)
        self.where = where
        self._fields = {name: inner for name, inner in value.items() if inner is not None}
        self._names, self._known, self._refused = list(value), list[str](), set[str]()

    def path(self, name: str) -> str:
        return f"{self.where}.{name}" if self.where else name

    def error(self, name: str, must: str) -> ApiError:
        """The field is not what it must be."""
        return bad(f"{self.path(name)} is {shown(self._fields.get(name))}; it must be {must}", self.path(name))

    def has(self, name: str) -> bool:
        return name in self._fields

    def take(self, name: str, kind: type, default: Any = None, must: str | None = None) -> Any:
        """A field's value, of this type; a whole number is a number, too, and true is none.

        Args:
          must: what it must be, in words; None is the type.
        """
        self._known.append(name)
        if name not in self._fields:
            return default
        value = self._fields[name]
        if kind is int and isinstance(value, float) and value.is_integer():
            value = int(value)  # JSON has one kind of numbers
        fits = isinstance(value, int | float if kind is float else kind) and (
            kind is bool or not isinstance(value, bool)
        )
        if not fits or (isinstance(value, int) and abs(value) >= HUGE):
            raise self.error(name, must or WORDS[kind])
        return value

    def any(self, name: str) -> Any:
        """A field's value, of any type."""
        self._known.append(name)
        return self._fields.get(name)

    def choice(self, name: str, choices: Iterable[str], default: str) -> str:
        choices = list(choices)
        value = self.take(name, str, default, f"one of {', '.join(choices)}")
        if value not in choices:
            raise self.error(name, f"one of {', '.join(choices)}")
        return value

    def object(self, name: str) -> "Fields | None":
        """A field that is an object."""
        self._known.append(name)
        return Fields(self._fields[name], self.path(name)) if name in self._fields else None

    def ignore(self, *names: str) -> None:
        """Fields that make no difference to the answer."""
        self._known += names

    def refuse(self, reasons: Mapping[str, str]) -> None:
        """Fields that would make a difference, but are not done here; their values that ask for nothing pass."""
        self._refused |= reasons.keys()
        for name, reason in reasons.items():
            value = self.any(name)
            if value is not None and value is not False and value not in ([], {}, ""):
                raise bad(f"{self.path(name)} is not supported: {reason}", self.path(name), "unsupported_parameter")

    def finish(self, elsewhere: Mapping[str, str] | None = None) -> None:
        """Refuses what was not read.

        Args:
          elsewhere: what others call a field -> what it is here.
        """
        for name in self._names:
            if name not in self._known:
                known = sorted(set(self._known) - self._refused)
                error = unknown_name(self.where or "the body", name[:60], known, elsewhere or {}, "field")
                raise bad(str(error), self.path(name), "unknown_parameter")


def shown(value: Any) -> str:
    """A value as errors quote it."""
    if isinstance(value, dict | list):
        return WORDS[type(value)]
    if isinstance(value, int) and abs(value) >= HUGE:
        return "a number of more than 20 digits"
    return f"{value!r:.60}"
