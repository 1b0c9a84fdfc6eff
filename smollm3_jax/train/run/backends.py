"""Where metrics go beside metrics.jsonl: TensorBoard and Weights & Biases, which may fail without the run."""

import logging
from collections.abc import Callable, Mapping

from etils import epath

from ...support import how_to_install
from ..settings import Settings, as_table

log = logging.getLogger(__name__)


def tensorboard(folder: epath.Path, settings: Settings) -> Callable[[int, Mapping[str, float]], None] | None:
    if not settings.log.tensorboard:
        return None
    try:
        from tensorboardX import SummaryWriter  # pyright: ignore[reportMissingImports]
    except ImportError:
        log.warning(f"log.tensorboard: {how_to_install('tensorboard')}; metrics.jsonl has it all")
        return None
    writer = SummaryWriter(str(folder / "tensorboard"))
    return _forgiving("tensorboard", lambda step, values: [writer.add_scalar(k, v, step) for k, v in values.items()])


def wandb(settings: Settings) -> Callable[[int, Mapping[str, float]], None] | None:
    if not settings.log.wandb:
        return None
    try:
        import wandb  # pyright: ignore[reportMissingImports]

        run = wandb.init(project=settings.log.wandb, name=settings.run.name or None, config=as_table(settings))
    except Exception as error:
        log.warning("log.wandb: %s; metrics.jsonl has it all", str(error).splitlines()[0])
        return None
    return _forgiving("wandb", lambda step, values: run.log(dict(values), step=step))


def _forgiving(name: str, write: Callable[[int, Mapping[str, float]], object]) -> Callable[..., None]:
    """The same backend, which after its first failure logs a warning and is not called again."""
    works = True

    def attempt(step: int, values: Mapping[str, float]) -> None:
        nonlocal works
        if works:
            try:
                write(step, values)
            except Exception as error:
                works = False
                log.warning("%s failed, training goes on without it: %s", name, error)

    return attempt
