"""The `smollm3` command: finds the subcommand, runs it, and turns what goes wrong into a line and an exit code."""

import argparse
import importlib
import logging
import os
import sys
from collections.abc import Sequence
from typing import Any

DESCRIPTION = "SmolLM3 in JAX: run it, train it, convert it."
COMMANDS = {
    "pull": "fetch a model; prints its folder as the last line",
    "convert": "rewrite a checkpoint as a Hugging Face folder",
    "verify": "compare a checkpoint's computation with a reference; exit code 0 or 4",
    "quantize": "rewrite a checkpoint with quantized weights",
    "inspect": "config, tensors, sizes and parameter count of a checkpoint",
    "generate": "continue a text, or answer a message",
    "chat": "talk with a model in the terminal; /help lists what it understands",
    "perplexity": "how well a model predicts text, computed as it would generate it",
    "train": "continue pretraining, in a run folder that a restart goes on from",
    "export": "write a run's checkpoint as a Hugging Face folder",
    "tokenize": "write a corpus as shards of tokens, once",
    "plan": "what hardware would give: real programs, compiled for it, without it",
    "doctor": "versions, devices, and whether they are supported",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code: 0, 2 (usage), 3 (bad input), 4 (verification failed)."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] not in COMMANDS:
        _top_parser().parse_args(words)
    name, *rest = words
    command = importlib.import_module(f".{name}", __package__)
    parser = argparse.ArgumentParser(prog=f"smollm3 {name}", description=COMMANDS[name])
    command.add(parser)
    return _run(command, _parse(parser, rest))


def _top_parser() -> argparse.ArgumentParser:
    """Knows the commands' names alone."""
    parser = argparse.ArgumentParser(prog="smollm3", description=DESCRIPTION)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, help in COMMANDS.items():
        commands.add_parser(name, help=help)
    return parser


def _parse(parser: argparse.ArgumentParser, words: list[str]) -> argparse.Namespace:
    args, rest = parser.parse_known_args(words)
    if hasattr(args, "settings") and not any(word.startswith("-") for word in rest):
        args.settings += rest  # argparse takes only those before the first option
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return args


def _run(command: Any, args: argparse.Namespace) -> int:
    from sharding.strategies import ShardingError

    from ..errors import SmolLM3Error
    from ..support import keep_to_the_cpu_without_accelerator

    logging.basicConfig(format="smollm3: %(levelname)s: %(message)s", level=logging.WARNING)
    for package in ("smollm3_jax", "sharding"):
        logging.getLogger(package).setLevel(logging.INFO)
    logging.getLogger("smollm3_jax.generation.api").setLevel(logging.WARNING)
    keep_to_the_cpu_without_accelerator()
    try:
        return command.run(args)
    except (SmolLM3Error, ShardingError) as error:
        print(f"smollm3: {error}", file=sys.stderr)
        return getattr(command, "leave", lambda code: code)(error.exit_code)
    except KeyboardInterrupt as interrupt:
        print("; ".join(["smollm3: interrupted", *map(str, interrupt.args)]), file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
