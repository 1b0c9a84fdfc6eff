"""A corpus as shards of tokens, written by several processes; after an interruption the same command goes on."""

import concurrent.futures
import contextlib
import hashlib
import json
import multiprocessing
import multiprocessing.resource_tracker
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...config import ModelConfig
from ...errors import DataError, OptionError, SaveError
from ...files import new_file, write
from ...progress import tally
from ...tokenizer import load_tokenizer
from ..settings import Source
from .encode import Encode, encoder
from .files import MANIFEST, is_ours, read_manifest, refuse_within
from .records import BadRecord
from .sources import Documents, open_documents

MAX_BYTES = 100_000_000
_documents: Documents
_encode: Encode


def tokenize(
    source: str,
    folder: Path,
    model: Path,
    *,
    field: str = "text",
    format: str = "",
    workers: int = 1,
    shard_documents: int = 10_000,
    bad_records: int = 100,
) -> dict[str, Any]:
    """Writes `folder`: ArrayRecord shards, a document's token ids and the end of text a record, and a manifest.

    Args:
      source: a file or folder of documents. model: a model folder, whose tokenizer is taken.
      format: one of settings.SOURCE_FORMATS; "" takes it from the files' names.

    Returns:
      documents, tokens, bad (records skipped), last_bad (why the last of them was; ""), shards.

    Raises:
      OptionError: a number is too small, or the folder holds shards of another corpus, tokenizer or size, or something
        else.
      DataError: more than `bad_records` cannot be read, or none can; or a process was killed.
      SaveError: the folder cannot be written.
    """
    if workers < 1 or shard_documents < 1 or bad_records < 0:
        raise OptionError(
            f"workers {workers} and shard_documents {shard_documents} must be at least 1, bad_records {bad_records} 0"
        )
    corpus = Source(path=source, format=format, field=field)
    config = ModelConfig.from_hf(model)
    encoder(load_tokenizer(model, config), config)  # what is wrong with it shows here
    refuse_within(folder, corpus)
    documents = open_documents("SRC", corpus, MAX_BYTES)
    inputs = {
        "files": [list(file) for file in documents.files],
        "tokenizer": hashlib.sha256((model / "tokenizer.json").read_bytes()).hexdigest(),
        "field": field,
        "shard_documents": shard_documents,
    }
    shards = -(-len(documents) // shard_documents)
    with _writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        manifest = folder / MANIFEST
        if manifest.exists():
            _require_same(manifest, inputs, inputs | {"files": [list(file) for file in documents.pieces]})
        write(manifest, json.dumps({"inputs": inputs}))
    jobs = [
        (folder / f"{shard:05d}-of-{shards:05d}.tokens", start, shard_documents)
        for shard, start in enumerate(range(0, len(documents), shard_documents))
    ]
    with _pool(workers, corpus, model) as pool, _writing(folder):
        totals, last = _write_shards(pool, jobs, source, bad_records)
    result = dict(zip(("documents", "tokens", "bad"), totals, strict=True))
    if not result["documents"]:
        raise DataError(f"{source}: none of its {len(documents)} records can be read; the last: {last}")
    with _writing(folder):
        write(manifest, json.dumps({"inputs": inputs, **result, "shards": shards}))
    return {**result, "last_bad": last, "shards": shards}


def _write_shards(
    pool: concurrent.futures.Executor, jobs: list[tuple[Path, int, int]], source: str, bad_records: int
) -> tuple[list[int], str]:
    """(documents, tokens and bad records of all shards, why the last of these was). jobs: arguments of `_shard`."""
    totals, last, done = [0, 0, 0], "", 0
    with tally("shards", len(jobs)) as report:
        with _interrupts_kept():  # the processes begin with the first job, and are silent until `_begin`
            futures = [pool.submit(_shard, *job) for job in jobs]
        for future in concurrent.futures.as_completed(futures):
            *counts, reason = future.result()
            totals = [total + count for total, count in zip(totals, counts, strict=True)]
            last, done = reason or last, done + 1
            report(done, totals[1])
            if totals[2] > bad_records:
                raise DataError(
                    f"{source}: {totals[2]} bad records, more than --bad-records {bad_records}; the last: {last}"
                )
    return totals, last


def _require_same(manifest: Path, *inputs: dict[str, Any]) -> None:
    """Raises OptionError if a folder's manifest is another program's, or has none of these inputs."""
    before = read_manifest(manifest)
    if not is_ours(before):
        raise OptionError(f"{manifest} is not one that `smollm3 tokenize` writes; name another folder")
    if before["inputs"] not in inputs:
        raise OptionError(f"{manifest.parent} holds shards of another corpus, tokenizer or size; name another folder")


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Turns OSError into SaveError. Whole shards stay, and the same command goes on after them."""
    try:
        yield
    except OSError as error:
        raise SaveError(
            f"{folder} cannot be written: {error}; when that is mended, run the same command again: it goes on"
        ) from None


@contextlib.contextmanager
def _pool(workers: int, corpus: Source, model: Path) -> Iterator[concurrent.futures.ProcessPoolExecutor]:
    """Processes that make shards. Where the block ends early, nothing more begins."""
    context = multiprocessing.get_context("spawn")
    arguments = (corpus, model)
    with concurrent.futures.ProcessPoolExecutor(workers, context, initializer=_begin, initargs=arguments) as pool:
        try:
            yield pool
        except concurrent.futures.process.BrokenProcessPool:
            raise DataError(
                "a process of `smollm3 tokenize` was killed, perhaps for want of memory: give fewer --workers; the "
                "same command goes on from the shards that are there"
            ) from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


@contextlib.contextmanager
def _interrupts_kept() -> Iterator[None]:
    """Ctrl-C is delivered after the block; processes that begin in it ignore it until they unblock it."""
    multiprocessing.resource_tracker.ensure_running()  # which would unblock it when it starts
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin(corpus: Source, model: Path) -> None:
    """What a worker opens once: the documents, and what encodes them."""
    global _documents, _encode
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # without a message: the first process prints one
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    config = ModelConfig.from_hf(model)
    _documents = open_documents("SRC", corpus, MAX_BYTES)
    _encode = encoder(load_tokenizer(model, config), config)


def _shard(out: Path, start: int, count: int) -> tuple[int, int, int, str]:
    """(documents, tokens, bad records, why the last was) of one shard, which is written unless it is there.

    Raises:
      OSError: it cannot be written.
    """
    from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

    note = out.with_suffix(".json")
    if out.exists() and (known := _noted(note)):
        return known
    written = tokens = bad = 0
    reason = ""
    try:
        with new_file(out) as file:
            writer = ArrayRecordWriter(file.name, "group_size:1")
            for index in range(start, min(start + count, len(_documents))):
                try:
                    ids = _encode(_documents[index])
                except BadRecord as error:
                    bad, reason = bad + 1, str(error)
                    continue
                writer.write(ids.astype("<i4").tobytes())
                written, tokens = written + 1, tokens + len(ids)
            writer.close()
            if written and ArrayRecordReader(file.name).num_records() != written:
                raise OSError(f"{out.name} has not all of its records")
            write(note, json.dumps([written, tokens, bad, reason]))
    except (RuntimeError, ValueError) as error:  # of ArrayRecord
        if isinstance(error, DataError):
            raise
        raise OSError(f"{out.name}: {str(error).splitlines()[0][:300]}") from None
    return written, tokens, bad, reason


def _noted(note: Path) -> tuple[int, int, int, str] | None:
    """What a shard's note says; None if that is nothing, so that the shard is made again."""
    try:
        content = json.loads(note.read_bytes())
        documents, tokens, bad = (int(x) for x in content[:3])
        return documents, tokens, bad, str(content[3]) if len(content) > 3 else ""
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None
