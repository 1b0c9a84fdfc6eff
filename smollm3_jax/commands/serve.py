"""`smollm3 serve`."""

import argparse
import contextlib
import importlib.util
import ipaddress
import logging
import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import OptionError, SupportError
from ..streams import give_up_stdout
from .shared import add_job, add_model, count, join_if_asked, leave, opened, say

if TYPE_CHECKING:
    from ..model import SmolLM3
    from ..tokenizer import Tokenizer
    from ..weights.load import Checkpoint

log = logging.getLogger(__name__)

__all__ = ["add", "leave", "run"]

NEEDED = ("starlette", "uvicorn", "prometheus_client", "llguidance", "httptools")
KEY_VARIABLE = "SMOLLM3_API_KEY"
SLOTS = 8
# What fits beside a model of 3B parameters on most devices, unless the model's own context is shorter.
CONTEXT = 8192
SERVED_HELP = (
    "a PEFT folder (LoRA) to serve as a model of its own, NAME or the folder's name, times SCALE (default: 1); may be "
    "repeated"
)


def add(parser: argparse.ArgumentParser) -> None:
    add_model(parser, SERVED_HELP)
    add_job(parser)
    group = parser.add_argument_group("server")
    group.add_argument(
        "--host", default="127.0.0.1", help="the address to listen at (default: 127.0.0.1, this machine)"
    )
    group.add_argument("--port", type=int, default=8000, metavar="N", help="default: 8000; 0 takes a free one")
    group.add_argument("--name", metavar="NAME", help="what requests call the model (default: what it is called here)")
    key_help = f"what requests have to send; may be repeated (default: the variable {KEY_VARIABLE}, or none is needed)"
    group.add_argument("--api-key", action="append", metavar="KEY", help=key_help)
    group.add_argument("--no-api-key", action="store_true", help="go without one where other machines can ask")
    host_help = "a name of this server beside localhost and addresses; may be repeated"
    group.add_argument("--allow-host", action="append", default=[], metavar="NAME", help=host_help)
    origin_help = "a site, such as https://example.com, whose pages may ask; may be repeated"
    group.add_argument("--allow-origin", action="append", default=[], metavar="ORIGIN", help=origin_help)
    drain_help = "after a signal to end, for what is under way (default: 30)"
    group.add_argument("--drain-timeout", type=float, default=30.0, metavar="SECONDS", help=drain_help)
    group.add_argument(
        "--log-requests", action="store_true", help="a line for each that asks for an answer, without its texts"
    )
    engine = parser.add_argument_group("engine")
    engine.add_argument("--slots", type=count, default=SLOTS, metavar="N", help=f"answers side by side ({SLOTS})")
    context_help = f"most tokens of a prompt and its answer (default: the model's, at most {CONTEXT:,})"
    engine.add_argument("--context", type=count, metavar="N", help=context_help)
    pool_help = (
        "tokens that the answers share, prompts included, in pages that each takes as it grows (default: slots times "
        "context; on a CPU, or where slots lie on several devices, each slot has its own context instead)"
    )
    engine.add_argument("--cache-tokens", type=count, metavar="N", help=pool_help)
    prefix_help = "compute every prompt from its start; else the last ones' beginnings are kept, where there is memory"
    engine.add_argument("--no-prefix-cache", action="store_true", help=prefix_help)
    queue_help = "answers that may wait for a slot (default: 8 for each slot); more are refused"
    engine.add_argument("--max-queue", type=int, metavar="N", help=queue_help)
    tokens_help = "tokens of prompts that may wait (default: what the slots can hold)"
    engine.add_argument("--max-queue-tokens", type=count, metavar="N", help=tokens_help)


