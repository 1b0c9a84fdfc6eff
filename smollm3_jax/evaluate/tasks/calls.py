"""Whether calls of functions are those that were asked for, as the Berkeley Function-Calling Leaderboard (BFCL) judges
calls of Python functions: by name, number, types and values, of which a question may allow several.

A function is BFCL's: {"name", "parameters": {"properties": {name: {"type", "items": {"type"}}}, "required": [...]}}.
What is wanted of a call is {name: {parameter: [a value, another, ...]}}, where "" says that it may be left out.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

# BFCL's names of types -> Python's.
TYPES: dict[str, type] = {"string": str, "integer": int, "float": float, "number": float, "boolean": bool, "any": str}
TYPES |= {"array": list, "list": list, "tuple": list, "dict": dict, "object": dict}

Call = tuple[str, Mapping[str, Any]]
Wanted = Mapping[str, Mapping[str, Sequence[Any]]]


def problem(functions: Sequence[Mapping[str, Any]], calls: Sequence[Call], wanted: Sequence[Wanted]) -> str | None:
    """What is wrong with the calls, or None; in any order."""
    if len(calls) != len(wanted):
        return f"{len(calls)} calls, not {len(wanted)}"
    left = list(calls)
    for one in wanted:
        ((name, values),) = one.items()
        function = next(function for function in functions if function["name"] == name)
        found = [_problem_of_one(function, call, values) for call in left]
        if None not in found:
            return found[0] if len(wanted) == 1 else f"no call is the one of {name} that is asked for"
        del left[found.index(None)]
    return None


def _problem_of_one(function: Mapping[str, Any], call: Call, values: Mapping[str, Sequence[Any]]) -> str | None:
    name, arguments = call
    schema = function["parameters"]
    if name != function["name"]:
        return f"a call of {name}, not of {function['name']}"
    for parameter in schema.get("required", ()):
        if parameter not in arguments:
            return f"{parameter} is required"
    for parameter, value in arguments.items():
        if parameter not in schema["properties"] or parameter not in values:
            return f"{parameter} is no parameter that is asked for"
        if not _is_one_of(value, values[parameter], schema["properties"][parameter]):
            return f"{parameter} is {value!r:.100}, none of {list(values[parameter])!r:.300}"
    for parameter, options in values.items():
        if parameter not in arguments and "" not in options:
            return f"{parameter} is asked for"
    return None


def _is_one_of(value: Any, options: Sequence[Any], schema: Mapping[str, Any]) -> bool:
    """Whether a value has its type, and is one of those that are allowed."""
    kind = TYPES.get(schema["type"], str)
    inner = TYPES.get(schema.get("items", {}).get("type", "")) if kind is list else None
    if kind is float and type(value) is int:
        value = float(value)
    # An answer of another type than the function's stands for a variable by its name: such a value equals it as it is.
    said = next((type(option) for option in options if option != ""), None)
    if type(value) is not kind:
        return said is type(value) and value in options
    if inner is not None and not any(_are(inner, value, option) for option in options):
        return False
    if said is not None and said is not kind:
        return value in options
    if kind is dict:
        return any(_same_fields(value, option) for option in options if option != "")
    if kind is list and inner is dict:
        return any(
            len(value) == len(option) and all(map(_same_fields, value, option)) for option in options if option != ""
        )
    return _plain(value) in [_plain(option) for option in options if type(option) is kind]


def _are(kind: type, values: Sequence[Any], option: Any) -> bool:
    """Whether all values of a list are of a type, or of that which the option's have."""
    if type(option) is not list:
        return True
    said = next((type(one) for one in option if one != ""), None)
    return all(type(value) is kind or type(value) is said for value in values)


def _same_fields(value: Mapping[str, Any], option: Mapping[str, Sequence[Any]]) -> bool:
    """An object, of whose fields each has several values that are allowed."""
    if type(value) is not dict or any(name not in option for name in value):
        return False
    if any(_plain(one) not in list(map(_plain, option[name])) for name, one in value.items()):
        return False
    return all(name in value or "" in allowed for name, allowed in option.items())


def _plain(value: Any) -> Any:
    """A text without what does not matter: case, spaces and some punctuation, in lists too."""
    if type(value) is list:
        return [_plain(one) if type(one) is str else one for one in value]
    return re.sub(r"[ ,./\-_*^]", "", value).lower().replace("'", '"') if type(value) is str else value
