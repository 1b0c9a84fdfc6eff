"""Measures this machine's accelerator with SmolLM3-3B's shape and random weights, which need no network.

    python scripts/on_device.py                              # all of it: ten minutes on one H100
    python scripts/on_device.py --half first                 # ceilings, parity, decoding; five minutes
    python scripts/on_device.py --half second                # training, prefill, PyTorch; five minutes
    python scripts/on_device.py --tiny                       # all of it on a small model and a CPU, to try the run
    python scripts/on_device.py --merge FOLDER [FOLDER ...]  # keeps a machine's results in benchmarks/
    python scripts/on_device.py --table                      # the README's table of accelerators, from benchmarks/

Parts are processes of their own with limits. Each result is a line of FOLDER/results.jsonl the moment it is known; a
part that fails is tried once more without CUDA graphs, and loses nothing of what others found. Exit code: 0; 1 if
something failed or was skipped for lack of time; 4 if a comparison is out of its bounds.
"""

import argparse
import importlib
import os
import sys
from pathlib import Path

from device import benchmarks, report
from device.run import Run, lines
from device.schedule import HALVES, PARTS, PATIENCE, chosen, part_command, run_parts

from smollm3_jax.files import write

HALF_SECONDS = 285


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.list:
        for part in PARTS:
            print(f"{part.half:7}{part.name:24}at most {part.limit} s")
        return 0
    if args.table:
        print(benchmarks.markdown())
        return 0
    if args.merge:
        try:
            print(benchmarks.merge(args.merge, benchmarks.FOLDER))
        except benchmarks.MergeError as error:
            print(f"on_device: {error}", file=sys.stderr)
            return 3
        return 0
    if args.part:
        return run_part(Run(args.part, args.out, args.tiny, not args.without_graphs))
    if lines(args.out):
        print(f"on_device: {args.out} holds results already: name another folder by --out", file=sys.stderr)
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    return measure(args)


def measure(args: argparse.Namespace) -> int:
    """Runs the chosen parts and prints the table."""
    seconds = HALF_SECONDS * (1 if args.half else len(HALVES)) * (PATIENCE if args.tiny else 1)
    parts = chosen(args.half, args.only)
    command = part_command(Path(__file__).resolve(), args.out, args.tiny)
    good = run_parts(parts, args.out, args.budget or seconds, command, args.tiny)
    found = lines(args.out)
    text = report.table(found)
    write(args.out / "report.txt", text)
    print(f"\n{text}")
    if not all(line["passed"] for line in report.of_kind(found, "parity")):
        return 4
    return 0 if good else 1


def run_part(run: Run) -> int:
    """What a part's process does: 1 if a case of it failed."""
    importlib.import_module(f"device.{run.part}").part(run)
    own = [line for line in lines(run.out) if line["part"] == run.part]
    done = {line["case"] for line in own if line["kind"] == "done"}
    return int(any(line["kind"] == "error" and line["case"] not in done for line in own))


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--half", choices=HALVES, help="one of the two halves (default: both)")
    parser.add_argument("--only", type=_names, default=(), metavar="PART,PART", help="these parts alone; see --list")
    parser.add_argument(
        "--budget", type=float, metavar="SECONDS", help=f"for everything (default: {HALF_SECONDS} a half)"
    )
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="default: $OUT, or measured, or measured-HALF")
    parser.add_argument("--tiny", action="store_true", help="a small model on the CPU: tries the run, measures nothing")
    parser.add_argument("--list", action="store_true", help="the parts in their order")
    parser.add_argument("--merge", type=Path, nargs="+", metavar="FOLDER", help="keep the results of one machine")
    parser.add_argument("--table", action="store_true", help="print the README's table of accelerators")
    parser.add_argument("--part", help=argparse.SUPPRESS)  # a part's own process
    parser.add_argument("--without-graphs", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    own = "measured" if args.half is None else f"measured-{args.half}"
    args.out = args.out or Path(os.environ.get("OUT") or own)
    return args


def _names(text: str) -> tuple[str, ...]:
    names, known = tuple(text.split(",")), [part.name for part in PARTS]
    for name in names:
        if name not in known:
            raise argparse.ArgumentTypeError(f"there is no part {name!r}; choose of {', '.join(dict.fromkeys(known))}")
    return names


if __name__ == "__main__":
    sys.exit(main())
