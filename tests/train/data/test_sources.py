import bz2
import gzip
import json
import logging
import lzma
import os

import numpy as np
import pytest
from etils import epath
from hypothesis import given
from hypothesis import strategies as st

from smollm3_jax.errors import DataError
from smollm3_jax.train.data import sources
from smollm3_jax.train.data.sources import BadRecord, Documents, Words, digest, find_files, open_documents
from smollm3_jax.train.settings import Source


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("SMOLLM3_JAX_CACHE", str(tmp_path_factory.mktemp("cache")))


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
    with pytest.raises(DataError, match="say the format, --format=FORMAT, one of jsonl, parquet, "):
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


def write_parquet(path, **columns):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path.parent.mkdir(exist_ok=True)
    parquet.write_table(pyarrow.table(columns), path)


def jsonl(*texts):
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def test_a_folder_as_the_hub_has_it(tmp_path, caplog):
    """The files below, and not what is written about them; what is taken and what is left is said."""
    for name in ("README.md", "readme_en.md", "LICENSE", "LICENSE.txt", ".gitattributes", "_notes.txt", "CITATION.md"):
        (tmp_path / name).write_text("not to be learnt")
    for name in (".git/a.txt", ".cache/huggingface/b.jsonl", "_old/c.txt"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("nor this")
    (tmp_path / "dataset_infos.json").write_text('{"default": {}}')
    write_parquet(tmp_path / "data" / "train-00001-of-00002.parquet", text=["c"])
    write_parquet(tmp_path / "data" / "train-00000-of-00002.parquet", text=["a", "b"])
    with caplog.at_level(logging.INFO):
        assert read(tmp_path) == ["a", "b", "c"]
    names = [name for name, _ in open_documents("s", Source(path=str(tmp_path)), 1000).files]
    assert names == ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"]
    assert "data/train-00000-of-00002.parquet, data/train" in caplog.text
    assert "left alone: CITATION.md, LICENSE, LICENSE.txt, README.md, _notes.txt, dataset_infos.json" in caplog.text


@pytest.mark.parametrize("names", [("train-0.jsonl", "test-0.jsonl"), ("train/0.jsonl", "validation/0.jsonl")])
def test_other_splits_beside_that_for_training_are_told_of(tmp_path, caplog, names):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(jsonl(name))
    assert sorted(read(tmp_path)) == sorted(names)
    assert f"not only what is named train is read: {names[1]}" in caplog.text
    caplog.clear()
    (tmp_path / names[0]).rename(tmp_path / "latest.jsonl")
    read(tmp_path)
    assert "named train" not in caplog.text


def test_a_folder_of_what_is_about_it_alone_is_no_corpus(tmp_path):
    (tmp_path / "README.md").write_text("text")
    (tmp_path / "table.csv").write_text("text\na\n")
    with pytest.raises(DataError, match=r"neither a file .*there are README.md, table.csv"):
        read(tmp_path)
    assert read(tmp_path / "README.md") == ["text"]  # who names it means it


def test_names_that_only_begin_like_a_licence(tmp_path):
    (tmp_path / "licenses.txt").write_text("a")
    (tmp_path / "changes of mind.md").write_text("b")
    (tmp_path / "readmes.jsonl").write_bytes(b"")
    (tmp_path / "readmes.jsonl").unlink()
    assert read(tmp_path) == ["b", "a"]


def test_every_spelling_of_json_lines_in_one_folder(tmp_path, caplog):
    compress = {"c.jsonl.gz": gzip.compress, "d.jsonl.bz2": bz2.compress, "e.json.xz": lzma.compress}
    for name, pack in compress.items():
        (tmp_path / name).write_bytes(pack(jsonl(name[0])))
    (tmp_path / "a.JSONL").write_bytes(jsonl("a"))
    (tmp_path / "b.json").write_text(json.dumps([{"text": "b1"}, {"text": "b2"}], indent=1))
    (tmp_path / "f.ndjson").write_bytes(jsonl("f"))
    (tmp_path / "meta.json").write_text('{"version": 1}')
    (tmp_path / "labels.json").write_text('["x", "y"]')
    (tmp_path / "g.csv").write_text("text")
    with caplog.at_level(logging.INFO):
        assert read(tmp_path) == ["a", "b1", "b2", "c", "d", "e", "f"]
    assert "left alone: g.csv" in caplog.text and "left alone: labels.json, meta.json" in caplog.text


def test_zstd(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    (tmp_path / "a.jsonl.zst").write_bytes(pyarrow.compress(jsonl(*TEXTS), codec="zstd", asbytes=True))
    assert read(tmp_path) == TEXTS


def test_what_is_unpacked_is_unpacked_once_and_compared_by_what_was_given(tmp_path, monkeypatch):
    (tmp_path / "a.txt.gz").write_bytes(packed := gzip.compress(b"one", mtime=0))
    documents = open_documents("s", Source(path=str(tmp_path)), 1000)
    assert documents[0] == "one" and documents.files == (("a.txt.gz", digest(epath.Path(tmp_path / "a.txt.gz"))),)
    monkeypatch.setattr(sources, "blocks", None)
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
    path, words = tmp_path / f"a.{ending}", Words("data.field", "data.format", "data.max_document_bytes")
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
    words = Words("data.field", "data.format", "data.max_document_bytes")
    with pytest.raises(BadRecord, match=r"1001 bytes, more than data.max_document_bytes=1000"):
        open_documents("s", Source(path=str(tmp_path)), 1000, words)[0]


def test_columns_of_bytes(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    for kind in (pyarrow.binary(), pyarrow.large_binary()):
        write_parquet(tmp_path / "a.parquet", text=pyarrow.array(["三".encode(), b"\xff", None], kind))
        documents = open_documents("s", Source(path=str(tmp_path)), 1000)
        assert documents[0] == "三"
        for bad in (1, 2):
            with pytest.raises(BadRecord):
                documents[bad]


def test_the_option_of_the_format_is_named(tmp_path):
    write_jsonl(tmp_path / "part-0", TEXTS)
    words = Words("data.field", "data.format")
    with pytest.raises(DataError, match=r"data.format=FORMAT"):
        open_documents("s", Source(path=str(tmp_path / "part-0")), 1000, words)
    assert read(tmp_path, format="jsonl") == TEXTS  # a folder of names that say nothing
    write_jsonl(tmp_path / "a.jsonl", ["a"])
    (tmp_path / "b.txt").write_text("b")
    with pytest.raises(DataError, match=r"several formats: jsonl, text; .* data.format=jsonl"):
        open_documents("s", Source(path=str(tmp_path)), 1000, words)
    assert read(tmp_path, format="text") == ["b"] and read(tmp_path, format="jsonl") == ["a"]


def test_pointers_of_git_lfs(tmp_path):
    for name in ("a.jsonl", "b.parquet"):
        (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
        with pytest.raises(DataError, match="git lfs pull"):
            read(tmp_path / name)


def test_links(tmp_path):
    """Of files and folders, as the hub's cache has them; one that leads back is followed once."""
    (tmp_path / "blobs").mkdir()
    write_jsonl(tmp_path / "blobs" / "0f", ["a"])
    corpus = tmp_path / "corpus"
    (corpus / "data").mkdir(parents=True)
    (corpus / "data" / "a.jsonl").symlink_to(tmp_path / "blobs" / "0f")
    (corpus / "data" / "back").symlink_to(corpus)
    assert read(corpus) == ["a"]
    os.mkfifo(corpus / "data" / "b.jsonl")
    with pytest.raises(DataError, match="not a plain file"):
        read(corpus)


@pytest.mark.parametrize("content", ["[1]", "{}", "{", '{"inputs": 3}', "[" * 100_000, b"\xff".decode("latin-1")])
def test_a_manifest_of_somebody_else(tmp_path, content):
    write_jsonl(tmp_path / "a.jsonl", TEXTS)
    (tmp_path / "manifest.json").write_text(content)
    assert read(tmp_path) == TEXTS
    (tmp_path / "00000-of-00001.tokens").write_bytes(b"")
    (tmp_path / "a.jsonl").unlink()
    assert len(find_files("a", Source(path=str(tmp_path)))) == 1


def test_an_edit_anywhere_in_a_long_file_is_seen(tmp_path, monkeypatch):
    """Of a corpus beyond the limit, only what lies in the pieces that are compared."""
    content = bytearray(b"x" * (4 * sources.HASHED))
    path = epath.Path(_with(tmp_path / "a.txt", content))
    of = lambda: Documents([(1, str)], ["a.txt"], [path]).files  # noqa: E731
    whole, pieces = of(), Documents([(1, str)], ["a.txt"], [path]).pieces
    content[3 * sources.HASHED // 2] = ord("y")
    _with(tmp_path / "a.txt", content)
    assert of() != whole and Documents([(1, str)], ["a.txt"], [path]).pieces == pieces
    monkeypatch.setattr(sources, "WHOLE", 100)
    assert of() == pieces
