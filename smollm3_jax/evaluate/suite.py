"""Tasks of lm-evaluation-harness from their names to their results; see `harness` for what answers them."""

import contextlib
import difflib
import json
import logging
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lm_eval import evaluator
from lm_eval.api.group import Group
from lm_eval.api.task import Task
from lm_eval.loggers import EvaluationTracker
from lm_eval.tasks import TaskManager
from lm_eval.utils import handle_non_serializable

from ..errors import DataError, HubError, OptionError, SaveError, SmolLM3Error, SupportError
from ..progress import busy
from .harness import EngineLM

log = logging.getLogger(__name__)

# This package's own tasks, which need no hub.
FOLDER = Path(__file__).with_name("tasks")
# For errors of what has none in closed form: a hundred times this is lm-eval's own number, for processes side by side.
BOOTSTRAPS = 1000
# Modules whose errors are about a network, or its absence.
OF_NETWORKS = ("huggingface_hub", "httpx", "requests", "urllib3", "aiohttp", "fsspec")


def load_tasks(
    names: Sequence[str], folders: Sequence[str | Path] = (), metadata: Mapping[str, Any] | None = None
) -> tuple[TaskManager, list[Task | Group]]:
    """Tasks, groups and tags by their names, patterns ("mmlu_*") or the paths of YAML files, with their data.

    Args:
      folders: of task files, beside this package's and lm-eval's. Where these or the former have all of the names, the
        14,000 files of the latter are not looked through.
      metadata: what tasks that make their data are told, such as the tokenizer.

    Raises:
      OptionError: a name or folder is not there; HubError: data cannot be fetched; SupportError: a task needs another
        package; DataError: anything else that is wrong with it.
    """
    for folder in folders:
        if not Path(folder).is_dir():
            raise OptionError(f"{folder} is no folder; --include-path names one of YAML files that say what a task is")
    options: dict[str, Any] = {"include_path": [FOLDER, *folders], "metadata": dict(metadata or {})}
    with busy("looking for the tasks"):
        manager = TaskManager(**options, include_defaults=False)
        if not all(_matches(manager, name) for name in names):
            manager = TaskManager(**options)
    found: list[Task | Group] = []
    for name in names:
        matches = _matches(manager, name)
        if not matches:
            near = difflib.get_close_matches(name, manager.all_tasks, 3)
            meant = f"; did you mean {' or '.join(near)}?" if near else ""
            raise OptionError(f"there is no task {name}{meant} (lm-eval's own, and those of --include-path)")
        for match in matches:
            if match in manager.all_groups and _strangers(manager, match):
                manager = TaskManager(**options)
            with busy(f"loading {match}"), _typed(match):
                loaded = manager._load_spec(match)
                found += loaded if isinstance(loaded, list) else [loaded]
    return manager, found


def _matches(manager: TaskManager, name: str) -> list[str]:
    return [name] if name.endswith((".yaml", ".yml")) and Path(name).is_file() else manager.match_tasks([name])


def _strangers(manager: TaskManager, group: str) -> bool:
    """Whether a group names tasks that the manager does not know, such as lm-eval's own in a user's group."""
    entry = manager.task_index[group]
    parts = (entry.cfg or {}).get("task") or []
    names = [part if isinstance(part, str) else part.get("task") for part in parts]
    return any(isinstance(name, str) and name not in manager.all_tasks for name in names)


@contextlib.contextmanager
def _typed(task: str) -> Iterator[None]:
    """What goes wrong while a task is loaded may be of any class: its data, its functions and a network are others'."""
    try:
        yield
    except SmolLM3Error:
        raise
    except ModuleNotFoundError as error:
        raise SupportError(f"the task {task} needs the package {error.name}: pip install {error.name}") from None
    except Exception as error:
        told = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        networks = type(error).__module__.split(".")[0] in OF_NETWORKS
        if networks or isinstance(error, ConnectionError) or "on the Hub" in told:
            raise HubError(
                f"the data of the task {task} cannot be fetched: {told}; run it once where there is a network, or copy "
                "its files into the cache of Hugging Face's datasets (HF_HOME)"
            ) from None
        raise DataError(f"the task {task} cannot be loaded: {type(error).__name__}: {told}") from None


