"""The settings of a training run: dataclasses whose fields say what they mean. `settings_file.py` fills them.

A run folder keeps the resolved settings, so every default is written down there.
"""

import dataclasses
import math
import re
import typing
from collections.abc import Sequence
from typing import Any

from ..config import DTYPES
from ..errors import OptionError
from ..weights.key_map import PROJECTIONS
from .options import REMAT

SCHEDULES = ("constant", "wsd", "cosine", "linear")
POLICIES = ("stop", "rollback", "ignore")
BASES = ("float32", "bfloat16", "int8", "int4")
KINDS = ("pretrain", "sft", "preference")
LOSSES = ("apo_zero", "apo_down", "sigmoid")
TRAIN_ON = ("assistant", "all")
OVERFLOWS = ("drop", "truncate", "split")
POSITIONS = ("row", "document")
SOURCE_FORMATS = ("jsonl", "parquet", "arrayrecord", "text", "tokens", "hf")


def _setting(default: Any, meaning: str) -> Any:
    """A field with its default and what it means."""
    return dataclasses.field(default=default, metadata={"meaning": meaning})


def _table(meaning: str) -> Any:
    """A field that is a table of names, empty at first."""
    return dataclasses.field(default_factory=dict, metadata={"meaning": meaning})


@dataclasses.dataclass(frozen=True)
class RunSettings:
    """The run as a whole."""

    dir: str = _setting("", "the run folder")
    steps: int = _setting(0, "steps in all, those that are skipped too")
    seed: int = _setting(0, "of the order of the data, and of the weights of a new model")
    name: str = _setting("", "for displays")


@dataclasses.dataclass(frozen=True)
class ModelSettings:
    """What is trained."""

    path: str = _setting("", 'a folder, a .gguf file, a hub id or "demo"; empty: a new model of the shape of `config`')
    config: str = _setting("", "for a new model: one whose config.json and tokenizer are taken, and no weights")
    dtype: str = _setting("bfloat16", f"of products; one of {', '.join(DTYPES)}. Parameters are float32")
    nope_interval: int = _setting(-1, "RoPE is off on every n-th layer (SmolLM3: 4); 0: on none; -1: the checkpoint's")
    rope_theta: float = _setting(0.0, "the base of RoPE's frequencies; 0: the checkpoint's")


@dataclasses.dataclass(frozen=True)
class Source:
    """One corpus."""

    path: str = _setting("", "a file or folder; gs:// and s3:// too, with the extra `remote`; with format hf a hub id")
    weight: float = _setting(1.0, "its share of the tokens, relative to the other sources'")
    format: str = _setting("", f"one of {', '.join(SOURCE_FORMATS)}; empty: guessed from the names of its files")
    field: str = _setting("text", "the field or column that holds the text")
    fraction: float = _setting(1.0, "the part of its documents that is read; which they are is drawn once")


@dataclasses.dataclass(frozen=True)
class DataSettings:
    """Corpora, and the rows that are packed from them."""

    path: str = _setting("", "of the only source, if there is one alone")
    sources: dict[str, Source] = _table("or several, each a table [data.sources.NAME]")  # noqa: RUF009
    per_file: bool = _setting(False, "makes a source of each file of data.path")
    concatenate: bool = _setting(
        False, "makes one corpus of all sources, whatever their weights: an epoch is each document once"
    )
    format: str = _setting("", "of the only source, as for a source")
    field: str = _setting("text", "of the only source, as for a source, and of data.eval_path")
    length: int = _setting(4096, "tokens of a row")
    rows: int = _setting(16, "rows of a step, over all devices")
    shuffle: bool = _setting(True, "an order drawn for each epoch (of Parquet, `smollm3 tokenize` first pays)")
    epochs: int = _setting(0, "how often the documents are read; 0: without end")
    eval_path: str = _setting("", "held-out documents: a file or a folder, their text in data.field")
    eval_format: str = _setting("", "their format, as for a source")
    eval_every_nth: int = _setting(0, "or hold out every n-th document of each source; 0: none")
    bad_records: int = _setting(100, "how many unreadable documents of a source are skipped before the run stops")
    max_document_bytes: int = _setting(10_000_000, "longer ones count as unreadable, but for formats tokens and hf")
    timeout: float = _setting(300.0, "seconds that a batch may take")
    template: str = _setting("", "of conversations: the file of a chat template; empty: the model's own")
    date: str = _setting("2025-07-08", "the day that templates take for today: the same in each run, whenever it is")
    overflow: str = _setting("drop", f"of conversations longer than a row; one of {', '.join(OVERFLOWS)}")
    positions: str = _setting("row", "of conversations: counted from the beginning of a row, or of each document")


