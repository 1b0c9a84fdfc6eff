"""BFCL's questions as the model reads them, and its own answers as if the model had written them."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
from proxies import FULL

from smollm3_jax.commands.main import main
from smollm3_jax.errors import HubError, OptionError

pytest.importorskip("lm_eval", reason="lm-eval is not installed (the extra eval has it)")

from smollm3_jax.evaluate.tasks import bfcl

CATEGORIES = {
    "simple_python": 400,
    "multiple": 200,
    "parallel": 200,
    "parallel_multiple": 200,
    "irrelevance": 240,
    "live_simple": 258,
}
ENTRY = {
    "id": "simple_0",
    "question": [[{"role": "user", "content": "What is 5 factorial?"}]],
    "function": [
        {
            "name": "math.factorial",
            "description": "Of a number.",
            "parameters": {
                "type": "dict",
                "properties": {"number": {"type": "float"}, "digits": {"type": "tuple", "items": {"type": "any"}}},
                "required": ["number"],
            },
        }
    ],
}
TRUTH = {"id": "simple_0", "ground_truth": [{"math.factorial": {"number": [5], "digits": [""]}}]}


@pytest.fixture
def entries(monkeypatch) -> None:
    """One question in place of the wheel's."""
    monkeypatch.setattr(bfcl, "read", lambda name: [TRUTH if "answer" in name else ENTRY])


@pytest.fixture(scope="module")
def small(tmp_path_factory, release) -> Path:
    folder = tmp_path_factory.mktemp("bfcl") / "small"
    return tiny.chat_checkpoint(folder, release / "chat_template.jinja", max_position_embeddings=4096)


def test_functions_are_shown_as_json_schemas(entries):
    (doc,) = bfcl.questions("simple_python", chat=True)["test"]
    content = json.loads(bfcl.prompt(doc).split(" ", 1)[1])
    assert content["messages"] == ENTRY["question"][0]
    function = content["tools"][0]["function"]
    assert function["name"] == "math.factorial" and function["parameters"]["type"] == "object"
    number, digits = (function["parameters"]["properties"][name] for name in ("number", "digits"))
    assert number == {"type": "number"} and digits == {"type": "array", "items": {"type": "string"}}


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ('<tool_call>\n{"name": "math.factorial", "arguments": {"number": 5}}\n</tool_call>', 1.0),
        ('Let me see.\n<tool_call>{"name": "math.factorial", "arguments": {"number": 5.0}}</tool_call>', 1.0),
        ('<tool_call>{"name": "math.factorial", "arguments": {"number": 6}}</tool_call>', 0.0),
        ('<tool_call>{"name": "math.factorial", "arguments": {"number": 5}}</tool_call>' * 2, 0.0),
        ('{"name": "math.factorial", "arguments": {"number": 5}}', 0.0),
        ("120", 0.0),
        ("", 0.0),
    ],
)
def test_calls_are_read_as_in_a_chat(entries, answer, right):
    (doc,) = bfcl.questions("simple_python", chat=True)["test"]
    assert bfcl.score(doc, [answer]) == {"acc": right}


def test_where_no_function_fits_no_call_is_right(monkeypatch):
    monkeypatch.setattr(bfcl, "read", lambda name: [] if "answer" in name else [ENTRY])
    (doc,) = bfcl.questions("irrelevance", chat=True)["test"]
    assert bfcl.score(doc, ["I have no such function."]) == {"acc": 1.0}
    assert bfcl.score(doc, ['<tool_call>{"name": "math.factorial", "arguments": {}}</tool_call>']) == {"acc": 0.0}


def test_a_text_has_no_tools(small, capsys, entries):
    with pytest.raises(OptionError, match="give --chat"):
        bfcl.questions("multiple")
    command = ["eval", str(small), "--tasks", "smollm3_bfcl_multiple"]
    assert main(command) == OptionError.exit_code
    assert "give --chat, --think or --no-think" in capsys.readouterr().err


def test_a_template_without_tools_is_refused(small, tmp_path, capsys, entries):
    (tmp_path / "bare.jinja").write_text("{{ messages[0].content }}")
    folder = tiny.chat_checkpoint(tmp_path / "bare", tmp_path / "bare.jinja")
    assert main(["eval", str(folder), "--tasks", "smollm3_bfcl_multiple", "--chat"]) == OptionError.exit_code
    assert "shows no tools" in capsys.readouterr().err


def _first(options: Any) -> Any:
    """What an answer that is allowed says, with fields of objects that have several each."""
    value = next(option for option in options if option != "")
    if isinstance(value, dict):
        return {name: _first(own) for name, own in value.items() if set(map(str, own)) - {""}}
    if isinstance(value, list) and value and all(isinstance(one, dict) for one in value):
        return [{name: _first(own) for name, own in one.items() if set(map(str, own)) - {""}} for one in value]
    return value


@pytest.mark.slow
@pytest.mark.parametrize("category", CATEGORIES)
def test_the_answers_of_the_data_are_right(category):
    """All but four, whose types the data itself contradicts: BFCL's checker refuses them too."""
    try:
        docs = bfcl.questions(category, chat=True)["test"]
    except HubError as error:
        pytest.skip(str(error))
    assert len(docs) == CATEGORIES[category]
    right = wrong = 0
    for doc in docs:
        calls = [
            {"name": name, "arguments": {p: _first(o) for p, o in given.items() if set(map(str, o)) - {""}}}
            for one in json.loads(doc["wanted"])
            for name, given in one.items()
        ]
        text = "".join(f"<tool_call>{json.dumps(call)}</tool_call>" for call in calls)
        right += bfcl.score(doc, [text])["acc"]
        name = next(iter(calls), {"name": "f"})["name"]
        wrong += bfcl.score(doc, [f'{text}<tool_call>{{"name": "{name}", "arguments": {{}}}}</tool_call>'])["acc"]
    assert right >= CATEGORIES[category] - 3 and wrong == 0


@FULL
def test_the_command_asks_them(small, capsys, entries):
    command = ["eval", str(small), "--tasks", "smollm3_bfcl", "--limit", "2", "--no-think", "--json"]
    assert main([*command, "--gen-kwargs", "max_gen_toks=4"]) == 0
    results = json.loads(capsys.readouterr().out)["results"]
    assert results["smollm3_bfcl_simple_python"]["acc,none"] == 0.0
    assert 0 <= results["smollm3_bfcl"]["acc,none"] <= 1
