"""Short tasks whose answers can be checked: a question, the steps to its answer, and the answer."""

import dataclasses
import random
from collections.abc import Callable

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
LETTERS = "abcdefghjkmnpqrstuvwxyz"  # without those that look like others
TRIES = 10_000


@dataclasses.dataclass(frozen=True)
class Task:
    """kind: its name in KINDS, which says how its answer is looked for; steps: the lines of worked reasoning."""

    kind: str
    question: str
    steps: tuple[str, ...]
    answer: str

    def record(self, thinking: bool) -> dict:
        """The conversation that answers it in a mode, for fine-tuning."""
        answer = {"role": "assistant", "content": f"The answer is {self.answer}."}
        if thinking:
            answer["reasoning_content"] = "\n".join(self.steps)
        return {"messages": [*prompt(self.question, thinking), answer]}


def prompt(question: str, thinking: bool) -> list[dict[str, str]]:
    """A question in a mode, which the system message names as it does for SmolLM3."""
    mode = "/think" if thinking else "/no_think"
    return [{"role": "system", "content": mode}, {"role": "user", "content": question}]


def _sum(draw: random.Random) -> Task:
    a, b = draw.randint(11, 99), draw.randint(11, 99)
    tens, ones = a // 10 * 10 + b // 10 * 10, a % 10 + b % 10
    steps = (f"{a // 10 * 10} + {b // 10 * 10} = {tens}", f"{a % 10} + {b % 10} = {ones}", f"{tens} + {ones} = {a + b}")
    return Task("sum", f"What is {a} + {b}?", steps, str(a + b))


def _difference(draw: random.Random) -> Task:
    b = draw.randint(11, 80)
    a = draw.randint(b + 1, 99)
    left = a - b // 10 * 10
    steps = (f"{a} - {b // 10 * 10} = {left}", f"{left} - {b % 10} = {a - b}")
    return Task("difference", f"What is {a} - {b}?", steps, str(a - b))


def _product(draw: random.Random) -> Task:
    a, b = draw.randint(11, 99), draw.randint(2, 9)
    tens, ones = a // 10 * 10 * b, a % 10 * b
    steps = (f"{a // 10 * 10} * {b} = {tens}", f"{a % 10} * {b} = {ones}", f"{tens} + {ones} = {a * b}")
    return Task("product", f"What is {a} * {b}?", steps, str(a * b))


def _largest(draw: random.Random) -> Task:
    numbers = draw.sample(range(11, 1000), 4)
    best = numbers[0]
    steps = []
    for number in numbers[1:]:
        steps.append(f"{best} or {number}: {max(best, number)}")
        best = max(best, number)
    listed = f"{', '.join(map(str, numbers[:-1]))} and {numbers[-1]}"
    return Task("largest", f"Which is the largest of {listed}?", tuple(steps), str(best))


def _sort(draw: random.Random) -> Task:
    letters = draw.sample(LETTERS, 4)
    left, steps = list(letters), []
    while len(left) > 1:
        first = min(left)
        left.remove(first)
        steps.append(f"first {first}, left {' '.join(left)}")
    return Task("sort", f"Sort these letters: {' '.join(letters)}", tuple(steps), " ".join(sorted(letters)))


def _reverse(draw: random.Random) -> Task:
    letters = draw.sample(LETTERS, draw.randint(4, 5))
    steps = tuple(f"last {letters[-i]}, then {' '.join(letters[:-i])}" for i in range(1, len(letters)))
    return Task("reverse", f"Write these letters backwards: {' '.join(letters)}", steps, " ".join(reversed(letters)))


def _count(draw: random.Random) -> Task:
    some = draw.sample(LETTERS, 3)
    letters = [draw.choice(some) for _ in range(draw.randint(6, 9))]
    letter, seen, steps = draw.choice(some), 0, []
    for other in letters:
        seen += other == letter
        steps.append(f"{other} {seen}")
    return Task("count", f"How often is {letter} among {' '.join(letters)}?", tuple(steps), str(seen))


def _day(draw: random.Random) -> Task:
    start, after, later = draw.randrange(7), draw.randint(2, 12), draw.random() < 0.5
    sign = 1 if later else -1
    days = [DAYS[(start + sign * i) % 7] for i in range(1, after + 1)]
    asked = f"Which day is it in {after} days?" if later else f"Which day was it {after} days ago?"
    steps = tuple(f"{i} {day}" for i, day in enumerate(days, 1))
    return Task("day", f"Today is {DAYS[start]}. {asked}", steps, days[-1])


KINDS: dict[str, Callable[[random.Random], Task]] = {
    "sum": _sum,
    "difference": _difference,
    "product": _product,
    "largest": _largest,
    "sort": _sort,
    "reverse": _reverse,
    "count": _count,
    "day": _day,
}


def modes(count: int) -> list[bool]:
    """The mode of each of `count` drawn tasks, True for /think: every kind of task comes in both modes."""
    return [bool((i + i // len(KINDS)) % 2) for i in range(count)]


def draw_tasks(count: int, seed: int, taken: set[str]) -> list[Task]:
    """As many tasks, each kind in turn, none of whose questions is `taken`; theirs are added to it.

    Raises:
      ValueError: a kind has no more questions.
    """
    draw, kinds, tasks = random.Random(seed), list(KINDS.values()), []
    while len(tasks) < count:
        make = kinds[len(tasks) % len(kinds)]
        task = next((task for task in (make(draw) for _ in range(TRIES)) if task.question not in taken), None)
        if task is None:
            raise ValueError(f"there are no more questions like: {make(draw).question}")
        taken.add(task.question)
        tasks.append(task)
    return tasks
