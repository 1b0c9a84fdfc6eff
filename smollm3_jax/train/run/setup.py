"""What a run sets up once: its model, its data, its optimizers, and where all of it lies."""

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from etils import epath
from flax import nnx
from jax.stages import Compiled

from sharding.mesh import DEFAULT_AXES, make_mesh, parse_axes
from sharding.rules import Sharding

from ...config import ModelConfig
from ...errors import OptionError, TrainingError
from ...job import agree, raise_everywhere
from ...model import SmolLM3
from ...tokenizer import Tokenizer, load_tokenizer
from ...weights import demo
from ...weights.key_map import abstract_model
from ...weights.load import common_dtype, load, open_checkpoint, text_folder
from .. import lora
from ..data.conversations import read_template
from ..data.encode import encoder
from ..data.mixture import Batches
from ..data.pairs import pair_items
from ..data.windows import sft_items
from ..objectives import Objective, objective_of
from ..optimizer import adamw
from ..reference import Sums
from ..settings import Settings, Stage, stage_at, starts
from ..state import TrainState, init_state, merge, split, state_shardings
from .checkpoint import Checkpoints, digest, digest_of, named_arrays
from .folder import environment, run_folder
from .monitor import Monitor
from .stages import config_in, rate_of, with_config


@dataclasses.dataclass
class Progress:
    """Where a run stands.

    step counts updates and skipped ones; stage is that of the last step; data is where the next batch begins
    (`Batches.state`); retries counts rollbacks; saved and saved_data are step and data of the newest checkpoint.
    """

    state: Any = None  # a TrainState, once there is one
    step: int = 0
    stage: int = 0
    data: Any = None
    retries: int = 0
    saved: int = -1
    saved_data: Any = None


@dataclasses.dataclass
class Run:
    """One call of `train`: what it set up, and where it stands.

    texts: the folder of the model's text files. encode: as `Batches` takes it. shapes: the model without arrays; load:
      makes the model.
    trainable: as in `TrainState`. batches: replaced by a rollback. base: the digest of what an adapter is trained on,
      once that is there. reference: the sums of preferences, before the first step. optimizers: by the stage's number,
      (AdamW, its learning rate). programs: the compiled step, by the stage's number and the batch's shape.
    """

    settings: Settings
    folder: epath.Path
    texts: Path
    shapes: SmolLM3
    load: Callable[[], SmolLM3]
    tokenizer_digest: str
    encode: Callable[..., Any]
    objective: Objective
    trainable: str | None
    batches: Batches
    checkpoints: Checkpoints
    monitor: Monitor
    progress: Progress
    base: str | None = None
    reference: Sums | None = None
    optimizers: dict[int, tuple[optax.GradientTransformation, optax.Schedule]] = dataclasses.field(default_factory=dict)
    programs: dict[tuple[int, tuple[int, ...]], Compiled] = dataclasses.field(default_factory=dict)

    def optimizer(self, stage: int) -> tuple[optax.GradientTransformation, optax.Schedule]:
        """(AdamW, its learning rate) of a stage: where one begins with fresh moments, its schedule begins too."""
        if stage not in self.optimizers:
            o, rate = self.settings.optimizer, rate_of(self.settings, stage)
            rule = adamw(rate, b1=o.b1, b2=o.b2, eps=o.eps, weight_decay=o.weight_decay, clip_norm=o.clip_norm)
            self.optimizers[stage] = (rule, rate)
        return self.optimizers[stage]


def set_up(settings: Settings, trainable: str | None = None) -> Run:
    """A run before its first step, without a state. Raises SmolLM3Error or ShardingError, on all processes."""
    folder = run_folder(settings.run.dir)
    if settings.lora.rank:
        if trainable is not None:
            raise OptionError("trainable: with lora.rank the adapter is trained, and nothing else; give one of both")
        trainable = lora.TRAINED
    with raise_everywhere():
        texts, shapes, load = open_model(settings)
        tokenizer = load_tokenizer(texts, shapes.config)
        tokenizer_digest = hashlib.sha256((texts / "tokenizer.json").read_bytes()).hexdigest()
        if settings.objective.kind == "sft":
            tokenizer_digest += f", template {template_digest(settings, tokenizer)}"
        encode = encode_for(settings, tokenizer, shapes.config)
        batches = Batches(settings, encode)
    agree("models", [shapes.config.to_hf(), tokenizer_digest])
    agree("data", batches.state())
    kept = settings.checkpoint
    checkpoints = Checkpoints(folder / "checkpoints", kept.keep, kept.keep_every)
    return Run(
        settings=settings,
        folder=folder,
        texts=texts,
        shapes=shapes,
        load=load,
        tokenizer_digest=tokenizer_digest,
        encode=encode,
        objective=objective_of(settings),
        trainable=trainable,
        batches=batches,
        checkpoints=checkpoints,
        monitor=Monitor(folder, settings, environment()),
        progress=Progress(data=batches.state()),
    )


def template_digest(settings: Settings, tokenizer: Tokenizer) -> str:
    """Of the chat template that conversations are written with, or of all that the model has."""
    own = json.dumps([tokenizer.chat_template, dict(tokenizer.templates)])
    template = read_template(settings.data.template) if settings.data.template else own
    return hashlib.sha256(template.encode()).hexdigest()


def encode_for(settings: Settings, tokenizer: Tokenizer, config: ModelConfig) -> Callable[..., Any]:
    """What `Batches` encodes documents or records with."""
    if settings.objective.kind == "pretrain":
        return encoder(tokenizer, config)
    items = pair_items if settings.objective.kind == "preference" else sft_items
    return items(tokenizer, config, settings)