def run(args: argparse.Namespace) -> int:
    from ..generation.hosts import is_follower
    from ..job import raise_everywhere
    from ..support import how_to_install
    from ..weights.served import read_served

    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise SupportError(f"{missing[0]} is not installed, which serving needs: {how_to_install('serve')}")
    from ..serve.run import listen

    keys = _keys(args)
    if args.max_queue is not None and args.max_queue < 0:
        raise OptionError(f"--max-queue is {args.max_queue}; it must be 0 (nothing waits) or more")
    if not 0 <= args.drain_timeout < 1e6:
        raise OptionError(f"--drain-timeout is {args.drain_timeout}; it must be a number of seconds, 0 or more")
    adapters = read_served(args.adapter, _name(args))
    join_if_asked(args)
    if is_follower():  # process 0 drains, and then says that it is over
        for number in (signal.SIGTERM, signal.SIGINT):  # Ctrl-C reaches all processes of a terminal
            signal.signal(number, signal.SIG_IGN)
    # First, so that a port that is taken is known before a model is fetched.
    with raise_everywhere():
        own = contextlib.nullcontext() if is_follower() else listen(args.host, args.port)
    with own as listening, opened(args, adapters) as model:
        if model is not None and listening is not None:
            _serve(args, listening, keys, {one.name: str(one.adapter.folder) for one in adapters}, *model)
    return 0


def _name(args: argparse.Namespace) -> str:
    """What requests call the model."""
    return args.name or (Path(args.model).name if Path(args.model).exists() else args.model)


def _keys(args: argparse.Namespace) -> list[str]:
    """
    Raises:
      OptionError: a key is empty, or there is none where other machines can ask.
    """
    own = os.environ.get(KEY_VARIABLE)
    keys = args.api_key or ([own] if own is not None else [])
    if any(not key.strip() or not key.isascii() for key in keys):
        where = "--api-key" if args.api_key else KEY_VARIABLE
        raise OptionError(f"{where} is empty or has other than ASCII characters; give a key, or leave it out")
    if not keys and not args.no_api_key and not _is_this_machine(args.host):
        raise OptionError(
            f"--host {args.host} lets other machines ask: give --api-key KEY, or --no-api-key if all of them may"
        )
    return [key.strip() for key in keys]


def _is_this_machine(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _serve(
    args: argparse.Namespace,
    own: socket.socket,
    keys: list[str],
    adapters: dict[str, str],
    checkpoint: "Checkpoint",
    tokenizer: "Tokenizer",
    load: "Callable[[], SmolLM3]",
) -> None:
    from ..compile_cache import compilations
    from ..generation.engine import Engine
    from ..generation.places import pool_tokens
    from ..generation.prompts import SERVING_PIECES, kept_tokens
    from ..progress import busy
    from ..serve.app import Service, Settings
    from ..serve.job import Server, parse
    from ..serve.metrics import Metrics
    from ..serve.run import serve
    from ..serve.worker import Worker

    most = checkpoint.config.max_position_embeddings
    context = min(most, CONTEXT) if args.context is None else args.context
    if context > most:
        raise OptionError(f"--context is {context}; the model has been trained for {most} (--yarn FACTOR stretches it)")
    server = Server(_name(args), tokenizer, checkpoint.config, checkpoint.generation_config, context, adapters)

    def make() -> Engine:
        shape = {"slots": args.slots, "context": context, "cache_dtype": args.cache, "piece_sizes": SERVING_PIECES}
        model = load()
        tokens = pool_tokens(model, args.slots, context) if args.cache_tokens is None else args.cache_tokens
        # Pages that nobody wants keep them for nothing; beside rows they take memory.
        kept = 0 if args.no_prefix_cache else tokens or kept_tokens(args.slots, context)
        engine = Engine(model, tokenizer=tokenizer, **shape, prefix_tokens=kept, cache_tokens=tokens)
        begin, before = time.monotonic(), compilations()
        with busy("compiling"):
            engine.warm_up()
        made = [now - then for now, then in zip(compilations(), before, strict=True)]
        log.info("%d programs compiled and %d loaded from the cache, in %.1f s", *made, time.monotonic() - begin)
        return engine

    def service() -> Service:
        queue = 8 * args.slots if args.max_queue is None else args.max_queue
        tokens = args.slots * context if args.max_queue_tokens is None else args.max_queue_tokens
        hosts = [args.host, *args.allow_host]
        settings = Settings(args.slots, queue, tokens, keys, hosts, args.allow_origin, args.log_requests)
        return Service(Worker(make, Metrics()), server, parse, settings)

    serve(service, own, say=_tell, drain_timeout=args.drain_timeout)


def _tell(text: str) -> None:
    """The ready line; where nobody can read it, the server goes on."""
    try:
        say(text)
    except OSError as error:
        log.warning("%s: %s; it could not be written to standard output", text, error.strerror)
        give_up_stdout()
