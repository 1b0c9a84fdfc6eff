"""A run folder that `smollm3 train` is started in again and again, and what is compared of it."""

import dataclasses
import json
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from smollm3_jax.files import write

from .common import RECIPES, Fault, Soak, log_file, resident, wait_for

STEPS, EVERY, KEEP, TIMEOUT = 40, 3, 2, 4.0
PATIENCE = 240.0  # seconds that a step or an end may take


@dataclasses.dataclass
class Leg:
    """One start of the command and its end."""

    code: int
    said: str  # on standard error, where that was to be seen
    highest: float  # MB of memory
    reached: bool  # whether it came to the moment of the fault


class Run:
    """A run folder on the small disk, and what may be done to the command that trains there."""

    def __init__(self, soak: Soak, name: str):
        self.soak, self.folder, self.log = soak, soak.disk.folder / name, soak.out / f"{name}.log"
        self.corpus = soak.out / "soaked.jsonl"
        if not self.corpus.exists():
            write(self.corpus, (RECIPES / "sonnets.jsonl").read_bytes())
        settings = {"run.dir": self.folder, "run.steps": STEPS, "model.path": soak.model, "data.path": self.corpus}
        settings |= {"checkpoint.every": EVERY, "checkpoint.keep": KEEP, "data.timeout": TIMEOUT}
        self.words = ["train", "--config", "quick", *(f"{name}={value}" for name, value in settings.items())]
        self.words += ["--resume", "auto"]
        self.damaged: set[tuple[str, int]] = set()  # name and number of folders of checkpoints

    def words_now(self) -> list[str]:
        """The command, which may begin anew only where no checkpoint is sound any more."""
        lost = bool(self.damaged) and {(x.name, x.stat().st_ino) for x in self.checkpoints} <= self.damaged
        return [*self.words, "--allow-restart"] if lost else self.words

    @property
    def checkpoints(self) -> list[Path]:
        folder = self.folder / "checkpoints"
        return sorted(x for x in folder.iterdir() if x.name.isdecimal()) if folder.is_dir() else []

    @property
    def step(self) -> int:
        return max(losses(self.folder), default=0)

    def leg(
        self, inject: Callable[[subprocess.Popen, bool], Any], fault: Fault | None = None, stderr: Any = None
    ) -> Leg:
        """Starts the command, waits for the moment of a fault, lets `inject` do it, and waits for the end."""
        with log_file(self.log) as log:
            process = self.soak.start(*self.words_now(), stderr=log if stderr is None else stderr)
        highest: list[float] = []
        watch = threading.Thread(target=_watch, args=(process, highest))
        watch.start()
        reached = fault is None or self.reach(process, fault)
        inject(process, reached)
        if not wait_for(lambda: process.poll() is not None, PATIENCE, every=0.02):
            self.soak.found(f"training had not ended after {PATIENCE:.0f} s: {json.dumps(fault)}", self.log)
            process.kill()
        process.wait()
        watch.join()
        said = self.log.read_text(errors="replace")
        self.soak.check("Traceback" not in said, f"a traceback: {json.dumps(fault)}", self.log)
        return Leg(process.returncode, said, max(highest, default=0.0), reached)

    def reach(self, process: subprocess.Popen, fault: Fault) -> bool:
        begin, own = self.step, len(self.checkpoints)

        def there() -> bool:
            if process.poll() is not None:
                return True
            match fault["when"]:
                case "start":
                    return True
                case "steps":
                    return self.step >= min(begin + fault["steps"], STEPS - 1)
                case "saving":
                    return bool(list(self.folder.glob("checkpoints/*tmp*")))
                case _:
                    return len(self.checkpoints) > max(own, KEEP)

        if not wait_for(there, PATIENCE, every=0.002):
            self.soak.found(f"it did not come so far in {PATIENCE:.0f} s: {json.dumps(fault)}", self.log)
        # A removal is a matter of milliseconds.
        time.sleep(fault["seconds"] / (100 if fault["when"] == "removing" else 1))
        return process.poll() is None


def _watch(process: subprocess.Popen, found: list[float]) -> None:
    while process.poll() is None:
        found.append(resident(process.pid))
        time.sleep(0.1)


def losses(folder: Path) -> dict[int, float]:
    file = folder / "metrics.jsonl"
    if not file.exists():
        return {}
    found = {}
    for text in file.read_text(errors="replace").rpartition("\n")[0].splitlines():
        try:
            line = json.loads(text)
            found[line["step"]] = line["loss"]
        except (ValueError, KeyError, TypeError):
            continue
    return found


def outcome(folder: Path) -> dict[str, Any]:
    """What two runs are compared by: the losses of each step, the digests of the last state, where its data stand."""
    about = folder / "checkpoints" / f"{STEPS:08d}" / "about" / "metadata"
    content = json.loads(about.read_text()) if about.exists() else {}
    return {"losses": losses(folder), "state": content.get("arrays"), "data": content.get("data")}


def names_of(folder: Path) -> set[str]:
    """Of all that lies in a run folder, and of its checkpoints."""
    return {str(x.relative_to(folder)) for x in files_of(folder)}


def files_of(folder: Path) -> Iterator[Path]:
    for x in folder.iterdir() if folder.is_dir() else ():
        yield x
        if x.name in ("checkpoints", "tokenizer"):
            yield from x.iterdir()


def size_of(folder: Path) -> int:
    total = 0
    for at, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(at, name)).st_size
            except OSError:
                continue
    return total
