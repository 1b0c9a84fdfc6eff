"""Python functions as tools: the JSON schemas that a model reads, and the calls that it writes.

A function is described by its signature and its docstring:

    def get_weather(city: str, days: int = 1) -> str:
        \"\"\"The weather forecast of a city.

        Args:
          city: its name, in English
          days: how many days ahead
        \"\"\"
"""

import enum
import importlib.util
import inspect
import json
import re
import sys
import traceback
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from ..errors import OptionError
from ..paths import user_path
from ..reading import read_file

MOST_BYTES = 2**26  # of a file of functions
Tools = Mapping[str, Callable[..., Any]]

_SCALARS = {str: "string", int: "integer", float: "number", bool: "boolean"}
_SUPPORTED = (
    "str, int, float, bool, list[...], dict[str, ...], Optional, Literal and enums of texts and numbers; "
    "a function whose name begins with _ is no tool"
)

# What ends a docstring's description of the function itself.
_SECTION = re.compile(r"^(Args|Arguments|Returns|Yields|Raises|Examples?):[ \t]*$", re.MULTILINE)


def load_tools(path: str | Path) -> dict[str, Callable[..., Any]]:
    """The public functions that a Python file defines, by name; running the file is what importing does.

    Raises:
      OptionError: the file fails, has no such function, or one that cannot be described to a model.
    """
    path = user_path(path)
    if not path.is_file():
        raise OptionError(f"{path} is not there; tools are the functions of a Python file")
    spec = importlib.util.spec_from_loader("smollm3_tools", None, origin=str(path))
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    module.__file__ = str(path)
    sys.modules[spec.name] = module  # where dataclasses and pickle look for what it defines
    try:
        exec(compile(read_file(path, MOST_BYTES), str(path), "exec", dont_inherit=True), module.__dict__)
    except (Exception, SystemExit) as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        line = f" in line {lines[-1]}" if lines else ""
        raise OptionError(f"{path} cannot be run as Python: {type(error).__name__}{line}: {error}") from None
    found = {
        name: value
        for name, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == module.__name__ and not name.startswith("_")
    }
    if not found:
        raise OptionError(f"{path} defines no function whose name does not begin with _")
    for name, function in found.items():
        try:
            schema(name, function)
        except OptionError as error:
            raise OptionError(f"{path}: {error}") from None
    return found


def schema(name: str, function: Callable[..., Any]) -> dict[str, Any]:
    """What a model reads about a function, in OpenAI's form.

    Raises:
      OptionError: a parameter that JSON cannot express, by name.
    """
    if inspect.iscoroutinefunction(function) or inspect.isgeneratorfunction(function):
        raise OptionError(f"{name} is a coroutine or generator; a tool is a plain function")
    description, notes = _docstring(inspect.getdoc(function) or "")
    properties = {}
    for parameter, hint in _hints(name, function).items():
        properties[parameter] = _describe(hint, f"{name}: the type hint of {parameter}")
        if parameter in notes:
            properties[parameter]["description"] = notes[parameter]
    required = [p.name for p in inspect.signature(function).parameters.values() if p.default is p.empty]
    parameters = {"type": "object", "properties": properties} | ({"required": required} if required else {})
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


def prepare(tools: Tools, name: str, arguments: Mapping[str, Any]) -> Callable[[], str]:
    """A call that a model wrote, ready to run: checked against the function's signature.

    Raises:
      ValueError: saying to the model what is wrong with the call.
    """
    if name not in tools:
        raise ValueError(f"there is no function {name}; choose one of {', '.join(tools)}")
    function = tools[name]
    hints, parameters = _hints(name, function), inspect.signature(function).parameters
    given: dict[str, Any] = {}
    for key, value in arguments.items():
        # Python code may name an argument by its place, which reads "0", "1", ... here.
        parameter = list(hints)[int(key)] if key.isdecimal() and int(key) < len(hints) else key
        if parameter not in hints:
            raise ValueError(f"{name} has no parameter {key}; it has {', '.join(hints) or 'none'}")
        if parameter in given:
            raise ValueError(f"{name}: {parameter} is given twice")
        given[parameter] = _convert(hints[parameter], value, f"{name}: {parameter}")
    if missing := [p.name for p in parameters.values() if p.default is p.empty and p.name not in given]:
        raise ValueError(f"{name}: {', '.join(missing)} must be given")
    return lambda: _run(function, given)


