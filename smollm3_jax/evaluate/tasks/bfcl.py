"""BFCL's single-turn questions: functions are offered as tools, in the model's chat template, and the calls that the
model answers with are read as those of a chat. The data is that of bfcl-eval's wheel, which pip fetches once."""

import functools
import json
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any

from smollm3_jax.chat.parse import parse
from smollm3_jax.errors import OptionError
from smollm3_jax.evaluate.harness import conversation
from smollm3_jax.evaluate.tasks.calls import problem
from smollm3_jax.evaluate.tasks.data import dataset
from smollm3_jax.weights.wheels import cached_wheel

WHEEL = "bfcl-eval==2026.3.23"
SHA256 = "3bb6dfa5f0c68ad403c9ec50b00db2bb3b4cc9b38ab1ff33f48fe30d853d3a0a"
# BFCL's names of types -> JSON schema's.
JSON_TYPES = {"float": "number", "dict": "object", "tuple": "array", "list": "array", "any": "string"}


def questions(category: str, chat: bool = False, **_: Any) -> dict[str, Any]:
    """Those of a category, with the calls that they ask for; none for irrelevance.

    Raises:
      OptionError: `chat` is not set: the questions have tools, and a text has none.
      HubError: the data cannot be fetched.
    """
    if not chat:
        raise OptionError("BFCL offers functions in a chat template: give --chat, --think or --no-think")
    answers = {one["id"]: one["ground_truth"] for one in read(f"possible_answer/BFCL_v4_{category}.json")}
    # As texts: the columns of a dataset have one type.
    entries = [
        {
            "id": one["id"],
            "messages": json.dumps(one["question"][0]),
            "functions": json.dumps(one["function"]),
            "wanted": json.dumps(answers.get(one["id"], [])),
        }
        for one in read(f"BFCL_v4_{category}.json")
    ]
    return dataset(entries)


def prompt(doc: Mapping[str, str]) -> str:
    """The conversation with its tools; see `harness.conversation`."""
    tools = [{"type": "function", "function": _json_schema(one)} for one in json.loads(doc["functions"])]
    return conversation(json.loads(doc["messages"]), tools)


def score(doc: Mapping[str, str], results: Sequence[str]) -> dict[str, float]:
    """Right or not."""
    calls = [(call.name, call.arguments) for call in parse(results[0]).tool_calls]
    return {"acc": float(problem(json.loads(doc["functions"]), calls, json.loads(doc["wanted"])) is None)}


@functools.cache
def read(name: str) -> list[dict[str, Any]]:
    """The entries of a file of the wheel's data; none where it is not there, as irrelevance has no answers."""
    with zipfile.ZipFile(cached_wheel(WHEEL, SHA256)) as archive:
        path = f"bfcl_eval/data/{name}"
        text = archive.read(path).decode() if path in archive.namelist() else ""
    return [json.loads(line) for line in text.splitlines() if line]


def _json_schema(content: Any) -> Any:
    """A function with types as JSON schema calls them."""
    if isinstance(content, list):
        return [_json_schema(one) for one in content]
    if not isinstance(content, dict):
        return content
    return {
        name: JSON_TYPES.get(value, value) if name == "type" and isinstance(value, str) else _json_schema(value)
        for name, value in content.items()
    }
