"""RULER's questions: of their lengths, always the same, and with answers that can be found in them."""

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
from proxies import FULL

from smollm3_jax.commands.main import main
from smollm3_jax.errors import OptionError
from smollm3_jax.pretrained import load_tokenizer

pytest.importorskip("lm_eval", reason="lm-eval is not installed (the extra eval has it)")

from smollm3_jax.evaluate.tasks import data, ruler

NAMES = ("niah_multikey_2", "niah_multikey_3", "vt", "cwe", "fwe")
ANSWERS = {"niah_multikey_2": 128, "niah_multikey_3": 128, "vt": 30, "cwe": 120, "fwe": 50}


@pytest.fixture(scope="module")
def small(tmp_path_factory, release) -> Path:
    folder = tmp_path_factory.mktemp("ruler") / "small"
    return tiny.chat_checkpoint(folder, release / "chat_template.jinja", max_position_embeddings=4096)


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> str:
    """A folder with a tokenizer that makes a token of each word and of what stands between them."""
    import tokenizers
    from tokenizers import models, pre_tokenizers

    folder = tmp_path_factory.mktemp("words")
    tokenizer = tokenizers.Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    return str(folder)


@pytest.fixture(scope="module")
def made(words) -> Iterator[dict[str, list[dict[str, Any]]]]:
    """Ten questions of two lengths, by task."""
    told: dict[str, Any] = {"tokenizer": words, "max_seq_lengths": [2048, 4096]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ruler, "SAMPLES", 10)
        yield {name: list(getattr(ruler, name)(**told)["test"]) for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_a_question_fills_its_length(made, words, name):
    tokenizer = load_tokenizer(words)
    assert [one["max_length"] for one in made[name]] == [2048, 4096] * 10
    for one in made[name]:
        length = len(tokenizer.encode(f"{one['input']} {one['gen_prefix']}")) + ANSWERS[name]
        assert 0.8 * one["max_length"] <= length <= one["max_length"]
    assert len({one["input"] for one in made[name]}) == len(made[name])


def test_a_length_without_room_is_refused(words):
    words_of_error = r"max_seq_lengths has 512; the shortest question of cwe has \d+ tokens.*leave cwe out.*\[1024\]"
    with pytest.raises(OptionError, match=words_of_error):
        ruler.cwe(tokenizer=words, max_seq_lengths=[512])


def test_questions_are_the_same_whatever_the_lengths_are(made, words):
    again = ruler.fwe(tokenizer=words, max_seq_lengths=[4096])["test"]
    assert list(again) == [one for one in made["fwe"] if one["max_length"] == 4096]


@pytest.mark.parametrize(
    ("name", "needle"),
    [
        ("niah_multikey_2", r"One of the special magic numbers for ([a-z]+-[a-z]+) is: (\d{7})\."),
        ("niah_multikey_3", r"One of the special magic uuids for ([0-9a-f-]{36}) is: ([0-9a-f-]{36})\."),
    ],
)
def test_one_needle_of_many_is_asked_for(made, name, needle):
    places = set()
    for one in made[name]:
        pairs = re.findall(needle, one["input"])
        asked = re.search(r"for (\S+) mentioned", one["input"])
        assert asked and asked[1] in one["gen_prefix"] and len(pairs) > 5
        assert [value for key, value in pairs if key == asked[1]] == one["outputs"]
        places.add(3 * [key for key, _ in pairs].index(asked[1]) // len(pairs))
    assert places == {0, 1, 2}


def test_variables_can_be_tracked(made):
    for one in made["vt"]:
        example, question = one["input"].split("\n\nMemorize")
        value = re.search(r"assigned the value (\d+) in the text", question)
        assert value and f"5 variables are assigned the value {value[1]}, they are:" in one["gen_prefix"]
        known = {value[1]}
        for name, of in re.findall(r"VAR ([A-Z]{5}) = (?:VAR )?(\w+)", question):
            known |= {name} if of in known else set()
        assert known - {value[1]} == set(one["outputs"]) and len(one["outputs"]) == 5
        assert example.count("VAR") == 9 and not known & set(re.findall(r"\w+", example))


def test_common_words_are_common(made):
    for one in made["cwe"]:
        question = one["input"].rpartition("Below is a numbered list")[2]
        counts = Counter(re.findall(r"\d+\. ([a-z]+-[a-z]+)", question))
        often, seldom = (6, 1) if one["max_length"] < 4096 else (30, 3)
        assert {word for word, count in counts.items() if count == often} == set(one["outputs"])
        assert set(counts.values()) == {often, seldom}


def test_the_most_frequent_words_are_asked_for(made):
    for one in made["fwe"]:
        words = re.search(r"coded words\. (.*)\nQuestion", one["input"])
        assert words
        counts = Counter(words[1].split()).most_common(5)
        assert counts[0][0] == "..." and {word for word, _ in counts[1:4]} == set(one["outputs"])
        assert counts[3][1] > counts[4][1]


def test_the_share_that_is_named_counts():
    doc = {"outputs": ["ABC", "DEF", "GHI", "JKL"], "max_length": 512}
    assert data.by_length(doc, ["abc, then JKL"]) == {"512": 0.5}
    assert data.by_length(doc, ["ABCDEFGHIJKL"]) == {"512": 1.0}
    assert data.by_length(doc, [""]) == {"512": 0.0}


@FULL
def test_the_command_finds_them(small, words, capsys):
    told = json.dumps({"max_seq_lengths": [1024], "tokenizer": words})
    command = ["eval", str(small), "--tasks", "smollm3_ruler", "--limit", "2", "--json", "--metadata", told]
    assert main([*command, "--gen-kwargs", "max_gen_toks=4"]) == 0
    results = json.loads(capsys.readouterr().out)["results"]
    assert all(results[f"smollm3_{name}"]["1024,none"] == 0.0 for name in (*NAMES, "niah_single_1"))
