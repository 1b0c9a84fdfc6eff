"""The stages of a run, one after the other; each goes on where it was stopped, and is skipped where it is done."""

import dataclasses
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from smollm3_jax.chat.template import render
from smollm3_jax.errors import OptionError, TrainingError
from smollm3_jax.files import append, new_folder, write
from smollm3_jax.weights.demo import model_folder

from .data import make_data, pairs_of, read_lines, write_lines
from .measure import Numbers, nats, rates
from .report import draw, summary

TEMPLATE = Path(__file__).with_name("dual-mode.jinja")
MODELS = ("base", "sft", "apo", "soup", "merged")
DTYPE = ("--dtype", "float32")
SLOTS = ("--slots", "32")


@dataclasses.dataclass(frozen=True)
class Run:
    """A folder with all that a run makes, and what it was begun with."""

    folder: Path
    recipe: dict[str, Any]
    seed: int

    def model(self, name: str) -> Path:
        return self.folder / "models" / name


def begin(folder: Path, recipe: dict[str, Any], seed: int) -> Run:
    """The run of a folder, a new one or one that goes on. Raises OptionError: it was begun with something else."""
    kept, about = folder / "recipe.json", {"seed": seed, **recipe}
    if kept.is_file():
        before = json.loads(kept.read_text())
        changed = sorted(key for key in {*before, *about} if before.get(key) != about.get(key))
        if changed:
            raise OptionError(f"{folder} was begun with another {changed[0]}: name another folder by --out")
    else:
        folder.mkdir(parents=True, exist_ok=True)
        write(kept, json.dumps(about, indent=1))
    return Run(folder, recipe, seed)


def stages(run: Run) -> Iterator[tuple[str, Path, Callable[[], None]]]:
    """(name, the file or folder that is there once it is done, what makes that) of each stage, in order."""
    yield "data", run.folder / "data", lambda: make_data(run.recipe, run.seed, run.folder / "data")
    yield "base", run.model("base"), lambda: _base(run)
    yield "sft", run.model("sft"), lambda: _sft(run)
    yield "samples", run.folder / "pairs.jsonl", lambda: _samples(run)
    yield "apo", run.model("apo"), lambda: _apo(run)
    yield "soup", run.model("soup"), lambda: _soup(run)
    yield "merged", run.model("merged"), lambda: _merged(run)
    for name in MODELS:
        yield f"measures of {name}", _measures(run, name), lambda name=name: _measure(run, name)
    yield "report", run.folder / "report.json", lambda: _report(run)


def run_stages(run: Run) -> None:
    """Runs what is not done, saying which stage it is, and keeps what each took in stages.jsonl."""
    every = list(stages(run))
    for number, (name, result, make) in enumerate(every, 1):
        if result.exists():
            continue
        print(f"dual-mode: stage {number} of {len(every)}, {name}", file=sys.stderr, flush=True)
        wall, before = time.monotonic(), _processor_seconds()
        try:
            make()
        finally:
            took = {"seconds": time.monotonic() - wall, "processor_seconds": _processor_seconds() - before}
            append(run.folder / "stages.jsonl", json.dumps({"stage": name, "done": result.exists(), **took}) + "\n")


def _processor_seconds() -> float:
    """Of this process and all that it waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def smollm3(*words: str | Path, output: Path | None = None) -> None:
    """Runs one of the package's commands; output: the file that gets what it prints.

    Raises:
      TrainingError: it failed; it has said why.
    """
    command = [sys.executable, "-m", "smollm3_jax", *map(str, words)]
    done = subprocess.run(command, stdout=subprocess.PIPE if output else 2)
    if done.returncode:
        raise TrainingError(
            f"`smollm3 {words[0]}` ended with {done.returncode}; the same command again goes on from here"
        )
    if output:
        write(output, done.stdout)


def _base(run: Run) -> None:
    """The model that all begins with: the recipe's, with the template of the two modes."""
    source = model_folder(run.recipe["model"])
    with new_folder(run.model("base")) as new:
        for path in source.iterdir():
            if path.is_file():
                write(new / path.name, path.read_bytes())
        write(new / "chat_template.jinja", TEMPLATE.read_bytes())


