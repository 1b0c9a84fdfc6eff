"""What an answer is worth: whether it keeps to its mode, and whether it is correct."""

import dataclasses
import re

from .tasks import DAYS

OPEN, CLOSE = "<think>", "</think>"
# What an answer looks like, by kind of task. The last match after the thinking counts.
NUMBER = re.compile(r"-?\d+")
DAY = re.compile("|".join(DAYS))
LETTERS = re.compile(r"\b[a-z](?: [a-z])+\b")
SHAPES = {"sort": LETTERS, "reverse": LETTERS, "day": DAY}


@dataclasses.dataclass(frozen=True)
class Verdict:
    """obeyed: the answer has the form of its mode, and ends. correct: its result is right, whatever the form."""

    obeyed: bool
    correct: bool

    @property
    def passes(self) -> bool:
        """What the preferences ask for."""
        return self.obeyed and self.correct


def check(kind: str, answer: str, text: str, thinking: bool, finished: bool) -> Verdict:
    """The verdict on what a model wrote after a prompt.

    Args:
      kind, answer: of the task.
      thinking: the mode that was asked for.
      finished: the model ended its turn by itself.
    """
    return Verdict(finished and _has_form(text, thinking), _result(kind, said(text)) == answer)


def said(text: str) -> str:
    """The part of an answer that the user sees: all after the thinking."""
    return text.rpartition(CLOSE)[2].strip()


def _has_form(text: str, thinking: bool) -> bool:
    """/think: one block with something in it, and an answer after it. /no_think: one line, and no tag of thinking."""
    if not thinking:
        return OPEN not in text and CLOSE not in text and len(text.strip().splitlines()) == 1
    before, opened, rest = text.partition(OPEN)
    thought, closed, answer = rest.partition(CLOSE)
    once = OPEN not in rest and CLOSE not in answer
    return bool(opened and closed and once and not before.strip() and thought.strip() and answer.strip())


def _result(kind: str, text: str) -> str:
    """The last thing in a text that looks like an answer of that kind; of letters with any separators, "a b c"."""
    shape = SHAPES.get(kind, NUMBER)
    if shape is LETTERS:
        text = re.sub(r"(?:\s*(?:,|->|-|\band\b)\s*|\s)+", " ", text.lower())
    elif shape is NUMBER:
        text = re.sub(r"(?<=\d),(?=\d{3}\b)", "", text)
    found = shape.findall(text)
    return found[-1] if found else ""
