"""Files of JSON lines, and what a run's files of prompts and records are made of."""

import json
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from smollm3_jax.files import new_folder, write

from . import dialogues
from .checker import check
from .tasks import Task, draw_tasks, modes, prompt


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_lines(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    write(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def make_data(recipe: dict[str, Any], seed: int, folder: Path) -> None:
    """Writes what a run reads: sft.jsonl, prompts.jsonl, held-out.jsonl and texts.jsonl, whole or not at all."""
    sizes, spoken, taken = recipe["tasks"], recipe["dialogues"], set[str]()
    held_out = draw_tasks(sizes["held_out"], sizes["held_out_seed"], taken)
    trained = draw_tasks(sizes["sft"], 2 * seed, taken)
    asked = draw_tasks(sizes["preferences"], 2 * seed + 1, taken)
    wheel = dialogues.corpus()
    talks = dialogues.read_dialogues(wheel, "english", tuple(spoken["sft_files"]))
    talks = random.Random(seed).sample(talks, spoken["sft"])
    longest = recipe["max_new_tokens"]
    with new_folder(folder) as new:
        records = [task.record(mode) for task, mode in zip(trained, modes(len(trained)), strict=True)]
        write_lines(new / "sft.jsonl", [*records, *map(dialogues.record, talks)])
        lines = [_line(task, mode, longest) for task, mode in zip(asked, modes(len(asked)), strict=True)]
        seeds = ({"seed": seed * 1_000_000 + recipe["samples"]["n"] * i} for i in range(len(lines)))
        drawn = [line | recipe["samples"] | own for line, own in zip(lines, seeds, strict=True)]
        write_lines(new / "prompts.jsonl", drawn)
        both = [_line(task, mode, longest) | {"temperature": 0.0} for task in held_out for mode in (False, True)]
        write_lines(new / "held-out.jsonl", both)
        write_lines(new / "texts.jsonl", _texts(wheel, spoken))


def _line(task: Task, thinking: bool, longest: int) -> dict[str, Any]:
    """Of `smollm3 generate --input`; what the answer is checked by is in its id."""
    known = {"kind": task.kind, "question": task.question, "answer": task.answer, "thinking": thinking}
    return {"id": known, "messages": prompt(task.question, thinking), "max_new_tokens": longest}


def _texts(wheel: Path, spoken: dict[str, Any]) -> Iterable[dict[str, Any]]:
    """Of `smollm3 perplexity`, which measures by language: each text is one of its own, "german 3"."""
    for language in spoken["languages"]:
        files = tuple(spoken["english_files"]) if language == "english" else ()
        talks = dialogues.read_dialogues(wheel, language, files)
        for i, text in enumerate(dialogues.texts(talks, spoken["characters"])[: spoken["texts"]]):
            yield {"text": text, "language": f"{language} {i}"}


def judged(line: dict[str, Any]) -> list[tuple[str, Any]]:
    """(text, verdict) of each sample of an answered line."""
    known, samples = line["id"], line.get("samples", [line])
    found = []
    for sample in samples:
        asked = known["kind"], known["answer"], sample["text"], known["thinking"]
        found.append((sample["text"], check(*asked, finished=sample["finish_reason"] == "stop")))
    return found


def pairs_of(
    answers: Iterable[dict[str, Any]], render: Callable[[list[dict[str, str]]], str]
) -> Iterable[dict[str, Any]]:
    """A preference for each prompt of which one sample passes and another does not: the first of each.

    As texts, since what a model wrote is to be learned, or unlearned, as it stands: where thinking is off, messages
    would lose the thinking that a sample has all the same.

    Args:
      render: messages -> their text up to the assistant's answer.
    """
    for line in sorted(answers, key=lambda line: line["index"]):
        verdicts = judged(line)
        good = [text for text, verdict in verdicts if verdict.passes]
        bad = [text for text, verdict in verdicts if not verdict.passes]
        if good and bad:
            yield {
                "prompt": render(prompt(line["id"]["question"], line["id"]["thinking"])),
                "chosen": good[0],
                "rejected": bad[0],
            }
