"""What the roofline of `smollm3 plan` says of a program that was just compiled, beside what it was measured to take."""

from collections.abc import Callable

import jax
from jax.stages import Compiled

from sharding import hlo
from sharding.hardware import chip_of
from sharding.roofline import Roofline

from .run import Run


def say_modelled(run: Run, case: str, compiled: Compiled, model_of: Callable[[Compiled], Roofline]) -> None:
    """Says it, with the compiler's own memory; nothing where the chip is unknown to the model.

    Args:
      model_of: of a plan's setting. For decoding that is a token of every slot, at full capacity.
    """
    if chip_of(jax.devices()[0]) is None:
        return
    model, memory = model_of(compiled), hlo.memory(compiled)
    run.say(
        "modelled",
        case,
        ms=1e3 * model.seconds,
        bytes=model.bytes,
        flops=model.flops,
        launches=model.launches,
        loop_launches=model.loop_launches,
        unknown_kernels=list(model.opaque),
        unknown_loops=model.unknown_loops,
        temporaries=memory.temporaries,
    )
