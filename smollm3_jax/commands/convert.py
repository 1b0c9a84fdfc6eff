"""`smollm3 convert`."""

import argparse

from ..config import FORMATS
from .shared import MODEL_HELP, add_dtype, folder, say


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", help=MODEL_HELP)
    parser.add_argument("folder", metavar="DST", help="the folder to write")
    add_dtype(parser, "cast all tensors (default: keep each as it is)")
    parser.add_argument("--format", choices=FORMATS, default="safetensors")
    parser.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="default: 5GB")
    parser.add_argument("--force", action="store_true", help="DST may be there: replace the model in it")


def run(args: argparse.Namespace) -> int:
    from ..weights.save import check_target, convert

    check_target(args.folder, args.force)  # before anything is fetched
    convert(folder(args.source), args.folder, args.dtype, args.format, args.max_shard_size, args.force)
    say(args.folder)
    return 0
