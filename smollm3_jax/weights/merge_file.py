"""What to merge, and how: mergekit's YAML, as far as whole models are merged."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..config import DTYPES
from ..config_file import MAX_JSON_BYTES
from ..errors import OptionError, unknown_name
from ..reading import read_file, why
from .stored import shown

# A number; a list of them, spread over the layers; or a list of {"filter": part of a tensor's name, "value": of these}.
Setting = float | list[Any] | None

# Method -> whether it sums differences from a base (then: elects signs, divides by the weights unless told otherwise).
METHODS = {
    "linear": None,
    "slerp": None,
    "ties": (True, True),
    "dare_ties": (True, False),
    "dare_linear": (False, False),
}
ALIASES = {"dare": "dare_linear"}  # its paper's
_KEYS = ("models", "merge_method", "base_model", "dtype", "out_dtype", "tokenizer_source", "parameters")
_OF_MODEL = ("weight", "density")
_OF_ALL = ("weight", "density", "t", "normalize", "rescale", "lambda", "int8_mask")
# What mergekit knows and this does not, and what to do.
_OTHERS = {
    "slices": "whole models are merged here; mergekit itself cuts them into slices",
    "modules": "whole models are merged here; mergekit itself cuts them into modules",
    "tokenizer": "tokenizer_source names the model whose tokenizer goes along",
    "chat_template": "the template goes with the tokenizer, of the model that tokenizer_source names",
}


@dataclasses.dataclass(frozen=True)
class Part:
    """One model of a merge, by a name as for `from_pretrained`; density: the share of its differences that stays."""

    model: str
    weight: Setting = None
    density: Setting = 1.0


@dataclasses.dataclass(frozen=True)
class Merge:
    """A merge as it was asked for.

    method: a key of METHODS. base: the model that differences are taken from, or that slerp begins at.
    t: slerp's. normalize: None is the method's own. dtype: of what is written; None is the first model's.
    tokenizer: the model whose tokenizer and templates go along; None is the base, or the first.
    """

    method: str
    parts: tuple[Part, ...]
    base: str | None = None
    t: Setting = None
    normalize: bool | None = None
    rescale: bool = True
    scale: float = 1.0
    dtype: str | None = None
    tokenizer: str | None = None

    @property
    def normalized(self) -> bool:
        """Whether sums are divided by the weights."""
        own = METHODS[self.method]
        return (own is None or own[1]) if self.normalize is None else self.normalize


def read_merge(path: str | Path) -> Merge:
    """The merge that a YAML file describes, in mergekit's words.

    Raises:
      OptionError: it cannot be read, has a key that is not known, or lacks one.
    """
    import yaml

    try:
        raw = yaml.safe_load(read_file(Path(path), MAX_JSON_BYTES))
    except OSError as error:
        raise OptionError(f"--config {path} cannot be read: {why(error)}") from None
    except (yaml.YAMLError, UnicodeError, RecursionError, ValueError) as error:
        raise OptionError(f"{path} is not YAML: {shown(error)}") from None
    table = _table(raw, str(path), _KEYS)
    shared = _table(table.get("parameters") or {}, "parameters", _OF_ALL)
    entries = table.get("models")
    if not isinstance(entries, list) or not entries:
        raise OptionError(f"{path}: models must be a list of tables, each with model and perhaps parameters")
    parts = []
    for entry in entries:
        entry = _table(entry, "an entry of models", ("model", "parameters"))
        own = _table(entry.get("parameters") or {}, "parameters of a model", _OF_MODEL)
        found = {key: own.get(key, shared.get(key)) for key in _OF_MODEL}
        parts.append(
            Part(_name(entry.get("model"), "models[].model"), **{k: x for k, x in found.items() if x is not None})
        )
    base, source = table.get("base_model"), table.get("tokenizer_source")
    method = _name(table.get("merge_method"), "merge_method", f"one of {', '.join(METHODS)}")
    if source == "union":
        raise OptionError("tokenizer_source: union makes a new vocabulary, for models of different ones; name a model")
    merge = Merge(
        method=ALIASES.get(method, method),
        parts=tuple(parts),
        base=None if base is None else _name(base, "base_model"),
        t=shared.get("t"),
        normalize=_flag(shared, "normalize", None),
        rescale=bool(_flag(shared, "rescale", True)),
        scale=_number(shared.get("lambda", 1.0), "parameters.lambda"),
        dtype=table.get("out_dtype") or table.get("dtype"),
        tokenizer=None if source in (None, "base") else _name(source, "tokenizer_source"),
    )
    check(merge)
    return merge


def as_yaml(merge: Merge) -> str:
    """What `read_merge` reads as this merge."""
    import yaml

    shared = {"t": merge.t, "normalize": merge.normalize, "rescale": None if merge.rescale else False}
    shared |= {"lambda": None if merge.scale == 1.0 else merge.scale}
    parts = [
        {"weight": part.weight, "density": part.density if METHODS[merge.method] else None} for part in merge.parts
    ]
    table = {
        "merge_method": merge.method,
        "base_model": merge.base,
        "models": [_given(model=p.model, parameters=_given(**own)) for p, own in zip(merge.parts, parts, strict=True)],
        "parameters": _given(**shared),
        "dtype": merge.dtype,
        "tokenizer_source": merge.tokenizer,
    }
    return yaml.safe_dump(_given(**table), sort_keys=False, allow_unicode=True)


def _given(**entries: Any) -> dict[str, Any]:
    return {key: value for key, value in entries.items() if value not in (None, {})}


def check(merge: Merge) -> None:
    """Raises OptionError where the parts do not make up a merge of this method."""
    names = [part.model for part in merge.parts]
    others = [name for name in names if name != merge.base]
    if merge.method not in METHODS:
        raise OptionError(f"merge_method is {shown(merge.method)!r}; choose one of {', '.join(METHODS)}")
    if merge.dtype is not None and merge.dtype not in DTYPES:
        raise OptionError(f"dtype is {shown(merge.dtype)!r}; choose one of {', '.join(DTYPES)}")
    if merge.method != "linear" and merge.base is None:
        what = "begins at one of the two models" if merge.method == "slerp" else "sums differences from a base model"
        raise OptionError(f"{merge.method} {what}: name it, base_model in the file or --base MODEL")
    if twice := [name for name in names if names.count(name) > 1]:
        raise OptionError(f"{twice[0]} is named twice")
    if merge.method == "slerp" and len(others) != 1:
        raise OptionError(f"slerp goes from the base to one other model; {len(others)} are named")
    if merge.method == "linear" and merge.base is not None and merge.base not in names:
        raise OptionError(f"linear sums models, and base_model {merge.base} is none of them: give it a weight too")
    if merge.method == "slerp" and merge.t is None:
        raise OptionError("slerp needs parameters.t, from 0 (the base) to 1 (the other model)")
    if not others:
        raise OptionError("name at least one model beside the base")
    if merge.method != "slerp":
        for part in merge.parts:
            if part.weight is None and not (part.model == merge.base and METHODS[merge.method]):
                raise OptionError(f"{part.model} has no weight: parameters.weight in the file, or {part.model}=WEIGHT")


def value_at(setting: Setting, what: str, name: str, depth: float) -> float:
    """What a setting is for a tensor.

    Args:
      what: the setting's name.
      depth: of the tensor's layer, from 0, the first, to 1, the last; 0 for what is in no layer.

    Raises:
      OptionError: it is none, or no filter matches the tensor's name.
    """
    if isinstance(setting, Mapping):
        setting = [setting]
    if not isinstance(setting, list) or not setting:
        return _number(setting, what)
    if isinstance(setting[0], Mapping):
        for entry in setting:
            entry = _table(entry, what, ("filter", "value"))
            if entry.get("filter") in (None, "*") or str(entry["filter"]) in name:
                return value_at(entry.get("value"), what, name, depth)
        raise OptionError(f"{what}: no filter matches {name}; end the list with an entry that has a value alone")
    at = depth * (len(setting) - 1)
    low = int(at)
    before, after = (_number(setting[i], what) for i in (low, min(low + 1, len(setting) - 1)))
    return before + (at - low) * (after - before)


def _table(raw: object, where: str, known: tuple[str, ...]) -> Mapping[str, Any]:
    if not isinstance(raw, Mapping):
        raise OptionError(f"{where} must be a table of {', '.join(known)}")
    for key in raw:
        if key in _OTHERS and known is _KEYS:
            raise OptionError(f"{where}: {key} is not read: {_OTHERS[key]}")
        if key not in known:
            raise unknown_name(where, shown(key), known, {"method": "merge_method", "base": "base_model"}, "key")
    return raw


def _name(raw: object, what: str, of: str = "the name of a model") -> str:
    if not isinstance(raw, str) or not raw:
        raise OptionError(f"{what} is {shown(repr(raw))}; give {of}")
    return raw


def _flag(table: Mapping[str, Any], key: str, default: bool | None) -> bool | None:
    value = table.get(key, default)
    if value is not default and value not in (True, False, 0, 1):
        raise OptionError(f"parameters.{key} is {shown(repr(value))}; it is true or false")
    return None if value is None else bool(value)


def _number(raw: Any, what: str) -> float:
    try:
        if isinstance(raw, bool) or raw is None:
            raise ValueError
        return float(raw)  # YAML reads 1e-3 as a text
    except (TypeError, ValueError):
        raise OptionError(f"{what} is {shown(repr(raw))}; give a number") from None
