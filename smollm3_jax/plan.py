"""What a topology would give: the real steps, compiled for devices that are not there, and asked what they cost.

Memory is the compiler's own figure. Times are modelled by `sharding.roofline`, and reports say so.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding
from jax.stages import Compiled

from sharding import hlo
from sharding.hardware import CHIPS, Chip, chip_of
from sharding.products import KernelCost
from sharding.roofline import Roofline, roofline
from sharding.rules import Sharding

from .config import WEIGHT_SCHEMES, ModelConfig
from .errors import ConfigError, OptionError
from .files import write_output
from .generation.device_loop import Slots, decode, prefill, slot_shardings
from .generation.sampling import MAX_STOP_IDS, Choice, SamplingParams
from .kv_cache import KVCache, cache_bytes, cache_shardings, empty_cache
from .plan_devices import DoesNotFit, compile_for, sharding_for, topology
from .train.optimizer import adamw
from .train.options import COMPILER_OPTIONS, REMAT, StepOptions
from .train.state import Batch, init_state, state_shardings
from .train.step import train_step
from .weights.key_map import abstract_model, count_parameters
from .weights.quantized import with_scheme

CONTEXTS = (4096, 8192, 16384, 32768, 65536, 131072)
FORMATS = ("float32", "bfloat16", "int8", "int4")
ASSUMPTIONS = (
    "modelled, not measured: compiled for this topology, run nowhere",
    "products at the chip's peak for their operands' type, everything else at its memory's bandwidth",
    "attention kernels at half of the peak",
    "collectives over rings at the links' bandwidth; those that the compiler made asynchronous are hidden, "
    "what leaves a slice is not",
    "what goes to the host's memory and back is hidden",
)
FLOOR = "the floor: all weights and the full cache once a token, at the bandwidth"
OF_GPUS = ("kernels other than attention: all of their arrays at the bandwidth", "launches cost no time")


def placed(x: Any, at: Any) -> Any:
    """The shape of an array at its place."""
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at)


def share(tree: Any) -> int:
    """Bytes of a tree of placed shapes on one device."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


# --- training ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class TrainSetting:
    """One train step on one topology: batch rows of `length` tokens, over all devices."""

    config: ModelConfig
    chip: Chip
    sharding: Sharding
    batch: int
    length: int
    options: StepOptions

    @functools.cached_property
    def arguments(self) -> tuple[Any, Batch]:
        """Shapes of the state and the batch, each at its place."""
        model = abstract_model(self.config, jnp.float32, sharding=self.sharding)
        state = jax.eval_shape(lambda model: init_state(model, _OPTIMIZER), model)
        state = jax.tree.map(placed, state, state_shardings(state, self.sharding))
        rows = self.batch
        if rows % (self.sharding.parts("batch") * self.options.micro_batches):
            raise OptionError(
                f"a batch of {rows} rows does not divide over {self.sharding.parts('batch')} devices and "
                f"{self.options.micro_batches} micro-batches: make it a multiple of "
                f"{self.sharding.parts('batch') * self.options.micro_batches}"
            )
        at = NamedSharding(self.sharding.mesh, self.sharding.spec("batch", None))
        tokens = jax.ShapeDtypeStruct((rows, self.length), jnp.int32, sharding=at)
        return state, Batch(tokens, tokens)

    def compile(self) -> Compiled:
        state, batch = self.arguments
        return compile_for(
            train_step,
            state,
            batch,
            optimizer=_OPTIMIZER,
            options=self.options,
            sharding=self.sharding,
            compiler_options=COMPILER_OPTIONS.get(self.sharding.platform),
            what=f"compiling the step, remat {self.options.remat}, micro-batches {self.options.micro_batches}",
        )

    def model_of(self, compiled: Compiled) -> Roofline:
        """Loops without a known end are those that attention takes for documents beyond what one call has place for."""
        return roofline(
            hlo.operations(compiled),
            self.chip,
            self.kernel_cost,
            slice_devices=_slice_devices(self.sharding),
            unknown_trips=0,
        )

    def kernel_cost(self, op: hlo.Operation) -> KernelCost | None:
        """Of splash attention, forward and backward: products over the half of the scores that causality leaves."""
        products = next((n for name, n in _SPLASH_PRODUCTS.items() if name in op.name + op.op_name), None)
        if products is None:
            return None
        rows = self.batch // self.options.micro_batches // self.sharding.parts("batch")
        heads = self.config.num_attention_heads // self.sharding.parts("heads")
        queries = self.length // self.sharding.parts("length")
        flops = products * 2 * rows * heads * queries * self.length * self.config.head_dim / 2
        return KernelCost(flops=flops, bytes=0.0, share=0.5)


