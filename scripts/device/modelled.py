"""What the roofline says of a program that was just compiled, beside what it was measured to take."""

from collections.abc import Callable
from typing import Any

import jax
from jax.stages import Compiled

from sharding import hlo
from sharding.hardware import chip_of
from sharding.roofline import roofline

from .run import Run


def say_modelled(
    run: Run, case: str, compiled: Compiled, kernel_cost: Callable[..., Any], *, calls: float = 1, branches: bool = True
) -> None:
    """Says what the model of `smollm3 plan` makes of a program; nothing where the chip is unknown to it.

    Args:
      calls: into how many parts the modelled time falls (of a loop that is counted once: 1).
    """
    chip = chip_of(jax.devices()[0])
    if chip is None:
        return
    model = roofline(hlo.operations(compiled), chip, kernel_cost, branches=branches)
    memory = hlo.memory(compiled)
    run.say(
        "modelled",
        case,
        ms=1e3 * model.seconds / calls,
        bytes=model.bytes / calls,
        flops=model.flops / calls,
        unknown_kernels=list(model.opaque),
        unknown_loops=model.unknown_loops,
        temporaries=memory.temporaries,
    )
