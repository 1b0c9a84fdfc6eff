"""Settings from TOML files, recipes and `section.key=value` words."""

import dataclasses
import difflib
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from ..errors import OptionError
from ..reading import read_file, why
from ..text_files import decode
from .settings import Settings, check

SHIPPED = "recipe:"  # begins the path of a file that the package ships with its recipes
RECIPES = Path(__file__).parent / "recipes"
MOST_BYTES = 2**24  # of a file of settings
PLANNED = ("objective", "lora")  # the sections that change a step beside what `smollm3 plan train` has options for

T = TypeVar("T")


def recipes() -> dict[str, Path]:
    """Name -> file of every recipe that the package ships."""
    return {file.stem: file for file in sorted(RECIPES.glob("*.toml"))}


def read_settings(config: str, words: Sequence[str] = ()) -> Settings:
    """The settings of a TOML file or of a recipe by name, with `section.key=value` words over them.

    Raises:
      OptionError: no such file or recipe; an unknown section or key; a value of another type or out of range.
    """
    file = recipes().get(config, Path(config))
    try:
        table = tomllib.loads(decode(read_file(file, MOST_BYTES)))
    except (FileNotFoundError, NotADirectoryError):
        near = difflib.get_close_matches(config, recipes(), 1)
        meant = f"did you mean {near[0]}? " if near else ""
        raise OptionError(
            f"--config {config}: neither a file nor a recipe; {meant}recipes: {', '.join(recipes())}"
        ) from None
    except OSError as error:
        raise OptionError(f"--config {config} cannot be read: {why(error)}") from None
    except (ValueError, RecursionError) as error:  # ValueError: also half a character, a number of 5,000 digits
        raise OptionError(f"{file}: not TOML: {error}") from None
    _override_all(table, words)
    settings = parse(table, str(file))
    check(settings)
    if settings.data.path.startswith(SHIPPED):
        own = str(RECIPES / settings.data.path.removeprefix(SHIPPED))
        settings = dataclasses.replace(settings, data=dataclasses.replace(settings.data, path=own))
    return settings


def read_words(words: Sequence[str]) -> Settings:
    """The settings of `section.key=value` words of the sections PLANNED over the defaults, for a step without a run.

    Raises:
      OptionError: another section; or as of `read_settings`.
    """
    table: dict[str, Any] = {"run": {"dir": "plan", "steps": 1}, "model": {"path": "plan"}, "data": {"path": "plan"}}
    if others := [word for word in words if word.partition(".")[0] not in PLANNED]:
        sections = ", ".join(f"{name}.KEY=VALUE" for name in PLANNED)
        raise OptionError(f"{others[0]}: a plan takes {sections}; rows, mesh and the like are its options")
    _override_all(table, words)
    settings = parse(table)
    check(settings)
    return settings


def parse(table: Mapping[str, Any], where: str = "settings") -> Settings:
    """Settings from what TOML or `as_table` gives."""
    return _fill(Settings, table, where, "")


def _override_all(table: dict[str, Any], words: Sequence[str]) -> None:
    for word in words:
        _override(table, word)
        alone: dict[str, Any] = {}
        _override(alone, word)
        parse(alone, f"the setting {word[:200]}")  # a mistake in it is none of the file's


def _override(table: dict[str, Any], word: str) -> None:
    path, equals, text = word.partition("=")
    keys = path.split(".")
    if not equals:
        raise OptionError(f"{word!r} is no setting; write section.key=value")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        value = text  # a bare word is a string
    for key in keys[:-1]:
        table = table.setdefault(key, {})
        if not isinstance(table, dict):
            raise OptionError(f"{word!r}: {key} is no section")
    table[keys[-1]] = value


def _fill(kind: type[T], table: object, where: str, path: str) -> T:
    """A dataclass from a table of its fields."""
    if not isinstance(table, Mapping):
        raise OptionError(f"{where}: {path or 'the file'} must be a table")
    hints = typing.get_type_hints(kind)
    for key in table:
        if key not in hints:
            near = _meant(path, key, table[key], hints)
            meant = f"did you mean {near}?" if near else f"choose one of {', '.join(hints)}"
            raise OptionError(f"{where}: unknown {'key' if path else 'section'} {_join(path, key)}; {meant}")
    return kind(**{key: _value(hints[key], value, where, _join(path, key)) for key, value in table.items()})


def _value(hint: Any, value: Any, where: str, path: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return _fill(typing.cast(type, hint), value, where, path)
    if origin is dict and isinstance(value, Mapping):
        return {key: _value(arguments[1], x, where, _join(path, key)) for key, x in value.items()}
    if origin is tuple and isinstance(value, (list, tuple)):
        return tuple(_value(arguments[0], x, where, f"{path}[{i}]") for i, x in enumerate(value))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is hint:
        return value
    wanted = hint.__name__ if isinstance(hint, type) and not isinstance(hint, types.GenericAlias) else str(hint)
    raise OptionError(f"{where}: {path} = {value!r} must be of type {wanted}")


def _meant(path: str, key: str, value: object, hints: Mapping[str, Any]) -> str | None:
    """What may have been meant by a name that is not there: its namesake of another section, or one like it."""
    near = difflib.get_close_matches(key, hints, 1)
    wanted = next(iter(value), key) if not path and isinstance(value, Mapping) else key
    same = [name for name in _names(Settings) if name.rpartition(".")[2] == wanted]
    if same and not (near and wanted != key):  # runs.steps is rather run than run.steps
        return same[0]
    return _join(path, near[0]) if near else None


def _names(kind: Any, path: str = "") -> list[str]:
    """Of all settings that stand in sections: "run.steps", ..."""
    hints = typing.get_type_hints(kind)
    return [
        name
        for key, hint in hints.items()
        for name in (_names(hint, _join(path, key)) if dataclasses.is_dataclass(hint) else [_join(path, key)])
    ]


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key
