import json
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smollm3_jax.errors import DataError, SupportError
from smollm3_jax.train.data import files
from smollm3_jax.train.data.mixture import Batches, _Kept, expanded, held_out_rows
from smollm3_jax.train.data.packing import EndOfData
from smollm3_jax.train.settings_file import parse


def encode(document):
    """A token a character, and 1 at the end."""
    return np.array([ord(c) for c in document] + [1], np.int32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_corpora(tmp_path_factory.mktemp("corpora"))


@pytest.fixture
def corpora(tmp_path):
    return write_corpora(tmp_path)


def write_corpora(folder):
    for name, letter in (("a", "a"), ("b", "b")):
        lines = [json.dumps({"text": letter * (3 + i % 5)}) for i in range(20)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def settings_for(folder, **data):
    sources = {name: {"path": str(folder / f"{name}.jsonl"), "weight": w} for name, w in (("a", 3.0), ("b", 1.0))}
    stages = data.pop("stages", [])
    table = {"sources": sources, "length": 8, "rows": 4, **data}
    return parse({"data": table, "stages": stages, "run": {"seed": 5}})


def batches_of(folder, **data):
    return Batches(settings_for(folder, **data), encode)


def test_mixtures_keep_their_weights_by_rows(corpora):
    batches = batches_of(corpora)
    letters = [chr(row.max()) for step in range(10) for row in batches.next(step).tokens]
    assert letters.count("a") == 30 and letters.count("b") == 10


def test_the_same_batches_from_a_state(corpora):
    """T1."""
    one, other = batches_of(corpora), batches_of(corpora)
    for step in range(7):
        one.next(step)
    other.restore(json.loads(json.dumps(one.state())))
    for step in range(7, 30):  # over the end of an epoch
        a, b = one.next(step), other.next(step)
        np.testing.assert_array_equal(a.tokens, b.tokens)
        np.testing.assert_array_equal(a.segment_ids, b.segment_ids)


@pytest.mark.slow
@given(st.integers(0, 6), st.integers(1, 4), st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 4]), st.integers(2, 20))
@settings(max_examples=25, deadline=None)
def test_batches_do_not_depend_on_the_number_of_hosts(folder, before, after, hosts, later_hosts, length):
    """T2: Some steps on one number of hosts, then others on another: together their rows are those of one host."""

    def rows_of(host, count, batch):
        size = len(batch.tokens) // count
        return batch.tokens[host * size : (host + 1) * size]

    alone = batches_of(folder, length=length)
    jobs = [batches_of(folder, length=length) for _ in range(hosts)]
    for step in range(before + after):
        if step == before:
            state = json.loads(json.dumps(jobs[0].state()))
            jobs = [batches_of(folder, length=length) for _ in range(later_hosts)]
            for job in jobs:
                job.restore(state)
        parts = [rows_of(host, len(jobs), job.next(step)) for host, job in enumerate(jobs)]
        np.testing.assert_array_equal(np.concatenate(parts), alone.next(step).tokens)


def test_epochs_are_shuffled_each_anew(corpora):
    settings = settings_for(corpora, sources={}, path=str(corpora / "a.jsonl"))
    batches = Batches(settings, encode)
    order = [int(batches._rows["data"]._order[k]) for k in range(40)]
    assert sorted(order[:20]) == sorted(order[20:]) == list(range(20))
    assert order[:20] != order[20:]


def test_stages_switch_mixture_and_length(corpora):
    batches = batches_of(corpora, stages=[{"start": 2, "length": 16, "rows": 2, "weights": {"b": 1.0}}])
    assert batches.next(1).tokens.shape == (4, 8)
    batch = batches.next(2)
    assert batch.tokens.shape == (2, 16) and batch.tokens.max() == ord("b")


def test_changed_files_are_refused(corpora):
    """T9."""
    state = batches_of(corpora).state()
    with (corpora / "a.jsonl").open("a") as file:
        file.write('{"text": "more"}\n')
    with pytest.raises(DataError, match=r"source a is not what the run began with: a.jsonl has changed"):
        batches_of(corpora).restore(state)


def test_of_changed_files_the_others_go_on(corpora):
    before = batches_of(corpora)
    for step in range(5):
        before.next(step)
    state = before.state()
    with (corpora / "a.jsonl").open("a") as file:
        file.write('{"text": "more"}\n')
    batches = batches_of(corpora)
    batches.restore(state, allow_changes=True)
    after = batches.state()
    assert after["rows"]["b"] == state["rows"]["b"] and after["mixed"] == state["mixed"]
    assert after["rows"]["a"] == batches_of(corpora).state()["rows"]["a"] != state["rows"]["a"]


def test_what_is_held_out_is_not_trained_on(corpora):
    kept = _Kept(20, 6)
    numbers = [kept[i] for i in range(len(kept))]
    assert sorted({*numbers, *range(0, 20, 6)}) == list(range(20)) and len(numbers) == 16
    batches = batches_of(corpora, eval_every_nth=6)
    rows = held_out_rows(settings_for(corpora, eval_every_nth=6), batches, encode)["a"]
    tokens, _ = rows.next(100)
    assert (tokens == 1).sum() == 4
    with pytest.raises(EndOfData):
        rows.next(100)


def test_without_grain_training_says_what_to_install(corpora, monkeypatch):
    monkeypatch.setitem(sys.modules, "grain", None)
    with pytest.raises(SupportError, match=r"corpora need the package grain .*pip install 'grain"):
        batches_of(corpora)


