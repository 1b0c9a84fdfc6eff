"""The training loop: batches in, checkpoints and metrics out, and an end that a restart goes on from.

All that a run needs to go on is in its folder: see folder.py.
"""

import contextlib
import logging
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

import jax
from etils import epath

from sharding.hardware import chip_of

from ... import compile_cache
from ...errors import DataError, OptionError, TrainingError
from ...files import remove, unfinished
from ...job import agree, raise_everywhere
from ...paths import is_remote
from ...support import version
from ..data.conversations import read_template
from ..data.files import refuse_within
from ..data.mixture import Batches, expanded, sources
from ..data.prefetch import on_mesh, prefetch
from ..settings import Settings, as_table, stage_at
from ..state import count, split
from . import checkpoint
from .evaluation import evaluate
from .folder import TOKENIZER, keep_texts, only_one, run_folder
from .program import memory_explained, program_for
from .reference_pass import reference_sums
from .resume import restore
from .setup import Run, first_state, in_stage, saved_part, set_up
from .stop import Stop

log = logging.getLogger(__name__)

STOPPED = 75  # the exit code of a run that was told to stop, and can go on: EX_TEMPFAIL


def train(
    settings: Settings,
    *,
    resume: bool = False,
    allow_restart: bool = False,
    allow_changes: bool = False,
    clean: bool = False,
    trainable: str | None = None,
) -> dict[str, Any]:
    """Trains until the settings' last step, the end of the data, or a signal.

    Args:
      resume: go on from the newest sound checkpoint of the run folder; from the beginning if it has none.
      allow_restart: begin anew even where all checkpoints are damaged.
      allow_changes: go on though settings or data are not those that the checkpoint was made with.
      clean: first remove whatever is no checkpoint there; what interrupted saves left goes anyway.
      trainable: a regular expression of the names of the parameters to train, as in `TrainState`; the others stay as
        they are. None trains all.

    Returns:
      "step", "stopped" (by a signal), "loss" of the last step, "skipped" and "held_out", "tokens" and "seconds" of this
      call, "checkpoint" (the last step's).

    Raises:
      SmolLM3Error, ShardingError: what is wrong, and the way out.
    """
    compile_cache.enable()
    agree("settings or versions", [as_table(settings), trainable, version("smollm3-jax"), version("jax")])
    stop = Stop()
    with stop.listening(), contextlib.ExitStack() as stack:
        with raise_everywhere():
            folder = run_folder(settings.run.dir)
            for source in sources(settings).values():
                refuse_within(folder, source)
            settings = expanded(settings)
            stack.enter_context(only_one(folder))
        if not resume and (folder / "checkpoints").is_dir() and checkpoint.steps(folder / "checkpoints"):
            raise OptionError(f"{folder} holds a run: --resume auto goes on with it, run.dir=FOLDER begins another")
        with raise_everywhere():
            if jax.process_index() == 0:
                _tidy(folder, clean)
        return _train(set_up(settings, trainable), stop, allow_restart, allow_changes)


def _tidy(folder: epath.Path, clean: bool) -> None:
    """Removes what earlier processes were ended in the midst of, so that it does not add up; the folder is locked."""
    found = (checkpoint.left_overs if clean else checkpoint.broken_off)(folder / "checkpoints")
    for left in [*found, *([] if is_remote(folder) else unfinished(folder))]:
        log.log(logging.WARNING if clean else logging.DEBUG, "removing %s", left)
        try:
            remove(left)
        except OSError:
            if clean:  # what nobody asked to remove stops no run
                raise


