"""`smollm3 tokenize`."""

import argparse
import os
from pathlib import Path

from ..screen_text import plain
from .shared import MODEL_HELP, folder, print_json


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", help="a file or folder of documents")
    parser.add_argument("folder", metavar="DST", help="the folder to write; a run that was stopped goes on")
    parser.add_argument("-m", "--model", required=True, metavar="MODEL", help=f"whose tokenizer: {MODEL_HELP}")
    parser.add_argument("--field", default="text", help="of JSON lines and columns (default: text)")
    formats = ("jsonl", "parquet", "arrayrecord", "text", "hf")
    parser.add_argument("--format", choices=formats, default="", help="where the files' names do not say it")
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: one a core)")
    parser.add_argument("--shard-documents", type=int, default=10_000, metavar="N", help="default: 10000")
    parser.add_argument("--bad-records", type=int, default=100, metavar="N", help="how many may be skipped")
    parser.add_argument("--json", action="store_true")


def run(args: argparse.Namespace) -> int:
    from ..train.data.tokenize import tokenize
    from ..weights.load import text_folder

    report = tokenize(
        args.source,
        Path(args.folder),
        text_folder(folder(args.model)),
        field=args.field,
        format=args.format,
        workers=args.workers or os.cpu_count() or 1,
        shard_documents=args.shard_documents,
        bad_records=args.bad_records,
    )
    if args.json:
        print_json(report)
    else:
        last = f" (the last: {plain(report['last_bad'])})" if report["bad"] else ""
        print(
            f"{report['documents']:,} documents, {report['tokens']:,} tokens, {report['shards']} shards, "
            f"bad records skipped: {report['bad']:,}{last}"
        )
    return 0
