"""A long prompt on a topology: its pieces, split over devices, their memory and the time to the first token.

All of it is asked of the engine's own programs: the largest piece of a prompt, and the decode loop of its one slot.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jax.stages import Compiled

from sharding import hlo
from sharding.mesh import device_bytes

from ..config import ModelConfig, with_yarn
from ..errors import OptionError
from ..files import write_output
from ..generation.places import capacity_for
from ..generation.prompts import piece_sizes, pieces
from ..weights.quantized import with_scheme
from .decode import DecodeSetting
from .devices import DoesNotFit, sharding_for, topology
from .report import assumptions, collectives, program, times

FIRST = "the first token: all pieces of the prompt, the last one padded, and a call of the decode loop for it"

CHANGE = "--weights int8, --cache int8, a --mesh that splits weights (tensor), or more devices"


def plan_prefill(
    config: ModelConfig,
    topology_name: str,
    rules: str = "serve_cp",
    length: int = 65536,
    *,
    axes: Mapping[str, int] | None = None,
    weights: str | None = None,
    cache: str = "bfloat16",
    dump: Path | None = None,
) -> dict[str, Any]:
    """Compiles the largest piece of a prompt and the decode loop after it for a topology, and reports what they take.

    Args:
      length: tokens of the prompt; a model that has been trained for less is stretched by YaRN.
      weights: a scheme of quantize.py; None is bfloat16. cache: bfloat16 or int8.
      dump: a file for the compiled piece.

    Returns:
      What `smollm3 plan prefill --json` prints.

    Raises:
      OptionError: the model's context cannot be stretched so far.
    """
    yarn = length / most if length > (most := config.max_position_embeddings) else None
    config = config if yarn is None else with_yarn(config, yarn)
    config = config if weights is None else with_scheme(config, weights)
    _, devices = topology(topology_name)
    sharding = sharding_for(config, devices, rules, axes)
    setting = DecodeSetting(config, sharding, 1, capacity_for(length), cache)
    if (parts := sharding.parts("batch")) > 1:
        raise OptionError(
            f"the rules {rules} split slots over {parts} devices, and a prompt is in one: choose serve_cp"
        )
    sizes = piece_sizes(sharding.platform, setting.context, sharding=sharding)
    starts = [start for start, *_ in pieces(length, sizes)]
    head = {
        "topology": topology_name,
        "devices": len(devices),
        "rules": rules,
        "mesh": dict(sharding.mesh.shape),
        "prompt": length,
        "capacity": setting.context,
        "yarn": yarn,
        "weights": weights or "bfloat16",
        "cache": cache,
        "piece": sizes[-1],
        "pieces": len(starts),
        "assumptions": [*assumptions(sharding), FIRST],
    }
    try:
        piece, decode = setting.compile_prefill(sizes[-1], whole=len(starts) == 1), setting.compile()
    except DoesNotFit as refusal:
        memory = {"limit": refusal.limit, "total": refusal.needed, **_held(setting)}
        return {**head, "fits": False, "change": CHANGE, "hbm": memory}
    if dump is not None:
        write_output(dump, piece.as_text() or "")
    return {**head, "fits": True, **_report(setting, piece, decode, starts, length)}


def _held(setting: DecodeSetting) -> dict[str, int]:
    return {"weights": device_bytes(setting.model), "cache": device_bytes(setting.cache)}


def _report(
    setting: DecodeSetting, piece: Compiled, decode: Compiled, starts: list[int], length: int
) -> dict[str, Any]:
    """What the programs take, for pieces of a prompt of `length` tokens that begin at `starts`."""
    memories, found = [hlo.memory(compiled) for compiled in (piece, decode)], hlo.operations(piece)
    hbm = {
        **_held(setting),
        "slots": device_bytes(setting.slots),
        "temporaries": max(memory.temporaries + memory.outputs - memory.aliased for memory in memories),
        "code": sum(memory.code for memory in memories),
    }
    models, a_round = [setting.piece_after(found, start) for start in starts], setting.model_of(decode)
    each = [times(model) for model in models]
    seconds = sum(model.seconds for model in models)
    return {
        "hbm": {"limit": setting.chip.hbm, "total": sum(hbm.values()), **hbm},
        "program": program(models[-1], setting.sharding),
        "collectives": collectives(models[-1]),
        # Of the whole prompt.
        "modelled": {
            **{name.replace("step", "prompt"): sum(x[name] for x in each) for name in each[0]},
            "tokens_per_second": length / seconds,
        },
        "first_piece_seconds": models[0].seconds,
        "last_piece_seconds": models[-1].seconds,
        "time_to_first_token_seconds": seconds + a_round.seconds,
        "ms_per_token_after": 1e3 * a_round.seconds,
    }
