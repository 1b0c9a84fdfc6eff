"""Schemas against transformers, arguments that models write, and files that are no tools."""

import enum
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Optional

import pytest

from smollm3_jax.chat.tools import load_tools, prepare, schema
from smollm3_jax.errors import OptionError


class Unit(enum.Enum):
    CELSIUS = "C"
    FAHRENHEIT = "F"


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 2


def weather(city: str, days: int = 1, unit: Unit = Unit.CELSIUS) -> str:
    """The weather forecast of a city.

    It may be wrong.

    Args:
        city: its name,
            in English
        days: how many days: 1 to 7
        unit: of temperatures

    Returns:
        A sentence.
    """
    return f"{city} {days} {unit.name}"


def everything(
    a: str,
    b: float,
    c: bool,
    d: list[int],
    e: dict[str, list[float]],
    f: Optional[int],  # noqa: UP045
    g: Literal["x", "y"],
    h: Literal[1, "one", True],
    i: Level,
    *,
    j: list = [],  # noqa: B006
    k: "dict | None" = None,
    m: list[Literal["x"] | None] = [],  # noqa: B006
):
    """Takes everything.

    Args:
      a: 1
      b: 2
      c: 3
      d: 4
      e: 5
      f: 6
      g: 7
      h: 8
      i: 9
      j: 10
      k: 11
      m: 12
    """
    return [a, b, c, d, e, f, g, h, i, j, k, m]


def nothing() -> None:
    """Does nothing."""


TOOLS = {"weather": weather, "everything": everything, "nothing": nothing}


@pytest.mark.torch
@pytest.mark.slow
@pytest.mark.parametrize("name", TOOLS)
def test_schemas_are_those_of_transformers(name: str):
    theirs = pytest.importorskip("transformers").utils.get_json_schema(TOOLS[name])
    theirs["function"].pop("return", None)  # which the model's template has no words for
    assert schema(name, TOOLS[name]) == theirs


def test_a_schema():
    assert schema("weather", weather) == {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather forecast of a city.\n\nIt may be wrong.",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "description": "its name, in English"},
                    "days": {"type": "integer", "description": "how many days: 1 to 7"},
                    "unit": {"type": "string", "enum": ["C", "F"], "description": "of temperatures"},
                },
                "required": ["city"],
            },
        },
    }


def test_a_schema_without_a_docstring_has_what_the_signature_says():
    def bare(x: int | None, y: list[dict[str, bool]]):
        return x, y

    function = schema("bare", bare)["function"]
    assert function["description"] == ""
    assert function["parameters"]["properties"] == {
        "x": {"type": "integer", "nullable": True},
        "y": {"type": "array", "items": {"type": "object", "additionalProperties": {"type": "boolean"}}},
    }


@pytest.mark.parametrize(
    ("arguments", "result"),
    [
        ({"city": "Rome"}, "Rome 1 CELSIUS"),
        ({"city": "Rome", "days": 3, "unit": "F"}, "Rome 3 FAHRENHEIT"),
        ({"city": "Rome", "days": 3.0}, "Rome 3 CELSIUS"),
        ({"0": "Rome", "1": 2}, "Rome 2 CELSIUS"),
    ],
)
def test_a_call(arguments: dict[str, Any], result: str):
    assert prepare(TOOLS, "weather", arguments)() == result


def test_arguments_of_all_types_arrive():
    given = {"a": "", "b": 2, "c": True, "d": [1, 2], "e": {"x": [1]}, "f": None, "g": "y", "h": 1, "i": 2}
    given |= {"j": [None, "x"], "k": {"y": 1}, "m": ["x", None]}
    result = json.loads(prepare(TOOLS, "everything", given)())
    assert result == list(given.values())
    assert repr(result[1]) == "2.0" and repr(result[4]["x"]) == "[1.0]"


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("wether", {}, "no function wether; choose one of weather, everything, nothing"),
        ("weather", {}, "city must be given"),
        ("weather", {"city": "Rome", "when": 1}, "no parameter when; it has city, days, unit"),
        ("nothing", {"x": 1}, "no parameter x; it has none"),
        ("weather", {"city": "Rome", "0": "Oslo"}, "city is given twice"),
        ("weather", {"city": "Rome", "9": "Oslo"}, "no parameter 9"),
        ("weather", {"city": 3}, 'city must be {"type": "string"}, not 3'),
        ("weather", {"city": None}, "not null"),
        ("weather", {"city": "Rome", "days": "3"}, 'days must be {"type": "integer"}, not "3"'),
        ("weather", {"city": "Rome", "days": 3.5}, "not 3.5"),
        ("weather", {"city": "Rome", "days": True}, "not true"),
        ("weather", {"city": "Rome", "unit": "K"}, r'unit must be .*"enum": \["C", "F"\]'),
        ("everything", {"b": 10**400}, "b must be"),
        ("everything", {"b": "1"}, "b must be"),
        ("everything", {"c": 1}, "c must be"),
        ("everything", {"d": 1}, "d must be"),
        ("everything", {"d": [1, "2"]}, r"d\[1\] must be"),
        ("everything", {"e": []}, "e must be"),
        ("everything", {"e": {"x": [None]}}, r"e\.x\[0\] must be"),
        ("everything", {"f": "x"}, 'f must be {"type": "integer"}'),
        ("everything", {"g": "z"}, "g must be"),
        ("everything", {"h": 1.0}, "h must be"),
        ("everything", {"i": True}, "i must be"),
        ("everything", {"m": ["y"]}, r"m\[0\] must be"),
    ],
)
def test_the_model_is_told_what_is_wrong(name: str, arguments: dict[str, Any], words: str):
    with pytest.raises(ValueError, match=words):
        prepare(TOOLS, name, arguments)


