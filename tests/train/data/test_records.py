import gzip
import json
import stat

import numpy as np
import pytest
from corpora import TEXTS, jsonl, read, write_jsonl, write_parquet
from etils import epath
from hypothesis import given
from hypothesis import strategies as st

from smollm3_jax.errors import DataError
from smollm3_jax.train.data import records
from smollm3_jax.train.data.files import OptionNames, digest
from smollm3_jax.train.data.records import BadRecord
from smollm3_jax.train.data.sources import open_documents
from smollm3_jax.train.settings import Source


def test_json_lines(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", TEXTS)
    assert read(tmp_path / "a.jsonl") == TEXTS


@given(st.lists(st.text(min_size=1, max_size=50).filter(str.strip), min_size=1), st.booleans(), st.booleans())
def test_any_json_lines(tmp_path_factory, texts, ends, blank):
    path = tmp_path_factory.mktemp("any") / "a.jsonl"
    lines = [json.dumps({"text": text}) for text in texts]
    path.write_text(("\n\n" if blank else "\n").join(lines) + "\n" * ends)
    assert read(path) == texts


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


TALKS = [{"messages": [{"role": "user", "content": f"{i}"}], "tools": None} for i in range(5)]


@pytest.mark.parametrize("ending", ["jsonl", "parquet", "arrayrecord"])
def test_whole_records(tmp_path, ending):
    """Of a source without a field for the text: conversations."""
    if ending == "jsonl":
        (tmp_path / "a.jsonl").write_text("".join(json.dumps(talk) + "\n" for talk in TALKS))
    elif ending == "parquet":
        pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.Table.from_pylist(TALKS), tmp_path / "a.parquet", row_group_size=2)
    else:
        module = pytest.importorskip("array_record.python.array_record_module")
        writer = module.ArrayRecordWriter(str(tmp_path / "a.arrayrecord"), "group_size:1")
        for talk in TALKS:
            writer.write(json.dumps(talk).encode())
        writer.close()
    assert read(tmp_path, field="") == TALKS


def test_what_is_no_whole_record(tmp_path):
    (tmp_path / "a.jsonl").write_text('["a"]\n{"messages": []}\n')
    documents = open_documents("talks", Source(path=str(tmp_path / "a.jsonl"), field=""), 100)
    with pytest.raises(BadRecord, match="a list where an object should be"):
        documents[0]
    (tmp_path / "b.txt").write_text("a")
    with pytest.raises(DataError, match="of the format text, and conversations are records of fields"):
        open_documents("talks", Source(path=str(tmp_path / "b.txt"), field=""), 100)


