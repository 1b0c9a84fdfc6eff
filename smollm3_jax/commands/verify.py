"""`smollm3 verify`."""

import argparse

from .shared import add_model_name, console, folder, print_json, say

VERIFICATION_FAILED = 4


def add(parser: argparse.ArgumentParser) -> None:
    add_model_name(parser)
    parser.add_argument("--against", required=True, metavar="MODEL|transformers")
    parser.add_argument("--prompt", metavar="TEXT", help="the text to compute on (default: a built-in one)")
    parser.add_argument("--json", action="store_true")


def run(args: argparse.Namespace) -> int:
    from rich.table import Table

    from ..support import require_devices
    from ..verify import verify

    require_devices()
    against = args.against if args.against == "transformers" else folder(args.against)
    report = verify(folder(args.model), against, args.prompt)
    if args.json:
        print_json(report)
    else:
        say(f"{report['model']} against {report['against']}")
        table = Table(show_header=False)
        for name in (
            *("tokens", "max_abs", "max_abs_bound", "mean_abs", "max_logit", "kl", "top1", "top5"),
            *("greedy_agreement", "greedy_tokens", "first_diverging_layer"),
        ):
            value = report[name]
            table.add_row(name, f"{value:.3g}" if isinstance(value, float) else "none" if value is None else str(value))
        if report["weights"]:
            table.add_row("tensors that differ", f"{report['weights']['different']} of {report['weights']['tensors']}")
        for name, passed in report["checks"].items():
            table.add_row(f"check: {name}", "passed" if passed else "FAILED")
        console().print(table)
        say(f"tolerance for {report['tolerance']['dtype']}: {report['tolerance']['source']}")
        say("verified" if report["ok"] else "NOT verified")
    return 0 if report["ok"] else VERIFICATION_FAILED
