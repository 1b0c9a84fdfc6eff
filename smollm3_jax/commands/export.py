"""`smollm3 export`."""

import argparse
from pathlib import Path

from .shared import add_dtype, say


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_folder", metavar="RUN")
    parser.add_argument("folder", metavar="DIR", help="the folder to write")
    parser.add_argument("--step", type=int, metavar="N", help="default: the newest that is sound")
    parser.add_argument("--average", type=int, default=1, metavar="N", help="the mean of the last N checkpoints")
    parser.add_argument("--force", action="store_true", help="DIR may be there: replace the model in it")
    parser.add_argument(
        "--adapter", action="store_true", help="of a run of lora.rank: the adapter alone, as PEFT has it"
    )
    add_dtype(parser, "default: float32; of a run of lora.rank, the base's own")


def run(args: argparse.Namespace) -> int:
    from ..train.run.export import export
    from ..train.run.folder import run_folder

    run = run_folder(args.run_folder)
    steps = export(run, Path(args.folder), args.step, args.average, args.dtype, args.force, args.adapter)
    say(f"{args.folder}: step {', '.join(map(str, steps))}")
    return 0