def _train(run: Run, name: str, start: Path, data: Path) -> Path:
    """The run folder of a training run of the recipe's settings, once it is done."""
    folder = run.folder / f"run-{name}"
    given = {"run.dir": str(folder), "run.seed": run.seed, "model.path": str(start), "data.path": str(data)}
    settings = {**dict(flat(run.recipe[name])), **given}
    config = run.folder / f"{name}.toml"
    write(config, "".join(f"{key} = {json.dumps(value, ensure_ascii=False)}\n" for key, value in settings.items()))
    smollm3("train", "--config", config, "--resume", "auto")
    return folder


def flat(table: dict[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """("section.key", value) of each value in a table of tables."""
    for key, value in table.items():
        if isinstance(value, dict):
            yield from flat(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value


def _sft(run: Run) -> None:
    trained = _train(run, "sft", run.model("base"), run.folder / "data" / "sft.jsonl")
    smollm3("export", trained, run.model("sft"))


def _samples(run: Run) -> None:
    """Samples of the fine-tuned model, and the pairs that the checker makes of them."""
    answers = run.folder / "samples.jsonl"
    prompts = run.folder / "data" / "prompts.jsonl"
    smollm3("generate", "-m", run.model("sft"), *DTYPE, *SLOTS, "--input", prompts, "--output", answers)
    template = TEMPLATE.read_text()
    pairs = list(pairs_of(read_lines(answers), lambda messages: render(template, messages, add_generation_prompt=True)))
    if not pairs:
        raise TrainingError(f"{answers}: there is no prompt of which one sample passes and another does not")
    write_lines(run.folder / "pairs.jsonl", pairs)


def _apo(run: Run) -> None:
    trained = _train(run, "apo", run.model("sft"), run.folder / "pairs.jsonl")
    smollm3("export", trained, run.model("apo"))


def _soup(run: Run) -> None:
    """The mean of the run's last checkpoints."""
    smollm3("export", run.folder / "run-apo", run.model("soup"), "--average", str(run.recipe["merge"]["soup"]))


def _merged(run: Run) -> None:
    start = run.recipe["merge"]["start"]
    words = [f"{run.model('soup')}={1 - start:g}", f"{run.model('base')}={start:g}"]
    smollm3("merge", *words, "--out", run.model("merged"))


def _measures(run: Run, name: str) -> Path:
    return run.folder / "measures" / f"{name}-perplexity.json"


def _answers(run: Run, name: str) -> Path:
    return run.folder / "measures" / f"{name}-answers.jsonl"


def _measure(run: Run, name: str) -> None:
    data, spoken = run.folder / "data", run.recipe["dialogues"]
    (run.folder / "measures").mkdir(exist_ok=True)
    model = ("-m", run.model(name), *DTYPE)
    smollm3("generate", *model, *SLOTS, "--input", data / "held-out.jsonl", "--output", _answers(run, name))
    length = str(spoken["tokens"])
    most = str(spoken["tokens"] * spoken["texts"] * len(spoken["languages"]))
    text = ("--text", data / "texts.jsonl", "--length", length, "--max-tokens", most)
    smollm3("perplexity", *model, *text, "--json", output=_measures(run, name))


def _report(run: Run) -> None:
    resamples, seed = run.recipe["measure"]["resamples"], run.recipe["measure"]["seed"]
    models: dict[str, Numbers] = {}
    for name in MODELS:
        of_texts = json.loads(_measures(run, name).read_text())
        models[name] = rates(read_lines(_answers(run, name)), resamples, seed) | nats(of_texts, resamples, seed)
    sizes = run.recipe["tasks"]
    about = {
        "held_out": sizes["held_out"],
        "prompts": sizes["preferences"],
        "pairs": len(read_lines(run.folder / "pairs.jsonl")),
        "seconds": sum(line["seconds"] for line in read_lines(run.folder / "stages.jsonl")),
        "processor_seconds": sum(line["processor_seconds"] for line in read_lines(run.folder / "stages.jsonl")),
    }
    found = summary(run.recipe, run.seed, models, about)
    if find_spec("matplotlib"):
        draw(found, run.folder / "report.png")
    write(run.folder / "report.json", json.dumps(found, indent=1))