def test_a_checkpoint_that_saw_long_files_by_pieces_is_gone_on_from(corpora, monkeypatch, caplog):
    """As older versions compared them."""
    monkeypatch.setattr(files, "HASHED", 20)
    before = batches_of(corpora)
    for step in range(3):
        before.next(step)
    state = json.loads(json.dumps(before.state()))
    state["files"] = {name: [list(file) for file in corpus.pieces] for name, corpus in before.corpora.items()}
    assert state["files"] != before.state()["files"]
    after = batches_of(corpora)
    after.restore(state)
    assert "saw of long files only beginning, middle and end" in caplog.text
    np.testing.assert_array_equal(after.next(3).tokens, before.next(3).tokens)


def test_an_edit_of_the_same_length_in_a_long_file_is_refused(corpora, monkeypatch):
    """T9."""
    monkeypatch.setattr(files, "HASHED", 20)
    state = batches_of(corpora).state()
    text = (corpora / "a.jsonl").read_text()
    at = text.index("aaa", 30)
    (corpora / "a.jsonl").write_text(text[:at] + "c" + text[at + 1 :])
    with pytest.raises(DataError, match=r"a.jsonl has changed"):
        batches_of(corpora).restore(state)


@pytest.mark.parametrize("per_file", [False, True])
def test_the_settings_of_the_only_corpus(tmp_path, per_file):
    """data.format and data.field, which its errors name."""
    for name in ("de", "en"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "part-0").write_text('{"body": "abc"}\n')
    table = {"path": str(tmp_path), "per_file": per_file, "rows": 2, "length": 4}
    opened = lambda **more: Batches(expanded(parse({"data": table | more})), encode)  # noqa: E731
    with pytest.raises(DataError, match=r"neither a file nor a folder .*de/part-0, en/part-0"):
        opened()
    with pytest.raises(DataError, match=r"it has body. Say which is the text: data.field=body"):
        opened(format="jsonl")
    batches = opened(format="jsonl", field="body")
    assert list(batches.corpora) == (["de/part-0", "en/part-0"] if per_file else ["data"])
    assert batches.next(0).tokens.max() == ord("c")


def test_a_source_for_each_file_of_documents_alone(corpora):
    (corpora / "dataset_infos.json").write_text('{"default": {}}')
    (corpora / "c.json").write_text('[{"text": "ccc"}]')
    settings = expanded(parse({"data": {"path": str(corpora), "per_file": True}}))
    assert list(settings.data.sources) == ["a", "b", "c"]


def of_number(record, length, tally):
    """A row of two tokens that are the record's number."""
    return [(np.full(length, record["n"], np.int32), np.ones(length, np.int32), np.ones(length, np.float32))]


def numbered(folder, **data):
    sources = {}
    for name, first in (("a", 100), ("b", 200)):
        (folder / f"{name}.jsonl").write_text("".join(f'{{"n": {first + i}}}\n' for i in range(20)))
        sources[name] = {"path": str(folder / f"{name}.jsonl"), "fraction": {"a": 1.0, "b": 0.35}[name]}
    table = {"sources": sources, "length": 2, "rows": 4, "epochs": 1, "concatenate": True, **data}
    return Batches(parse({"data": table, "objective": {"kind": "sft"}}), of_number)


def all_batches(batches):
    found = []
    while True:
        try:
            found.append(batches.next(len(found)))
        except EndOfData:
            return found


def test_sources_that_are_one_corpus(tmp_path):
    """Each record once an epoch, of a source a fraction; the last batch is filled up with empty rows."""
    found = all_batches(numbered(tmp_path))
    rows = np.concatenate([batch.tokens[:, 0] for batch in found]).tolist()
    assert len(found) == 7 and rows[27:] == [0] and not found[-1].weights[3].any()
    of_b = [n for n in rows if n >= 200]
    assert sorted(n for n in rows if 0 < n < 200) == list(range(100, 120)) and len(of_b) == len(set(of_b)) == 7
    assert sorted(of_b) != list(range(200, 207)) and rows != sorted(rows)
    # Held out is what would be without a fraction, and no one trains on it.
    batches = numbered(tmp_path, eval_every_nth=5)
    rows = np.concatenate([batch.tokens[:, 0] for batch in all_batches(batches)]).tolist()
    assert not {n for n in rows if n and n % 5 == 0}


def test_sources_that_are_one_corpus_go_on(tmp_path):
    whole, again = numbered(tmp_path, epochs=2), numbered(tmp_path, epochs=2)
    for step in range(5):
        whole.next(step)
    again.restore(json.loads(json.dumps(whole.state())))
    for one, other in zip(all_batches(whole), all_batches(again), strict=True):
        np.testing.assert_array_equal(one.tokens, other.tokens)


@pytest.mark.torch
def test_a_fraction_is_the_one_that_the_authors_drew(tmp_path):
    """The datasets library's shuffle with the seed 0, and its first records."""
    import datasets

    wanted = datasets.Dataset.from_dict({"n": list(range(20))}).shuffle(seed=0).select(range(int(20 * 0.35)))["n"]
    rows = np.concatenate([batch.tokens[:, 0] for batch in all_batches(numbered(tmp_path))]).tolist()
    assert sorted(n - 200 for n in rows if n >= 200) == sorted(wanted)