def evaluate(
    lm: EngineLM,
    tasks: tuple[TaskManager, Sequence[Task | Group]],
    *,
    limit: int | None = None,
    shots: int | None = None,
    generation: Mapping[str, Any] | None = None,
    system: str | None = None,
    chat: bool = False,
    unsafe: bool = False,
    about: Mapping[str, Any] | None = None,
    output: Path | None = None,
) -> dict[str, Any]:
    """lm-eval's results, ready for JSON; under "smollm3_jax" the most tokens of a text, and how many of how many
    prompts and texts lost their beginning to it, which is logged, too.

    Args:
      limit: the number of questions of each task; None is all.
      shots: the number of examples before a question; None is each task's own.
      generation: over the tasks' generation_kwargs.
      system, chat: a system message, and whether prompts are chats.
      unsafe: tasks that run what a model writes may do so.
      about: the model and how it is held, with its name as "pretrained", for the results.
      output: a folder that gets the results and the answers as lm-eval writes them; None is none.

    Raises:
      OptionError: a task runs what a model writes, and `unsafe` is not given.
      SaveError: the results cannot be written.
    """
    manager, found = tasks
    if not unsafe:
        _refuse_unsafe(found)
    tracker = EvaluationTracker(output_path=None if output is None else str(output))
    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # lm-eval's bootstraps would fork a process that has jax's threads
    # It asks git about the folder that one stands in, which is not the harness's; where that is none, git says "fatal".
    evaluator.get_git_commit_hash = lambda: None
    lm.counted.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of other packages', about themselves
        results: Any = evaluator.simple_evaluate(
            model=lm,
            model_args=dict(about or {}),
            tasks=list[Any](found),
            task_manager=manager,
            num_fewshot=shots,
            limit=limit,
            gen_kwargs=dict(generation) if generation else None,
            system_instruction=system,
            apply_chat_template=chat,
            fewshot_as_multiturn=chat,
            confirm_run_unsafe_code=unsafe,
            bootstrap_iters=BOOTSTRAPS,
            log_samples=output is not None,
            evaluation_tracker=tracker,
        )
    samples = results.pop("samples", None)
    _add_cuts(results, lm)
    if output is not None:
        _write(tracker, results, samples, output)
    return json.loads(json.dumps(results, default=handle_non_serializable))


def _add_cuts(results: dict[str, Any], lm: EngineLM) -> None:
    """What has lost its beginning, to the results and to the log."""
    counts = {name: lm.counted[name] for name in ("prompts", "prompts_cut", "texts", "texts_cut")}
    results["smollm3_jax"] = {"max_length": lm.max_length, **counts}
    if lost := said_of_cuts(results):
        log.warning("%s", lost)


def said_of_cuts(results: Mapping[str, Any]) -> str:
    """How many of how many prompts and texts lost their beginning; empty where none did."""
    counts = results["smollm3_jax"]
    lost = [
        f"{counts[f'{what}_cut']} of {counts[what]} {what}" for what in ("prompts", "texts") if counts[f"{what}_cut"]
    ]
    return f"{' and '.join(lost)} lost their beginning: max_length is {counts['max_length']} tokens" if lost else ""


def _write(tracker: EvaluationTracker, results: Any, samples: Any, output: Path) -> None:
    tracker.save_results_aggregated(results=results, samples=samples)
    for name, of_task in samples.items():
        tracker.save_results_samples(task_name=name, samples=of_task)
    # The tracker says what went wrong in its log alone.
    written = output / str(tracker.general_config_tracker.model_name_sanitized)
    if not (written / f"results_{getattr(tracker, 'date_id', '')}.json").exists():
        raise SaveError(f"the results cannot be written into {written}; the answers are kept in {output}")


def _refuse_unsafe(tasks: Sequence[Task | Group]) -> None:
    for task in (one for item in tasks for one in (item.get_all_tasks() if isinstance(item, Group) else [item])):
        if getattr(task, "UNSAFE_CODE", False):
            raise OptionError(
                f"{task.task_name} runs what the model writes, on this machine: --confirm-run-unsafe-code allows that"
            )


def rows(results: Mapping[str, Any]) -> Iterator[tuple[str, str, str, float | None, float | None]]:
    """(task, shots, metric as "acc,none", value, standard error) of all results, the parts of a group after it."""
    for task, metrics in results["results"].items():
        for name, value in metrics.items():
            metric, _, filtered = name.partition(",")
            if not filtered or metric.endswith("_stderr"):
                continue
            error = metrics.get(f"{metric}_stderr,{filtered}")
            shots = results.get("n-shot", {}).get(task, "")
            yield task, str(shots), name, _number(value), _number(error)


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) else None
