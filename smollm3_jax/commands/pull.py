"""`smollm3 pull`."""

import argparse

from .shared import add_model_name, folder, say


def add(parser: argparse.ArgumentParser) -> None:
    add_model_name(parser, help="demo, or a hub id such as HuggingFaceTB/SmolLM3-3B")
    parser.add_argument("--revision", help="branch, tag or commit of the hub's repository")
    parser.add_argument("--token", help="access token of the hub (default: HF_TOKEN, or the login of hf)")


def run(args: argparse.Namespace) -> int:
    say(folder(args.model, args.revision, args.token))
    return 0
