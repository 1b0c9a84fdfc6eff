"""`smollm3 verify`."""

import argparse
import shlex
from typing import Any

from .shared import add_mesh, add_model_name, console, folder, mesh_of, print_json, say

VERIFICATION_FAILED = 4


def add(parser: argparse.ArgumentParser) -> None:
    add_model_name(parser)
    reference = parser.add_mutually_exclusive_group(required=True)
    reference.add_argument("--against", metavar="MODEL|transformers")
    goldens_help = "with the released SmolLM3-3B's golden logits and text; of no use for any other model"
    reference.add_argument("--goldens", action="store_true", help=goldens_help)
    parser.add_argument("--prompt", metavar="TEXT", help="the text to compute on (default: a built-in one)")
    add_mesh(parser)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--card", action="store_true", help="put the report into the card written with MODEL")


def run(args: argparse.Namespace) -> int:
    from rich.table import Table

    from ..evaluate.parity import verify
    from ..support import require_devices

    require_devices()
    mesh_of(args)  # a mistake in it shows before anything is fetched
    if args.goldens:
        return _goldens(args)
    against = args.against if args.against == "transformers" else folder(args.against)
    report = verify(folder(args.model), against, args.prompt, **mesh_of(args))
    if args.card:
        _put_into_card(args, report)
    if args.json:
        print_json(report)
    else:
        say(f"{report['model']} against {report['against']}")
        table = Table(show_header=False)
        for row in _rows(report):
            table.add_row(*row)
        console().print(table)
        say(f"tolerance for {report['tolerance']['dtype']}: {report['tolerance']['source']}")
        say("verified" if report["ok"] else "NOT verified")
    return 0 if report["ok"] else VERIFICATION_FAILED


def _rows(report: dict[str, Any]) -> list[tuple[str, str]]:
    rows = []
    for name in (
        *("tokens", "max_abs", "max_abs_bound", "mean_abs", "max_logit", "kl", "top1", "top5"),
        *("greedy_agreement", "greedy_tokens", "first_diverging_layer"),
    ):
        value = report[name]
        rows.append((name, f"{value:.3g}" if isinstance(value, float) else "none" if value is None else str(value)))
    if report["weights"]:
        rows.append(("tensors that differ", f"{report['weights']['different']} of {report['weights']['tensors']}"))
    return rows + [(f"check: {name}", "passed" if passed else "FAILED") for name, passed in report["checks"].items()]


def _put_into_card(args: argparse.Namespace, report: dict[str, Any]) -> None:
    from ..weights.card import add_section, last_part, origin_of

    path = folder(args.model)
    against = args.against if args.against == "transformers" else origin_of(args.against).name
    lines = [f"| {name} | {value} |" for name, value in _rows(report)]
    table = "\n".join(["| measure | |", "|---|---|", *lines])
    command = shlex.join(["smollm3", "verify", last_part(str(path)), f"--against={against}"])
    verdict = "verified" if report["ok"] else "**not** verified"
    add_section(path, "Parity", f"`{command}`: {verdict}, in {report['tolerance']['dtype']}.\n\n{table}")


def _goldens(args: argparse.Namespace) -> int:
    from rich.table import Table

    from ..errors import OptionError
    from ..evaluate.goldens import verify_goldens
    from ..screen_text import plain

    if args.card:
        raise OptionError("--card takes the report of --against")
    if args.prompt is not None:
        raise OptionError("--goldens brings its own prompt: leave --prompt out")
    report = verify_goldens(folder(args.model), **mesh_of(args))
    if args.json:
        print_json(report)
        return 0 if report["ok"] else VERIFICATION_FAILED
    print(f"{plain(report['model'])} against the golden values of {report['against']}")
    table = Table(show_header=False)
    for name in ("mean_max_abs", "first_max_abs"):
        value = report[name]
        table.add_row(name, "not finite" if value is None else f"{value:.3g}")
    table.add_row("text", plain(report["text"]))
    for name, passed in report["checks"].items():
        table.add_row(f"check: {name}", "passed" if passed else "FAILED")
    console().print(table)
    print(f"source: {report['source']}")
    if not report["ok"]:
        print(
            f"{report['against']} has other values than this checkpoint: it is another one of the same architecture "
            "(the base model, a fine-tuned one, rounded weights), or it is damaged"
        )
    print("verified" if report["ok"] else "NOT verified")
    return 0 if report["ok"] else VERIFICATION_FAILED
