"""Five more of RULER's questions (arXiv 2404.06654), as lm-evaluation-harness asks them: texts made up to a length in
tokens, always the same ones. Its words come from a package and ours from two lists; no essay is needed for these."""

import itertools
import math
import random
import string
import uuid
from collections.abc import Callable, Sequence
from typing import Any

from smollm3_jax.errors import OptionError
from smollm3_jax.evaluate.tasks.data import HAYSTACK, LENGTHS, NEEDLE, PREFIX, PROMPT, SAMPLES, dataset
from smollm3_jax.evaluate.tasks.data import tokenizer_and_lengths as asked

# (text, what it asks for, how the answer begins) of a question with so much in it.
Question = tuple[str, list[str], str]
Make = Callable[[random.Random, int, int], Question]

# Adjectives, and things.
WORDS = """
able amber ancient arctic awake bitter blank bold brave brief bright broad brown busy calm careful cheap clean clear
clever coastal cold common cosy crisp curious curly daily damp dark dear deep distant dry dull dusty eager early easy
empty even faint fair famous fancy fast fertile final firm fluent fond formal fresh friendly frozen gentle giant glad
golden grand grateful grave green grey handy happy hardy harsh hasty heavy hidden hollow honest huge humble hungry icy
idle jolly kind large late lazy light likely little lively lonely loud loyal lucky mellow mild
|
acorn anchor apple apron arrow badge banner barrel basket beach bell bench berry blanket boat bottle branch bread
bridge broom bucket button cabin cable camel candle canvas carpet castle chair cheese cherry chimney circle cliff
cloud coat comet copper corner cotton cradle crown curtain daisy desert diamond dolphin door drawer drum eagle engine
envelope falcon feather fence field finger flag flame flute forest fountain garden gate glove grape guitar hammer
harbour helmet hill honey island jacket jewel kettle kitten ladder lamp lantern leaf lemon letter meadow mirror needle
orchard
"""
ADJECTIVES, NOUNS = (part.split() for part in WORDS.split("|"))
HOPS = 4
CHAINS = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\n"
    "Question: Find all variables that are assigned the value {value} in the text above."
)
CHAINED = (
    "Answer: According to the chain(s) of variable assignment in the text above, {count} variables are assigned the "
    "value {value}, they are:"
)
COMMON = (
    "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
    "appear most often.\n{context}\nQuestion: What are the 10 most common words in the above list?"
)
MOST_COMMON = "Answer: The top 10 words that appear most often in the list are:"
CODED = (
    "Read the following coded text and track the frequency of each coded word. Find the three most frequently appeared "
    "coded words. {context}\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the "
    "three most frequently appeared words in the above coded text?"
)
MOST_CODED = "Answer: According to the coded text above, the three most frequently appeared words are:"
ZETA = math.pi**2 / 6  # the sum of 1 / k^2


def niah_multikey_2(**told: Any) -> dict[str, Any]:
    """A number among numbers: all of the text are needles, of other words."""
    return _questions("niah_multikey_2", 128, told, lambda draw, size, _: _needle(draw, size, "number", _pair, _number))


def niah_multikey_3(**told: Any) -> dict[str, Any]:
    """The same with UUIDs as words and as what belongs to them."""
    return _questions("niah_multikey_3", 128, told, lambda draw, size, _: _needle(draw, size, "uuid", _uuid, _uuid))


def vt(**told: Any) -> dict[str, Any]:
    """Variables that are assigned to one another, in a text that says nothing else; after an example."""
    return _questions("vt", 30, told, _tracking)


def cwe(**told: Any) -> dict[str, Any]:
    """The words of a long list that occur more often than the others; after an example."""
    return _questions("cwe", 120, told, _common)


def fwe(**told: Any) -> dict[str, Any]:
    """The three most frequent of coded words, whose frequencies fall with the square of their rank."""
    return _questions("fwe", 50, told, _frequent)