def _train(run: Run, stop: Stop, allow_restart: bool, allow_changes: bool) -> dict[str, Any]:
    settings, progress = run.settings, run.progress
    ended = "done"

    def close(kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        why = "" if error is None else str(error) or type(error).__name__
        run.monitor.close(f"ended by an error: {why}" if why else ended, progress.step)

    def resume() -> bool:
        return restore(run, allow_restart=allow_restart, allow_changes=allow_changes)

    with contextlib.ExitStack() as ends:
        ends.push(close)
        ends.enter_context(checkpoint.without_late_writes())
        ends.callback(run.checkpoints.close)
        if settings.objective.kind == "preference":  # while there is no state that takes memory
            run.reference = reference_sums(run, stop)
            if run.reference is None:
                ended = "stopped by a signal"
                progress.step = max(checkpoint.steps(run.folder / "checkpoints"), default=0)
                return {**run.monitor.summary(), "step": progress.step, "stopped": True, "checkpoint": progress.saved}
        resumed = resume()
        if not resumed:
            progress.state = first_state(run)
        with raise_everywhere():
            if jax.process_index() == 0:  # not before a resume has found that the tokenizer is the same
                keep_texts(run.texts, run.folder / TOKENIZER, _template(settings))
        run.monitor.begin(progress.step, resumed, _about(run))
        if not run.monitor.has_held_out(progress.step):
            evaluate(run, stop)
        try:
            while trouble := _steps(run, stop):
                _go_back(run, trouble, resume)
        except DataError:
            if jax.process_count() == 1:  # in a job, others may be on their way to the next step
                _keep(run)
            raise
        _keep(run)
        stopped = stop.agreed() and progress.step < settings.run.steps
        if progress.step == 0 and not stopped:
            d = settings.data
            raise DataError(
                f"data.epochs={d.epochs}: so often read, the documents do not fill a batch of data.rows={d.rows} "
                f"rows of data.length={d.length} tokens; make it smaller, or read them without end: data.epochs=0"
            )
        if progress.step < settings.run.steps:
            ended = "stopped by a signal" if stopped else "done: the data ended"
    return {**run.monitor.summary(), "step": progress.step, "stopped": stopped, "checkpoint": progress.saved}


def _template(settings: Settings) -> str | None:
    """The chat template that the run trains with, if it is not the model's own: exports have it."""
    path = settings.data.template
    if not path or settings.objective.kind == "pretrain":
        return None
    log.info("exports have the chat template that conversations are trained with, %s", path)
    return read_template(path)


def _steps(run: Run, stop: Stop) -> str | None:
    """Steps until the last one, the end of the data or a signal; or until trouble that the policy does not ignore:
    what it is."""
    s, progress = run.settings, run.progress

    def asked() -> bool:
        return stop.asked and jax.process_count() == 1  # in a job all have to come to the same step

    with contextlib.closing(prefetch(run.batches, progress.step, s.run.steps, s.data.timeout, asked)) as batches:
        begin = time.monotonic()
        for item in batches:
            if stop.agreed() or item is None:
                return None
            step, host_batch, data_after = item
            number, stage = stage_at(s, step)
            progress.state = in_stage(run, number, stage)
            if number != progress.stage:
                log.info("stage %d begins at step %d", number, progress.step)
            progress.stage = number
            if run.reference is not None:
                host_batch = run.reference.filled(host_batch)
            batch = on_mesh(host_batch, run.shapes.sharding)
            known = len(run.programs)
            program = program_for(run, number, stage, batch)
            if len(run.programs) > known:
                begin = time.monotonic()  # a step's time is that of its data and its products
            with run.monitor.profiled(step + 1), memory_explained(progress.state, batch):
                progress.state, metrics = program(progress.state, batch)
                metrics = {name: float(x) for name, x in jax.device_get(metrics).items()}
            progress.step = step + 1
            line = _line(run, metrics, time.monotonic() - begin, host_batch.tokens.size)
            trouble = run.monitor.step(line)
            if line["bad"]:
                run.monitor.skipped({"step": progress.step, "bad": line["bad"], "data": progress.data})
            progress.data = data_after
            run.checkpoints.check()
            if trouble and s.guard.policy != "ignore":
                return trouble
            if trouble:
                log.warning("step %d: %s", progress.step, trouble)
            if s.checkpoint.every and progress.step % s.checkpoint.every == 0:
                _save(run)
            evaluate(run, stop)
            begin = time.monotonic()
    if progress.step < s.run.steps:
        log.warning("the data ends at step %d of %d", progress.step, s.run.steps)
    return None


def _go_back(run: Run, trouble: str, resume: Callable[[], bool]) -> None:
    """To the last checkpoint, and on with the data after the trouble, if the policy says so."""
    s, progress = run.settings, run.progress
    progress.retries += 1
    if s.guard.policy == "stop" or progress.retries > s.guard.retries:
        raise TrainingError(
            f"step {progress.step}: {trouble}; the last checkpoint is of step {progress.saved}. "
            "guard.policy=rollback goes back to it and passes over the data since"
        )
    run.checkpoints.wait()
    before, data = progress.step, progress.data
    if not resume():
        raise TrainingError(f"step {before}: {trouble}; there is no checkpoint to go back to")
    # A new reader, as the old one's thread may be in the middle of a batch; it goes on after what made the trouble.
    run.batches = Batches(s, run.encode)
    run.batches.restore(data)
    progress.data = data
    log.warning("step %d: %s: back to step %d, without the data since", before, trouble, progress.step)
    run.monitor.event({"event": "rollback", "step": before, "to": progress.step, "reason": trouble})
    run.monitor.back_to(progress.step)


def _save(run: Run) -> None:
    progress = run.progress
    if progress.step == progress.saved and progress.data is progress.saved_data:
        return
    about = {
        "settings": as_table(run.settings),
        "stage": progress.stage,
        "data": progress.data,
        "retries": progress.retries,
        "tokenizer": run.tokenizer_digest,
        "trainable": run.trainable,
        "base": run.base,
        "config": progress.state.model.config.to_hf(),
        "generation_config": progress.state.model.generation_config.to_hf(),
    }
    with run.monitor.busy("saving"):
        run.checkpoints.save(progress.step, saved_part(run, progress.state), about)
    run.monitor.flush()
    progress.saved, progress.saved_data = progress.step, progress.data


def _keep(run: Run) -> None:
    """A checkpoint of where the run stands, whole when this returns."""
    if run.progress.step > 0:
        _save(run)
    run.checkpoints.wait()


def _line(run: Run, metrics: dict[str, float], seconds: float, tokens: int) -> dict[str, Any]:
    """A step's line of metrics.jsonl.

    Args:
      metrics: those of `train_step`; "updates" is taken out.
      seconds: that the step took, its data among them.
      tokens: of its batch, padding among them.
    """
    progress = run.progress
    rate: Any = run.optimizer(progress.stage)[1](int(metrics.pop("updates")))
    line = {"step": progress.step, "stage": progress.stage, **metrics, "learning_rate": float(rate), "seconds": seconds}
    line["bad"] = int(line["bad"])
    line["tokens_per_second"] = tokens / seconds
    chip = chip_of(jax.devices()[0])
    if chip is not None:
        # Two operations a parameter and token forward, and twice two backward, where a frozen one has one product less.
        state = progress.state
        useful = (4 * count(state.model) + 2 * count(split(state.model, state.trainable)[0])) * tokens
        line["mfu"] = useful / seconds / (chip.peak * jax.device_count())
    return line


def _about(run: Run) -> dict[str, Any]:
    """What is about to run, for people."""
    s, sharding = run.settings, run.shapes.sharding
    _, stage = stage_at(s, run.progress.step)
    return {
        "parameters": count(run.progress.state.model),
        "devices": jax.device_count(),
        "mesh": dict(sharding.mesh.shape) if sharding else None,
        "tokens_per_step": stage.rows * stage.length,
        "steps": s.run.steps,
        "weights": dict(stage.weights),
        "documents": {name: len(corpus) for name, corpus in run.batches.corpora.items()},
    }
