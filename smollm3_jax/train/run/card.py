"""The model card of what a run has trained: its base, data, settings and commands."""

import dataclasses
import json
import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath
from typing import Any

from ...weights.card import Card, Origin, is_hub_id, is_there, last_part, origin_of, shown_name
from ..settings import Settings, Source, as_table
from ..settings_file import RECIPES, SHIPPED

# What made the model, of all that a run is told; the rest is about folders, displays and machines.
TOLD = ("model", "data", "objective", "optimizer", "step", "lora")
MODELS = ("model.path", "model.config", "objective.reference")
FILES = ("path", "eval_path", "template")
DONE = {"pretrain": "trained on text", "sft": "fine-tuned on conversations", "preference": "tuned on preferences"}


def card_of(settings: Settings, steps: Sequence[int], folder: Path, dtype: str | None, adapter: bool) -> Card:
    """What is said of an export.

    Args:
      steps: of the checkpoints that went into it.
      adapter: it is the adapter alone.
    """
    s = settings
    origins = [origin_of(s.model.path)] if s.model.path else []
    words = ["smollm3", "export", "run", last_part(str(folder)), f"--step={steps[0]}"]
    words += [f"--average={len(steps)}"] if len(steps) > 1 else []
    words += [f"--dtype={dtype}"] if dtype else []
    words += ["--adapter"] if adapter else []
    return Card(
        what=_sentence(s, origins, steps, adapter),
        origins=origins,
        commands=["smollm3 train --config recipe.toml run.dir=run", shlex.join(words)],
        relation="adapter" if adapter else "finetune",
        tags=[s.objective.kind, *(["lora"] if s.lora.rank else [])],
        datasets=[name for source in _sources(s) if is_hub_id(name := data_name(source).partition(":")[0])],
        library="peft" if adapter else "transformers",
        sections={"Recipe": f"`recipe.toml`:\n\n```toml\n{recipe(s)}\n```", "Data": _about_data(s)},
    )


def _sentence(s: Settings, origins: Sequence[Origin], steps: Sequence[int], adapter: bool) -> str:
    begin = f"`{origins[0].name}`" if origins else f"A new model in the shape of `{shown_name(s.model.config)}`"
    form = "alone" if adapter else "folded in"
    lora = f", by an adapter of rank {s.lora.rank}, which is here {form}" if s.lora.rank else ""
    saved = f"step {steps[0]} of {s.run.steps}"
    if len(steps) > 1:
        saved = f"the mean of the steps {', '.join(map(str, sorted(steps)))} of {s.run.steps}"
    return f"{begin}, {DONE[s.objective.kind]}{lora}: {saved}."


def _about_data(s: Settings) -> str:
    named = [(source.weight, data_name(source)) for source in _sources(s)]
    total = sum(weight for weight, _ in named)
    shares = [f", {weight / total:.3g} of the tokens" if len(named) > 1 and total else "" for weight, _ in named]
    lines = [f"- `{name}`{share}" for (_, name), share in zip(named, shares, strict=True)]
    shipped = any(name.startswith(SHIPPED) for _, name in named)
    return "\n".join(lines) + ("\n\nWhat begins with `recipe:` is part of smollm3-jax." if shipped else "")


def _sources(s: Settings) -> list[Source]:
    one = [Source(s.data.path, format=s.data.format)] if s.data.path else []
    return [*one, *s.data.sources.values()]


def data_name(source: Source) -> str:
    """A dataset of the hub, "recipe:FILE", or the last part of a path."""
    if source.format == "hf" and not is_there(source.path) and is_hub_id(source.path.partition(":")[0]):
        return source.path
    return _file_name(source.path)


def _file_name(path: str) -> str:
    parts = PurePath(path).parts
    own = parts[-4:-1] == RECIPES.parts[-3:] and (RECIPES / parts[-1]).is_file()
    return f"{SHIPPED}{parts[-1]}" if own else last_part(path)


def recipe(settings: Settings) -> str:
    """The settings that differ from their defaults, as TOML; of models, files and folders the names alone."""
    run = [f"run.steps = {settings.run.steps}", f"run.seed = {settings.run.seed}"]
    own = ((name, getattr(settings, name)) for name in TOLD)
    lines = [line for name, table in own for line in _lines(name, table)]
    stages = [_toml({key: value for key, value in as_table(stage).items() if value}) for stage in settings.stages]
    return "\n".join([*run, *lines, *([f"stages = [{', '.join(stages)}]"] if stages else [])])


def _lines(path: str, table: Any) -> Iterator[str]:
    """Of a section, or of a table in one."""
    for field in dataclasses.fields(table):
        value, name = getattr(table, field.name), f"{path}.{field.name}"
        if isinstance(value, dict):
            for key, inner in value.items():
                yield from _lines(f"{name}.{_key(key)}", inner)
        elif value != getattr(type(table)(), field.name):
            if name in MODELS:
                value = shown_name(value)
            elif isinstance(table, Source) and field.name == "path":
                value = data_name(table)
            elif name == "data.path":
                value = data_name(Source(value, format=table.format))
            elif field.name in FILES:
                value = _file_name(value)
            yield f"{name} = {_toml(value)}"


def _key(name: str) -> str:
    return name if re.fullmatch(r"[\w-]+", name, re.ASCII) else json.dumps(name, ensure_ascii=False)


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return f"{{ {', '.join(f'{_key(key)} = {_toml(inner)}' for key, inner in value.items())} }}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_toml, value))}]"
    return json.dumps(value, ensure_ascii=False)
