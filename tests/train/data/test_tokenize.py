"""Shards of tokens: what they hold, and what may go wrong while they are written."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import Future
from pathlib import Path

import pytest
import tiny
from runs import environment, write_corpus

from smollm3_jax.commands.main import main
from smollm3_jax.errors import DataError, OptionError, SaveError, TokenizerError
from smollm3_jax.train.data import tokenize as module
from smollm3_jax.train.data.sources import open_documents
from smollm3_jax.train.data.tokenize import tokenize
from smollm3_jax.train.settings import Source


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.talking_checkpoint(tmp_path_factory.mktemp("tokenize") / "model")


@pytest.fixture
def corpus(tmp_path):
    write_corpus(tmp_path / "corpus.jsonl", documents=10)
    return tmp_path / "corpus.jsonl"


class Here:
    """Stands for processes: what they would do is done here, at once."""

    def __init__(self, workers, context, initializer, initargs):
        before = signal.getsignal(signal.SIGINT)
        initializer(*initargs)
        signal.signal(signal.SIGINT, before)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def submit(self, work, *args):
        done = Future()
        try:
            done.set_result(work(*args))
        except Exception as error:
            done.set_exception(error)
        return done

    def shutdown(self, **_):
        pass


@pytest.fixture(autouse=True)
def here(request, monkeypatch):
    if not request.node.get_closest_marker("slow"):
        monkeypatch.setattr(module.concurrent.futures, "ProcessPoolExecutor", Here)


def test_it_goes_on_where_it_stopped(model, corpus, tmp_path):
    """What is there stays, but for what cannot be read."""
    out = tmp_path / "out"
    whole = tokenize(str(corpus), out, model, shard_documents=3)
    assert whole["documents"] == 10 and (whole["bad"], whole["last_bad"], whole["shards"]) == (0, "", 4)
    documents = open_documents("s", Source(path=str(out)), 1000)
    tokens = [documents[i].tolist() for i in range(10)]
    texts = [json.loads(line)["text"] for line in corpus.read_text().splitlines()]
    assert tokens == [[*(int(word[1:]) for word in text.split()), 2] for text in texts]
    (out / "manifest.json").write_text(
        json.dumps({"inputs": json.loads((out / "manifest.json").read_text())["inputs"]})
    )
    kept = (out / "00000-of-00004.tokens").stat()
    (out / "00001-of-00004.tokens").unlink()
    (out / "00002-of-00004.json").write_text("[1")
    (out / "00003-of-00004.json").write_text(json.dumps([1, 5, 0]))  # as an older version wrote it
    again = tokenize(str(corpus), out, model, shard_documents=3)
    assert (out / "00000-of-00004.tokens").stat() == kept
    assert again["documents"] == 10 and [documents[i].tolist() for i in range(10)] == tokens
    assert not [file for file in out.iterdir() if file.name.startswith(".")]


def command(source, out, model, *words):
    return main(["tokenize", str(source), str(out), "--model", str(model), "--workers", "1", *words])


def test_bad_records_are_counted_aloud(model, tmp_path, capsys):
    """T8: half a surrogate pair among them."""
    lines = ['{"text": "w5 w6"}', '{"text": "w5 \\ud800"}', "{", '{"text": "w7"}']
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    assert command(tmp_path / "a.jsonl", tmp_path / "out", model) == 0
    out = capsys.readouterr().out
    assert "2 documents, 5 tokens, 1 shards, bad records skipped: 2 (the last: a.jsonl, byte 40: not JSON" in out
    assert command(tmp_path / "a.jsonl", tmp_path / "out", model, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["bad"] == 2 and report["last_bad"].startswith("a.jsonl, byte 40")
    assert command(tmp_path / "a.jsonl", tmp_path / "other", model, "--bad-records", "1") == 3
    assert "2 bad records, more than --bad-records 1; the last: a.jsonl" in capsys.readouterr().err


def test_a_corpus_of_bad_records_alone_is_refused(model, tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text('{\n{"text": " "}\n')
    assert command(tmp_path / "a.jsonl", tmp_path / "out", model) == 3
    assert "none of its 2 records can be read; the last: a.jsonl, byte 2: an empty doc" in capsys.readouterr().err


def test_the_hints_can_be_followed(model, tmp_path, capsys):
    (tmp_path / "corpus").write_text('{"content": "w5 w6"}\n')
    assert command(tmp_path / "corpus", tmp_path / "out", model) == 3
    assert "--format=FORMAT" in capsys.readouterr().err
    assert command(tmp_path / "corpus", tmp_path / "out", model, "--format=jsonl") == 3
    assert "it has content. Say which is the text: --field=content" in capsys.readouterr().err
    assert command(tmp_path / "corpus", tmp_path / "out", model, "--format=jsonl", "--field=content") == 0


@pytest.mark.parametrize("content", ["", "{", "[1]", "{}", '{"inputs": 1}', "[" * 100_000, '{"inputs": {"files": []}}'])
def test_a_folder_with_another_manifest_is_left_alone(model, corpus, tmp_path, content):
    out = tmp_path / "out"
    out.mkdir()
    (out / "manifest.json").write_text(content)
    with pytest.raises(OptionError, match="name another folder"):
        tokenize(str(corpus), out, model)
    assert (out / "manifest.json").read_text() == content and len(list(out.iterdir())) == 1


def test_a_folder_that_cannot_be_written(model, corpus, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(SaveError, match="cannot be written"):
        tokenize(str(corpus), tmp_path / "file", model)

    def full(path, content):
        if Path(path).name.startswith("0"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(path, content)

    write = module.write
    monkeypatch.setattr(module, "write", full)
    with pytest.raises(SaveError, match=r"No space left on device.*goes on"):
        tokenize(str(corpus), tmp_path / "out", model)
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["manifest.json"]
    monkeypatch.setattr(module, "write", write)
    assert tokenize(str(corpus), tmp_path / "out", model)["documents"] == 10


def test_a_model_without_a_tokenizer(corpus, tmp_path):
    tiny.tiny_checkpoint(tmp_path / "mute")
    with pytest.raises(TokenizerError, match=r"tokenizer.json is missing"):
        tokenize(str(corpus), tmp_path / "out", tmp_path / "mute")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("option", [{"workers": 0}, {"shard_documents": 0}, {"bad_records": -1}])
def test_numbers_that_are_none(model, corpus, tmp_path, option):
    with pytest.raises(OptionError, match="must be at least"):
        tokenize(str(corpus), tmp_path / "out", model, **option)


def test_a_corpus_that_is_damaged_on_the_way(model, corpus, tmp_path, monkeypatch):
    def gone(*_):
        raise DataError("corpus.jsonl can no longer be read")

    monkeypatch.setattr(module, "_shard", gone)
    with pytest.raises(DataError, match="no longer"):
        tokenize(str(corpus), tmp_path / "out", model)


@pytest.mark.slow
@pytest.mark.parametrize(("kill", "early"), [(signal.SIGKILL, False), (signal.SIGINT, False), (signal.SIGINT, True)])
def test_a_process_that_is_killed(model, tmp_path, kill, early):
    """Without a traceback, and the same command goes on. Ctrl-C reaches all processes of a terminal."""
    write_corpus(tmp_path / "long.jsonl", documents=200_000)
    words = [sys.executable, "-m", "smollm3_jax", "tokenize", tmp_path / "long.jsonl", tmp_path / "out"]
    words += ["--model", model, "--workers", "2", "--shard-documents", "200"]
    process = subprocess.Popen(
        words, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    end = time.monotonic() + 100
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while len(children.read_text().split()) < 3 if early else not list((tmp_path / "out").glob("*.tokens")):
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.05)
    if kill == signal.SIGKILL:
        # Its children are what Python starts beside it, its workers last.
        os.kill(int(children.read_text().split()[-1]), kill)
    else:
        os.killpg(process.pid, kill)
    _, said = process.communicate(timeout=60)
    assert "Traceback" not in said
    if kill == signal.SIGKILL:
        assert process.returncode == 3 and "was killed" in said and "the same command goes on" in said
    else:
        assert process.returncode == 130 and said.endswith("smollm3: interrupted\n")
