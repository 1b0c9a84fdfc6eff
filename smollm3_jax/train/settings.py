"""The settings of a training run: dataclasses, filled from TOML files and `section.key=value` words.

A run folder keeps the resolved settings, so every default is written down there.
"""

import dataclasses
import difflib
import re
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from ..config import DTYPES
from ..errors import OptionError
from ..reading import read_file, why
from ..text_files import decode
from .options import REMAT

SCHEDULES = ("constant", "wsd", "cosine", "linear")
POLICIES = ("stop", "rollback", "ignore")
SHIPPED = "recipe:"  # begins the path of a file that the package ships with its recipes
RECIPES = Path(__file__).parent / "recipes"
MOST_BYTES = 2**24  # of a file of settings
SOURCE_FORMATS = ("jsonl", "parquet", "arrayrecord", "text", "tokens", "hf")

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class RunSettings:
    """dir: the run folder. steps: updates in all. seed: of the data's order. name: for displays."""

    dir: str = ""
    steps: int = 0
    seed: int = 0
    name: str = ""


@dataclasses.dataclass(frozen=True)
class ModelSettings:
    """path: a folder, a hub id, "demo", or "" for a new model of `config`'s shape, drawn from the seed.

    dtype: of products. nope_interval: RoPE off on every n-th layer (SmolLM3: 4); 0: on none; -1 leaves the
    checkpoint's own. rope_theta: 0 leaves the checkpoint's own. config: where path is "", a model whose config.json
    and tokenizer are taken, and no weights.
    """

    path: str = ""
    config: str = ""
    dtype: str = "bfloat16"
    nope_interval: int = -1
    rope_theta: float = 0.0


@dataclasses.dataclass(frozen=True)
class Source:
    """One corpus: path of a file or folder (local, or gs:// and s3:// with the extra `remote`), its weight in the
    mixture, its format (guessed from the names of its files if ""), and the field or column that holds the text."""

    path: str = ""
    weight: float = 1.0
    format: str = ""
    field: str = "text"


@dataclasses.dataclass(frozen=True)
class DataSettings:
    """path: of the only source, its format and field as in a source's table; or sources: by name; per_file makes a
    source of each file of path.

    length: tokens of a row. rows: of a step, over all devices. epochs: how often the documents are read (0: without
    end). shuffle: read them in an order drawn anew in each epoch; for one document of Parquet a whole row group is
    decoded, so `smollm3 tokenize` pays. eval_path: held-out documents, a folder or a file, of eval_format (guessed if
    "") and with the same field; or eval_every_nth: every n-th document of each source is held out (0: none).
    bad_records: how many unreadable documents of a source are skipped before the run stops. max_document_bytes:
    longer ones count as unreadable. timeout: seconds that a batch may take.
    """

    path: str = ""
    sources: dict[str, Source] = dataclasses.field(default_factory=dict)
    per_file: bool = False
    format: str = ""
    field: str = "text"
    length: int = 4096
    rows: int = 16
    shuffle: bool = True
    epochs: int = 0
    eval_path: str = ""
    eval_format: str = ""
    eval_every_nth: int = 0
    bad_records: int = 100
    max_document_bytes: int = 10_000_000
    timeout: float = 300.0


@dataclasses.dataclass(frozen=True)
class OptimizerSettings:
    """AdamW and its learning rate. schedule: constant, wsd (linear decay over the last `decay_steps`), cosine or
    linear, each after a linear warm-up from 0. end: the final learning rate as a share of the peak."""

    learning_rate: float = 2e-4
    schedule: str = "wsd"
    warmup_steps: int = 2000
    decay_steps: int = 0
    end: float = 0.0
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0


@dataclasses.dataclass(frozen=True)
class StepSettings:
    """remat: a key of options.REMAT. micro_batches: into how many parts a step's rows are split, which are computed one
    after the other. z_loss: its weight in what is minimised.

    deterministic: two equal steps give equal bits on a GPU too, which costs speed; a CPU and a TPU do so anyway.
    """

    remat: str = "dots"
    micro_batches: int = 1
    z_loss: float = 0.0
    deterministic: bool = False