def _run(function: Callable[..., Any], arguments: Mapping[str, Any]) -> str:
    """The result as text: itself, JSON, or what went wrong."""
    try:
        result = function(**arguments)
        text = result if isinstance(result, str) else json.dumps(result, ensure_ascii=False, default=str)
    except (Exception, SystemExit) as error:
        text = f"error: {type(error).__name__}: {error}"
    return text.encode(errors="replace").decode()  # half a surrogate pair is no text


def _hints(name: str, function: Callable[..., Any]) -> dict[str, Any]:
    """Parameter -> type."""
    try:
        hints = typing.get_type_hints(function)
    except Exception as error:  # hints may be code in quotes
        raise OptionError(f"{name}: its type hints cannot be read: {error}") from None
    found = {}
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise OptionError(f"{name}: the parameter {parameter} cannot be given by name, which is how a model calls")
        if parameter.name not in hints:
            raise OptionError(f"{name}: the parameter {parameter.name} has no type hint; give it one: {_SUPPORTED}")
        found[parameter.name] = hints[parameter.name]
    return found


def _describe(hint: Any, where: str) -> dict[str, Any]:
    """A type as JSON schema, as transformers writes it."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if choices := _choices(hint):
        values = [written for written, _ in choices]
        kinds = list(dict.fromkeys(_SCALARS.get(type(value), "") for value in values))
        if all(kinds):
            return {"type": kinds[0] if len(kinds) == 1 else kinds, "enum": values}
    elif isinstance(hint, type) and hint in _SCALARS:
        return {"type": _SCALARS[hint]}
    elif (some := _optional(hint)) is not None:
        return _describe(some, where) | {"nullable": True}
    elif (origin or hint) is list:
        return {"type": "array"} | ({"items": _describe(inner[0], where)} if inner else {})
    elif (origin or hint) is dict and (not inner or inner[0] is str):
        return {"type": "object"} | ({"additionalProperties": _describe(inner[1], where)} if inner else {})
    written = hint.__name__ if isinstance(hint, type) else hint
    raise OptionError(f"{where} is {written}; what a model can write is {_SUPPORTED}")


def _convert(hint: Any, value: Any, where: str) -> Any:
    """A JSON value as the type that a function expects."""
    inner = typing.get_args(hint)
    if choices := _choices(hint):
        for written, meant in choices:
            if written == value and type(written) is type(value):
                return meant
    elif (some := _optional(hint)) is not None:
        return None if value is None else _convert(some, value, where)
    elif isinstance(value, list) and (typing.get_origin(hint) or hint) is list:
        return [_convert(inner[0], item, f"{where}[{i}]") for i, item in enumerate(value)] if inner else value
    elif isinstance(value, dict) and (typing.get_origin(hint) or hint) is dict:
        return {key: _convert(inner[1], item, f"{where}.{key}") for key, item in value.items()} if inner else value
    elif type(value) is hint:
        return value
    elif hint is float and type(value) is int and abs(value) < 2**1000:
        return float(value)
    elif hint is int and type(value) is float and value.is_integer():
        return int(value)
    expected = json.dumps(_describe(hint, where), ensure_ascii=False)
    raise ValueError(f"{where} must be {expected}, not {json.dumps(value, ensure_ascii=False)}")


def _choices(hint: Any) -> list[tuple[Any, Any]]:
    """(what may be written, what the function gets) for each value of a Literal or an enum; else nothing."""
    if typing.get_origin(hint) is Literal:
        return [(value, value) for value in typing.get_args(hint)]
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return [(member.value, member) for member in hint]
    return []


def _optional(hint: Any) -> Any:
    """X for Optional[X], else None."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        inner = [part for part in typing.get_args(hint) if part is not type(None)]
        if len(inner) == 1:
            return inner[0]
    return None


def _docstring(text: str) -> tuple[str, dict[str, str]]:
    """What a docstring in Google's style says of the function, and of each parameter."""
    description, *sections = re.split(_SECTION, text)
    notes: dict[str, str] = {}
    for title, body in zip(sections[::2], sections[1::2], strict=True):
        if title not in ("Args", "Arguments"):
            continue
        indent, name = None, ""
        for line in filter(str.strip, body.split("\n")):
            depth = len(line) - len(line.lstrip())
            indent = depth if indent is None else indent
            entry = re.match(r"\s*\**(\w+)\s*(?:\([^)]*\))?:\s*(.*)", line) if depth <= indent else None
            if depth == 0:
                break
            if entry:
                name, line = entry[1], entry[2]
            notes[name] = f"{notes[name]} {line.strip()}" if name in notes else line.strip()
    return description.strip(), notes
