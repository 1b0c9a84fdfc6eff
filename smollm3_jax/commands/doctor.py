"""`smollm3 doctor`."""

import argparse

from .shared import print_json


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true")


def run(args: argparse.Namespace) -> int:
    from ..support import diagnose

    report = diagnose()
    if args.json:
        print_json(report)
    else:
        for name, version in report["versions"].items():
            print(f"{name:18} {version or '-'}")
        for device in report["devices"]:
            print(f"{'device':18} {device}")
        for problem in report["problems"]:
            print(f"{'problem':18} {problem}")
        print(f"{'verdict':18} {report['verdict']}")
    return 3 if report["problems"] else 0