@dataclasses.dataclass(frozen=True)
class MeshSettings:
    """rules: a strategy of sharding.rules. axes: like "fsdp=8,tensor=2"; "" is the strategy's usual mesh."""

    rules: str = ""
    axes: str = ""


@dataclasses.dataclass(frozen=True)
class CheckpointSettings:
    """every: steps between checkpoints (0: only the last). keep: newest ones that stay, at least 2. keep_every: of
    older ones each multiple of it stays too (0: none)."""

    every: int = 500
    keep: int = 3
    keep_every: int = 0


@dataclasses.dataclass(frozen=True)
class EvaluationSettings:
    """every: steps between evaluations (0: none). tokens: how many of each source."""

    every: int = 0
    tokens: int = 20_000


@dataclasses.dataclass(frozen=True)
class GuardSettings:
    """When to give up. skips: steps in a row without a finite gradient. spike: by how many standard deviations a
    loss exceeds the mean of the last `window` steps (0: none). policy: stop, rollback (to the last good
    checkpoint, past the batches since) or ignore; retries: how many rollbacks."""

    skips: int = 10
    spike: float = 6.0
    window: int = 100
    policy: str = "stop"
    retries: int = 3


@dataclasses.dataclass(frozen=True)
class LogSettings:
    """every: steps between lines of metrics.jsonl. tensorboard, wandb: write there too (extras of those names).
    profile: "10-12" profiles these steps."""

    every: int = 1
    tensorboard: bool = False
    wandb: str = ""
    profile: str = ""


@dataclasses.dataclass(frozen=True)
class Stage:
    """From step `start` on: other weights of sources (by name; those not named get none), length, rows,
    micro-batches, theta; 0 or empty leaves what was. reset_optimizer: begin with fresh moments."""

    start: int = 0
    weights: dict[str, float] = dataclasses.field(default_factory=dict)
    length: int = 0
    rows: int = 0
    micro_batches: int = 0
    rope_theta: float = 0.0
    reset_optimizer: bool = False


@dataclasses.dataclass(frozen=True)
class Settings:
    """One training run."""

    run: RunSettings = dataclasses.field(default_factory=RunSettings)
    model: ModelSettings = dataclasses.field(default_factory=ModelSettings)
    data: DataSettings = dataclasses.field(default_factory=DataSettings)
    optimizer: OptimizerSettings = dataclasses.field(default_factory=OptimizerSettings)
    step: StepSettings = dataclasses.field(default_factory=StepSettings)
    mesh: MeshSettings = dataclasses.field(default_factory=MeshSettings)
    checkpoint: CheckpointSettings = dataclasses.field(default_factory=CheckpointSettings)
    eval: EvaluationSettings = dataclasses.field(default_factory=EvaluationSettings)
    guard: GuardSettings = dataclasses.field(default_factory=GuardSettings)
    log: LogSettings = dataclasses.field(default_factory=LogSettings)
    stages: tuple[Stage, ...] = ()


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
    except (tomllib.TOMLDecodeError, UnicodeError, RecursionError) as error:
        raise OptionError(f"{file}: not TOML: {error}") from None
    for word in words:
        _override(table, word)
        alone: dict[str, Any] = {}
        _override(alone, word)
        parse(alone, f"the setting {word[:200]}")  # a mistake in it is none of the file's
    settings = parse(table, str(file))
    check(settings)
    if settings.data.path.startswith(SHIPPED):
        own = str(RECIPES / settings.data.path.removeprefix(SHIPPED))
        settings = dataclasses.replace(settings, data=dataclasses.replace(settings.data, path=own))
    return settings


def parse(table: Mapping[str, Any], where: str = "settings") -> Settings:
    """Settings from what TOML or `as_table` gives."""
    return _fill(Settings, table, where, "")


