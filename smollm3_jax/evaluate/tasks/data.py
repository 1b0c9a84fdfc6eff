"""What this package's tasks are made of: texts that lie beside this file, and questions that are made up, always the
same ones. lm-eval calls these functions, by the names that the YAML files give, with what --metadata says."""

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from smollm3_jax.errors import OptionError
from smollm3_jax.pretrained import load_tokenizer

# Tokens of a prompt and its answer, and of the answer.
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
ANSWER = 128
SAMPLES = 100  # of a length
# RULER's (arXiv 2404.06654), but for the words that a number belongs to.
HAYSTACK = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE = "One of the special magic numbers for {key} is: {value}."
PROMPT = (
    "A special magic number is hidden within the following text. Make sure to memorize it. I will quiz you about the "
    "number afterwards.\n{context}\nWhat is the special magic number for {key} mentioned in the provided text?"
)
PREFIX = "The special magic number for {key} mentioned in the provided text is"
FIRST = ("quiet", "narrow", "golden", "distant", "hollow", "bright", "careful", "frozen", "gentle", "rapid", "wooden")
SECOND = (
    "harbour",
    "ladder",
    "window",
    "orchard",
    "bridge",
    "kettle",
    "lantern",
    "meadow",
    "needle",
    "pillow",
    "river",
)


def texts(language: str, **_: Any) -> dict[str, Any]:
    """The texts of a language."""
    lines = Path(__file__).with_name("languages.jsonl").read_text(encoding="utf-8").splitlines()
    return _dataset([entry for entry in map(json.loads, lines) if entry["language"] == language])


def niah_single_1(
    tokenizer: str | None = None, max_seq_lengths: Sequence[int] = (1024,), pretrained: str | None = None, **_: Any
) -> dict[str, Any]:
    """A number in a text that says the same thing over and over; of several lengths, one question of each in turn.

    Args:
      tokenizer, pretrained: a model's name, whose tokens count.
      max_seq_lengths: of LENGTHS.

    Raises:
      OptionError: a length is none of these, or there is no tokenizer.
    """
    if not max_seq_lengths or any(length not in LENGTHS for length in max_seq_lengths):
        raise OptionError(f"max_seq_lengths is {max_seq_lengths}; each must be one of {', '.join(map(str, LENGTHS))}")
    name = tokenizer or pretrained
    if name is None:
        raise OptionError('lengths are counted in tokens; say of which model: "tokenizer"')
    found = load_tokenizer(name)
    counts = {length: _sentences(found, length) for length in max_seq_lengths}
    # Each with its own seed, so that the first questions are the same whatever the lengths are.
    return _dataset(
        [_question(i, length, count) for i in range(SAMPLES) for length, count in counts.items()],
    )


def by_length(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    return {str(doc["max_length"]): float(doc["output"] in results[0])}


def _sentences(tokenizer: Any, length: int) -> int:
    """How many fit, beside the question and its answer; a few tokens are left for what differs between questions."""

    def tokens(count: int) -> int:
        return len(tokenizer.encode(_question(0, length, count)["input"]))

    each = (tokens(101) - tokens(1)) / 100
    return max(1, 1 + int((length - ANSWER - 40 - tokens(1)) / each))


def _question(number: int, length: int, count: int) -> dict[str, Any]:
    chance = random.Random(f"niah_single_1 {number} {length}")
    key, value = f"{chance.choice(FIRST)}-{chance.choice(SECOND)}", str(chance.randint(10**6, 10**7 - 1))
    sentences = [HAYSTACK] * count
    sentences.insert(chance.randrange(count), NEEDLE.format(key=key, value=value))
    prompt = PROMPT.format(context="\n".join(sentences), key=key)
    return {"input": prompt, "output": value, "gen_prefix": PREFIX.format(key=key), "max_length": length}


def _dataset(entries: list[dict[str, Any]]) -> dict[str, Any]:
    import datasets

    return {"test": datasets.Dataset.from_list(entries)}
