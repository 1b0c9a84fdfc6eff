"""Decoding and prefill on a topology: their memory, their collectives and their modelled times."""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.stages import Compiled

from sharding import hlo
from sharding.arrays import ArraySpec, shapes, specs_of
from sharding.hardware import Chip, chip_of
from sharding.mesh import device_bytes
from sharding.products import CUDNN_ATTENTION, KernelCost
from sharding.roofline import Roofline, roofline
from sharding.rules import Sharding

from ..attention.piece import BLOCK, DENSE_BLOCK
from ..config import ModelConfig
from ..errors import OptionError
from ..files import write_output
from ..generation.device_loop import Slots, decode, prefill, slot_specs
from ..kv_cache import KVCache, cache_specs
from ..model import SmolLM3
from ..weights.key_map import abstract_model
from ..weights.quantized import with_scheme
from ..weights.served import planned
from .devices import DoesNotFit, compile_for, sharding_for, topology
from .report import assumptions, collectives, program, times

FLOOR = "the floor: all weights and the full cache once a token, at the bandwidth"


@dataclasses.dataclass(frozen=True)
class DecodeSetting:
    """Decoding on one topology: shapes of the model, the cache and the slots, with their shardings."""

    config: ModelConfig
    sharding: Sharding
    batch: int
    context: int
    cache_dtype: str = "bfloat16"
    # One array a layer, as inference has them, XLA reads in place; out of stacked ones it copies some in every step.
    stacked: bool = False
    # Pages that the rows share, and the tokens of each; None is rows of their own.
    pool: tuple[int, int] | None = None
    # Adapters beside every projection, and their rank, as a server has them; None is a model without.
    adapters: tuple[int, int] | None = None

    @property
    def chip(self) -> Chip:
        chip = chip_of(self.sharding.mesh.devices.flat[0])
        assert chip is not None
        return chip

    @functools.cached_property
    def model(self) -> SmolLM3:
        model = abstract_model(self.config, jnp.bfloat16, stacked=self.stacked, sharding=self.sharding)
        model = model if self.adapters is None else planned(model, *self.adapters)
        return shapes(specs_of(model), self.sharding)

    @functools.cached_property
    def cache(self) -> KVCache:
        specs = cache_specs(self.config, self.batch, self.context, self.cache_dtype, self.pool)
        return shapes(specs, self.sharding)

    @functools.cached_property
    def slots(self) -> Slots:
        specs = slot_specs(self.batch, self.config.vocab_size, self.adapters is not None)
        return shapes(specs, self.sharding)

    @property
    def places(self) -> int:
        """How many tokens of a slot a device has while a piece of a prompt looks at them: all, where it has a part of
        the piece."""
        return self.context // (1 if self.sharding.parts("length") > 1 else self.sharding.parts("context"))

    def piece_after(self, found: Sequence[hlo.Operation], past: int) -> Roofline:
        """The roofline of a piece of a prompt after `past` tokens of it, which its loops go through in blocks."""
        in_loops = [f"{op.name} {op.target}" for op in found if op.in_loop and op.opcode == "custom-call"]
        by_kernel = any("splash_mha" in name or CUDNN_ATTENTION in name for name in in_loops)
        blocks = -(-min(past, self.places) // math.gcd(BLOCK if by_kernel else DENSE_BLOCK, self.places))
        return roofline(found, self.chip, self.kernel_cost, unknown_trips=blocks)

    def scalar(self, *shape: int) -> jax.ShapeDtypeStruct:
        """Of int32, the same on every device."""
        return shapes(ArraySpec(shape, jnp.dtype(jnp.int32), (None,) * len(shape)), self.sharding)

    def compile(self) -> Compiled:
        """The decode loop."""
        what = f"compiling decoding, batch {self.batch}"
        return compile_for(decode, self.model, self.cache, self.slots, self.scalar(), sharding=self.sharding, what=what)

    def compile_prefill(self, length: int, whole: bool = True) -> Compiled:
        """A prompt of `length` tokens that goes in whole, or a piece of one."""
        tokens = (self.scalar(1, length), self.scalar(length), self.scalar())
        adapter = None if self.adapters is None else self.scalar()
        return compile_for(
            *(prefill, self.model, self.cache, self.scalar(), None if whole else self.scalar(), *tokens, adapter),
            sharding=self.sharding,
            what=f"compiling the prefill of {length:,} tokens",
        )

    def model_of(self, compiled: Compiled) -> Roofline:
        """The roofline of the decode loop: of one round, without what only some requests need."""
        return roofline(hlo.operations(compiled), self.chip, self.kernel_cost, branches=False)

    def kernel_cost(self, op: hlo.Operation) -> KernelCost | None:
        """The cost of a TPU's kernels: paged attention, which reads a layer's cache (here: a full one), and splash."""
        if self.sharding.platform != "tpu":
            return None
        heads, width = self.config.num_attention_heads // self.sharding.parts("heads"), self.config.head_dim
        if "paged_attention" in op.name + op.op_name:
            pages, length = self.pool or (self.batch // self.sharding.parts("batch"), self.context)
            return KernelCost(4 * heads * pages * length * width, device_bytes(self.cache.layers[0]))
        if "splash_mha_fwd" in op.name + op.op_name:
            length = max(math.prod(shape.dims) for shape in op.shapes) // (heads * width)
            # In a loop it goes through a piece's past, all of which its queries see. A device has as many of a piece's
            # first tokens as of its last.
            whole = length * self.sharding.parts("length")
            keys = math.gcd(BLOCK, self.places) if op.in_loop else whole / 2
            return KernelCost(4 * heads * length * keys * width, 0.0, share=0.5)
        return None


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
      batch: slots, over all devices; context: the capacity of each, in tokens.
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
        parts = sharding.parts("batch")
        raise OptionError(f"{batch} slots do not divide over {parts} devices; make them a multiple of {parts}")
    setting = DecodeSetting(config, sharding, batch, context, cache)
    floor = (device_bytes(setting.model) + device_bytes(setting.cache)) / chip.hbm_bandwidth
    head: dict[str, Any] = {
        "topology": topology_name,
        "devices": len(devices),
        "rules": rules,
        "mesh": dict(sharding.mesh.shape),
        "batch": batch,
        "context": context,
        "weights": weights or "bfloat16",
        "cache": cache,
        "floor": {"ms_per_token": 1e3 * floor, "tokens_per_second": batch / floor},
        "assumptions": [*assumptions(sharding), FLOOR],
    }
    try:
        compiled = setting.compile()
    except DoesNotFit as refusal:
        return {**head, "fits": False, **_refusal(setting, refusal)}
    if dump is not None:
        write_output(dump, compiled.as_text() or "")
    return {**head, "fits": True, **_report(setting, compiled, min(context, 8192) if prompt is None else prompt)}


def _refusal(setting: DecodeSetting, refusal: DoesNotFit) -> dict[str, Any]:
    """What is known of a setting that does not fit, and what to change."""
    parts, cache = setting.sharding.parts("batch"), device_bytes(setting.cache)
    rows = setting.batch // parts
    fewer = max(0, rows - math.ceil((refusal.needed - refusal.limit) / (cache / rows)))
    memory = {"limit": refusal.limit, "total": refusal.needed, "weights": device_bytes(setting.model), "cache": cache}
    return {
        "hbm": memory,
        "largest_batch": fewer * parts,
        "change": f"--batch {fewer * parts}" if fewer else "--weights int8, or more devices",
    }


def _report(setting: DecodeSetting, compiled: Compiled, prompt: int) -> dict[str, Any]:
    """What the decode loop takes, and the prefill of a prompt of `prompt` tokens."""
    chip, parts, cache = setting.chip, setting.sharding.parts("batch"), device_bytes(setting.cache)
    memory, model, rows = hlo.memory(compiled), setting.model_of(compiled), setting.batch // parts
    prefill_model = roofline(hlo.operations(setting.compile_prefill(prompt)), chip, setting.kernel_cost)
    more = int((chip.hbm - memory.total) // (cache / rows))
    decoding = {"ms_per_token": 1e3 * model.seconds, "tokens_per_second": setting.batch / model.seconds}
    return {
        "hbm": {
            "limit": chip.hbm,
            "total": memory.total,
            "weights": device_bytes(setting.model),
            "cache": cache,
            "temporaries": memory.temporaries,
            "code": memory.code,
        },
        # From what is left: each row takes its part of the cache.
        "largest_batch": (rows + max(0, more)) * parts,
        "program": program(model, setting.sharding, a_round=True),
        "collectives": collectives(model),
        "modelled": {**times(model), **decoding},
        "prefill": {
            "tokens": prompt,
            "modelled": {**times(prefill_model), "tokens_per_second": prompt / prefill_model.seconds},
            "collectives": collectives(prefill_model),
        },
    }
