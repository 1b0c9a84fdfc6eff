"""What a run shows and writes: progress on standard error, metrics.jsonl, and backends that may fail."""

import contextlib
import json
import logging
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from etils import epath

from ..weights.bucket import is_remote
from .settings import Settings, as_table

log = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 10.0
# A step that takes so many times the median is said to.
STRAGGLER = 5.0


class Monitor:
    """Of one run. Only process 0 writes and shows; all watch the loss."""

    def __init__(
        self,
        folder: epath.Path,
        settings: Settings,
        environment: Mapping[str, Any],
        show: Callable[[Mapping[str, Any]], None] | None = None,
    ):
        self._folder, self._settings, self._show = folder, settings, show
        self._environment = environment
        self._first = jax.process_index() == 0
        self._lines: list[dict[str, Any]] = []
        self._losses: list[float] = []
        self._skips = 0
        self._begin = self._said = time.monotonic()
        self._start = 0
        self._bar: Any = None
        self._backends: list[Callable[[int, Mapping[str, float]], None]] = []
        self._profiling = False
        self._behind: dict[str, str] = {}

    # --- beginning and end --------------------------------------------------------------------------------

    def begin(self, step: int, resumed: bool, about: Mapping[str, Any]) -> None:
        """Before the first step: what is known of the steps so far, and what is about to run."""
        self._start, self._begin = step, time.monotonic()
        self._lines = [x for x in read_lines(self._folder / "metrics.jsonl") if x["step"] <= step] if resumed else []
        self._losses = [x["loss"] for x in self._lines if "loss" in x and math.isfinite(x["loss"])]
        if not self._first:
            return
        self._write("settings.json", json.dumps(as_table(self._settings), indent=2) + "\n")
        self._write("environment.json", json.dumps(self._environment, indent=2) + "\n")
        # What was logged behind the checkpoint is computed again.
        self._write("metrics.jsonl", "".join(_text(line) for line in self._lines))
        self._backends = [b for b in (_tensorboard(self._folder, self._settings), _wandb(self._settings)) if b]
        self._say(_headline(about))
        self._open_bar(step)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        if not self._first:
            return
        self.flush()
        with self._surviving("report.html"):
            from .report import write_report

            write_report(self._folder)

    def summary(self) -> dict[str, Any]:
        steps = [x for x in self._lines if "loss" in x]
        now = [x for x in steps if x["step"] > self._start]
        return {
            "loss": steps[-1]["loss"] if steps else None,
            "tokens": int(sum(x["tokens"] for x in now)),
            "seconds": time.monotonic() - self._begin,
            "skipped": sum(1 for x in steps if x["bad"]),
            "held_out": next((x["held_out"] for x in reversed(self._lines) if "held_out" in x), None),
        }

    # --- as it goes ---------------------------------------------------------------------------------------

    def step(self, line: dict[str, Any]) -> str | None:
        """Records a step; says what is wrong with it, if it is reason to give up."""
        guard = self._settings.guard
        self._lines.append(line)
        if line["step"] % self._settings.log.every == 0 or line["bad"]:
            self._append("metrics.jsonl", line)
            for backend in self._backends:
                backend(line["step"], {k: v for k, v in line.items() if isinstance(v, (int, float))})
        self._advance(line)
        if self._show is not None and self._first:
            self._show(line)
        recent = [x["seconds"] for x in self._lines[-50:-1] if "seconds" in x]
        if len(recent) > 10 and line["seconds"] > STRAGGLER * statistics.median(recent):
            log.warning("step %d took %.1f s, others %.1f", line["step"], line["seconds"], statistics.median(recent))
        loss, window = line["loss"], self._losses[-guard.window :]
        self._skips = self._skips + 1 if not math.isfinite(loss) else 0
        if guard.skips and self._skips >= guard.skips:
            return f"{self._skips} steps in a row were not finite"
        if not math.isfinite(loss):
            log.warning("step %d is not finite and was skipped", line["step"])
            return None
        self._losses.append(loss)
        if guard.spike and len(window) >= min(20, guard.window):
            limit = statistics.mean(window) + guard.spike * statistics.stdev(window)
            if loss > limit:
                return f"the loss jumped to {loss:.4g}, beyond {limit:.4g}"
        return None

    def back_to(self, step: int) -> None:
        """Forgets what came behind a step."""
        self._lines = [x for x in self._lines if x["step"] <= step]
        self._losses = [x["loss"] for x in self._lines if "loss" in x and math.isfinite(x["loss"])]
        self._skips = 0
        if self._first:
            self._write("metrics.jsonl", "".join(_text(line) for line in self._lines))

    def held_out(self, step: int, found: Mapping[str, Any]) -> None:
        line = {"step": step, "held_out": dict(found)}
        self._lines.append(line)
        self._append("metrics.jsonl", line)
        for backend in self._backends:
            backend(step, {f"held_out/{name}": x["nats_per_token"] for name, x in found.items()})
        text = ", ".join(f"{name} {x['nats_per_token']:.4f}" for name, x in found.items())
        self._say(f"step {step}: held out, nats a token: {text}")

    def event(self, line: Mapping[str, Any]) -> None:
        self._append("events.jsonl", line)

    def skipped(self, line: Mapping[str, Any]) -> None:
        self._append("skipped.jsonl", line)

    @contextlib.contextmanager
    def busy(self, what: str) -> Iterator[None]:
        """For what takes a while between steps."""
        begin = time.monotonic()
        if self._bar is not None:
            self._bar.update(self._task, what=what)
        yield
        if self._bar is not None:
            self._bar.update(self._task, what="training")
        elif self._first and time.monotonic() - begin > 2:
            print(f"smollm3: {what}: {time.monotonic() - begin:.1f} s", file=sys.stderr, flush=True)

    @contextlib.contextmanager
    def profiled(self, step: int) -> Iterator[None]:
        """Profiles the steps that log.profile names, into the run folder."""
        first, _, last = self._settings.log.profile.partition("-")
        if first and step == int(first) and not self._profiling:
            jax.profiler.start_trace(str(self._folder / "profile"))
            self._profiling = True
        yield
        if self._profiling and step >= int(last or first):
            jax.profiler.stop_trace()
            self._profiling = False

    # --- how ----------------------------------------------------------------------------------------------

    def _open_bar(self, step: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        console = Console(stderr=True)
        if not console.is_terminal or self._show is not None:
            return
        columns = (TextColumn("{task.fields[what]}"), BarColumn(), MofNCompleteColumn())
        self._bar = Progress(*columns, TextColumn("{task.fields[numbers]}"), TimeRemainingColumn(), console=console)
        self._bar.start()
        self._task = self._bar.add_task("", total=self._settings.run.steps, completed=step, what="training", numbers="")

    def _advance(self, line: Mapping[str, Any]) -> None:
        if not self._first:
            return
        mfu = f", MFU {100 * line['mfu']:.1f} %" if "mfu" in line else ""
        numbers = (
            f"loss {line['loss']:.4f}, lr {line['learning_rate']:.2e}, {line['tokens_per_second']:,.0f} tokens/s{mfu}, "
            f"|g| {line['grad_norm']:.2f}"
        )
        if self._bar is not None:
            self._bar.update(self._task, completed=line["step"], numbers=numbers)
        elif self._show is None and time.monotonic() - self._said >= SECONDS_BETWEEN_LINES:
            done = line["step"] - self._start
            left = (time.monotonic() - self._begin) / done * (self._settings.run.steps - line["step"])
            self._said = time.monotonic()
            self._say(f"step {line['step']} of {self._settings.run.steps}: {numbers}, {left:,.0f} s left")

    def _say(self, text: str) -> None:
        if not self._first:
            return
        if self._bar is not None:
            self._bar.console.print(text, highlight=False)
        else:
            print(f"smollm3: {text}", file=sys.stderr, flush=True)

    def _write(self, name: str, text: str) -> None:
        with self._surviving(name):
            temporary = self._folder / f".{name}.new"
            temporary.write_text(text)
            temporary.replace(self._folder / name)
            self._behind.pop(name, None)

    def _append(self, name: str, line: Mapping[str, Any]) -> None:
        if not self._first:
            return
        text = _text(line)
        if is_remote(self._folder):
            self._behind[name] = self._behind.get(name, "") + text
            return
        with self._surviving(name), (self._folder / name).open("a") as file:
            file.write(text)

    def flush(self) -> None:
        """Object stores know no appending: there, logs are written again whole, and so less often."""
        for name, text in list(self._behind.items()):
            file = self._folder / name
            with self._surviving(name):
                self._write(name, (file.read_text() if file.exists() else "") + text)

    @contextlib.contextmanager
    def _surviving(self, what: str) -> Iterator[None]:
        """Training goes on without logs."""
        try:
            yield
        except Exception as error:
            log.warning("%s could not be written: %s", what, error)


def _text(line: Mapping[str, Any]) -> str:
    """A line of JSON, which knows no NaN: numbers that are not finite are null there."""
    plain = {key: None if isinstance(x, float) and not math.isfinite(x) else x for key, x in line.items()}
    return json.dumps(plain) + "\n"


def read_lines(path: epath.Path) -> list[dict[str, Any]]:
    """Of a file of JSON lines, null read as NaN; one that a kill cut short is passed over."""
    lines = []
    if path.exists():
        for text in path.read_text().splitlines():
            with contextlib.suppress(ValueError):
                lines.append({key: math.nan if x is None else x for key, x in json.loads(text).items()})
    return lines


def _headline(about: Mapping[str, Any]) -> str:
    share = ", ".join(f"{name} {100 * weight:.4g} %" for name, weight in about["weights"].items() if weight)
    documents = sum(about["documents"].values())
    return (
        f"{about['parameters']:,} parameters, {about['devices']} devices, {about['steps']:,} steps of "
        f"{about['tokens_per_step']:,} tokens, {documents:,} documents: {share}"
    )


def _tensorboard(folder: epath.Path, settings: Settings) -> Callable[[int, Mapping[str, float]], None] | None:
    if not settings.log.tensorboard:
        return None
    try:
        from tensorboardX import SummaryWriter  # pyright: ignore[reportMissingImports]
    except ImportError:
        log.warning("log.tensorboard: pip install 'smollm3-jax[tensorboard]'; metrics.jsonl has it all")
        return None
    writer = SummaryWriter(str(folder / "tensorboard"))
    return _forgiving("tensorboard", lambda step, values: [writer.add_scalar(k, v, step) for k, v in values.items()])


def _wandb(settings: Settings) -> Callable[[int, Mapping[str, float]], None] | None:
    if not settings.log.wandb:
        return None
    try:
        import wandb  # pyright: ignore[reportMissingImports]

        run = wandb.init(project=settings.log.wandb, name=settings.run.name or None, config=as_table(settings))
    except Exception as error:
        log.warning("log.wandb: %s; metrics.jsonl has it all", str(error).splitlines()[0])
        return None
    return _forgiving("wandb", lambda step, values: run.log(dict(values), step=step))


def _forgiving(name: str, write: Callable[[int, Mapping[str, float]], Any]) -> Callable[..., None]:
    """The same, but for what fails: said once, then left alone."""
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
