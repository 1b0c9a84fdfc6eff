"""What a run shows and writes: progress on standard error, metrics.jsonl, and backends that may fail."""

import collections
import contextlib
import json
import logging
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import jax
from etils import epath

from ... import progress, screen_text
from ...files import append, write
from ...paths import is_remote
from ..settings import Settings, as_table
from . import backends
from .metrics import as_text, known_lines, read_lines
from .report import write_report

if TYPE_CHECKING:
    from rich.progress import Progress

log = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 10.0
# A warning tells of a step that takes more than this many times the median.
STRAGGLER = 5.0
# A warning tells of a jump of the machine's clock by more than this many seconds.
CLOCK_JUMP = 60.0


class Monitor:
    """What one run writes and shows. Only process 0 does; all watch the loss."""

    def __init__(self, folder: epath.Path, settings: Settings, environment: Mapping[str, Any]):
        self._folder, self._settings, self._environment = folder, settings, environment
        self._first = jax.process_index() == 0
        # Of the last steps alone, as a run may take millions: seconds, and (step, loss) of those with an update.
        self._seconds: collections.deque[float] = collections.deque(maxlen=50)
        self._losses: collections.deque[tuple[int, float]] = collections.deque(maxlen=settings.guard.window)
        self._sums = {"loss": None, "tokens": 0, "skipped": 0, "held_out": None}
        self._held_out_at = -1
        self._skips = 0
        self._begin = self._timed = self._said = time.monotonic()
        self._start = 0
        self._bar: Progress | None = None
        self._backends: list[Callable[[int, Mapping[str, float]], None]] = []
        self._profiling = False
        self._unwritten: dict[str, str] = {}
        self._about: Mapping[str, Any] = {}
        self._redirected: list[logging.StreamHandler] = []
        self._clock = time.time() - time.monotonic()

    # --- beginning and end --------------------------------------------------------------------------------

    def begin(self, step: int, resumed: bool, about: Mapping[str, Any]) -> None:
        """Before the first step: what is known of the steps so far, and what is about to run."""
        self._start, self._begin, self._about = step, time.monotonic(), about
        self._timed = self._begin
        self._clock = time.time() - self._begin
        if resumed:
            lines, others = known_lines(self._folder / "metrics.jsonl")
            if others and self._first:
                log.warning("metrics.jsonl: %d lines that are no run's are left out", others)
            for line in lines:
                if line["step"] <= step:
                    self._remember(line)
        self._cut(step if resumed else -1)
        if not self._first:
            return
        self._write("settings.json", json.dumps(as_table(self._settings), indent=2) + "\n")
        self._write("environment.json", json.dumps(self._environment, indent=2) + "\n")
        self._backends = [
            b for b in (backends.tensorboard(self._folder, self._settings), backends.wandb(self._settings)) if b
        ]
        self._say(_headline(about))
        self._open_bar(step)

    def close(self, state: str, step: int) -> None:
        """state, step: how the run ended and where, for the report."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
            for handler in self._redirected:
                handler.setStream(sys.stderr)
        self._end_profile()
        if not self._first:
            return
        self.flush()
        if not self._about:  # it did not begin, and what was reported before holds
            return
        with self._surviving("report.html"):
            write_report(self._folder, {"state": state, "step": step, **self.summary(), **self._about})

    def summary(self) -> dict[str, Any]:
        """Of the whole run, but for "tokens" and "seconds", which are those of this call."""
        return {**self._sums, "seconds": time.monotonic() - self._begin}

    def has_held_out(self, step: int) -> bool:
        """Whether metrics.jsonl has the held-out losses of a step."""
        return self._held_out_at == step

    def _remember(self, line: Mapping[str, Any]) -> None:
        sums = self._sums
        if "held_out" in line:
            self._held_out_at, sums["held_out"] = line["step"], line["held_out"]
            return
        self._seconds.append(line["seconds"])
        if math.isfinite(line["loss"]):
            self._losses.append((line["step"], line["loss"]))
        sums["loss"], sums["skipped"] = line["loss"], sums["skipped"] + bool(line["bad"])
        if line["step"] > self._start:
            sums["tokens"] += int(line["tokens"])

    def _cut(self, step: int) -> None:
        """Removes what comes after a step from metrics.jsonl: it is computed again."""
        if not self._first:
            return
        with self._surviving("metrics.jsonl"):
            kept = [line for line in read_lines(self._folder / "metrics.jsonl") if line["step"] <= step]
            self._write("metrics.jsonl", "".join(as_text(line) for line in kept))

    # --- as it goes ---------------------------------------------------------------------------------------

    def step(self, line: dict[str, Any]) -> str | None:
        """Records a step; says what is wrong with it, if it is reason to give up."""
        guard = self._settings.guard
        clock = time.time() - time.monotonic()
        if abs(jump := clock - self._clock) > CLOCK_JUMP:
            log.warning("the machine's clock jumped by %.0f s: nothing of a run depends on it", jump)
            self._clock = clock
        if len(self._seconds) > 10 and line["seconds"] > STRAGGLER * (usual := statistics.median(self._seconds)):
            log.warning("step %d took %.1f s, others %.1f", line["step"], line["seconds"], usual)
        window = [loss for _, loss in self._losses]
        self._remember(line)
        if line["step"] % self._settings.log.every == 0 or line["bad"]:
            self._append("metrics.jsonl", line)
            for backend in self._backends:
                backend(line["step"], {k: v for k, v in line.items() if isinstance(v, (int, float))})
        self._advance(line)
        loss = line["loss"]
        self._skips = self._skips + 1 if not math.isfinite(loss) else 0
        if guard.skips and self._skips >= guard.skips:
            return f"{self._skips} steps in a row were not finite"
        if not math.isfinite(loss):
            log.warning("step %d is not finite and was skipped", line["step"])
            return None
        if guard.spike and len(window) >= min(20, guard.window):
            limit = statistics.mean(window) + guard.spike * statistics.stdev(window)
            if loss > limit:
                return f"the loss jumped to {loss:.4g}, beyond {limit:.4g}"
        return None

    def back_to(self, step: int) -> None:
        """Forgets what came after a step."""
        self._losses = collections.deque((x for x in self._losses if x[0] <= step), self._losses.maxlen)
        self._skips = 0
        self.flush()
        self._cut(step)

    def held_out(self, step: int, found: Mapping[str, Any]) -> None:
        line = {"step": step, "held_out": dict(found)}
        self._remember(line)
        self._append("metrics.jsonl", line)
        of_text = {name: x["nats_per_token"] for name, x in found.items() if "nats_per_token" in x}
        of_pairs = {name: x for name, x in found.items() if name not in of_text}
        numbers = {f"held_out/{name}": x for name, x in of_text.items()}
        numbers |= {f"held_out/{name}/{key}": value for name, x in of_pairs.items() for key, value in x.items()}
        for backend in self._backends:
            backend(step, numbers)
        if of_text:
            text = ", ".join(f"{name} {x:.4f}" for name, x in of_text.items())
            self._say(f"step {step}: held out, nats a token: {text}")
        for name, x in of_pairs.items():
            rewards = f"accuracy {x['rewards/accuracies']:.3f}, margin {x['rewards/margins']:.4f}"
            self._say(f"step {step}: held out, {name}: loss {x['loss']:.4f}, {rewards} ({x['pairs']:,} pairs)")

    def event(self, line: Mapping[str, Any]) -> None:
        self._append("events.jsonl", line)

    def skipped(self, line: Mapping[str, Any]) -> None:
        self._append("skipped.jsonl", line)

    @contextlib.contextmanager
    def busy(self, what: str) -> Iterator[None]:
        """For what takes a while between steps."""
        begin = time.monotonic()
        if self._bar is not None:
            self._bar.update(self._task, what=screen_text.plain(what))
        yield
        if self._bar is not None:
            self._bar.update(self._task, what="training")
        elif self._first and time.monotonic() - begin > 2:
            self._say(f"{what}: {time.monotonic() - begin:.1f} s")

    @contextlib.contextmanager
    def profiled(self, step: int) -> Iterator[None]:
        """Profiles the steps that log.profile names, into the run folder."""
        first, _, last = self._settings.log.profile.partition("-")
        if first and int(first) <= step <= int(last or first) and not self._profiling:
            with self._surviving("profile"):
                jax.profiler.start_trace(str(self._folder / "profile"))
                self._profiling = True
        yield
        if self._profiling and step >= int(last or first):
            self._end_profile()

    def _end_profile(self) -> None:
        if self._profiling:
            self._profiling = False
            with self._surviving("profile"):
                jax.profiler.stop_trace()

    # --- how ----------------------------------------------------------------------------------------------

    def _open_bar(self, step: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
        from rich.table import Column

        console = Console(stderr=True)
        if not (progress.shown and console.is_terminal):
            return
        # Names of sources are in them, which are no markup.
        what, numbers = (TextColumn(f"{{task.fields[{name}]}}", markup=False) for name in ("what", "numbers"))
        # Where it is narrow, the bar gives way, then the end of the numbers.
        wide = 2 * len(str(self._settings.run.steps)) + 1
        steps = MofNCompleteColumn(table_column=Column(no_wrap=True, min_width=wide))
        left = TimeRemainingColumn(table_column=Column(no_wrap=True, min_width=7))
        self._bar = Progress(what, BarColumn(), steps, numbers, left, console=console)
        own = sys.stderr
        self._bar.start()  # from here on, what is written to sys.stderr appears above the bar, log lines too
        for handler in logging.getLogger().handlers:
            if isinstance(handler, logging.StreamHandler) and handler.stream is own:
                handler.setStream(sys.stderr)
                self._redirected.append(handler)
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
            return
        done = line["step"] - self._start
        if done == 1:  # what came before it, compilation above all, says nothing of the rest
            self._timed = time.monotonic() - line["seconds"]
        if time.monotonic() - self._said >= SECONDS_BETWEEN_LINES:
            left = (time.monotonic() - self._timed) / done * (self._settings.run.steps - line["step"])
            self._said = time.monotonic()
            self._say(f"step {line['step']} of {self._settings.run.steps}: {numbers}, {left:,.0f} s left")

    def _say(self, text: str) -> None:
        if not self._first:
            return
        shown = screen_text.plain(text)
        if self._bar is not None:
            self._bar.console.print(shown, highlight=False, markup=False, emoji=False)
        elif progress.shown:
            print(f"smollm3: {shown}", file=sys.stderr, flush=True)

    def _write(self, name: str, text: str) -> None:
        with self._surviving(name):
            write(self._folder / name, text)
            self._unwritten.pop(name, None)

    def _append(self, name: str, line: Mapping[str, Any]) -> None:
        if not self._first:
            return
        self._unwritten[name] = self._unwritten.get(name, "") + as_text(line)
        if is_remote(self._folder):
            return
        with self._surviving(name):  # what does not fit onto the disk is written when there is room again
            append(self._folder / name, self._unwritten[name])
            del self._unwritten[name]

    def flush(self) -> None:
        """Writes what is not written yet. Object stores know no appending: there, logs are written again whole, and
        so less often."""
        for name, text in list(self._unwritten.items()):
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


def _headline(about: Mapping[str, Any]) -> str:
    share = ", ".join(f"{name} {100 * weight:.4g} %" for name, weight in about["weights"].items() if weight)
    documents = sum(about["documents"].values())
    return (
        f"{about['parameters']:,} parameters, {about['devices']} devices, {about['steps']:,} steps of "
        f"{about['tokens_per_step']:,} tokens, {documents:,} documents: {share}"
    )
