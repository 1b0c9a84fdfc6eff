"""A server on a topology: how many tokens its cache can hold, its modelled speed, and its largest context.

All of it is asked of the engine's own programs: the decode loop of all its slots, and the largest piece of a prompt.
"""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from jax.stages import Compiled

from sharding import hlo
from sharding.mesh import device_bytes
from sharding.roofline import Roofline

from ..config import ModelConfig
from ..errors import OptionError
from ..files import write_output
from ..generation.device_loop import MAX_STEPS
from ..generation.places import MIN_CAPACITY, capacity_for, pool_for, pool_tokens, slots_for
from ..generation.prompts import SERVING_PIECES, kept_tokens, piece_sizes, prefix_pages
from ..lora import LoraStack
from ..weights.quantized import with_scheme
from .decode import DecodeSetting
from .devices import DoesNotFit, sharding_for, topology
from .report import assumptions, collectives, program, times

FULL = "every slot decodes, and the cache is full"
GAP = f"the longest gap: a prompt's last piece, and a call of {MAX_STEPS} tokens of every slot"
OTHERS = "pieces that are smaller or have log-probabilities: as much code as the largest; what copies: nothing"


@dataclasses.dataclass(frozen=True)
class ServeSetting:
    """A server's engine on one topology.

    decode: its slots, each with the capacity that holds `context` tokens, and their pool.
    """

    decode: DecodeSetting
    context: int

    @classmethod
    def of(cls, decode: DecodeSetting, context: int, cache_tokens: int | None = None) -> "ServeSetting":
        """Of the slots of `decode`; cache_tokens: what these share, None is as `smollm3 serve` has it.

        Raises:
          OptionError: there can be no such pool.
        """
        decode = dataclasses.replace(decode, context=capacity_for(context))
        tokens = pool_tokens(decode.model, decode.batch, context) if cache_tokens is None else cache_tokens
        pool = pool_for(tokens, _piece_sizes(decode)[-1], context, 0, decode.sharding)
        return cls(dataclasses.replace(decode, pool=pool), context)

    @property
    def piece(self) -> int:
        """Tokens of a whole piece of a prompt, and of a page."""
        return _piece_sizes(self.decode)[-1]

    @property
    def tokens(self) -> int:
        """How many tokens the slots hold, over all devices."""
        pages, page = self.decode.pool or (self.decode.batch, self.decode.context)
        return pages * page

    @property
    def kept(self) -> int:
        """How many tokens of prompts are kept beside the slots, over all devices; those in a pool take none of its."""
        if self.decode.pool is not None:
            return 0
        tokens = kept_tokens(self.decode.batch, self.context)
        return self.piece * prefix_pages(tokens, self.piece, self.decode.context, self.decode.sharding)

    @property
    def token_bytes(self) -> float:
        """What a token of the cache takes of one device, over the tokens of all devices."""
        return device_bytes(self.decode.cache) / self.tokens

    @property
    def weights(self) -> dict[str, int]:
        """Bytes of one device that the model takes: its weights, and the adapters beside them, if there are any."""
        model = self.decode.model
        if self.decode.adapters is None:
            return {"weights": device_bytes(model)}
        found = jax.tree.leaves(model, is_leaf=lambda x: isinstance(x, LoraStack))
        adapters = device_bytes([(x.a, x.b) for x in found if isinstance(x, LoraStack)])
        return {"weights": device_bytes(model) - adapters, "adapters": adapters}

    @functools.cached_property
    def programs(self) -> tuple[Compiled, Compiled] | DoesNotFit:
        """The decode loop, and the largest piece of a prompt; or what the compiler says if one of them does not fit."""
        try:
            return self.decode.compile(), self.decode.compile_prefill(self.piece, whole=False)
        except DoesNotFit as refusal:
            return refusal

    @property
    def beside(self) -> dict[str, int]:
        """Bytes of one device beside the cache: the model, the slots' state, and what the programs need."""
        assert not isinstance(self.programs, DoesNotFit)
        decode, piece = (hlo.memory(compiled) for compiled in self.programs)
        return {
            **self.weights,
            "slots": device_bytes(self.decode.slots),
            "temporaries": max(memory.temporaries + memory.outputs - memory.aliased for memory in (decode, piece)),
            "code": decode.code + 2 * len(_piece_sizes(self.decode)) * piece.code,
        }

    @property
    def room(self) -> int:
        """How many tokens of cache fit beside all that, over all devices."""
        if isinstance(refusal := self.programs, DoesNotFit):
            spare = refusal.limit - (refusal.needed - device_bytes(self.decode.cache))
        else:
            spare = self.decode.chip.hbm - sum(self.beside.values())
        return max(0, int(spare / self.token_bytes))

    @property
    def fits(self) -> bool:
        """Whether the slots and what is kept beside them do."""
        return not isinstance(self.programs, DoesNotFit) and self.tokens + self.kept <= self.room

    def round(self) -> Roofline:
        """One token of every slot."""
        assert not isinstance(self.programs, DoesNotFit)
        return self.decode.model_of(self.programs[0])

    def piece_after(self, past: int) -> Roofline:
        """A piece of a prompt after `past` tokens of it."""
        assert not isinstance(self.programs, DoesNotFit)
        return self.decode.piece_after(hlo.operations(self.programs[1]), past)