def as_table(settings: Any) -> Any:
    """Dictionaries, lists and plain values, ready for JSON and for `parse`."""
    return dataclasses.asdict(settings)


def check(settings: Settings) -> None:
    """Raises OptionError for values out of range, or that contradict each other."""
    s = settings

    def need(holds: bool, said: str) -> None:
        if not holds:
            raise OptionError(said)

    def one_of(key: str, value: str, choices: Sequence[str]) -> None:
        need(value in choices, f"{key} is {value!r}; choose one of {', '.join(filter(None, choices))}")

    def at_least(key: str, value: float, least: float, why: str = "") -> None:
        need(value >= least, f"{key} is {value}; it must be at least {least}{why}")

    need(s.run.dir != "", "run.dir is not given: name the folder of the run, run.dir=FOLDER")
    need(s.run.steps > 0, f"run.steps is {s.run.steps}; give the number of updates, run.steps=N")
    one_of("model.dtype", s.model.dtype, tuple(DTYPES))
    need(bool(s.model.path) != bool(s.model.config), "model: give either model.path or model.config")
    need(bool(s.data.path) != bool(s.data.sources), "data: give either data.path or [data.sources.NAME] tables")
    at_least("data.length", s.data.length, 2)
    at_least("data.rows", s.data.rows, 1)
    nth = s.data.eval_every_nth
    need(nth >= 0 and nth != 1, f"data.eval_every_nth is {nth}; it must be 0, or at least 2")
    need(not (s.data.eval_path and nth), "data: give either data.eval_path or data.eval_every_nth")
    at_least("log.every", s.log.every, 1)
    profile = s.log.profile
    need(re.fullmatch(r"(\d+(-\d+)?)?", profile) is not None, f"log.profile is {profile!r}; give steps, as in 10-12")
    at_least("guard.window", s.guard.window, 2)
    one_of("optimizer.schedule", s.optimizer.schedule, SCHEDULES)
    one_of("step.remat", s.step.remat, tuple(REMAT))
    at_least("checkpoint.keep", s.checkpoint.keep, 2, ", as the newest may turn out to be damaged")
    one_of("guard.policy", s.guard.policy, POLICIES)
    _, *begins = starts(s)
    need(begins == sorted(set(begins)), f"stages start at {begins}; their starts must increase")
    need(
        all(0 < start < s.run.steps for start in begins),
        f"stages start at {begins}; their starts must lie between 0 and run.steps={s.run.steps}",
    )
    for key in ("format", "eval_format"):
        one_of(f"data.{key}", getattr(s.data, key), ("", *SOURCE_FORMATS))
    for name, source in s.data.sources.items():
        one_of(f"data.sources.{name}.format", source.format, ("", *SOURCE_FORMATS))
        at_least(f"data.sources.{name}.weight", source.weight, 0)
    for stage in s.stages:
        for name in stage.weights:
            need(name in s.data.sources, f"stages.weights names {name!r}, and data.sources has no source of that name")
    for start in starts(s):
        stage = stage_at(s, start)[1]
        fits = stage.micro_batches >= 1 and stage.rows % stage.micro_batches == 0
        need(fits, f"step.micro_batches: {stage.rows} rows do not split into {stage.micro_batches} equal parts")


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


def _override(table: dict[str, Any], word: str) -> None:
    path, equals, text = word.partition("=")
    keys = path.split(".")
    if not equals:
        raise OptionError(f"{word!r} is no setting; write section.key=value")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except (tomllib.TOMLDecodeError, RecursionError):
        value = text  # a bare word is a string
    for key in keys[:-1]:
        table = table.setdefault(key, {})
        if not isinstance(table, dict):
            raise OptionError(f"{word!r}: {key} is no section")
    table[keys[-1]] = value


def _fill(kind: type[T], table: Any, where: str, path: str) -> T:
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


def _meant(path: str, key: str, value: Any, hints: Mapping[str, Any]) -> str | None:
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