def raises(error: BaseException) -> Callable[..., Any]:
    def function():
        raise error

    return function


@pytest.mark.parametrize(
    ("function", "text"),
    [
        (lambda: "as it is", "as it is"),
        (lambda: {"t": 21, "sky": "blå"}, '{"t": 21, "sky": "blå"}'),
        (lambda: None, "null"),
        (lambda: [Path("/a")], '["/a"]'),
        (lambda: "\ud800", "?"),
        (raises(KeyError("Rome")), "error: KeyError: 'Rome'"),
        (raises(SystemExit(3)), "error: SystemExit: 3"),
        (lambda: (loop := [], loop.append(loop))[0], "error: ValueError: Circular reference detected"),
    ],
)
def test_results_and_failures_are_text(function: Callable[..., Any], text: str):
    assert prepare({"f": function}, "f", {})() == text


def test_a_stopped_tool_is_no_result():
    with pytest.raises(KeyboardInterrupt):
        prepare({"f": raises(KeyboardInterrupt())}, "f", {})()


def write(folder: Path, source: str) -> Path:
    path = folder / "tools.py"
    path.write_text(source, encoding="utf-8")
    return path


def test_the_public_functions_of_a_file_are_the_tools(tmp_path: Path):
    source = """
from __future__ import annotations
import functools
from dataclasses import dataclass
from os.path import join
@dataclass
class Place:
    name: str
def logged(function):
    @functools.wraps(function)
    def inner(*args, **kwargs):
        return function(*args, **kwargs)
    return inner
del logged.__annotations__
_log = logged
del logged
@_log
def get(name: str) -> str:
    return Place(name).name + _suffix()
def _suffix():
    return "!"
"""
    tools = load_tools(write(tmp_path, source))
    assert list(tools) == ["get"]
    assert prepare(tools, "get", {"name": "Rome"})() == "Rome!"


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("def f(:", "cannot be run as Python: SyntaxError.*line 1"),
        ("import nothing_of_this_name", "ModuleNotFoundError in line 1: .*nothing_of_this_name"),
        ("x = 1\nx / 0", "ZeroDivisionError in line 2"),
        ("raise SystemExit('no')", "SystemExit"),
        ("\0", "cannot be run"),
        ("x = 1\ndef _f(): pass\nfrom os.path import join", "defines no function"),
        ("def f(x): pass", "tools.py: f: the parameter x has no type hint"),
        ("def f(x: set[int]): pass", "f: the type hint of x is set.*; what a model can write is str, int, float"),
        ("def f(x: bytes): pass", "f: the type hint of x is bytes"),
        ("def f(x: int | str): pass", r"f: the type hint of x is .*int"),
        ("def f(x: dict[int, str]): pass", "f: the type hint of x is dict"),
        ("def f(x: list[bytes]): pass", "f: the type hint of x is bytes"),
        ("import enum\nclass E(enum.Enum):\n  A = (1, 2)\ndef f(x: E): pass", "f: the type hint of x is E"),
        ("import enum\nclass E(enum.Enum):\n  A = []\ndef f(x: E): pass", "f: the type hint of x is E"),
        ("def f(x: 'Nope'): pass", "f: its type hints cannot be read: .*Nope"),
        ("def f(*x: int): pass", r"f: the parameter \*x: int cannot be given by name"),
        ("def f(**x: int): pass", r"f: the parameter \*\*x: int cannot"),
        ("def f(x: int, /): pass", "f: the parameter x: int cannot"),
        ("async def f(): pass", "f is a coroutine or generator"),
        ("def f():\n  yield 1", "f is a coroutine or generator"),
    ],
)
def test_files_that_cannot_be_tools(tmp_path: Path, source: str, words: str):
    with pytest.raises(OptionError, match=words) as error:
        load_tools(write(tmp_path, source))
    assert "tools.py" in str(error.value)


def test_a_file_that_is_not_there(tmp_path: Path):
    with pytest.raises(OptionError, match=r"nowhere\.py is not there"):
        load_tools(tmp_path / "nowhere.py")
