"""`smollm3 perplexity`."""

import argparse
from pathlib import Path

from .shared import add_model, console, load_model, open_model, print_json, say

# Four documents of each of SmolLM3's six languages.
MAX_TOKENS = 6 * 4 * 512
LENGTH = 512


def add(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    text_help = 'JSON lines, each with a "text" and perhaps a "language"'
    parser.add_argument("--text", required=True, metavar="FILE.jsonl", help=text_help)
    parser.add_argument("--max-tokens", type=int, default=MAX_TOKENS, metavar="N", help=f"default: {MAX_TOKENS}")
    length_help = f"of a document, from its start (default: {LENGTH})"
    parser.add_argument("--length", type=int, default=LENGTH, metavar="N", help=length_help)
    parser.add_argument("--json", action="store_true")


def run(args: argparse.Namespace) -> int:
    from rich.table import Table

    from ..evaluate.perplexity import encode_texts, perplexity, read_texts

    checkpoint, tokenizer = open_model(args)
    # Read before the model is loaded: a mistake in the text shows at once.
    texts, skipped = read_texts(Path(args.text))
    documents = encode_texts(Path(args.text), texts, tokenizer, args.max_tokens, args.length)
    report = {"model": args.model, "text": args.text, "skipped": len(skipped)}
    report |= perplexity(load_model(args, checkpoint), documents, args.cache)
    if args.json:
        print_json(report)
        return 0
    table = Table("language", "perplexity", "nats a token", "tokens")
    for language, row in [*report["languages"].items(), ("all", report)]:
        values = [row["perplexity"], row["nats_per_token"]]
        shown = ["not finite" if value is None else f"{value:.4f}" for value in values]
        table.add_row(language or "-", *shown, f"{row['tokens']:,}")
    console().print(table)
    bad = f"; bad records skipped: {len(skipped)}" if skipped else ""
    say(f"{report['documents']} documents of up to {report['longest']} tokens, {report['rows']} side by side{bad}")
    say(f"weights {report['weights']}, activations {report['activations']}, cache {report['cache']}")
    return 0