@pytest.mark.parametrize("ending", ["arrayrecord", "tokens"])
def test_array_records(tmp_path, ending):
    module = pytest.importorskip("array_record.python.array_record_module")
    writer = module.ArrayRecordWriter(str(tmp_path / f"a.{ending}"), "group_size:1")
    records = [text.encode() for text in TEXTS] if ending == "arrayrecord" else [np.array([1, 2], np.int32).tobytes()]
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
    [
        *(
            "{",
            "[]",
            '{"body": "x"}',
            '{"text": 3}',
            '{"text": " "}',
            '{"text": "' + "x" * 2000 + '"}',
            "\xff",
            "[" * 900,
        ),
        *(
            '{"text": "x \\ud800"}',
            '{"text": "\\udc00\\ud800"}',
            '{"text": ' + "9" * 5000 + "}",
            '{"text": null}',
            "\0",
        ),
    ],
)
def test_bad_lines_are_bad_records(tmp_path, line):
    """T8."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "good"}\n' + line.encode("latin-1") + b'\n{"text": "too"}\n')
    documents = open_documents("s", Source(path=str(path)), 1000)
    assert (documents[0], documents[2]) == ("good", "too")
    with pytest.raises(BadRecord):
        documents[1]


def test_zstd(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    (tmp_path / "a.jsonl.zst").write_bytes(pyarrow.compress(jsonl(*TEXTS), codec="zstd", asbytes=True))
    assert read(tmp_path) == TEXTS


def test_what_is_unpacked_is_unpacked_once_and_compared_by_what_was_given(tmp_path, monkeypatch):
    (tmp_path / "a.txt.gz").write_bytes(packed := gzip.compress(b"one", mtime=0))
    documents = open_documents("s", Source(path=str(tmp_path)), 1000)
    assert documents[0] == "one" and documents.files == (("a.txt.gz", digest(epath.Path(tmp_path / "a.txt.gz"))),)
    monkeypatch.setattr(records, "blocks", None)
    assert read(tmp_path) == ["one"]
    monkeypatch.undo()
    (tmp_path / "a.txt.gz").write_bytes(packed[:-3])
    with pytest.raises(DataError, match=r"source s: .*a.txt.gz cannot be unpacked"):
        read(tmp_path)


def test_a_cache_that_cannot_be_written_is_said(tmp_path, monkeypatch):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"one"))
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SMOLLM3_JAX_CACHE", str(tmp_path / "file"))
    with pytest.raises(DataError, match=r"cannot be unpacked into .*SMOLLM3_JAX_CACHE"):
        read(tmp_path / "a.txt.gz")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_files_with_a_mark(tmp_path, encoding):
    (tmp_path / "a.jsonl").write_bytes((jsonl(*TEXTS).decode().replace("\n", "\r\n\r\n")).encode(encoding))
    (tmp_path / "b.jsonl").write_bytes('{"text": "三 \\ud800"}\n{"text": "三"}'.encode(encoding))
    assert read(tmp_path / "a.jsonl") == TEXTS
    documents = open_documents("s", Source(path=str(tmp_path / "b.jsonl")), 1000)
    assert len(documents) == 2 and documents[1] == "三"
    (tmp_path / "c.txt").write_bytes("höher".encode(encoding))
    assert read(tmp_path / "c.txt") == ["höher"]


def test_utf16_without_a_mark_is_said(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl(*TEXTS).decode().encode("utf-16-le"))
    with pytest.raises(DataError, match="no byte order mark"):
        read(tmp_path / "a.jsonl")
    (tmp_path / "b.txt").write_bytes("one two".encode("utf-16-be"))
    with pytest.raises(BadRecord, match="no byte order mark"):
        read(tmp_path / "b.txt")


@pytest.mark.parametrize("ending", ["jsonl", "parquet", "arrayrecord"])
def test_text_under_another_name(tmp_path, ending):
    """Its fields are named at once, and the option; a record that lacks it among others is a bad one."""
    path, words = tmp_path / f"a.{ending}", OptionNames("data.field", "data.format", "data.max_document_bytes")
    rows = [{"content": text, "id": i} for i, text in enumerate(TEXTS)]
    if ending == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif ending == "parquet":
        write_parquet(path, content=TEXTS, id=[0, 1, 2])
    else:
        module = pytest.importorskip("array_record.python.array_record_module")
        writer = module.ArrayRecordWriter(str(path), "group_size:1")
        for row in rows:
            writer.write(json.dumps(row).encode())
        writer.close()
    with pytest.raises(DataError, match=r"content, id.*data\.field="):
        open_documents("s", Source(path=str(path)), 1000, words)
    assert read(path, field="content") == TEXTS
    if ending == "jsonl":
        path.write_bytes(b'{"content": "x"}\n' + jsonl("y"))
        documents = open_documents("s", Source(path=str(path)), 1000, words)
        with pytest.raises(BadRecord, match="without the field 'text'; it has content"):
            documents[0]
        assert documents[1] == "y"


def test_long_documents_name_the_limit(tmp_path):
    (tmp_path / "a.txt").write_text("x" * 1001)
    words = OptionNames("data.field", "data.format", "data.max_document_bytes")
    with pytest.raises(BadRecord, match=r"1001 bytes, more than data.max_document_bytes=1000"):
        open_documents("s", Source(path=str(tmp_path)), 1000, words)[0]


def test_marks_within_a_file_that_others_were_joined_to(tmp_path):
    one = b'\xef\xbb\xbf{"text": "a"}\n'
    (tmp_path / "a.jsonl").write_bytes(one + one + b'{"text": "b"}\n' + one)
    assert read(tmp_path) == ["a", "a", "b", "a"]


def test_an_unpacked_corpus_is_for_nobody_else(tmp_path, monkeypatch):
    monkeypatch.setenv("SMOLLM3_JAX_CACHE", str(tmp_path / "cache"))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n'))
    assert read(tmp_path / "a.jsonl.gz") == ["a"]
    [copy] = (tmp_path / "cache" / "corpora").iterdir()
    assert stat.S_IMODE(copy.stat().st_mode) == 0o600


def test_columns_of_bytes(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    for kind in (pyarrow.binary(), pyarrow.large_binary()):
        write_parquet(tmp_path / "a.parquet", text=pyarrow.array(["三".encode(), b"\xff", None], kind))
        documents = open_documents("s", Source(path=str(tmp_path)), 1000)
        assert documents[0] == "三"
        for bad in (1, 2):
            with pytest.raises(BadRecord):
                documents[bad]