def _piece_sizes(decode: DecodeSetting) -> tuple[int, ...]:
    """Tokens of the pieces of prompts, each of which has two programs."""
    return piece_sizes(decode.sharding.platform, decode.context, SERVING_PIECES, decode.sharding)


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
    cache_tokens: int | None = None,
    adapters: tuple[int, int] | None = None,
    dump: Path | None = None,
) -> dict[str, Any]:
    """Compiles a server's engine for a topology, and reports what it can hold and how fast it is.

    Args:
      slots, context, cache_tokens: as `smollm3 serve` takes them.
      weights: a scheme of quantize.py; None is bfloat16. cache: bfloat16 or int8.
      adapters: how many lie beside the weights, on all projections, and the largest one's rank; None is none.
      dump: a file for the compiled decode loop.

    Returns:
      What `smollm3 plan serve --json` prints.

    Raises:
      OptionError: the model has not been trained for that context, or there can be no such pool.
    """
    most = config.max_position_embeddings
    if context > most:
        raise OptionError(f"--context is {context}; the model has been trained for {most}")
    config = config if weights is None else with_scheme(config, weights)
    _, devices = topology(topology_name)
    sharding = sharding_for(config, devices, rules, axes)
    decode = DecodeSetting(config, sharding, 1, MIN_CAPACITY, cache, adapters=adapters)
    setting = ServeSetting.of(dataclasses.replace(decode, batch=slots_for(decode.model, slots)), context, cache_tokens)
    if dump is not None and not isinstance(setting.programs, DoesNotFit):
        write_output(dump, setting.programs[0].as_text() or "")
    return {
        "topology": topology_name,
        "devices": len(devices),
        "rules": rules,
        "mesh": dict(sharding.mesh.shape),
        "slots": setting.decode.batch,
        "context": context,
        "capacity": setting.decode.context,
        "weights": weights or "bfloat16",
        "cache": cache,
        **({} if adapters is None else {"adapters": adapters[0], "adapter_rank": adapters[1]}),
        "page": setting.piece,
        **_fit(setting),
        **_speed(setting),
        "assumptions": [*assumptions(sharding), FULL, GAP, OTHERS],
    }


def _fit(setting: ServeSetting) -> dict[str, Any]:
    """What fits; if this does not, what to change."""
    decode, (largest, room) = setting.decode, _largest_context(setting)
    cache, kept = device_bytes(decode.cache), int(setting.kept * setting.token_bytes)
    sizes = {"cache": cache} | ({} if decode.pool else {"kept": kept})
    if isinstance(refusal := setting.programs, DoesNotFit):
        limit, total = refusal.limit, refusal.needed
        sizes |= setting.weights
    else:
        limit, room, sizes = decode.chip.hbm, setting.room, sizes | setting.beside
        total = sum(sizes.values())
    held = {"pool": setting.tokens} if decode.pool else {"slots": setting.tokens, "kept": setting.kept}
    return {
        "fits": setting.fits,
        **({} if setting.fits else {"change": _change(setting, largest, room)}),
        "hbm": {"limit": limit, "total": total, **sizes},
        "tokens": {"fit": room, "pages": room // setting.piece, **held},
        "largest_context": largest,
    }


def _change(setting: ServeSetting, largest: int, room: int) -> str:
    if not largest:
        return "fewer --slots, --cache int8, --weights int8, or more devices"
    if setting.decode.pool is None:
        alone = "--no-prefix-cache of `smollm3 serve`, or " if setting.tokens <= room else ""
        return f"{alone}--context {largest}"
    shorter = f"--context {largest} " if largest < setting.context else ""
    return f"{shorter}--cache-tokens {room // setting.piece * setting.piece}"


def _largest_context(setting: ServeSetting) -> tuple[int, int]:
    """The largest context with as many slots, and the tokens of cache that fit then; 0 if there is none.

    It is compiled: with a pool of all that fits, which one sequence may have alone, or with rows, and half as much kept
    beside them.
    """
    decode, most, room = setting.decode, setting.decode.config.max_position_embeddings, setting.room
    if decode.pool is not None:
        for _ in range(3):
            room = room // setting.piece * setting.piece
            if (context := min(most, room)) < MIN_CAPACITY:
                break
            tried = ServeSetting.of(decode, context, room)
            if tried.fits:
                return context, room
            # A compiler that refuses says to a hundredth of a gigabyte what it needs: it may be no less than there is.
            room = tried.room if tried.room < room else room - max(setting.piece, room // 200)
        return 0, 0
    contexts = {most, max(setting.context, MIN_CAPACITY), *(1 << i for i in range(most.bit_length()))}
    for context in sorted((n for n in contexts if n >= MIN_CAPACITY), reverse=True):
        tried = ServeSetting.of(decode, context)
        if tried.tokens + tried.kept <= room and (tried.decode == decode or tried.fits):
            return context, room
    return 0, room


def _speed(setting: ServeSetting) -> dict[str, Any]:
    """The modelled times of full slots; nothing where the programs do not fit."""
    if isinstance(setting.programs, DoesNotFit):
        return {}
    decode, a_round, first = setting.decode, setting.round(), setting.piece_after(0)
    last, call = setting.piece_after(decode.context - setting.piece), MAX_STEPS * a_round.seconds
    return {
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