@dataclasses.dataclass(frozen=True)
class ObjectiveSettings:
    """What is minimised."""

    kind: str = _setting(
        "pretrain", f"one of {', '.join(KINDS)}; sft: of conversations, packed whole; preference: of pairs of them"
    )
    train_on: str = _setting("assistant", "of sft: the assistant's turns and completions alone, or all tokens")
    loss: str = _setting("apo_zero", f"of preference: one of {', '.join(LOSSES)} (DPO's)")
    beta: float = _setting(0.1, "of preference: how closely to stay at the reference; the higher, the closer")
    reference: str = _setting("", "of preference: the model to compare with, as model.path; empty: the start")


@dataclasses.dataclass(frozen=True)
class OptimizerSettings:
    """AdamW and its learning rate, which rises from 0 over a linear warm-up."""

    learning_rate: float = _setting(2e-4, "the peak")
    schedule: str = _setting("wsd", f"one of {', '.join(SCHEDULES)} (wsd: constant, then a linear decay)")
    warmup_steps: int = _setting(2000, "updates of the warm-up")
    decay_steps: int = _setting(0, "for wsd: how many updates, the last ones, the decay takes")
    end: float = _setting(0.0, "where the decay ends, as a share of the peak; nothing where there is none")
    b1: float = _setting(0.9, "AdamW's decay of the first moment")
    b2: float = _setting(0.95, "and of the second")
    eps: float = _setting(1e-8, "AdamW's epsilon")
    weight_decay: float = _setting(0.1, "of all parameters but the embedding")
    clip_norm: float = _setting(1.0, "the largest norm of all gradients together; 0: any")


@dataclasses.dataclass(frozen=True)
class StepSettings:
    """How a step is computed."""

    remat: str = _setting("dots", f"what the backward pass computes again; from least to most: {', '.join(REMAT)}")
    micro_batches: int = _setting(1, "parts that a step's rows are split into, computed one after the other")
    z_loss: float = _setting(0.0, "the weight of the z-loss beside the cross-entropy")
    deterministic: bool = _setting(False, "equal steps give equal bits on a GPU too, which costs speed")


@dataclasses.dataclass(frozen=True)
class MeshSettings:
    """How the model and the batch lie on several devices."""

    rules: str = _setting("", "a sharding strategy; empty: fsdp where there are several devices")
    axes: str = _setting("", "the mesh, such as fsdp=8,tensor=2; empty: the strategy's usual one")


@dataclasses.dataclass(frozen=True)
class CheckpointSettings:
    """Which checkpoints there are."""

    every: int = _setting(500, "steps between them; 0: the last alone")
    keep: int = _setting(3, "how many of the newest stay; at least 2")
    keep_every: int = _setting(0, "of older ones those stay whose step this divides; 0: none")


@dataclasses.dataclass(frozen=True)
class LoraSettings:
    """An adapter that is trained in place of the model (lora.py)."""

    rank: int = _setting(0, "of the adapter's matrices; 0: no adapter, all parameters are trained")
    alpha: float = _setting(0.0, "the adapter counts alpha / rank; 0: twice the rank")
    dropout: float = _setting(0.0, "the share of the adapter's inputs that a step leaves out")
    targets: tuple[str, ...] = _setting((), f"which projections, of {', '.join(PROJECTIONS)}; empty: all of them")
    rslora: bool = _setting(False, "the adapter counts alpha / sqrt(rank)")
    dora: bool = _setting(False, "the lengths of the weights' rows are trained too (DoRA)")
    base: str = _setting("", f"what the frozen model is kept in: {', '.join(BASES)}; empty: as the checkpoint is")


