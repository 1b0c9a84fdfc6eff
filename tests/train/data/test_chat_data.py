"""What `smollm3 chat-data` tells of conversations."""

import pytest
import tiny
from talks import talks, turn, write_talks

from smollm3_jax.config import ModelConfig
from smollm3_jax.tokenizer import load_tokenizer
from smollm3_jax.train.data.chat_data import describe
from smollm3_jax.train.settings_file import parse

OVERRIDE = turn("system", "/system_override")


@pytest.fixture(scope="module")
def small(release, tmp_path_factory):
    return tiny.chat_checkpoint(tmp_path_factory.mktemp("chat") / "model", release / "chat_template.jinja")


def report_of(small, file, records, show=0, **data):
    settings = parse({"data": {"path": str(write_talks(file, records)), **data}, "objective": {"kind": "sft"}})
    config = ModelConfig.from_hf(small)
    return describe(settings, load_tokenizer(small, config), config, show)


def test_what_is_left_out_and_why(small, tmp_path):
    records = [
        {"messages": [OVERRIDE, turn("user", "a"), turn("assistant", "b")]},
        {"messages": [OVERRIDE, turn("user", "a")]},
        {"messages": [OVERRIDE, turn("user", "a" * 200), turn("assistant", "b")]},
        {"text": "a"},
    ]
    found = report_of(small, tmp_path / "a.jsonl", records, length=100)
    assert found["records"] == 4
    assert found["left_out"] == {"no trained token": 1, "too long": 1, "unreadable": 1}
    assert [entry["record"] for entry in found["why"]] == [1, 2, 3]
    assert [entry["why"].partition(", ")[0] for entry in found["why"]][:2] == ["no trained token", "232 tokens"]
    assert "neither messages" in found["why"][2]["why"]
    cut = report_of(small, tmp_path / "a.jsonl", records, length=100, overflow="truncate")
    assert cut["why"][1]["why"] == "none of its trained tokens is among the first 100"
    assert cut["tokens_left_out"] == found["tokens_left_out"]


def test_rows_are_those_of_a_run(small, tmp_path):
    found = report_of(small, tmp_path / "a.jsonl", talks(40), length=512)
    assert found["rows"] == pytest.approx(found["tokens"] / 512 / found["filled"])
    assert 0.8 < found["filled"] <= 1 and found["tokens_left_out"] == 0
    assert found["lengths"]["shortest"] < found["lengths"]["median"] < found["lengths"]["longest"]


def test_each_token_of_the_first_records_is_told(small, tmp_path):
    messages = [OVERRIDE, turn("user", "Hi"), turn("assistant", "<think>\nHm.\n</think>\nHello")]
    records = [{"messages": messages, "chat_template_kwargs": {"enable_thinking": False}}]
    pair = {"prompt": messages[:2], "chosen": [turn("assistant", "a")], "rejected": [turn("assistant", "bc")]}
    found = report_of(small, tmp_path / "a.jsonl", [*records, pair, pair], show=2)
    first, chosen, rejected = found["shown"]
    said = lambda record, trained: "".join(t["text"] for t in record["tokens"] if t["trained"] == trained)  # noqa: E731
    assert said(first, True) == "<|im_start|>assistant\n<think>\n\n</think>\nHello<|im_end|>\n"
    assert first["turns_without_their_reasoning"] == found["turns_without_their_reasoning"] == 1
    assert [record["side"] for record in found["shown"]] == ["", "chosen", "rejected"]
    assert [said(record, True) for record in (chosen, rejected)] == ["a<|im_end|>\n", "bc<|im_end|>\n"]
