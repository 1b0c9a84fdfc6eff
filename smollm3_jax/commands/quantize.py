"""`smollm3 quantize`."""

import argparse

from ..config import CACHE_SCHEMES, WEIGHT_SCHEMES
from .shared import MODEL_HELP, folder, say


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", help=MODEL_HELP)
    parser.add_argument("folder", metavar="DST", help="the folder to write")
    parser.add_argument("--weights", choices=WEIGHT_SCHEMES, required=True)
    parser.add_argument("--cache", choices=CACHE_SCHEMES, help="what keys and values are to be kept in by default")
    parser.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="default: 5GB")
    parser.add_argument("--force", action="store_true", help="DST may be there: replace the model in it")


def run(args: argparse.Namespace) -> int:
    from ..weights.save import check_target, quantize

    check_target(args.folder, args.force)  # before anything is fetched
    quantize(folder(args.source), args.folder, args.weights, args.cache, args.max_shard_size, args.force)
    say(args.folder)
    return 0
