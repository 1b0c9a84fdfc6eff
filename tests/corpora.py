"""Small corpora in files, and what is read from them."""

import json

import pytest

from smollm3_jax.train.data.sources import open_documents
from smollm3_jax.train.settings import Source

TEXTS = ["one", "zwei\nZeilen", "三"]


def read(path, **fields):
    documents = open_documents("s", Source(path=str(path), **fields), 1000)
    return [documents[i] for i in range(len(documents))]


def write_jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def write_parquet(path, **columns):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path.parent.mkdir(exist_ok=True)
    parquet.write_table(pyarrow.table(columns), path)


def jsonl(*texts):
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