def open_model(settings: Settings) -> tuple[Path, SmolLM3, Callable[[], SmolLM3]]:
    """(the folder of its text files, the shapes of the model with its sharding, what loads it): a float32 model, or one
    with an adapter on a base that is frozen."""
    m = settings.model
    path = demo.model_folder(m.path or m.config)
    opened = open_checkpoint(path) if m.path else None
    texts = text_folder(path)
    found = opened.config if opened else ModelConfig.from_hf(texts)
    config, generation = adapted(found, settings), opened.generation_config if opened else None
    sharding = _sharding(settings, config)
    adapter, seed = settings.lora, settings.run.seed
    if adapter.rank and opened is not None:
        base, dtype = lora.base_of(opened, adapter), common_dtype(opened.tensors)
        shapes = lora.shapes_of(config, adapter, base, dtype, generation, sharding)
        return texts, shapes, lambda: lora.attach(lora.load_base(opened, config, adapter, sharding), adapter, seed)
    shapes = abstract_model(config, "float32", generation, sharding=sharding)

    def load_it() -> SmolLM3:
        if opened is not None:
            mesh, rules = (sharding.mesh, settings.mesh.rules or "fsdp") if sharding else (None, None)
            return load(dataclasses.replace(opened, config=config), "float32", mesh, rules, stacked=True)
        shardings = state_shardings(shapes, sharding) if sharding else None

        def fresh() -> SmolLM3:
            return SmolLM3(config, rngs=nnx.Rngs(settings.run.seed), sharding=sharding)

        return jax.jit(fresh, out_shardings=shardings)()

    return texts, shapes, load_it


def adapted(config: ModelConfig, settings: Settings) -> ModelConfig:
    """The config with the NoPE interval and theta of the settings."""
    m = settings.model
    if m.nope_interval >= 0:
        layers = range(1, config.num_hidden_layers + 1)
        pattern = tuple(not m.nope_interval or i % m.nope_interval != 0 for i in layers)
        config = dataclasses.replace(config, model_type="smollm3", rope_layers=pattern, layer_types=None)
    if m.rope_theta:
        config = dataclasses.replace(config, rope_theta=m.rope_theta)
    return config


def _sharding(settings: Settings, config: ModelConfig) -> Sharding | None:
    mesh = settings.mesh
    if jax.device_count() == 1 and not mesh.rules:
        return None
    rules = mesh.rules or "fsdp"
    axes = parse_axes(mesh.axes) if mesh.axes else DEFAULT_AXES.get(rules, {"data": -1})
    sharding = Sharding.of(make_mesh(axes), rules).fitted(config.axis_sizes)
    for start in starts(settings):
        stage, parts = stage_at(settings, start)[1], sharding.parts("batch")
        if stage.rows // stage.micro_batches % parts:
            raise OptionError(
                f"data.rows: {stage.rows} in {stage.micro_batches} micro-batches do not go evenly onto {parts} devices"
            )
    return sharding


def first_state(run: Run) -> TrainState:
    """Of the model as it is loaded. Raises TrainingError where it is not finite."""
    model = loaded(run)
    return _laid_out(init_state(model, run.optimizer(0)[0], run.trainable))


def loaded(run: Run) -> SmolLM3:
    """The model as the run begins with it; sets the run's digest of what an adapter is trained on.

    Raises:
      TrainingError: not all of it is finite.
    """
    with raise_everywhere():
        model = run.load()
    _, finite = digest(named_arrays({"model": model}))
    if bad := [name for name, good in finite.items() if not good]:
        raise TrainingError(f"{run.settings.model.path}: not all is finite in {', '.join(bad[:10])}")
    if run.settings.lora.rank:
        run.base = digest_of(split(model, run.trainable)[1])
    return model


def saved_part(run: Run, state: TrainState) -> TrainState:
    """What checkpoints hold of a state: with an adapter, what is trained alone; the rest is in the model's folder."""
    if not run.settings.lora.rank:
        return state
    return dataclasses.replace(state, model=split(state.model, run.trainable)[0])


def with_base(run: Run, state: TrainState) -> TrainState:
    """The state that `saved_part` took apart, with its base read again."""
    if not run.settings.lora.rank:
        return state
    model = merge(state.model, split(loaded(run), run.trainable)[1])
    return _laid_out(dataclasses.replace(state, model=with_config(model, state.model.config)))


def state_like(run: Run, stage: Stage) -> TrainState:
    """The shapes of a state in a stage, each with its sharding."""
    state = jax.eval_shape(lambda model: init_state(model, run.optimizer(0)[0], run.trainable), run.shapes)
    state = with_config(state, config_in(run.shapes.config, stage))
    if state.model.sharding is not None:
        shardings = state_shardings(state, state.model.sharding)
    else:
        shardings = jax.tree.map(lambda _: jax.sharding.SingleDeviceSharding(jax.local_devices()[0]), state)
    return jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), state, shardings)


def in_stage(run: Run, number: int, stage: Stage) -> TrainState:
    """The run's state as a stage begins or goes on: with its theta, and perhaps with fresh moments."""
    state, config = run.progress.state, config_in(run.shapes.config, stage)
    if state.model.config != config:
        state = with_config(state, config)
    if number != run.progress.stage and stage.reset_optimizer:
        fresh = init_state(state.model, run.optimizer(number)[0], run.trainable)
        state = _laid_out(dataclasses.replace(fresh, step=state.step))
    return state


def _laid_out(state: TrainState) -> TrainState:
    """The state with each array where its model's sharding has it."""
    sharding = state.model.sharding
    if sharding is None:
        return jax.tree.map(jnp.asarray, state)
    return jax.jit(lambda x: x, out_shardings=state_shardings(state, sharding), donate_argnums=0)(state)
