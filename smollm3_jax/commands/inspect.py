"""`smollm3 inspect`."""

import argparse
import json

from .shared import add_model_name, console, folder, print_json, say


def add(parser: argparse.ArgumentParser) -> None:
    add_model_name(parser)
    parser.add_argument("--json", action="store_true")


def run(args: argparse.Namespace) -> int:
    from rich.table import Table

    from ..weights.summary import summarize

    summary = summarize(folder(args.model))
    if args.json:
        print_json(summary)
        return 0
    config = summary["config"]
    say(f"{summary['path']}: {config['architectures'][0]}")
    say(f"{summary['parameters']:,} parameters, {summary['bytes']:,} bytes")
    table = Table("parameter", "layers", "dtype", "shape of each", "bytes", "files")
    for param in dict.fromkeys(tensor["parameter"] for tensor in summary["tensors"]):
        rows = [tensor for tensor in summary["tensors"] if tensor["parameter"] == param]
        table.add_row(
            param,
            str(len(rows)) if rows[0]["layer"] is not None else "",
            ", ".join(sorted({row["dtype"] for row in rows})),
            " x ".join(map(str, rows[0]["shape"])),
            f"{sum(row['bytes'] for row in rows):,}",
            ", ".join(sorted({row["file"] for row in rows})),
        )
    console().print(table)
    for name, value in config.items():
        say(f"{name}: {json.dumps(value)}")
    say(f"text files: {', '.join(summary['text_files']) or 'none'}")
    return 0
