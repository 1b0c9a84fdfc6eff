"""`smollm3 chat-data`."""

import argparse
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ..screen_text import plain
from .shared import MODEL_HELP, count, folder, show

if TYPE_CHECKING:
    from rich.console import RenderableType


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="FILE", help="a file or folder of conversations, or of preferences")
    parser.add_argument("-m", "--model", required=True, metavar="MODEL", help=f"whose tokenizer: {MODEL_HELP}")
    parser.add_argument("--show", type=int, default=1, metavar="N", help="print the first N records (default: 1)")
    # What they may be, and what they are by default, the settings say, which take seconds to load.
    parser.add_argument("--length", type=count, metavar="N", help="tokens of a row, as data.length")
    parser.add_argument("--overflow", metavar="drop|truncate|split", help="as data.overflow")
    parser.add_argument("--template", metavar="FILE", help="as data.template")
    parser.add_argument("--date", metavar="YYYY-MM-DD", help="as data.date")
    parser.add_argument("--train-on", metavar="assistant|all", default="assistant", help="as objective.train_on")
    parser.add_argument("--format", metavar="NAME", help="as data.format, where the files' names do not say it")
    parser.add_argument("--json", action="store_true")


def run(args: argparse.Namespace) -> int:
    from ..config import ModelConfig
    from ..tokenizer import load_tokenizer
    from ..train.data.chat_data import describe
    from ..train.settings import DataSettings, ModelSettings, ObjectiveSettings, RunSettings, Settings, check
    from ..weights.load import text_folder

    names = ("length", "overflow", "template", "date", "format")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    data = DataSettings(path=args.source, **given)
    run, model = RunSettings(dir="nowhere", steps=1), ModelSettings(path=args.model)
    settings = Settings(run=run, model=model, data=data, objective=ObjectiveSettings("sft", args.train_on))
    check(settings)
    texts = text_folder(folder(args.model))
    config = ModelConfig.from_hf(texts)
    show(args, describe(settings, load_tokenizer(texts, config), config, args.show), tables)
    return 0


def tables(report: dict[str, Any]) -> "Iterator[RenderableType]":
    """The same for people."""
    from rich.table import Table

    for record in report["shown"]:
        yield from _record(record)
    table = Table("conversations", "")
    table.add_row("records", f"{report['records']:,}")
    table.add_row("tokens", f"{report['tokens']:,}, of them trained {report['trained']:,}")
    table.add_row("lengths", ", ".join(f"{name} {value:,}" for name, value in report["lengths"].items()))
    for why, number in report["left_out"].items():
        table.add_row(f"left out: {why}", f"{number:,}")
    table.add_row("tokens left out", f"{report['tokens_left_out']:,}")
    if report["turns_without_their_reasoning"]:
        turns = f"{report['turns_without_their_reasoning']:,} turns, as thinking is off there"
        table.add_row("reasoning left out", turns)
    table.add_row(f"rows of {report['row_length']:,}", f"{report['rows']:,}, filled {100 * report['filled']:.1f} %")
    yield table
    for entry in report["why"]:
        yield f"record {entry['record']}: {plain(entry['why'])}"


def _record(record: dict[str, Any]) -> "Iterator[RenderableType]":
    from rich.text import Text

    side = f", {record['side']}" if record["side"] else ""
    why = f"; left out: {record['left_out']}" if record["left_out"] else ""
    yield f"record {record['record']}{side}: {record['length']:,} tokens, trained {record['trained']:,}{plain(why)}"
    text, inside = Text(), False
    for i, token in enumerate(record["tokens"]):
        if token["trained"] != inside:  # brackets for who sees no colour
            inside = token["trained"]
            text.append("⟦" if inside else "⟧", style="dim")
        # Neighbours differ in shade, so that each token shows.
        style = ("bold green", "bold green on grey15")[i % 2] if inside else ("", "on grey15")[i % 2]
        text.append(plain(token["text"], lines=True), style=style)
    text.append("⟧\n" if inside else "\n", style="dim")
    yield text
