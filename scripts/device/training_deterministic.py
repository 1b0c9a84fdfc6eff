"""step.deterministic: whether equal steps give equal bits, with it and without, and what it costs."""

import gc

from .run import Run, timed
from .training import digest, name_of, prepared, say_speed

STEPS = 2  # the second one reads what the first one made


def part(run: Run) -> None:
    for deterministic in (True, False):
        case = name_of(run, 1, "deterministic" if deterministic else "as it is")
        run.attempt(case, one, run, case, deterministic)


def one(run: Run, case: str, deterministic: bool) -> None:
    training, first_state = prepared(run, 1, deterministic)
    digests = []
    for attempt in range(2):
        if attempt:
            training.state = None  # two states have no room
            gc.collect()
            training.state = first_state()
        for _ in range(STEPS):
            training.step()
        digests.append(digest(training.state))
    same = digests[0] == digests[1]
    if deterministic:
        run.check("two equal steps, step.deterministic: bits that differ", float(not same), 0.0)
    else:
        run.say("note", "two equal steps without step.deterministic", same_bits=same)
    say_speed(run, case, training, timed(training.step, 3 if run.tiny else 5, warm_up=1), same_bits=same)
