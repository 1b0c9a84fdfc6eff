"""`smollm3 convert`."""

import argparse

from ..config import FORMATS
from .shared import add_dtype, add_source_and_target, folder, say


def add(parser: argparse.ArgumentParser) -> None:
    add_dtype(parser, "cast all tensors (default: keep each as it is)")
    parser.add_argument("--format", choices=FORMATS, default="safetensors")
    add_source_and_target(parser)


def run(args: argparse.Namespace) -> int:
    from ..weights.save import check_target, convert

    check_target(args.folder, args.force)  # before anything is fetched
    convert(folder(args.source), args.folder, args.dtype, args.format, args.max_shard_size, args.force)
    say(args.folder)
    return 0
