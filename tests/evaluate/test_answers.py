"""The file of answers: what is in it is found again, whatever became of the process that wrote it."""

import datetime
import json

import pytest

from smollm3_jax.errors import SaveError
from smollm3_jax.evaluate.answers import NAME, Answers


def test_what_is_answered_is_found_again_for_the_same_settings_alone(tmp_path):
    with Answers(tmp_path / "new" / "folder", {"model": "a"}) as answers:
        key = answers.key("loglikelihood", [1, 2], 1)
        assert answers.get(key) is None and key != answers.key("loglikelihood", [1, 2], 2)
        answers.add([(key, [-0.1234567890123456789, True]), (answers.key("x"), "é\ud800")])
        with pytest.raises(SaveError, match="another process"):
            Answers(tmp_path / "new" / "folder", {})
    for model, found in (("a", [-0.1234567890123456789, True]), ("b", None)):
        with Answers(tmp_path / "new" / "folder", {"model": model}) as answers:
            assert answers.get(answers.key("loglikelihood", [1, 2], 1)) == found
            assert answers.get(answers.key("x")) == ("é\ud800" if found else None)


def test_a_torn_line_is_cut_off_and_the_day_stays_that_of_the_first_run(tmp_path):
    with Answers(tmp_path, {}) as answers:
        answers.add([("a", 1), ("b", 2)])
    lines = (tmp_path / NAME).read_bytes().splitlines(keepends=True)
    day = datetime.date(2025, 2, 3)
    lines[0] = json.dumps({"answers": 1, "date": day.isoformat()}).encode() + b"\n"
    (tmp_path / NAME).write_bytes(b"".join(lines)[:-4])
    with Answers(tmp_path, {}) as answers:
        assert (answers.get("a"), answers.get("b"), answers.date) == (1, None, day)
        answers.add([("b", 3)])
    with Answers(tmp_path, {}) as answers:
        assert (answers.get("a"), answers.get("b")) == (1, 3)


def test_a_first_line_that_is_torn_begins_anew(tmp_path):
    (tmp_path / NAME).write_bytes(b'{"answ')
    with Answers(tmp_path, {}) as answers:
        answers.add([("a", 1)])
    with Answers(tmp_path, {}) as answers:
        assert answers.get("a") == 1


@pytest.mark.parametrize("content", ["hello", "hello\n", "[]\n", '{"answers": 2, "date": "2025-02-03"}\n'])
def test_other_files_are_left_alone(tmp_path, content):
    (tmp_path / NAME).write_text(content)
    with pytest.raises(SaveError, match="no file of answers"):
        Answers(tmp_path, {})
    assert (tmp_path / NAME).read_text() == content


def test_without_a_folder_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Answers(None, {}) as answers:
        answers.add([("a", 1)])
        assert answers.get("a") == 1 and answers.date == datetime.date.today()
    assert not list(tmp_path.iterdir())
