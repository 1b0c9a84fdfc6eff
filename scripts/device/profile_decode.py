"""The dearest kernels of decoding a token, at batch 1."""

from smollm3_jax.generation.device_loop import MAX_STEPS

from . import shape
from .decode import CASES, TINY_CASES, decoder, name_of
from .profile import profile
from .run import Run


def part(run: Run) -> None:
    batch, held, capacity = (TINY_CASES if run.tiny else CASES)[0]
    case = f"a token of {name_of(batch, held)}"

    def one() -> None:
        call, reset, _ = decoder(run, shape.random_model(shape.config(run.tiny)), batch, held, capacity)
        call()
        reset()
        profile(run, case, call, MAX_STEPS)

    run.attempt(case, one)
