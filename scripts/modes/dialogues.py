"""Everyday dialogues of several languages: chatterbot-corpus, a wheel of texts (BSD), which pip fetches once."""

import zipfile
from pathlib import Path
from typing import Any

import yaml

from smollm3_jax.weights.wheels import cached_wheel

WHEEL = "chatterbot-corpus==1.3.3"
SHA256 = "86de5300afb9a80826386339d3bec79c0a72eb0358abb8327e2ecef5ae0ce154"
LONGEST = 300  # characters of a turn


def corpus() -> Path:
    """The wheel in the package's cache. Raises HubError: pip cannot fetch it, or it is another file."""
    return cached_wheel(WHEEL, SHA256)


def read_dialogues(wheel: Path, language: str, files: tuple[str, ...] = ()) -> list[list[str]]:
    """The dialogues of a language in the corpus's order, each once and with two turns or more.

    Args:
      files: the names of those that are read, without .yml; none: all of them.
    """
    found: dict[tuple[str, ...], None] = {}
    with zipfile.ZipFile(wheel) as archive:
        folder = f"chatterbot_corpus/data/{language}/"
        names = sorted(name for name in archive.namelist() if name.startswith(folder) and name.endswith(".yml"))
        for name in names:
            if files and name.removeprefix(folder).removesuffix(".yml") not in files:
                continue
            for turns in yaml.safe_load(archive.read(name))["conversations"]:
                if _is_dialogue(turns):
                    found[tuple(turn.strip() for turn in turns)] = None
    return [list(turns) for turns in found]


def _is_dialogue(turns: Any) -> bool:
    """YAML reads "- 42" as a number and "- yes: no" as a table: such turns, and long ones, are left out."""
    return len(turns) > 1 and all(isinstance(turn, str) and 0 < len(turn.strip()) <= LONGEST for turn in turns)


def record(turns: list[str]) -> dict:
    """A dialogue's first question and answer, without thinking, for fine-tuning."""
    roles = zip(("user", "assistant"), turns[:2], strict=True)
    messages = [{"role": role, "content": turn} for role, turn in roles]
    return {"messages": [{"role": "system", "content": "/no_think"}, *messages]}


def texts(dialogues: list[list[str]], characters: int) -> list[str]:
    """Dialogues joined into texts of at least `characters` each, a turn on a line; a shorter rest is left out."""
    found, lines = [], []
    for turns in dialogues:
        lines += turns
        if sum(map(len, lines)) >= characters:
            found.append("\n".join(lines))
            lines = []
    return found
