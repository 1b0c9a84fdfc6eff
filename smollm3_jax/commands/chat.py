"""`smollm3 chat`."""

import argparse
import dataclasses
import io
import os
import sys
from collections.abc import Callable, Generator
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import OptionError, SaveError
from .shared import add_job, add_model, add_sampling, console, join_if_asked, opened, sampling_params

if TYPE_CHECKING:
    from ..model import SmolLM3
    from ..tokenizer import Tokenizer
    from ..weights.load import Checkpoint


def add(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add_job(parser)
    parser.add_argument("--system", metavar="TEXT", help="the system message")
    parser.add_argument("--no-think", action="store_true", help="answer without reasoning first")
    parser.add_argument("--load", metavar="FILE", help="go on with a conversation that /save wrote")
    parser.add_argument("--tools", metavar="FILE.py", help="let the model call the public functions of this file")
    parser.add_argument("--yes", action="store_true", help="run the tools that it calls without a question")
    add_sampling(parser)
    parser.epilog = (
        "--max-new-tokens is here by default the model's own, or else 4096 for one that can think and 1024 for "
        "another. Where output is no terminal, answers are printed without the reasoning."
    )


def run(args: argparse.Namespace) -> int:
    for file, errors in ((sys.stdin, "replace"), (sys.stdout, "backslashreplace")):
        if isinstance(file, io.TextIOWrapper):
            file.reconfigure(errors=errors)
    join_if_asked(args)
    with opened(args) as model:
        return 0 if model is None else _converse(args, *model)


def _converse(
    args: argparse.Namespace, checkpoint: "Checkpoint", tokenizer: "Tokenizer", load: "Callable[[], SmolLM3]"
) -> int:
    from rich.console import Console

    from ..chat import terminal
    from ..chat.screen import Screen, is_interactive, line_reader
    from ..chat.tools import load_tools
    from ..generation.api import stream
    from ..generation.requests import Delta, Request, chat_ends, check_request, think_ids
    from ..generation.sampling import SamplingParams
    from ..generation.stats import Stats
    from ..paths import cache_dir

    if args.max_new_tokens is None and checkpoint.generation_config.to_hf().get("max_new_tokens") is None:
        args.max_new_tokens = 1024 if -1 in think_ids(tokenizer) else 4096
    params = sampling_params(args, checkpoint)
    if params.n != 1 or params.logprobs is not None or params.prompt_logprobs:
        raise OptionError("--n, --logprobs and --prompt-logprobs are for `smollm3 generate`: a chat shows one answer")
    ends = chat_ends(tokenizer, checkpoint.config)
    probe = Request([0], dataclasses.replace(params, max_new_tokens=1), ends)
    check_request(checkpoint.config, checkpoint.generation_config, probe, tokenizer)

    def generate(
        prompt: list[int], params: SamplingParams, capacity: int, stats: Stats
    ) -> Generator[Delta, None, None]:
        # Few steps at a time: an answer should flow.
        options = {"max_slots": 1, "capacity": capacity, "cache_dtype": args.cache, "steps": 4, "stats": stats}
        yield from stream(model, [Request(prompt, params, ends)], tokenizer=tokenizer, **options)

    try:
        history = cache_dir() / "history"
    except SaveError:  # a user without a home
        history = None
    chat = terminal.Chat(
        tokenizer=tokenizer,
        context=checkpoint.config.max_position_embeddings,
        params=params,
        generate=generate,
        read=line_reader(history or Path(os.devnull)),
        remembered=str(history) if history and is_interactive() and sys.stdout.isatty() else "",
        screen=Screen(console(), Console(stderr=True)),
        interactive=is_interactive(),
        tools=load_tools(args.tools) if args.tools is not None else {},
        yes=args.yes,
        think=not args.no_think,
    )
    if args.load is not None:
        terminal.load(chat, args.load)
    if args.system is not None:
        chat.system = args.system
    model = load()  # not before all else has been found right
    return terminal.converse(chat)