@dataclasses.dataclass(frozen=True)
class EvaluationSettings:
    """The loss on held-out documents, of pairs their rewards too."""

    every: int = _setting(0, "steps between evaluations; 0: none")
    tokens: int = _setting(20_000, "how many tokens of each source")


@dataclasses.dataclass(frozen=True)
class GuardSettings:
    """When to give up."""

    skips: int = _setting(10, "steps in a row without a finite gradient")
    spike: float = _setting(6.0, "by how many standard deviations a loss exceeds the mean of the window; 0: any")
    window: int = _setting(100, "the last steps, whose losses that mean is of")
    policy: str = _setting(
        "stop", f"{', '.join(POLICIES)}; rollback: to the last good checkpoint, and past the data since"
    )
    retries: int = _setting(3, "how many rollbacks")


@dataclasses.dataclass(frozen=True)
class LogSettings:
    """What is written of the run."""

    every: int = _setting(1, "steps between lines of metrics.jsonl")
    tensorboard: bool = _setting(False, "TensorBoard's files too (the extra `tensorboard`)")
    wandb: str = _setting("", "a project of Weights & Biases (the extra `wandb`)")
    profile: str = _setting("", 'steps to profile, such as "10-12"')


@dataclasses.dataclass(frozen=True)
class Stage:
    """From a step on, other settings; 0 or empty leaves what was."""

    start: int = _setting(0, "how many steps come before the stage")
    weights: dict[str, float] = _table("of sources, by name; those that are not named get none")  # noqa: RUF009
    length: int = _setting(0, "as data.length")
    rows: int = _setting(0, "as data.rows")
    micro_batches: int = _setting(0, "as step.micro_batches")
    rope_theta: float = _setting(0.0, "as model.rope_theta")
    reset_optimizer: bool = _setting(False, "begin with fresh moments, and the schedule from its start")


@dataclasses.dataclass(frozen=True)
class Settings:
    """One training run."""

    run: RunSettings = dataclasses.field(default_factory=RunSettings)
    model: ModelSettings = dataclasses.field(default_factory=ModelSettings)
    data: DataSettings = dataclasses.field(default_factory=DataSettings)
    objective: ObjectiveSettings = dataclasses.field(default_factory=ObjectiveSettings)
    optimizer: OptimizerSettings = dataclasses.field(default_factory=OptimizerSettings)
    step: StepSettings = dataclasses.field(default_factory=StepSettings)
    mesh: MeshSettings = dataclasses.field(default_factory=MeshSettings)
    checkpoint: CheckpointSettings = dataclasses.field(default_factory=CheckpointSettings)
    lora: LoraSettings = dataclasses.field(default_factory=LoraSettings)
    eval: EvaluationSettings = dataclasses.field(default_factory=EvaluationSettings)
    guard: GuardSettings = dataclasses.field(default_factory=GuardSettings)
    log: LogSettings = dataclasses.field(default_factory=LogSettings)
    stages: tuple[Stage, ...] = ()


def listed() -> list[dict[str, Any]]:
    """Every setting, in order: its name ("run.steps"), type, default (ready for JSON) and meaning.

    Those of a table that may stand there several times are named "data.sources.NAME.path" and "stages[].start".
    """
    return list(_listed(Settings))


def _listed(kind: Any, path: str = "") -> typing.Iterator[dict[str, Any]]:
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        hint, name = hints[field.name], f"{path}{field.name}"
        inner = next((x for x in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(x)), None)
        if "meaning" in field.metadata:
            default = field.default if field.default is not dataclasses.MISSING else {}
            of = str(getattr(hint, "__name__", hint)) if inner is None else "table"
            yield {"name": name, "type": of, "default": default, "meaning": field.metadata["meaning"]}
        if inner is not None:
            several = {dict: ".NAME", tuple: "[]"}.get(typing.get_origin(hint), "")
            yield from _listed(inner, f"{name}{several}.")


def as_table(settings: Settings | Stage) -> dict[str, Any]:
    """Dictionaries, lists and plain values, ready for JSON and for `parse`."""
    return dataclasses.asdict(settings)


