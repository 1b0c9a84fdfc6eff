import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from smollm3_jax.errors import DataError
from smollm3_jax.train.settings import Source
from smollm3_jax.train.sources import BadRecord, digest, find_files, open_documents

TEXTS = ["one", "zwei\nZeilen", "三"]


def read(path, **fields):
    documents = open_documents("s", Source(path=str(path), **fields), 1000)
    return [documents[i] for i in range(len(documents))]


def write_jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def test_json_lines(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", TEXTS)
    assert read(tmp_path / "a.jsonl") == TEXTS


@given(st.lists(st.text(min_size=1).filter(str.strip), min_size=1), st.booleans(), st.booleans())
def test_any_json_lines(tmp_path_factory, texts, ends, blank):
    path = tmp_path_factory.mktemp("any") / "a.jsonl"
    lines = [json.dumps({"text": text}) for text in texts]
    path.write_text(("\n\n" if blank else "\n").join(lines) + "\n" * ends)
    assert read(path) == texts


def test_a_folder_in_the_order_of_names(tmp_path):
    for name, text in (("b", "second"), ("a", "first")):
        write_jsonl(tmp_path / f"{name}.jsonl", [text])
    (tmp_path / "notes.pdf").write_bytes(b"")
    assert read(tmp_path) == ["first", "second"]


def test_text_files(tmp_path):
    (tmp_path / "a.txt").write_text("all of it\nis one")
    assert read(tmp_path) == ["all of it\nis one"]


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"body": TEXTS}), tmp_path / "a.parquet", row_group_size=2)
    assert read(tmp_path, field="body") == TEXTS
    with pytest.raises(DataError, match="no column 'text'; there are body"):
        read(tmp_path)
    (tmp_path / "a.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(DataError, match="is no Parquet file"):
        read(tmp_path)


@pytest.mark.parametrize("ending", ["arrayrecord", "tokens"])
def test_array_records(tmp_path, ending):
    module = pytest.importorskip("array_record.python.array_record_module")
    writer = module.ArrayRecordWriter(str(tmp_path / f"a.{ending}"), "group_size:1")
    records = [text.encode() for text in TEXTS] if ending == "arrayrecord" else [np.int32([1, 2]).tobytes()]
    for record in records:
        writer.write(record)
    writer.close()
    found = read(tmp_path)
    if ending == "tokens":
        assert found[0].tolist() == [1, 2]
    else:
        assert found == TEXTS


@pytest.mark.parametrize(
    "line",
    ["{", "[]", '{"body": "x"}', '{"text": 3}', '{"text": " "}', '{"text": "' + "x" * 2000 + '"}', "\xff", "[" * 900],
)
def test_bad_lines_are_bad_records(tmp_path, line):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "good"}\n' + line.encode("latin-1") + b'\n{"text": "too"}\n')
    documents = open_documents("s", Source(path=str(path)), 1000)
    assert (documents[0], documents[2]) == ("good", "too")
    with pytest.raises(BadRecord):
        documents[1]


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ([], "neither a file nor a folder"),
        (["a.jsonl", "b.txt"], "several formats: jsonl, text"),
        (["a.jsonl"], "holds no document"),
    ],
)
def test_folders_that_are_no_corpus(tmp_path, files, said):
    for name in files:
        (tmp_path / name).write_text("")
    with pytest.raises(DataError, match=said):
        read(tmp_path)


def test_a_file_without_a_known_ending(tmp_path):
    write_jsonl(tmp_path / "corpus", TEXTS)
    with pytest.raises(DataError, match="say the format"):
        read(tmp_path / "corpus")
    assert read(tmp_path / "corpus", format="jsonl") == TEXTS


def test_digests_see_length_and_contents(tmp_path):
    (file,) = find_files("s", Source(path=str(_with(tmp_path / "a.txt", b"abc"))))
    first = digest(file)
    assert digest(file) == first
    _with(tmp_path / "a.txt", b"abd")
    assert digest(file) != first


def _with(path, content):
    path.write_bytes(content)
    return path


def test_shards_that_are_not_all_there_are_refused(tmp_path):
    (tmp_path / "00000-of-00002.tokens").write_bytes(b"")
    (tmp_path / "manifest.json").write_text('{"inputs": {}}')
    with pytest.raises(DataError, match="is not complete: run `smollm3 tokenize` again"):
        find_files("a", Source(path=str(tmp_path)))
    (tmp_path / "manifest.json").write_text('{"inputs": {}, "shards": 2}')
    assert len(find_files("a", Source(path=str(tmp_path)))) == 1
