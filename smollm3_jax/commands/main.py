"""The `smollm3` command: finds the subcommand, runs it, and turns what goes wrong into a line and an exit code."""

import argparse
import io
import logging
import os
import sys
from collections.abc import Sequence
from types import ModuleType

from ..screen_text import plain
from ..streams import give_up_stdout, go_on_without_stderr, nobody_reads_stdout
from .parsing import Parser, did_you_mean, leaves
from .subcommands import COMMANDS, parser_of

DESCRIPTION = "SmolLM3 in JAX: run it, train it, convert it."
FLAGS = {"-q", "--quiet", "-v", "--verbose"}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code: 0, 2 (usage), 3 (bad input), 4 (verification failed)."""
    # Where one is closed, nobody listens; a file that is opened may not take its number.
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    go_on_without_stderr()
    try:
        return _main(list(sys.argv[1:] if argv is None else argv))
    except KeyboardInterrupt as interrupt:
        print("; ".join(["smollm3: interrupted", *map(plain, interrupt.args)]), file=sys.stderr)
        if "jax" in sys.modules:
            from .shared import leave

            return leave(130)
        return 130


def _main(words: list[str]) -> int:
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # not every encoding has what there is to say
    if words[:1] == ["__complete"]:  # what the lines of `smollm3 completion` ask
        from .completion import candidates

        print("\n".join(candidates(words[1:])))
        return 0
    if words[:1] == ["help"]:
        words = [*(word for word in words[1:2] if word != "help"), "--help"]
    flags = []
    while words and words[0] in FLAGS:
        flags.append(words.pop(0))
    if not words or words[0] not in COMMANDS:
        _not_a_command(words)
    name, *rest = words
    command, parser = parser_of(name)
    first = 1 if name in ("plan", "launch") else 0  # after the word that says of what
    return _run(name, command, parse(parser, [*rest[:first], *flags, *rest[first:]]))


def _not_a_command(words: Sequence[str]) -> None:
    parser = Parser(prog="smollm3", usage="smollm3 COMMAND [OPTION ...]", description=DESCRIPTION)
    parser.formatter_class = lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=16)
    parser.epilog = "commands:\n" + "\n".join(f"  {name:11} {help}" for name, (help, _) in COMMANDS.items())
    parser.epilog += "\n\nsmollm3 COMMAND --help says more of one. A first try: smollm3 chat demo"
    parser.add_argument("-V", "--version", action="version", version=_version())
    parser.add_argument("-q", "--quiet", action="store_true", help="neither progress nor remarks, but warnings")
    parser.add_argument("-v", "--verbose", action="store_true", help="more; -vv still more")
    if not words:
        parser.print_help(sys.stderr)
        raise SystemExit(2)
    if not words[0].startswith("-"):
        parser.error(f"{words[0]!r} is no command{did_you_mean(words[0], (*COMMANDS, '--version'))}")
    parser.parse_args(words)
    parser.error("give a command")


def _version() -> str:
    from .. import __version__
    from ..support import version

    return f"smollm3 {__version__} (jax {version('jax')}, Python {version('python')})"


def parse(parser: Parser, words: list[str]) -> argparse.Namespace:
    args, rest = parser.parse_known_args(words)
    own = {leaf.prog.rpartition(" ")[2]: leaf for leaf in leaves(parser)}
    asked = own.get(words[0] if words else "", parser)  # of plan's, the one that is meant
    if hasattr(args, "settings") and "=" in (getattr(args, "model_word", None) or ""):
        args.settings.insert(0, args.model_word)
        args.model_word = None
    # argparse takes optional words only where the first of them may stand, before any option.
    if hasattr(args, "settings") and not any(word.startswith("-") for word in rest):
        args.settings += rest
        rest = []
    if hasattr(args, "model_word"):
        if args.model_word is None and rest and not rest[0].startswith("-"):
            args.model_word = rest.pop(0)
        if args.model_word is not None and args.model is not None:
            asked.error(f"two models are named, {args.model_word} and {args.model}")
        args.model = args.model_word if args.model is None else args.model
        if args.model is None and args.model_needed:
            asked.error("name a model: a folder, a .gguf file, a hub id, or demo")
    if rest:
        asked.error(f"unexpected: {' '.join(map(repr, rest))}")
    return args


def _run(name: str, command: ModuleType, args: argparse.Namespace) -> int:
    _speak(args.quiet, args.verbose)
    try:
        if name not in ("doctor", "completion"):  # which work anywhere
            from ..support import keep_to_the_cpu_without_accelerator, require_supported

            require_supported()
            keep_to_the_cpu_without_accelerator()
        return command.run(args)
    except Exception as error:
        if isinstance(error, BrokenPipeError) and nobody_reads_stdout():
            give_up_stdout()
            return 0
        from sharding.strategies import ShardingError

        from ..errors import OptionError, OutOfMemoryError, lacks_memory
        from ..support import refused_by_jax

        error = refused_by_jax(error) or error
        if lacks_memory(error):
            why = (str(error).splitlines() or ["none is left"])[0][:200]
            error = OutOfMemoryError(f"too little memory: {why}; a smaller model, batch or context takes less")
        code = OptionError.exit_code if isinstance(error, ShardingError) else getattr(error, "exit_code", None)
        if code is None and isinstance(error, OSError):
            code = 3  # a name that is too long, a full disk, ...
        if code is None or args.verbose > 1:
            raise
        print(f"smollm3: {plain(error)}", file=sys.stderr)
        return getattr(command, "leave", lambda code: code)(code)


def _speak(quiet: bool, verbose: int) -> None:
    """What is logged, and whether there are bars and spinners."""
    from .. import progress

    progress.shown = not quiet
    handler = logging.StreamHandler()
    handler.setFormatter(_Plain("smollm3: %(levelname)s: %(message)s"))
    logging.basicConfig(handlers=[handler], level=logging.INFO if verbose > 1 else logging.WARNING)
    level = logging.WARNING if quiet else logging.DEBUG if verbose > 1 else logging.INFO
    for package in ("smollm3_jax", "sharding"):
        logging.getLogger(package).setLevel(level)
    logging.getLogger("smollm3_jax.generation").setLevel(level if verbose else logging.WARNING)


class _Plain(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        ours = record.name.startswith("smollm3_jax")  # which says a thing in a line; names may have more
        return plain(super().format(record), lines=not ours or record.exc_info is not None)
