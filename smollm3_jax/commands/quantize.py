"""`smollm3 quantize`."""

import argparse

from ..config import CACHE_SCHEMES, WEIGHT_SCHEMES
from .shared import add_source_and_target, folder, say


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--weights", choices=WEIGHT_SCHEMES, required=True)
    parser.add_argument("--cache", choices=CACHE_SCHEMES, help="what keys and values are to be kept in by default")
    add_source_and_target(parser)


def run(args: argparse.Namespace) -> int:
    from ..weights.save import check_target, quantize

    check_target(args.folder, args.force)  # before anything is fetched
    quantize(folder(args.source), args.folder, args.weights, args.cache, args.max_shard_size, args.force)
    say(args.folder)
    return 0