def _questions(name: str, answer: int, told: dict[str, Any], make: Make) -> dict[str, Any]:
    """SAMPLES questions of each length in turn.

    Args:
      answer: tokens that it has.

    Raises:
      OptionError: a length is too short, or as for `tokenizer_and_lengths`.
    """
    tokenizer, lengths = asked(**told)

    def tokens(question: Question) -> int:
        return len(tokenizer.encode(f"{question[0]} {question[2]}"))

    made: dict[int, list[dict[str, Any]]] = {}
    for length in lengths:
        shortest = tokens(make(_chance(name, length, -1), 1, length)) + answer
        if shortest > length:
            fits = next((one for one in LENGTHS if one >= shortest), LENGTHS[-1])
            raise OptionError(
                f"max_seq_lengths has {length}; the shortest question of {name} has {shortest} tokens of this model: "
                f"leave {name} out, or give --metadata '{{\"max_seq_lengths\": [{fits}]}}'"
            )
        size = _largest(lambda n, of=length: tokens(make(_chance(name, of, -1), n, of)) + answer <= of)
        made[length] = []
        for number in range(SAMPLES):
            left = size
            while tokens(question := make(_chance(name, length, number), left, length)) + answer > length and left > 1:
                left -= max(1, left // 50)
            text, outputs, prefix = question
            made[length].append({"input": text, "outputs": outputs, "gen_prefix": prefix, "max_length": length})
    # The first questions are the same whatever the lengths are.
    return dataset([made[length][number] for number in range(SAMPLES) for length in lengths])


def _chance(name: str, length: int, number: int) -> random.Random:
    return random.Random(f"{name} {length} {number}")


def _largest(fits: Callable[[int], bool]) -> int:
    """The largest size that fits, or 1."""
    most = 2
    while fits(most):
        most *= 2
    least = most // 2
    while most - least > max(1, least // 100):
        middle = (least + most) // 2
        least, most = (middle, most) if fits(middle) else (least, middle)
    return max(1, least)


def _needle(draw: random.Random, size: int, kind: str, key: Callable[..., str], value: Callable[..., str]) -> Question:
    """One needle among `size` others."""
    wanted, answer = key(draw), value(draw)
    others = [(key(draw), value(draw)) for _ in range(size)]
    needles = [NEEDLE.format(kind=kind, key=name, value=other) for name, other in others if name != wanted]
    needles.insert(draw.randrange(len(needles) + 1), NEEDLE.format(kind=kind, key=wanted, value=answer))
    text = PROMPT.format(kind=kind, context="\n".join(needles), key=wanted)
    return text, [answer], PREFIX.format(kind=kind, key=wanted)


def _pair(draw: random.Random) -> str:
    return f"{draw.choice(ADJECTIVES)}-{draw.choice(NOUNS)}"


def _number(draw: random.Random) -> str:
    return str(draw.randint(10**6, 10**7 - 1))


def _uuid(draw: random.Random) -> str:
    return str(uuid.UUID(int=draw.getrandbits(128), version=4))


def _tracking(draw: random.Random, size: int, _length: int) -> Question:
    """An example of few sentences, then `size` sentences with the variables among them."""
    example, names, prefix = _chain(draw, 5, 3)
    text, wanted, opens = _chain(draw, size, 5)
    return f"{example} {prefix} {' '.join(names)}\n\n{text}", wanted, opens


def _chain(draw: random.Random, size: int, letters: int) -> Question:
    names: list[str] = []
    while len(names) <= HOPS:
        name = "".join(draw.choices(string.ascii_uppercase, k=letters))
        names += [name] * (name not in names)
    value = draw.randint(10000, 99999)
    said = [f"VAR {names[0]} = {value}"]
    said += [f"VAR {after} = VAR {before}" for before, after in itertools.pairwise(names)]
    sentences = [HAYSTACK] * size
    if size <= len(said):  # too few places between them: all between the shorter ones that each consists of
        sentences = [f"{part}." for part in HAYSTACK.rstrip(".").split(". ")] * size
    places = sorted(draw.sample(range(len(sentences)), len(said)))
    for shift, (place, one) in enumerate(zip(places, said, strict=True)):
        sentences.insert(place + shift, one)
    text = CHAINS.format(context="\n".join(sentences), value=value)
    return text, names, CHAINED.format(count=len(names), value=value)


def _common(draw: random.Random, size: int, length: int) -> Question:
    """An example, then a list with ten words that are common and `size` that are not."""
    short = length < 4096
    example, said = _list(draw, *((10, 3, 1) if short else (30, 10, 3)))
    context, words = _list(draw, size, *((6, 1) if short else (30, 3)))
    shown = f"{COMMON.format(context=example)} {MOST_COMMON} {_numbered(said)}"
    return f"{shown}\n{COMMON.format(context=context)}", words, MOST_COMMON


def _list(draw: random.Random, rare: int, often: int, seldom: int) -> tuple[str, list[str]]:
    """The text of a list, and its ten words that occur `often`."""
    pairs = len(ADJECTIVES) * len(NOUNS)
    chosen = draw.sample(range(pairs), min(rare + 10, pairs))
    words = [f"{ADJECTIVES[i // len(NOUNS)]}-{NOUNS[i % len(NOUNS)]}" for i in chosen]
    entries = words[:10] * often + words[10:] * seldom
    draw.shuffle(entries)
    return _numbered(entries), words[:10]


def _numbered(words: Sequence[str]) -> str:
    return " ".join(f"{i}. {word}" for i, word in enumerate(words, 1))


def _frequent(draw: random.Random, size: int, length: int) -> Question:
    """`size` coded words; the most frequent one is dots, which do not count."""
    words = {"": None} | {"".join(draw.choices(string.ascii_lowercase, k=6)): None for _ in range(max(4, length // 50))}
    ranked = ["...", *list(words)[1:]]
    entries = [word for rank, word in enumerate(ranked, 1) for _ in range(int(size / (rank**2 * ZETA)))]
    draw.shuffle(entries)
    return CODED.format(context=" ".join(entries)), ranked[1:4], MOST_CODED
