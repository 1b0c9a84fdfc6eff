"""What the roofline of `smollm3 plan` says of a program that was just compiled, beside what it was measured to take."""

from collections.abc import Callable, Sequence

import jax
from jax.stages import Compiled

from sharding import hlo
from sharding.hardware import chip_of
from sharding.roofline import Roofline

from .run import Run


def say_modelled(run: Run, case: str, compiled: Compiled, calls_of: Callable[[Compiled], Sequence[Roofline]]) -> None:
    """Says it, with the compiler's own memory; nothing where the chip is unknown to the model.

    Args:
      calls_of: the rooflines, by a plan's setting, of all calls of the program that the case is made of. For decoding
        that is one: a token of every slot, at full capacity.
    """
    if chip_of(jax.devices()[0]) is None:
        return
    calls, memory = calls_of(compiled), hlo.memory(compiled)
    run.say(
        "modelled",
        case,
        ms=1e3 * sum(call.seconds for call in calls),
        bytes=sum(call.bytes for call in calls),
        flops=sum(call.flops for call in calls),
        launches=sum(call.launches for call in calls),
        loop_launches=sum(call.loop_launches for call in calls),
        unknown_kernels=list(calls[0].opaque),
        unknown_loops=calls[0].unknown_loops,
        temporaries=memory.temporaries,
    )
