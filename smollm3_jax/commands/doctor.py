"""`smollm3 doctor`."""

import argparse

from ..screen_text import plain
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
        for name, value in report["variables"].items():
            print(f"{'variable':18} {name}={plain(value)}")
        for device in report["devices"]:
            print(f"{'device':18} {plain(device)}")
        for problem in report["problems"]:
            print(f"{'problem':18} {plain(problem)}")
        print(f"{'verdict':18} {report['verdict']}")
    return 3 if report["problems"] else 0
