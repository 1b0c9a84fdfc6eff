import bz2
import gzip
import json
import logging
import lzma
import os

import pytest
from corpora import TEXTS, jsonl, read, write_jsonl, write_parquet

from smollm3_jax.errors import DataError, OptionError
from smollm3_jax.train.data.files import OptionNames, digest, find_files, refuse_within
from smollm3_jax.train.data.sources import open_documents
from smollm3_jax.train.settings import Source


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
    (tmp_path / "a.txt").write_bytes(b"abc")
    (file,) = find_files("s", Source(path=str(tmp_path / "a.txt")))
    first = digest(file)
    assert digest(file) == first
    (tmp_path / "a.txt").write_bytes(b"abd")
    assert digest(file) != first


def test_shards_that_are_not_all_there_are_refused(tmp_path):
    (tmp_path / "00000-of-00002.tokens").write_bytes(b"")
    (tmp_path / "manifest.json").write_text('{"inputs": {}}')
    with pytest.raises(DataError, match="is not complete: run `smollm3 tokenize` again"):
        find_files("a", Source(path=str(tmp_path)))
    (tmp_path / "manifest.json").write_text('{"inputs": {}, "shards": 2}')
    assert len(find_files("a", Source(path=str(tmp_path)))) == 1


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
    assert sorted(map(str, read(tmp_path))) == sorted(names)
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


def test_the_option_of_the_format_is_named(tmp_path):
    write_jsonl(tmp_path / "part-0", TEXTS)
    words = OptionNames("data.field", "data.format")
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


def test_a_page_for_lines_of_json(tmp_path):
    (tmp_path / "a.jsonl").write_text("<!DOCTYPE html><html>404</html>")
    with pytest.raises(DataError, match=r"a.jsonl holds no lines of JSON: it is a web page"):
        read(tmp_path)


def test_a_folder_that_datasets_saved(tmp_path):
    for name in ("dataset_info.json", "state.json", "dataset_dict.json"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "data-00000-of-00001.arrow").write_bytes(b"ARROW1")
    with pytest.raises(DataError, match=r"data-00000-of-00001.arrow.*saved is read with --format=hf"):
        read(tmp_path)


def test_an_empty_name_is_not_the_folder_that_one_is_in(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "a.jsonl", TEXTS)
    with pytest.raises(DataError, match="is empty: give one"):
        read("")


def test_nothing_is_written_among_the_documents(tmp_path):
    """It would be read as documents the next time, and a run could not go on."""
    corpus = tmp_path / "corpus"
    (corpus / "below").mkdir(parents=True)
    (tmp_path / "link").symlink_to("corpus")
    source = Source(path=str(corpus))
    for place in (corpus, corpus / "run", corpus / "below" / "a" / "run", tmp_path / "link" / "run"):
        with pytest.raises(OptionError, match="lies in the folder of the documents"):
            refuse_within(place, source)
    with pytest.raises(OptionError, match="is no name of a folder"):
        refuse_within("a\0b", source)
    for place in (tmp_path, tmp_path / "corpus2", corpus / ".run", corpus / "_runs" / "1", "gs://bucket/run"):
        refuse_within(place, source)
    refuse_within(corpus / "run", Source(path=str(corpus), format="parquet"))
    refuse_within(tmp_path / "run", Source(path=str(tmp_path / "a.jsonl")))


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
