"""Conversations for tests of fine-tuning."""

import contextlib
import datetime
import json
import random

from smollm3_jax.train.settings_file import RECIPES

DATE = "2025-07-08"
SFT_TEMPLATE = RECIPES / "smollm3-sft.jinja"
TOOL = {"type": "function", "function": {"name": "now", "description": "It's the time", "parameters": {}}}


def turn(role, content, **fields):
    return {"role": role, "content": content, **fields}


def talks(count=40, seed=0, longest=60):
    """Records without the template's long header: a system message, and one to three questions with their answers."""
    draw = random.Random(seed)

    def words():
        return "".join(draw.choice("abcdefgh ") for _ in range(draw.randint(1, longest)))

    records = []
    for _ in range(count):
        messages = [turn("system", "/system_override")]
        for _ in range(draw.randint(1, 3)):
            messages += [turn("user", words()), turn("assistant", words())]
        records.append({"messages": messages, "chat_template_kwargs": {"enable_thinking": draw.random() < 0.5}})
    return records


def write_talks(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@contextlib.contextmanager
def transformers_on(date=DATE):
    """transformers' templates see this date as today."""
    import transformers.utils.chat_template_utils as templates

    class Pinned(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime.datetime.fromisoformat(date)

    # The one that its module has imported.
    before = vars(templates)["datetime"]
    vars(templates)["datetime"] = Pinned
    try:
        yield
    finally:
        vars(templates)["datetime"] = before
