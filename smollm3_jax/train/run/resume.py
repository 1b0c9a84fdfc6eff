"""Going on from a checkpoint: the newest sound one, made with the same settings and data."""

import json
import logging
import re
from collections.abc import Mapping
from typing import Any

from ...errors import TrainingError
from ...job import raise_everywhere
from ...weights.key_map import parameters
from ..settings import as_table, stage_at
from ..settings_file import parse
from ..state import split
from . import checkpoint
from .checkpoint import Damaged
from .setup import Run, saved_part, state_like, with_base
from .stages import begin_of, config_in, rate_of

log = logging.getLogger(__name__)

# What may differ from what a checkpoint was made with: none of it changes what a step computes.
FREE = ("run.dir", "run.steps", "run.name", "mesh", "checkpoint", "eval", "guard", "log", "step.remat")
FREE += ("data.timeout", "data.bad_records", "data.eval_path", "data.eval_format")
# Nor where files lie: what is in them is compared by digests.
FREE += ("model.path", "model.config", "data.path")


def restore(run: Run, *, allow_restart: bool = False, allow_changes: bool = False) -> bool:
    """Goes to the newest sound checkpoint of the run's folder; False if there is none at all.

    Raises:
      TrainingError: all checkpoints are damaged and a restart is not allowed; or one was made with other settings and
        changes are not allowed.
      DataError: the corpora have changed.
    """
    progress, folder = run.progress, run.folder / "checkpoints"
    damaged = []
    for step in reversed(checkpoint.steps(folder)):
        try:
            with raise_everywhere():
                about = checkpoint.read_about(folder, step)
                _compare(run, about, allow_changes)
            progress.state = None  # what is to be replaced need not take memory
            like = saved_part(run, state_like(run, stage_at(run.settings, max(0, step - 1))[1]))
            progress.state = with_base(run, checkpoint.restore(folder, step, like))
            _compare_base(run, about.get("base"))
        except Damaged as reason:
            log.warning("%s; trying the one before", reason)
            run.monitor.event({"event": "damaged checkpoint", "step": step, "reason": str(reason)})
            damaged.append(step)
            run.checkpoints.damaged.add(step)
            continue
        run.batches.restore(about["data"], allow_changes)
        progress.step, progress.stage, progress.data = step, about["stage"], run.batches.state()
        progress.retries = max(progress.retries, about.get("retries", 0))
        progress.saved, progress.saved_data = step, progress.data
        log.info("going on from step %d", step)
        return True
    if damaged and not allow_restart:
        raise TrainingError(
            f"all {len(damaged)} checkpoints of {folder} are damaged; --allow-restart begins from the start"
        )
    return False


def _compare(run: Run, about: Mapping[str, Any], allow_changes: bool) -> None:
    """Raises TrainingError where what is trained, settings, architecture or tokenizer differ: what changes what a step
    computes."""
    before, now = about.get("trainable", run.trainable), run.trainable  # folders of before do not say
    if _trained(run, before) != _trained(run, now):
        raise TrainingError(
            f"trainable is {now!r}, and the checkpoint was made with {before!r}, which trains other parameters: "
            f"train(..., trainable={before!r}) goes on, another run.dir begins anew"
        )
    number, stage = stage_at(run.settings, max(0, about["step"] - 1))
    config = config_in(run.shapes.config, stage).to_hf()
    own = {**as_table(run.settings), "config.json": config, "tokenizer.json": run.tokenizer_digest}
    settings = parse(about["settings"], "the checkpoint")  # a setting that it does not know had its default
    then = {**as_table(settings), "config.json": about["config"], "tokenizer.json": about["tokenizer"]}
    before, now = (_flat(json.loads(json.dumps(x))) for x in (then, own))
    differ = [
        f"{key}: {before.get(key)!r} then, {now.get(key)!r} now"
        for key in sorted({*before, *now})
        if before.get(key) != now.get(key) and not _is_free(key)
    ]
    updates = about["step"] - 1 - begin_of(settings, number)
    if updates >= 0 and rate_of(settings, number)(updates) != rate_of(run.settings, number)(updates):
        steps = f"{settings.run.steps} then, {run.settings.run.steps} now"
        differ.append(f"run.steps: {steps}, on which the learning rate of the steps so far depends")
    if not differ:
        return
    if not allow_changes:
        raise TrainingError(
            f"the checkpoint was made with other settings: {'; '.join(differ[:10])}; --allow-changes goes on anyway"
        )
    log.warning("going on with other settings: %s", "; ".join(differ))


def _compare_base(run: Run, then: str | None) -> None:
    """Raises TrainingError where an adapter would go on with another model than it was trained on."""
    if run.base != then:
        raise TrainingError(
            f"{run.settings.model.path} is not the model that the adapter was trained on so far: its numbers have "
            "changed since; give the old one, model.path=MODEL, or begin anew in another run.dir"
        )


def _trained(run: Run, trainable: str | None) -> set[str]:
    trained = parameters(split(run.shapes, trainable)[0])
    return {name for name, parameter in trained.items() if parameter.get_value() is not None}


def _is_free(key: str) -> bool:
    return any(key == free or key.startswith(free + ".") for free in FREE) or bool(
        re.fullmatch(r"data\.sources\..*\.path", key)
    )


def _flat(table: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(table, dict) or not table:
        return {path: table}
    return {k: v for key, x in table.items() for k, v in _flat(x, f"{path}.{key}" if path else key).items()}