_OPTIMIZER = adamw(2e-4)
# Scores and mix; scores, their gradient, dq; scores, their gradient, dv, dk.
_SPLASH_PRODUCTS = {"splash_mha_fwd": 2, "splash_mha_dq": 3, "splash_mha_dkv": 4}


def plan_train(
    config: ModelConfig,
    topology_name: str,
    rules: str = "fsdp",
    batch: int = 16,
    length: int = 4096,
    *,
    axes: Mapping[str, int] | None = None,
    slices: int = 1,
    remat: str | None = None,
    micro_batches: int = 1,
    dump: Path | None = None,
) -> dict[str, Any]:
    """Compiles the train step for a topology and reports memory, collectives and the modelled time.

    Args:
      batch: rows of `length` tokens a step, over all devices.
      axes: of the mesh; None is the strategy's usual.
      remat: a key of REMAT; None takes the first, and so the one that recomputes least, that fits.
      dump: a file for the compiled program.

    Returns:
      What `smollm3 plan train --json` prints; "fits": false, with what to change, if nothing does.
    """
    if remat is not None and remat not in REMAT:
        raise OptionError(f"--remat {remat}: there are {', '.join(REMAT)}")
    chip, devices = topology(topology_name, slices)
    sharding = sharding_for(config, devices, rules, axes, slices)
    refused: list[dict[str, Any]] = []

    def attempt(remat: str, micro_batches: int) -> dict[str, Any] | None:
        options = StepOptions(remat=remat, micro_batches=micro_batches)
        setting = TrainSetting(config, chip, sharding, batch, length, options)
        try:
            compiled = setting.compile()
        except DoesNotFit as refusal:
            refused.append(
                {"remat": remat, "micro_batches": micro_batches, "needed": refusal.needed, "limit": refusal.limit}
            )
            return None
        if dump is not None:
            write_output(dump, compiled.as_text() or "")
        return _train_report(setting, compiled)

    # With all devices' rows in one go whatever is not saved has to be small; "none" hardly ever is.
    policies = [remat] if remat else [name for name in REMAT if name != "none"]
    report = next((r for r in (attempt(policy, micro_batches) for policy in policies) if r), None)
    head = {
        "topology": topology_name,
        "slices": slices,
        "devices": len(devices),
        "rules": rules,
        "mesh": dict(sharding.mesh.shape),
        "batch": batch,
        "length": length,
        "parameters": count_parameters(config),
        "refused": refused,
    }
    if report is not None:
        return {**head, "fits": True, **report}
    # What would: the leanest policy that leaves the host alone, with the rows in several goes; or else fewer of them.
    rows = batch // sharding.parts("batch")
    for micro in (n for n in (2, 4, 8, 16) if rows % n == 0 and n > micro_batches):
        if attempt("full", micro):
            return {**head, "fits": False, "change": f"--micro-batches {micro} --remat full fits"}
    return {**head, "fits": False, "change": _leaner(rules, sharding)}


def _leaner(rules: str, sharding: Sharding) -> str:
    if sharding.parts("embed") == 1:
        return "the parameters are whole on every device: --rules fsdp splits them"
    if sharding.parts("length") == 1:
        return "more devices, shorter rows, or --rules fsdp_tp_cp, which splits them"
    return "more devices, or shorter rows"


def _train_report(setting: TrainSetting, compiled: Compiled) -> dict[str, Any]:
    state, batch = setting.arguments
    memory = hlo.memory(compiled)
    model = setting.model_of(compiled)
    tokens = setting.batch * setting.length
    useful = 6 * count_parameters(setting.config) * tokens / setting.sharding.mesh.size
    return {
        "remat": setting.options.remat,
        "micro_batches": setting.options.micro_batches,
        "hbm": {
            "limit": setting.chip.hbm,
            "total": memory.total,
            "parameters": share(state.model),
            "optimizer": share(state.optimizer),
            "batch": share(batch),
            "temporaries": memory.temporaries,
            "code": memory.code,
        },
        "program": _program(model, setting.sharding),
        "collectives": _collectives(model),
        "modelled": {
            **_times(model),
            "tokens_per_second": tokens / model.seconds,
            "mfu": useful / (setting.chip.peak * model.seconds),
            "bound_by": _bound(model),
        },
        "assumptions": _assumptions(setting.sharding),
    }


