"""What a run would do, without its data."""

import itertools
import os
from collections.abc import Iterator
from typing import Any

import jax
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from sharding.hardware import GIB

from ...config import RELEASE, SMOLLM3_3B, ModelConfig
from ...model import SmolLM3
from ...paths import is_remote
from ...screen_text import plain
from ...weights import demo
from ...weights.key_map import abstract_model
from ...weights.load import text_folder
from .. import lora
from ..settings import Settings, as_table, stage_at, starts
from ..state import count, split


def describe(settings: Settings, trainable: str | None = None) -> dict[str, Any]:
    """Steps, tokens, stages with their mixtures, and the memory of parameters and optimizer: no data is read.

    Args:
      trainable: the names of the parameters to train, as in `TrainState`.

    Returns:
      What `smollm3 train --dry-run --json` prints; "memory" in bytes, "missing" names the settings whose paths are not
      there.
    """
    stages = []
    for start, end in itertools.pairwise([*starts(settings), settings.run.steps]):
        _, stage = stage_at(settings, start)
        tokens = (end - start) * stage.rows * stage.length
        stages.append({**as_table(stage), "steps": end - start, "tokens": tokens})
    model, parameters, trained = counted(settings, model_config(settings), trainable)
    return {
        "steps": settings.run.steps,
        "tokens": sum(stage["tokens"] for stage in stages),
        "stages": stages,
        "parameters": parameters,
        "memory": {
            "parameters": sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(model)),
            "optimizer": 8 * trained,
        },
        "missing": missing(settings),
        "settings": as_table(settings),
    }


def counted(settings: Settings, config: ModelConfig, trainable: str | None = None) -> tuple[SmolLM3, int, int]:
    """The model of a run without its arrays, how many parameters it has, and how many are trained."""
    model = abstract_model(config, "float32")
    if settings.lora.rank:
        trainable, model = lora.TRAINED, lora.planned(config, settings.lora)
    return model, count(model), count(split(model, trainable)[0])


def missing(settings: Settings) -> list[str]:
    """The settings that name corpora which are not there, as far as this machine can tell without a network."""
    data = settings.data
    paths = {"data.path": (data.path, data.format), "data.eval_path": (data.eval_path, data.eval_format)}
    paths |= {f"data.sources.{name}.path": (source.path, source.format) for name, source in data.sources.items()}
    return [
        f"{key}={path}"
        for key, (path, format) in paths.items()
        if path and format != "hf" and not is_remote(path) and not os.path.exists(os.path.expanduser(path))
    ]


def model_config(settings: Settings) -> ModelConfig:
    """Of the model that would be trained; its weights are not read."""
    name = settings.model.config or settings.model.path
    if name == RELEASE:
        return ModelConfig.from_hf(SMOLLM3_3B)
    return ModelConfig.from_hf(text_folder(demo.model_folder(name)))


def tables(report: dict[str, Any]) -> Iterator[RenderableType]:
    """The same for people."""
    memory = report["memory"]
    yield (
        f"{report['steps']:,} steps, {report['tokens']:,} tokens; {report['parameters']:,} parameters, with their "
        f"optimizer {(memory['parameters'] + memory['optimizer']) / GIB:.2f} GiB over all devices"
    )
    for name in report["missing"]:
        yield Text(plain(f"warning: {name} is not there"))
    for number, stage in enumerate(report["stages"]):
        table = Table(f"stage {number}: step {stage['start']:,} on", f"{stage['steps']:,} steps")
        table.add_row("tokens", f"{stage['tokens']:,}")
        table.add_row("a step", f"{stage['rows']:,} rows of {stage['length']:,}")
        if stage["rope_theta"]:
            table.add_row("rope theta", f"{stage['rope_theta']:,.0f}")
        for name, weight in stage["weights"].items():
            table.add_row(plain(name), f"{100 * weight:.4g} %")
        yield table