# Of whole numbers, the least and the most; the others' are 0 and the largest of a device's integers.
_RANGES = {
    "run.seed": (0, 2**32 - 1),
    "data.max_document_bytes": (0, 2**63 - 1),
    "model.nope_interval": (-1, 2**31 - 1),
}


def check(settings: Settings) -> None:
    """Raises OptionError for values out of range, or that contradict each other."""
    s = settings

    _need(s.run.dir != "", "run.dir is not given: name the folder of the run, run.dir=FOLDER")
    _need(s.run.steps > 0, f"run.steps is {s.run.steps}; give the number of updates, run.steps=N")
    _one_of("model.dtype", s.model.dtype, tuple(DTYPES))
    _need(bool(s.model.path) != bool(s.model.config), "model: give either model.path or model.config")
    _need(bool(s.data.path) != bool(s.data.sources), "data: give either data.path or [data.sources.NAME] tables")
    _at_least("data.length", s.data.length, 2)
    _at_least("data.rows", s.data.rows, 1)
    _need(s.data.field != "", "data.field is empty; name the field of the text")
    nth = s.data.eval_every_nth
    _need(nth >= 0 and nth != 1, f"data.eval_every_nth is {nth}; it must be 0, or at least 2")
    _need(not (s.data.eval_path and nth), "data: give either data.eval_path or data.eval_every_nth")
    _check_objective(s)
    _at_least("log.every", s.log.every, 1)
    profile = s.log.profile
    _need(re.fullmatch(r"(\d+(-\d+)?)?", profile) is not None, f"log.profile is {profile!r}; give steps, as in 10-12")
    _at_least("guard.window", s.guard.window, 2)
    _one_of("optimizer.schedule", s.optimizer.schedule, SCHEDULES)
    _one_of("step.remat", s.step.remat, tuple(REMAT))
    _check_lora(s)
    _at_least("checkpoint.keep", s.checkpoint.keep, 2, ", as the newest may turn out to be damaged")
    _one_of("guard.policy", s.guard.policy, POLICIES)
    _, *begins = starts(s)
    _need(begins == sorted(set(begins)), f"stages start at {begins}; their starts must increase")
    _need(
        all(0 < start < s.run.steps for start in begins),
        f"stages start at {begins}; their starts must lie between 0 and run.steps={s.run.steps}",
    )
    for key in ("format", "eval_format"):
        _one_of(f"data.{key}", getattr(s.data, key), ("", *SOURCE_FORMATS))
    for name, source in s.data.sources.items():
        _one_of(f"data.sources.{name}.format", source.format, ("", *SOURCE_FORMATS))
        _at_least(f"data.sources.{name}.weight", source.weight, 0)
        _need(source.field != "", f"data.sources.{name}.field is empty; name the field of the text")
        share = source.fraction
        _need(0 < share <= 1, f"data.sources.{name}.fraction is {share}; it must be more than 0 and at most 1")
    for stage in s.stages:
        for name in stage.weights:
            _need(name in s.data.sources, f"stages.weights names {name!r}, and data.sources has no source of that name")
    for start in starts(s):
        stage = stage_at(s, start)[1]
        fits = stage.micro_batches >= 1 and stage.rows % stage.micro_batches == 0
        _need(fits, f"step.micro_batches: {stage.rows} rows do not split into {stage.micro_batches} equal parts")
    _check_values(as_table(s))


def _check_values(value: object, path: str = "") -> None:
    """Refuses what no setting can be: a negative number, an infinite one, more than a device counts to, half a text."""
    if isinstance(value, dict | list | tuple):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            _check_values(inner, f"{path}.{key}" if path else str(key))
    elif isinstance(value, float) and not 0 <= value < math.inf:
        raise OptionError(f"{path} is {value}; it must be a finite number, and not negative")
    elif isinstance(value, int):
        least, most = _RANGES.get(path, (0, 2**31 - 1))
        if not least <= value <= most:
            raise OptionError(f"{path} is {value}; it must be a whole number from {least} to {most:,}")
    elif isinstance(value, str) and re.search(r"[\0\ud800-\udfff]", value):
        raise OptionError(f"{path} is {value!r}; a NUL or half a surrogate pair is in it, which no text has")


