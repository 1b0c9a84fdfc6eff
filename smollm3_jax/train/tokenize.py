"""A corpus as shards of tokens, written once by several processes; a run that was stopped goes on."""

import concurrent.futures
import hashlib
import json
import multiprocessing
import os
from pathlib import Path
from typing import Any

from ..config import ModelConfig
from ..errors import DataError, OptionError
from ..progress import tally
from ..tokenizer import load_tokenizer
from .data import encoder
from .settings import Source
from .sources import MANIFEST, BadRecord, open_documents

MAX_BYTES = 100_000_000
_documents: Any
_encode: Any


def tokenize(
    source: str,
    folder: Path,
    model: Path,
    *,
    field: str = "text",
    workers: int = 1,
    shard_documents: int = 10_000,
    bad_records: int = 100,
) -> dict[str, Any]:
    """Writes `folder`: ArrayRecord shards, a document's token ids and the end of text a record, and a manifest.

    Args:
      source: a file or folder of documents; model: a model folder, whose tokenizer it is.

    Returns:
      documents, tokens, bad (records skipped), shards.

    Raises:
      OptionError: the folder holds shards of another corpus, tokenizer or size.
      DataError: more than `bad_records` cannot be read.
    """
    documents = open_documents("source", Source(path=source, field=field), MAX_BYTES)
    shards = -(-len(documents) // shard_documents)
    inputs = {
        "files": [list(file) for file in documents.files],
        "tokenizer": hashlib.sha256((model / "tokenizer.json").read_bytes()).hexdigest(),
        "field": field,
        "shard_documents": shard_documents,
    }
    folder.mkdir(parents=True, exist_ok=True)
    manifest = folder / MANIFEST
    if manifest.exists() and json.loads(manifest.read_text())["inputs"] != inputs:
        raise OptionError(f"{folder} holds shards of another corpus, tokenizer or size; name another folder")
    _write(manifest, {"inputs": inputs})
    jobs = [
        (folder / f"{shard:05d}-of-{shards:05d}.tokens", start, shard_documents)
        for shard, start in enumerate(range(0, len(documents), shard_documents))
    ]
    counts = []
    with (
        tally("shards", shards) as report,
        concurrent.futures.ProcessPoolExecutor(
            workers, multiprocessing.get_context("spawn"), initializer=_begin, initargs=(source, field, model)
        ) as pool,
    ):
        for done in concurrent.futures.as_completed([pool.submit(_shard, *job) for job in jobs]):
            counts.append(done.result())
            report(len(counts), sum(tokens for _, tokens, _ in counts))
            bad = sum(count for _, _, count in counts)
            if bad > bad_records:
                pool.shutdown(cancel_futures=True)
                raise DataError(f"{source}: {bad} bad records, more than --bad-records {bad_records}")
    totals = {
        name: int(sum(x)) for name, x in zip(("documents", "tokens", "bad"), zip(*counts, strict=True), strict=True)
    }
    _write(manifest, {"inputs": inputs, **totals, "shards": shards})
    return {**totals, "shards": shards}


def _write(file: Path, content: Any) -> None:
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    temporary.write_text(json.dumps(content))
    os.replace(temporary, file)


def _begin(source: str, field: str, model: Path) -> None:
    """What a worker opens once: the documents, and what encodes them."""
    global _documents, _encode
    config = ModelConfig.from_hf(model)
    _documents = open_documents("source", Source(path=source, field=field), MAX_BYTES)
    _encode = encoder(load_tokenizer(model, config), config)


def _shard(out: Path, start: int, count: int) -> tuple[int, int, int]:
    """(documents, tokens, bad records) of one shard, which is written unless it is there."""
    from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

    note = out.with_suffix(".json")
    if out.exists() and note.exists():
        return tuple(json.loads(note.read_text()))
    written = tokens = bad = 0
    temporary = f"{out}.{os.getpid()}"
    writer = ArrayRecordWriter(temporary, "group_size:1")
    for index in range(start, min(start + count, len(_documents))):
        try:
            ids = _encode(_documents[index])
        except BadRecord:
            bad += 1
            continue
        writer.write(ids.astype("<i4").tobytes())
        written, tokens = written + 1, tokens + len(ids)
    writer.close()
    if written:
        assert ArrayRecordReader(temporary).num_records() == written
    _write(note, [written, tokens, bad])
    os.replace(temporary, out)
    return written, tokens, bad