def _times(model: Roofline) -> dict[str, float]:
    return {
        "step_seconds": model.seconds,
        "dot_seconds": model.dot_seconds,
        "memory_seconds": model.memory_seconds,
        "kernel_seconds": model.kernel_seconds,
        "exposed_collective_seconds": model.exposed_seconds,
        "hidden_collective_seconds": model.hidden_seconds,
    }


def _program(model: Roofline, sharding: Sharding, a_round: bool = False) -> dict[str, Any]:
    """What a device does in one call, or in one round of its loop. launches: of a GPU, each fusion, kernel, copy and
    collective that it is told to do, also where a CUDA graph repeats them."""
    counts = {
        "flops": model.flops,
        "bytes_moved": model.bytes,
        "products": model.products,
        "float32_products": model.float32_products,
    }
    launches = model.loop_launches if a_round else model.launches
    return {**counts, "launches": launches} if sharding.platform == "gpu" else counts


def _assumptions(sharding: Sharding) -> list[str]:
    return [*ASSUMPTIONS, *(OF_GPUS if sharding.platform == "gpu" else ())]


def _bound(model: Roofline) -> str:
    parts = {
        "products": model.dot_seconds,
        "memory": model.memory_seconds,
        "attention": model.kernel_seconds,
        "collectives": model.exposed_seconds,
    }
    return max(parts, key=lambda name: parts[name])


def _collectives(model: Roofline) -> list[dict[str, Any]]:
    """By kind, and whether hidden: how many run in a step, and the bytes that a device sends for them."""
    rows: dict[tuple[str, bool], dict[str, Any]] = {}
    for c in model.collectives:
        row = rows.setdefault(
            (c.kind, c.hidden), {"kind": c.kind, "hidden": c.hidden, "count": 0, "bytes": 0, "bytes_across_slices": 0}
        )
        row["count"] += c.count
        row["bytes"] += c.count * c.bytes
        row["bytes_across_slices"] += c.count * c.bytes * c.across_slices
    return sorted(rows.values(), key=lambda row: -row["bytes"])


def _slice_devices(sharding: Sharding) -> int | None:
    slices = {getattr(device, "slice_index", 0) for device in sharding.mesh.devices.flat}
    return sharding.mesh.size // len(slices) if len(slices) > 1 else None


# --- decoding ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class DecodeSetting:
    """Decoding on one topology: shapes of the model, the cache and the slots, each at its place."""

    config: ModelConfig
    sharding: Sharding
    batch: int
    context: int
    cache_dtype: str = "bfloat16"
    # One array a layer, as inference has them, XLA reads in place; out of stacked ones it copies some in every step.
    stacked: bool = False

    @property
    def chip(self) -> Chip:
        chip = chip_of(self.sharding.mesh.devices.flat[0])
        assert chip is not None
        return chip

    @functools.cached_property
    def model(self) -> Any:
        def place(param: nnx.Variable) -> nnx.Variable:
            axes, value = param.get_metadata("axes"), param.get_value()
            return param.replace(placed(value, self.sharding.named("weight", axes, value.shape)))

        model = abstract_model(self.config, jnp.bfloat16, stacked=self.stacked, sharding=self.sharding)
        return jax.tree.map(place, model, is_leaf=lambda x: isinstance(x, nnx.Variable))

    @functools.cached_property
    def cache(self) -> KVCache:
        dtype = jnp.dtype(self.cache_dtype)
        cache = jax.eval_shape(lambda: empty_cache(self.config, self.batch, self.context, dtype))
        return jax.tree.map(placed, cache, cache_shardings(self.config, dtype, self.sharding))

    @functools.cached_property
    def slots(self) -> Slots:
        slots = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((self.batch, *np.shape(x)), x.dtype), _one_slot(self.config)
        )
        return jax.tree.map(placed, slots, slot_shardings(self.sharding))

    def scalar(self, *shape: int) -> jax.ShapeDtypeStruct:
        """Of int32, the same on every device."""
        return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=NamedSharding(self.sharding.mesh, self.sharding.spec()))

    def compile(self) -> Compiled:
        """The decode loop."""
        what = f"compiling decoding, batch {self.batch}"
        return compile_for(decode, self.model, self.cache, self.slots, self.scalar(), sharding=self.sharding, what=what)

    def compile_prefill(self, length: int, past: int) -> Compiled:
        """A prompt's piece of `length` tokens behind up to `past` others."""
        tokens = (self.scalar(1, length), self.scalar(length), self.scalar())
        return compile_for(
            *(prefill, self.model, self.cache, self.scalar(), *tokens),
            past=past,
            sharding=self.sharding,
            what=f"compiling the prefill of {length:,} tokens",
        )

    def model_of(self, compiled: Compiled) -> Roofline:
        """Of the decode loop: one round of it, without what only some requests need."""
        return roofline(hlo.operations(compiled), self.chip, self.kernel_cost, branches=False)

    def kernel_cost(self, op: hlo.Operation) -> KernelCost | None:
        """Of a TPU's kernels: paged attention, which reads a layer's cache (here: a full one), and splash attention."""
        if self.sharding.platform != "tpu":
            return None
        heads, width = self.config.num_attention_heads // self.sharding.parts("heads"), self.config.head_dim
        if "paged_attention" in op.name + op.op_name:
            rows = self.batch // self.sharding.parts("batch")
            return KernelCost(4 * rows * heads * self.context * width, share(self.cache.layers[0]))
        if "splash_mha_fwd" in op.name + op.op_name:
            length = max(math.prod(shape.dims) for shape in op.shapes) // (heads * width)
            return KernelCost(4 * heads * length * length * width / 2, 0.0, share=0.5)
        return None