def _check_objective(settings: Settings) -> None:
    """The objective, and the data that it takes."""
    s = settings
    _one_of("objective.kind", s.objective.kind, KINDS)
    _one_of("objective.train_on", s.objective.train_on, TRAIN_ON)
    _one_of("objective.loss", s.objective.loss, LOSSES)
    _need(s.objective.beta > 0, f"objective.beta is {s.objective.beta}; it must be more than 0")
    _one_of("data.overflow", s.data.overflow, OVERFLOWS)
    _one_of("data.positions", s.data.positions, POSITIONS)
    _need(re.fullmatch(r"\d{4}-\d\d-\d\d", s.data.date) is not None, f"data.date is {s.data.date!r}; give YYYY-MM-DD")
    if s.objective.kind == "preference":
        lengths = sorted({s.data.length, *(stage.length for stage in s.stages if stage.length)})
        _need(len(lengths) == 1, f"stages.length: preferences have rows of one length, and these are of {lengths}")
        _need(
            s.data.overflow != "split", "data.overflow=split: a completion is compared whole; choose drop or truncate"
        )
        _need(not s.step.z_loss, f"step.z_loss is {s.step.z_loss}; the losses of preferences have none: step.z_loss=0")


def _need(holds: bool, said: str) -> None:
    if not holds:
        raise OptionError(said)


def _one_of(key: str, value: str, choices: Sequence[str]) -> None:
    _need(value in choices, f"{key} is {value!r}; choose one of {', '.join(filter(None, choices))}")


def _at_least(key: str, value: float, least: float, why: str = "") -> None:
    _need(value >= least, f"{key} is {value}; it must be at least {least}{why}")


def _check_lora(settings: Settings) -> None:
    lora, known = settings.lora, ", ".join(PROJECTIONS)
    given = f"rank {lora.rank}, alpha {lora.alpha}, dropout {lora.dropout}"
    sound = lora.rank >= 0 and lora.alpha >= 0 and 0 <= lora.dropout < 1
    _need(sound, f"lora: {given}; rank and alpha are at least 0, dropout is from 0 to below 1")
    for target in lora.targets:
        tied = f"lora.targets: {target} is not adapted, as one matrix is both embedding and head; leave it out"
        _need(target not in ("lm_head", "embed_tokens"), tied)
        _need(target in PROJECTIONS, f"lora.targets: there is no {target!r}; choose among {known}")
    _one_of("lora.base", lora.base, ("", *BASES))
    alone = lora.rank > 0 or lora == LoraSettings()
    _need(alone, "lora: lora.rank=0 means no adapter, and other settings of it are given; set lora.rank, to 16 say")
    there = not lora.rank or settings.model.path != ""
    _need(there, "lora.rank: an adapter is trained on a model that is there: give model.path")


def starts(settings: Settings) -> list[int]:
    """The step at which each stage begins; 0 is before the first of `stages`."""
    return [0, *(stage.start for stage in settings.stages)]


def stage_at(settings: Settings, step: int) -> tuple[int, Stage]:
    """(number, stage) of a step: 0 is before the first of `stages`; with everything filled in, weights normalised."""
    data = settings.data
    weights = {name: source.weight for name, source in data.sources.items()} or {"data": 1.0}
    current = Stage(0, weights, data.length, data.rows, settings.step.micro_batches, settings.model.rope_theta)
    number = 0
    for stage in settings.stages:
        if stage.start > step:
            break
        number += 1
        given = {field.name: getattr(stage, field.name) for field in dataclasses.fields(stage)}
        current = dataclasses.replace(current, **{key: value for key, value in given.items() if value})
        current = dataclasses.replace(current, start=stage.start, reset_optimizer=stage.reset_optimizer)
    total = sum(current.weights.values())
    if total <= 0:
        raise OptionError(f"data.sources: none has a weight at step {step}")
    return number, dataclasses.replace(current, weights={name: w / total for name, w in current.weights.items()})
