"""The dearest kernels of a training step."""

from .profile import profile
from .run import Run
from .training import name_of, prepared


def part(run: Run) -> None:
    case = name_of(run, 1)

    def one() -> None:
        training, _ = prepared(run, 1)
        training.step()
        profile(run, case, training.step, 1)

    run.attempt(case, one)