def _one_slot(config: ModelConfig) -> Slots:
    number, flag = np.int32(0), np.bool_(False)
    return Slots(
        token=number,
        active=flag,
        generated=number,
        limit=number,
        stop_ids=np.zeros(MAX_STOP_IDS, np.int32),
        think_ids=np.zeros(2, np.int32),
        thinking=flag,
        think_left=number,
        choice=Choice.of(SamplingParams(), [0], 0, config.vocab_size),
    )


def plan_decode(
    config: ModelConfig,
    topology_name: str,
    rules: str = "serve_tp",
    batch: int = 64,
    context: int = 8192,
    *,
    axes: Mapping[str, int] | None = None,
    weights: str | None = None,
    cache: str = "bfloat16",
    prompt: int | None = None,
    dump: Path | None = None,
) -> dict[str, Any]:
    """Compiles the decode loop and the prefill of a prompt for a topology, and reports what they take.

    Args:
      batch: slots, over all devices; context: tokens that each has room for.
      weights: a scheme of quantize.py; None is bfloat16. cache: bfloat16 or int8.
      prompt: tokens of the prompt whose prefill is compiled; None is the context or 8192, whichever is less.
      dump: a file for the compiled decode loop.

    Returns:
      What `smollm3 plan decode --json` prints.
    """
    config = config if weights is None else with_scheme(config, weights)
    chip, devices = topology(topology_name)
    sharding = sharding_for(config, devices, rules, axes)
    if batch % sharding.parts("batch"):
        raise OptionError(f"{batch} slots do not divide over {sharding.parts('batch')} devices")
    setting = DecodeSetting(config, sharding, batch, context, cache)
    rows, state = batch // sharding.parts("batch"), share(setting.cache)
    held = share(setting.model)
    floor = (held + state) / chip.hbm_bandwidth
    report: dict[str, Any] = {
        "topology": topology_name,
        "devices": len(devices),
        "rules": rules,
        "mesh": dict(sharding.mesh.shape),
        "batch": batch,
        "context": context,
        "weights": weights or "bfloat16",
        "cache": cache,
        "floor": {"ms_per_token": 1e3 * floor, "tokens_per_second": batch / floor},
        "assumptions": [
            *_assumptions(sharding),
            "the floor: all weights and the full cache once a token, at the bandwidth",
        ],
    }
    try:
        compiled = setting.compile()
    except DoesNotFit as refusal:
        over = refusal.needed - refusal.limit
        fewer = max(0, rows - math.ceil(over / (state / rows)))
        return {
            **report,
            "fits": False,
            "hbm": {"limit": refusal.limit, "total": refusal.needed, "weights": held, "cache": state},
            "largest_batch": fewer * sharding.parts("batch"),
            "change": f"--batch {fewer * sharding.parts('batch')}" if fewer else "--weights int8, or more devices",
        }
    if dump is not None:
        write_output(dump, compiled.as_text() or "")
    memory = hlo.memory(compiled)
    model = setting.model_of(compiled)
    length = min(context, 8192) if prompt is None else prompt
    prefill_model = roofline(hlo.operations(setting.compile_prefill(length, 0)), chip, setting.kernel_cost)
    more = int((chip.hbm - memory.total) // (state / rows))
    return {
        **report,
        "fits": True,
        "hbm": {
            "limit": chip.hbm,
            "total": memory.total,
            "weights": held,
            "cache": state,
            "temporaries": memory.temporaries,
            "code": memory.code,
        },
        # From what is left: each row takes its part of the cache.
        "largest_batch": (rows + max(0, more)) * sharding.parts("batch"),
        "program": _program(model, sharding, a_round=True),
        "collectives": _collectives(model),
        "modelled": {**_times(model), "ms_per_token": 1e3 * model.seconds, "tokens_per_second": batch / model.seconds},
        "prefill": {
            "tokens": length,
            "modelled": {**_times(prefill_model), "tokens_per_second": length / prefill_model.seconds},
            "collectives": _collectives(prefill_model),
        },
    }


# --- memory -----------------------------------------------------------------------------------------------


def plan_memory(config: ModelConfig, batch: int = 1, contexts: Iterable[int] = CONTEXTS) -> dict[str, Any]:
    """Bytes of the weights in each format, and of the cache of `batch` rows at each context: exact.

    Contexts beyond the model's own want YaRN. A format whose groups do not divide the model's dimensions is left out.
    """
    contexts = list(contexts)
    weights = {}
    for name in FORMATS:
        with contextlib.suppress(ConfigError):
            weights[name] = weight_bytes(config, name)
    caches = {
        name: {str(n): cache_bytes(config, batch, n, jnp.dtype(name)) for n in contexts}
        for name in ("bfloat16", "int8")
    }
    return {
        "parameters": count_parameters(config),
        "batch": batch,
        "weights": weights,
        "cache": caches,
        "own_context": config.max_position_embeddings,
    }


def weight_bytes(config: ModelConfig, weights: str) -> int:
    """What a model takes whose weights are of a dtype or of a scheme of quantize.py (then the rest is bfloat16)."""
    scheme = weights in WEIGHT_SCHEMES
    model = abstract_model(with_scheme(config, weights) if scheme else config, "bfloat16" if scheme else weights)
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(model))


