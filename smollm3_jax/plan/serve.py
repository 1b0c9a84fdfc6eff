"""A server on a topology: how many tokens its cache can hold, its modelled speed, and its largest context.

All of it is asked of the engine's own programs: the decode loop of all its slots, and the largest piece of a prompt.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jax.stages import Compiled

from sharding import hlo
from sharding.mesh import device_bytes
from sharding.products import CUDNN_ATTENTION
from sharding.roofline import Roofline, roofline

from ..attention.piece import BLOCK, DENSE_BLOCK
from ..config import ModelConfig
from ..errors import OptionError
from ..files import write_output
from ..generation.device_loop import MAX_STEPS
from ..generation.places import MIN_CAPACITY, capacity_for, slots_for
from ..generation.prompts import SERVING_PIECES, kept_tokens, piece_sizes, prefix_pages
from ..weights.quantized import with_scheme
from .decode import DecodeSetting
from .devices import DoesNotFit, sharding_for, topology
from .report import assumptions, collectives, program, times

FULL = "every slot decodes, and holds as many tokens as it can"
GAP = f"the longest gap: a prompt's last piece, and a call of {MAX_STEPS} tokens of every slot"
OTHERS = "pieces that are smaller or have log-probabilities: as much code as the largest; what copies: nothing"


@dataclasses.dataclass(frozen=True)
class ServeSetting:
    """A server's engine on one topology.

    decode: its slots, each with the capacity that holds `context` tokens.
    """

    decode: DecodeSetting
    context: int

    @classmethod
    def of(cls, decode: DecodeSetting, context: int) -> "ServeSetting":
        return cls(dataclasses.replace(decode, context=capacity_for(context)), context)

    @property
    def piece_sizes(self) -> tuple[int, ...]:
        """Tokens of the pieces of prompts, each of which has two programs; the last is that of a page."""
        return piece_sizes(self.decode.sharding.platform, self.decode.context, SERVING_PIECES)

    @property
    def piece(self) -> int:
        return self.piece_sizes[-1]

    @property
    def kept(self) -> int:
        """How many tokens of prompts are kept beside the slots, over all devices."""
        tokens = kept_tokens(self.decode.batch, self.context)
        return self.piece * prefix_pages(tokens, self.piece, self.decode.context, self.decode.sharding)

    @property
    def tokens(self) -> int:
        """How many tokens the slots hold, over all devices."""
        return self.decode.batch * self.decode.context

    @property
    def token_bytes(self) -> float:
        """What a token of the cache takes of one device, over the tokens of all devices."""
        return device_bytes(self.decode.cache) / self.tokens

    @functools.cached_property
    def programs(self) -> tuple[Compiled, Compiled]:
        """The decode loop, and the largest piece of a prompt.

        Raises:
          DoesNotFit: the device has not enough memory for one of them.
        """
        return self.decode.compile(), self.decode.compile_prefill(self.piece, whole=False)

    @functools.cached_property
    def beside(self) -> dict[str, int]:
        """Bytes of one device beside the cache: the weights, the slots' state, and what the programs need."""
        decode, piece = (hlo.memory(compiled) for compiled in self.programs)
        return {
            "weights": device_bytes(self.decode.model),
            "slots": device_bytes(self.decode.slots),
            "temporaries": max(memory.temporaries + memory.outputs - memory.aliased for memory in (decode, piece)),
            "code": decode.code + 2 * len(self.piece_sizes) * piece.code,
        }

    @property
    def room(self) -> int:
        """How many tokens of cache fit beside all that, over all devices."""
        return int((self.decode.chip.hbm - sum(self.beside.values())) / self.token_bytes)

    @property
    def fits(self) -> bool:
        """Whether the slots and what is kept beside them do."""
        try:
            return self.tokens + self.kept <= self.room
        except DoesNotFit:
            return False

    def round(self) -> Roofline:
        """One token of every slot."""
        return self.decode.model_of(self.programs[0])

    def piece_after(self, past: int) -> Roofline:
        """A piece of a prompt after `past` tokens of it, which its loops go through in blocks."""
        found = hlo.operations(self.programs[1])
        in_loops = [f"{op.name} {op.target}" for op in found if op.in_loop and op.opcode == "custom-call"]
        by_kernel = any("splash_mha" in name or CUDNN_ATTENTION in name for name in in_loops)
        places = self.decode.context // self.decode.sharding.parts("context")  # of a slot, on one device
        blocks = -(-min(past, places) // math.gcd(BLOCK if by_kernel else DENSE_BLOCK, places))
        return roofline(found, self.decode.chip, self.decode.kernel_cost, unknown_trips=blocks)


def plan_serve(
    config: ModelConfig,
    topology_name: str,
    rules: str = "serve_tp",
    slots: int = 8,
    context: int = 8192,
    *,
    axes: Mapping[str, int] | None = None,
    weights: str | None = None,
    cache: str = "bfloat16",
    dump: Path | None = None,
) -> dict[str, Any]:
    """Compiles a server's engine for a topology, and reports what it can hold and how fast it is.

    Args:
      slots, context: as `smollm3 serve` takes them.
      weights: a scheme of quantize.py; None is bfloat16. cache: bfloat16 or int8.
      dump: a file for the compiled decode loop.

    Returns:
      What `smollm3 plan serve --json` prints.

    Raises:
      OptionError: the model has not been trained for that context.
    """
    most = config.max_position_embeddings
    if context > most:
        raise OptionError(f"--context is {context}; the model has been trained for {most}")
    config = config if weights is None else with_scheme(config, weights)
    _, devices = topology(topology_name)
    sharding = sharding_for(config, devices, rules, axes)
    decode = DecodeSetting(config, sharding, 1, MIN_CAPACITY, cache)
    setting = ServeSetting.of(dataclasses.replace(decode, batch=slots_for(decode.model, slots)), context)
    head: dict[str, Any] = {
        "topology": topology_name,
        "devices": len(devices),
        "rules": rules,
        "mesh": dict(sharding.mesh.shape),
        "slots": setting.decode.batch,
        "context": context,
        "capacity": setting.decode.context,
        "weights": weights or "bfloat16",
        "cache": cache,
        "page": setting.piece,
        "assumptions": [*assumptions(sharding), FULL, GAP, OTHERS],
    }
    try:
        report = _report(setting)
    except DoesNotFit as refusal:
        report = _refusal(setting, refusal)
    else:
        if dump is not None:
            write_output(dump, setting.programs[0].as_text() or "")
    return {**head, **report}


def _refusal(setting: ServeSetting, refusal: DoesNotFit) -> dict[str, Any]:
    """What is known of a setting whose programs do not compile, and what to change."""
    cache = device_bytes(setting.decode.cache)
    largest = _largest_context(setting, int((refusal.limit - (refusal.needed - cache)) / setting.token_bytes))
    memory = {"limit": refusal.limit, "total": refusal.needed, "weights": device_bytes(setting.decode.model)}
    return {"fits": False, "hbm": {**memory, "cache": cache}, "largest_context": largest, "change": _change(largest)}


def _change(largest: int) -> str:
    return f"--context {largest}" if largest else "fewer --slots, --cache int8, --weights int8, or more devices"


def _report(setting: ServeSetting) -> dict[str, Any]:
    """
    Raises:
      DoesNotFit: a program alone is too large.
    """
    decode, beside, room = setting.decode, setting.beside, setting.room
    kept, cache = int(setting.kept * setting.token_bytes), device_bytes(decode.cache)
    largest = _largest_context(setting, room)
    report: dict[str, Any] = {"fits": setting.fits}
    if not setting.fits:
        alone = setting.tokens <= room
        report["change"] = ("--no-prefix-cache of `smollm3 serve`, or " if alone else "") + _change(largest)
    a_round, first = setting.round(), setting.piece_after(0)
    last, call = setting.piece_after(decode.context - setting.piece), MAX_STEPS * a_round.seconds
    return report | {
        "hbm": {
            "limit": decode.chip.hbm,
            "total": sum(beside.values()) + cache + kept,
            "cache": cache,
            "kept": kept,
            **beside,
        },
        "tokens": {"fit": room, "pages": room // setting.piece, "slots": setting.tokens, "kept": setting.kept},
        "largest_context": largest,
        "program": program(a_round, decode.sharding, a_round=True),
        "collectives": collectives(a_round),
        "modelled": {
            **times(a_round),
            "ms_per_token": 1e3 * a_round.seconds,
            "tokens_per_second": decode.batch / a_round.seconds,
        },
        # What a piece takes grows evenly with what lies before it.
        "prefill": {
            "tokens": setting.piece,
            "first_seconds": first.seconds,
            "last_seconds": last.seconds,
            "tokens_per_second": 2 * setting.piece / (first.seconds + last.seconds),
        },
        "gap": {"piece_seconds": last.seconds, "call_seconds": call, "seconds": last.seconds + call},
    }


def _largest_context(setting: ServeSetting, room: int) -> int:
    """The largest context of as many slots, half as much kept beside them, whose programs compile and leave it room; 0
    if there is none.

    Args:
      room: how many tokens of cache fit beside the setting's own programs.
    """
    most = setting.decode.config.max_position_embeddings
    contexts = {most, max(setting.context, MIN_CAPACITY), *(1 << i for i in range(most.bit_length()))}
    for context in sorted((n for n in contexts if n >= MIN_CAPACITY), reverse=True):
        tried = ServeSetting.of(setting.decode, context)
        if tried.tokens + tried.kept <= room and (tried.decode == setting.decode or tried.fits):
            return context
    return 0
