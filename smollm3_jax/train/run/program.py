"""The compiled step of a run."""

import contextlib
from collections.abc import Iterator

from jax.stages import Compiled

from sharding.hardware import GIB
from sharding.mesh import device_bytes
from sharding.rules import PyTree

from ...errors import TrainingError, lacks_memory
from ..options import StepOptions, compiler_options
from ..settings import Stage
from ..state import Batch, TrainState
from ..step import train_step
from .setup import Run


def program_for(run: Run, number: int, stage: Stage, batch: Batch) -> Compiled:
    """The step of a stage for batches of this shape, compiled once. It takes the state and a batch."""
    key = (number, batch.tokens.shape)
    if key not in run.programs:
        s, state = run.settings, run.progress.state
        options = StepOptions(s.model.dtype, s.step.remat, stage.micro_batches, s.run.seed)
        lowered = train_step.lower(
            state, batch, objective=run.objective, optimizer=run.optimizer(number)[0], options=options
        )
        sharding = state.model.sharding
        devices = 1 if sharding is None else sharding.mesh.size
        compile_with = compiler_options(state.model.platform, s.step.deterministic, devices)
        with run.monitor.busy("compiling the step"), memory_explained(state, batch):
            run.programs[key] = lowered.compile(compile_with)
    return run.programs[key]


@contextlib.contextmanager
def memory_explained(state: TrainState, batch: Batch) -> Iterator[None]:
    """Turns a lack of memory into TrainingError: what takes it, and three ways out."""

    def share(tree: PyTree) -> str:
        return f"{device_bytes(tree) / GIB:.2f} GiB"

    parts = f"parameters {share(state.model)}, optimizer {share(state.optimizer)}, batch {share(batch)}"
    try:
        yield
    except Exception as error:
        if not lacks_memory(error):
            raise
        raise TrainingError(
            f"the step does not fit: {str(error).splitlines()[0][:200]}; on a device: {parts}, the rest activations. "
            "Ways out: step.remat=full; step.micro_batches=2 or more; mesh.rules=fsdp on more devices"
        ) from None