# --- scale ------------------------------------------------------------------------------------------------

# Devices -> topology and slices of it: a v5e pod has 256 chips.
V5E = {16: ("v5e:4x4", 1), 64: ("v5e:8x8", 1), 256: ("v5e:16x16", 1), 1024: ("v5e:16x16", 4)}
# SmolLM3's own run: 384 H100, tensor parallel 2, data parallel 192; 14k tokens/s a GPU (its blog post).
H100_RUN = {"gpus": 384, "tensor": 2, "rows": 576, "length": 4096, "tokens_per_second_per_gpu": 14_000}


def plan_scale(
    config: ModelConfig, devices: Iterable[int], length: int = 4096, *, remat: str = "dots"
) -> dict[str, Any]:
    """The train step on ever more v5e, a row a device: modelled time, memory and bytes of collectives.

    Beside it SmolLM3's own layout on H100, by arithmetic from `hardware.CHIPS` alone.
    """
    rows, devices = [], list(devices)
    if unknown := [count for count in devices if count not in V5E]:
        raise OptionError(f"--devices {unknown[0]}: there are {', '.join(map(str, V5E))}")
    for count in devices:
        name, slices = V5E[count]
        report = plan_train(config, name, "fsdp", count, length, slices=slices, remat=remat)
        rows.append(report)
    return {"length": length, "steps": rows, "h100": h100_run(config)}


def h100_run(config: ModelConfig) -> dict[str, Any]:
    """SmolLM3's pretraining layout: products at the peak, all collectives exposed; nothing is compiled."""
    chip, run = CHIPS["h100"], H100_RUN
    groups = run["gpus"] // run["tensor"]
    tokens = run["rows"] * run["length"] / groups  # of a group of two
    attention = 6 * config.num_hidden_layers * tokens * run["length"] * config.num_attention_heads * config.head_dim
    flops = (6 * count_parameters(config) * tokens + attention) / run["tensor"]
    # Four all-reduces of the activations a layer, forward and backward; the gradients once, in bfloat16.
    activations = (
        4 * config.num_hidden_layers * tokens * config.hidden_size * 2 * (run["tensor"] - 1) / run["tensor"] * 2
    )
    gradients = 2 * 2 * count_parameters(config) / run["tensor"] * (groups - 1) / groups
    seconds = {
        "dot_seconds": flops / chip.peak,
        "tensor_parallel_seconds": activations / chip.link,
        "gradient_seconds": gradients / chip.network,
    }
    total = sum(seconds.values())
    rate = run["rows"] * run["length"] / total / run["gpus"]
    return {
        **run,
        **seconds,
        "modelled_tokens_per_second_per_gpu": rate,
        "share_of_model_reached": run["tokens_per_second_per_gpu"] / rate,
    }
