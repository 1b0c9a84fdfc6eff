"""What this package's tasks are made of: texts that lie beside this file, and questions that are made up, always the
same ones. lm-eval calls these functions, by the names that the YAML files give, with what --metadata says."""

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from smollm3_jax.errors import OptionError
from smollm3_jax.pretrained import load_tokenizer
from smollm3_jax.tokenizer import Tokenizer

# Tokens of a prompt and its answer, and of the answer.
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
ANSWER = 128
SAMPLES = 100  # of a length
# RULER's (arXiv 2404.06654), but for the words that a number belongs to.
HAYSTACK = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE = "One of the special magic {kind}s for {key} is: {value}."
PROMPT = (
    "A special magic {kind} is hidden within the following text. Make sure to memorize it. I will quiz you about the "
    "{kind} afterwards.\n{context}\nWhat is the special magic {kind} for {key} mentioned in the provided text?"
)
PREFIX = "The special magic {kind} for {key} mentioned in the provided text is"
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
    return dataset([entry for entry in map(json.loads, lines) if entry["language"] == language])


def niah_single_1(**told: Any) -> dict[str, Any]:
    """A number in a text that says the same thing over and over; of several lengths, one question of each in turn.

    told, errors: as for `tokenizer_and_lengths`.
    """
    found, lengths = tokenizer_and_lengths(**told)
    counts = {length: _sentences(found, length) for length in lengths}
    # Each with its own seed, so that the first questions are the same whatever the lengths are.
    return dataset(
        [_question(i, length, count) for i in range(SAMPLES) for length, count in counts.items()],
    )


def tokenizer_and_lengths(
    tokenizer: str | None = None,
    max_seq_lengths: Sequence[int] = (1024,),
    pretrained: str | None = None,
    max_length: int | None = None,
    **_: Any,
) -> tuple[Tokenizer, Sequence[int]]:
    """What counts tokens, and how many a question and its answer have.

    Args:
      tokenizer, pretrained: a model's name, whose tokens count.
      max_seq_lengths: of LENGTHS.
      max_length: the most tokens of a text that the model is given; None: nobody says.

    Raises:
      OptionError: a length is none of these, or more than the model is given, or there is no tokenizer.
    """
    if not max_seq_lengths or any(length not in LENGTHS for length in max_seq_lengths):
        raise OptionError(f"max_seq_lengths is {max_seq_lengths}; each must be one of {', '.join(map(str, LENGTHS))}")
    if max_length is not None and max(max_seq_lengths) > max_length:
        fits = [length for length in LENGTHS if length <= max_length]
        smaller = f"--metadata '{{\"max_seq_lengths\": [{fits[-1]}]}}' or shorter, " if fits else ""
        raise OptionError(
            f"max_seq_lengths has {max(max_seq_lengths)}, and the model is given {max_length} tokens at most: a longer "
            f"question would lose its beginning. Give {smaller}--yarn FACTOR, which stretches the model's "
            "context, or a larger --max-length where that is what limits it"
        )
    name = tokenizer or pretrained
    if name is None:
        raise OptionError('lengths are counted in tokens; say of which model: "tokenizer"')
    return load_tokenizer(name), max_seq_lengths


def by_length(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """The share of what is asked for that the answer names, whatever its case."""
    asked = [output.lower() in results[0].lower() for output in doc["outputs"]]
    return {str(doc["max_length"]): sum(asked) / len(asked)}


def _sentences(tokenizer: Tokenizer, length: int) -> int:
    """How many fit, beside the question and its answer; a few tokens are left for what differs between questions."""

    def tokens(count: int) -> int:
        return len(tokenizer.encode(_question(0, length, count)["input"]))

    each = (tokens(101) - tokens(1)) / 100
    return max(1, 1 + int((length - ANSWER - 40 - tokens(1)) / each))


def _question(number: int, length: int, count: int) -> dict[str, Any]:
    chance = random.Random(f"niah_single_1 {number} {length}")
    key, value = f"{chance.choice(FIRST)}-{chance.choice(SECOND)}", str(chance.randint(10**6, 10**7 - 1))
    sentences = [HAYSTACK] * count
    sentences.insert(chance.randrange(count), NEEDLE.format(kind="number", key=key, value=value))
    prompt = PROMPT.format(kind="number", context="\n".join(sentences), key=key)
    return {
        "input": prompt,
        "outputs": [value],
        "gen_prefix": PREFIX.format(kind="number", key=key),
        "max_length": length,
    }


def dataset(entries: list[dict[str, Any]]) -> dict[str, Any]:
    """As lm-eval takes it from a function: a split, and its rows."""
    import datasets

    return {"test": datasets.Dataset.from_list(entries)}
