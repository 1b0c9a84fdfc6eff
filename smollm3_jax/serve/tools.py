"""What a body says of tools: which there are, whether the model is to call them, and what of its calls is passed on."""

import dataclasses
import json
import re
from collections.abc import Mapping
from typing import Any

from ..chat.parse import ToolCall, signature
from ..errors import OptionError
from .errors import bad, from_option
from .fields import Fields, shown

MAX_TOOLS = 128
_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")

# What a model reads about tools whose template has no place for them; the form is that which SmolLM3's template gives.
HEAD = "You can call these functions. Their signatures, as JSON:\n\n<tools>\n"
FOOT = (
    '\n</tools>\n\nWrite each call as a JSON object within <tool_call></tool_call>:\n<tool_call>\n{"name": '
    '<function-name>, "arguments": <args-json-object>}\n</tool_call>'
)


@dataclasses.dataclass(frozen=True)
class Tools:
    """functions: in the form of chat completions; choice: auto, none, required, or "function": the one of this name."""

    functions: list[dict[str, Any]]
    choice: str
    name: str | None
    parallel: bool

    @property
    def shown(self) -> list[dict[str, Any]]:
        """Those that the model is told of: where it may not call any, none."""
        return [] if self.choice == "none" else self.functions

    @property
    def forced(self) -> bool:
        """Whether the answer must be calls."""
        return self.choice in ("required", "function")

    def grammar(self) -> str:
        """What a forced answer must be.

        Raises:
          ApiError: parameters of a function that cannot be kept.
        """
        from ..generation import grammar

        names = None if self.name is None else [self.name]
        try:
            return grammar.tool_calls(self.functions, names=names, parallel=self.parallel, style="xml")
        except OptionError as error:
            raise from_option(error, "tools") from None

    def as_text(self) -> str:
        """The tools in words, for a system message."""
        return HEAD + "\n".join(json.dumps(tool, ensure_ascii=False) for tool in self.functions) + FOOT


def read_tools(fields: Fields, flat: bool = False) -> Tools:
    """The fields tools, tool_choice and parallel_tool_calls.

    Args:
      flat: in the form of responses, where a function's name stands beside its type.
    """
    tools = fields.take("tools", list, [])
    if len(tools) > MAX_TOOLS:
        raise bad(f"tools has {len(tools)} entries; it may have {MAX_TOOLS}", "tools")
    functions = [_function(Fields(tool, f"tools[{i}]"), flat) for i, tool in enumerate(tools)]
    names = [tool["function"]["name"] for tool in functions]
    if len(set(names)) < len(names):
        raise bad("tools has two functions of one name", "tools")
    parallel = fields.take("parallel_tool_calls", bool, True)
    choice = fields.any("tool_choice")
    name = None
    if isinstance(choice, dict):
        choice, name = "function", _named(Fields(choice, "tool_choice"), flat, names)
    elif choice is not None and choice not in ("auto", "none", "required"):
        raise fields.error("tool_choice", "auto, none, required, or an object that names a function")
    if choice == "required" and not functions:
        raise bad("tool_choice is 'required', but tools has no function that could be called", "tool_choice")
    return Tools(functions, choice or "auto", name, parallel and name is None)


def _function(tool: Fields, flat: bool) -> dict[str, Any]:
    kind = tool.any("type")
    if kind != "function":
        raise tool.error("type", "'function': this server runs no tools of its own")
    function = tool if flat else tool.object("function")
    if function is None:
        raise bad(f"{tool.path('function')} is missing", tool.path("function"))
    name = function.take("name", str)
    if name is None or not _NAME.fullmatch(name):
        raise function.error("name", "a name of 1 to 64 letters, digits, _ and -")
    found: dict[str, Any] = {"name": name}
    for field, of in (("description", str), ("parameters", dict)):
        value = function.take(field, of)
        found |= {} if value is None else {field: value}
    function.take("strict", bool)  # where calls are forced, they always keep to the schema
    function.finish()
    tool.finish()
    return {"type": "function", "function": found}


def _named(choice: Fields, flat: bool, names: list[str]) -> str:
    if choice.any("type") != "function":
        raise choice.error("type", "'function'")
    inner = choice if flat else choice.object("function")
    name = inner and inner.any("name")
    if inner is None or name not in names:
        where = (inner or choice).path("name")
        raise bad(f"{where} is {shown(name)}; it must be one of the functions of tools", "tool_choice")
    inner.finish()
    choice.finish()
    return name


def parameters_of(tools: list[Any]) -> dict[str, list[str]] | None:
    """Name -> names of parameters, of functions in any form that a template takes; None if one has no known name."""
    found = {}
    for tool in tools:
        if isinstance(tool, str) and (named := signature(tool)):
            found[named[0]] = named[1]
            continue
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            return None
        schema = function.get("parameters")
        properties = schema.get("properties") if isinstance(schema, Mapping) else None
        found[function["name"]] = list(properties) if isinstance(properties, Mapping) else []
    return found


def with_names(call: ToolCall, parameters: list[str]) -> dict[str, Any]:
    """A call's arguments, those that Python code gives by their place under the parameters' names."""
    places = {str(i): name for i, name in enumerate(parameters)}
    named = {places.get(key, key): value for key, value in call.arguments.items()}
    return named if len(named) == len(call.arguments) else call.arguments
