"""`smollm3 convert`."""

import argparse

from ..config import FORMATS, GGUF_TYPES
from ..paths import user_path
from .shared import add_dtype, add_source_and_target, folder, say


def add(parser: argparse.ArgumentParser) -> None:
    add_dtype(parser, "cast all tensors (default: keep each as it is)")
    parser.add_argument("--format", choices=FORMATS, default=FORMATS[0])
    own = "default: the checkpoint's own dtype"
    parser.add_argument("--type", choices=GGUF_TYPES, help=f"of a .gguf file: what its matrices become; {own}")
    add_source_and_target(parser, "the folder to write, or a FILE.gguf")


def run(args: argparse.Namespace) -> int:
    from ..weights.gguf_write import check_file
    from ..weights.load import is_gguf
    from ..weights.save import check_target, convert

    # Before anything is fetched.
    (check_file if is_gguf(user_path(args.folder)) else check_target)(args.folder, args.force)
    options = {"max_shard_size": args.max_shard_size, "force": args.force, "gguf_type": args.type}
    convert(folder(args.source), args.folder, args.dtype, args.format, **options)
    say(args.folder)
    return 0
