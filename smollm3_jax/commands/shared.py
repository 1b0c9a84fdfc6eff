"""Arguments and steps that several commands have."""

import argparse
import contextlib
import dataclasses
import functools
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from sharding.strategies import STRATEGIES

from ..config import DTYPES, WEIGHT_SCHEMES, with_yarn
from ..screen_text import UNSEEN, plain
from ..streams import end_now

MODEL_HELP = "a model folder, a .gguf file, a hub id such as HuggingFaceTB/SmolLM3-3B (or ORG/NAME@REVISION), or demo"

ADAPTER_HELP = "a PEFT folder (LoRA, DoRA) to fold into the model, times SCALE (default: 1); may be repeated"

# Seconds that the processes of a job wait for each other, and after which a silent one is lost.
WAIT = 300
HEARTBEAT = 100
# How a model that only answers is spread, unless another strategy is named.
SERVING = "serve_tp"

T = TypeVar("T")
# What takes options: a parser, or a group of its options, whose class argparse does not name in public.
Options: TypeAlias = argparse.ArgumentParser | argparse._ArgumentGroup

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.text import Text

    from ..generation.sampling import SamplingParams
    from ..model import SmolLM3
    from ..tokenizer import Tokenizer
    from ..weights.load import Checkpoint
    from ..weights.peft import Adapter
    from ..weights.served import ServedAdapter


# As other programs write them.
_DTYPE_ALIASES = {"bf16": "bfloat16", "fp16": "float16", "f16": "float16", "half": "float16"}
_DTYPE_ALIASES |= {"fp32": "float32", "f32": "float32", "float": "float32"}


def count(text: str) -> int:
    """A whole number above 0."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if not 0 < number < 2**31:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is no whole number from 1 to {2**31 - 1:,}")
    return number


def dtype(text: str) -> str:
    return _DTYPE_ALIASES.get(text.lower(), text)


def add_dtype(parser: Options, help: str, default: str | None = None) -> None:
    parser.add_argument(*("--dtype",), type=dtype, choices=DTYPES, default=default, help=f"bf16, fp16 or fp32; {help}")


def add_model_name(
    parser: argparse.ArgumentParser, group: Options | None = None, help: str = MODEL_HELP, needed: bool = True
) -> None:
    """The model as a word of its own or after -m; main.py makes `args.model` of either."""
    parser.add_argument("model_word", nargs="?", metavar="MODEL", help=help)
    (group or parser).add_argument("-m", "--model", metavar="MODEL", help="the same")
    parser.set_defaults(model_needed=needed)


def add_model(parser: argparse.ArgumentParser, of_adapters: str = ADAPTER_HELP) -> None:
    """The model and how it is held in memory; see `open_model`. of_adapters: the help about them."""
    group = parser.add_argument_group("model")
    add_model_name(parser, group)
    add_adapter(group, of_adapters)
    add_dtype(group, "default: the checkpoint's own")
    group.add_argument("--weights", choices=WEIGHT_SCHEMES, help="quantize the weights at loading")
    group.add_argument("--cache", type=dtype, choices=("bfloat16", "int8"), help="what keys and values are kept in")
    group.add_argument("--yarn", type=float, metavar="FACTOR", help="stretch the context this many times (YaRN)")
    add_mesh(group)


def add_adapter(group: Options, help: str = ADAPTER_HELP) -> None:
    """Adapters of the model; see `adapters_of`."""
    group.add_argument("--adapter", action="append", default=[], metavar="[NAME=]DIR[:SCALE]", help=help)


def adapters_of(args: argparse.Namespace) -> "list[tuple[Adapter, float]]":
    """The adapters of `add_adapter`, opened, and what each counts."""
    from ..weights.peft import parse_adapter, read_adapter

    return [(read_adapter(folder), scale) for _, folder, scale in map(parse_adapter, args.adapter)]


def add_mesh(group: Options) -> None:
    """How the model lies on several devices; see `mesh_of`."""
    mesh_help = "spread the model over this mesh of all devices (-1: what is left); default: the first device alone"
    group.add_argument("--mesh", metavar="AXIS=N,...", help=mesh_help)
    rules_help = f"the mesh's sharding strategy: {', '.join(STRATEGIES)} (default with --mesh: {SERVING})"
    group.add_argument("--rules", choices=STRATEGIES, metavar="NAME", help=rules_help)


def mesh_of(args: argparse.Namespace) -> "dict[str, Any]":
    """The mesh and rules that `load` takes; nothing where neither was given.

    Raises:
      ShardingError: the mesh does not fit the devices or the strategy.
    """
    import jax

    if args.mesh is None and args.rules is None and jax.process_count() == 1:
        return {}
    from sharding.mesh import DEFAULT_AXES, make_mesh, parse_axes
    from sharding.rules import Sharding

    rules = args.rules or SERVING
    axes = parse_axes(args.mesh) if args.mesh else dict(DEFAULT_AXES[rules])
    if not args.mesh and axes.get("tensor", -1) > 0:  # of few devices, as many as divide them
        axes["tensor"] = math.gcd(axes["tensor"], jax.device_count())
    mesh = make_mesh(axes)
    Sharding.of(mesh, rules)  # a mistake shows before anything is loaded
    return {"mesh": mesh, "rules": rules}


def add_source_and_target(parser: argparse.ArgumentParser, target_help: str = "the folder to write") -> None:
    """The arguments of commands that rewrite a model as a Hugging Face folder."""
    parser.add_argument("source", metavar="SRC", help=MODEL_HELP)
    parser.add_argument("folder", metavar="DST", help=target_help)
    parser.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="default: 5GB")
    parser.add_argument("--force", action="store_true", help="DST may be there: replace the model in it")


def add_job(parser: argparse.ArgumentParser) -> None:
    """Several processes that run one command together; see `join`."""
    job = parser.add_argument_group("a job of several processes (found by itself on TPU pods, Slurm, Kubernetes)")
    job.add_argument("--coordinator", metavar="HOST:PORT", help="of process 0")
    job.add_argument("--processes", type=int, metavar="N")
    job.add_argument("--process", type=int, metavar="I", help="which this is, from 0")
    job.add_argument("--wait", type=int, default=WAIT, metavar="SECONDS", help=f"for the others (default: {WAIT})")
    lost_help = f"of silence: lost (default: {HEARTBEAT})"
    job.add_argument("--heartbeat", type=int, default=HEARTBEAT, metavar="SECONDS", help=lost_help)


def join(args: argparse.Namespace) -> None:
    """Meets the other processes of `add_job`, if there are any; before anything touches a device."""
    import jax

    from sharding.mesh import start

    start(args.coordinator, args.processes, args.process, args.wait, args.heartbeat)
    # (A terminal keeps its line editor, which wants the stream as it was.)
    if jax.distributed.is_initialized() and sys.stdout is sys.__stdout__ and not sys.stdout.isatty():
        # What moves arrays between CPUs prints that it is connected: to standard error, then.
        sys.stdout.flush()
        own = open(os.dup(1), "w", encoding=sys.stdout.encoding, errors=sys.stdout.errors)  # noqa: SIM115
        os.dup2(2, 1)
        sys.stdout = own


def join_if_asked(args: argparse.Namespace) -> None:
    """`join` where --coordinator, --mesh or --rules is given: without them the tasks of a Slurm job, say, may each have
    prompts of their own."""
    if args.coordinator is not None or args.mesh is not None or args.rules is not None:
        join(args)


@contextlib.contextmanager
def opened(
    args: argparse.Namespace, served: "Sequence[ServedAdapter] | None" = None
) -> "Iterator[tuple[Checkpoint, Tokenizer, Callable[[], SmolLM3]] | None]":
    """The model of `add_model`, and what loads it; in a job None on the processes that have followed process 0 to the
    end.

    Args:
      served: adapters that lie beside the model; None folds those of `add_adapter` into it.

    Raises:
      SmolLM3Error: of any process of the job, on all of them.
    """
    import jax

    from ..support import require_devices

    require_devices()
    if jax.process_count() == 1:
        checkpoint, tokenizer = open_model(args, served)
        yield checkpoint, tokenizer, functools.partial(load_model, args, checkpoint, served)
        return
    from ..generation import engine, hosts
    from ..job import agree, raise_everywhere

    own = ("process", "coordinator", "quiet", "verbose")
    agree("options", {name: str(value) for name, value in vars(args).items() if name not in own})
    with raise_everywhere():
        checkpoint, tokenizer = open_model(args, served)
    with raise_everywhere():
        model = load_model(args, checkpoint, served)
    try:
        if hosts.is_follower():
            engine.follow(model, tokenizer)
            yield None
        else:
            with hosts.leading():
                yield checkpoint, tokenizer, lambda: model
    finally:
        if not hosts.broken():
            jax.distributed.shutdown()  # waits for the others


def leave(code: int) -> int:
    """After an error: in a job the process ends at once, as a normal exit waits for the others; else the code."""
    import jax

    if jax.distributed.is_initialized():
        end_now(code)
    return code


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """One option for each field of SamplingParams, under its name; see `sampling_params`."""
    group = parser.add_argument_group("sampling")
    own = "default: the model's generation_config.json"

    def option(name: str, kind: Callable[[str], object], metavar: str, help: str, *others: str) -> None:
        group.add_argument(name, *others, type=kind, metavar=metavar, help=help)

    def several(name: str, kind: Callable[[str], object], metavar: str, help: str) -> None:
        group.add_argument(name, type=kind, metavar=metavar, help=f"{help}; may be repeated", action="append")

    option("--max-new-tokens", int, "N", f"{own}, or 128", "--max-tokens")
    option("--temperature", float, "T", f"0 is greedy; {own}", "--temp")
    option("--top-k", int, "K", f"sample among the K likeliest tokens; {own}")
    option("--top-p", float, "P", f"sample among the fewest tokens that hold this probability; {own}")
    option("--min-p", float, "P", f"sample among tokens at least P times as likely as the likeliest; {own}")
    option("--repetition-penalty", float, "X", f"above 1: tokens of the prompt and the text become less likely; {own}")
    option("--presence-penalty", float, "X", "subtracted from the logit of every token that was generated")
    option("--frequency-penalty", float, "X", "the same, once for each time that it was")
    several("--logit-bias", _bias, "ID=VALUE", "add VALUE to this token's logit")
    several("--stop", str, "TEXT", "end before this text; a special token's, such as <|im_end|>, is that token")
    several("--stop-token-id", int, "ID", "end with this token")
    group.add_argument("--ignore-eos", action="store_true", help="go on after the model's own end (for benchmarks)")
    option("--seed", int, "S", "default: 0")
    option("--n", int, "N", "how many samples; sample i draws with seed + i")
    option("--logprobs", int, "N", "log-probabilities, of the N likeliest tokens too (0 to 20)")
    group.add_argument("--prompt-logprobs", action="store_true", help="log-probabilities of the prompt's tokens")
    option("--max-thinking-tokens", int, "N", "at most N tokens of thinking, then the model has to answer")


def _bias(text: str) -> tuple[int, float]:
    token, _, value = text.partition("=")
    try:
        return int(token), float(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not ID=VALUE, such as 42=-1.5") from None


def sampling_params(args: argparse.Namespace, model: "Checkpoint") -> "SamplingParams":
    """What was given; for the rest the model's own settings, then the defaults of SamplingParams."""
    from ..generation.sampling import SamplingParams, with_defaults

    given = {field.name: getattr(args, field.name, None) for field in dataclasses.fields(SamplingParams)}
    given["logit_bias"] = dict(args.logit_bias) if args.logit_bias else None
    given["stop_token_ids"] = args.stop_token_id
    given |= {name: getattr(args, name) or None for name in ("ignore_eos", "prompt_logprobs")}  # False is not said
    said = {name: value for name, value in given.items() if value is not None}
    return with_defaults(model.generation_config, model.config.vocab_size, **said)


def folder(model: str, revision: str | None = None, token: str | None = None) -> Path:
    """The model's folder, fetched where it is not there yet."""
    from ..weights.demo import model_folder

    return model_folder(model, revision, token)


def open_model(
    args: argparse.Namespace, served: "Sequence[ServedAdapter] | None" = None
) -> "tuple[Checkpoint, Tokenizer]":
    """The model of `add_model` as it will be loaded, headers only; served: as for `opened`."""
    from ..support import require_devices
    from ..tokenizer import load_tokenizer
    from ..weights.load import open_checkpoint, text_folder, with_adapters
    from ..weights.served import check_served

    require_devices()
    mesh_of(args)
    adapters = adapters_of(args) if served is None else []
    path = folder(args.model)
    checkpoint = open_checkpoint(path)
    check_served(checkpoint.config, served or ())
    checkpoint = with_adapters(checkpoint, adapters) if adapters else checkpoint
    if args.yarn is not None:
        checkpoint = dataclasses.replace(checkpoint, config=with_yarn(checkpoint.config, args.yarn))
    return checkpoint, load_tokenizer(text_folder(path), checkpoint.config)


def load_model(
    args: argparse.Namespace, checkpoint: "Checkpoint", served: "Sequence[ServedAdapter] | None" = None
) -> "SmolLM3":
    from ..weights.load import load
    from ..weights.served import attach

    model = load(checkpoint, args.dtype, **({"weights": args.weights} if args.weights else {}), **mesh_of(args))
    return attach(model, served) if served else model


def say(text: object = "", end: str = "\n") -> None:
    """Standard output: a file or pipe gets the text as it is, a terminal without what would command it."""
    print(plain(text, lines=True) if sys.stdout.isatty() else text, end=end, flush=True)


def print_json(content: object) -> None:
    lines = json.dumps(content, ensure_ascii=False, indent=2).split("\n")
    # JSON's own spelling, of half a surrogate pair, too.
    print("\n".join(UNSEEN.sub(lambda match: f"\\u{ord(match[0]):04x}", line) for line in lines))


def show(args: argparse.Namespace, report: T, tables: "Callable[[T], Iterable[RenderableType]]") -> None:
    """A report as JSON with --json, else the tables that are made of it."""
    if args.json:
        print_json(report)
        return
    for part in tables(report):
        console().print(part, highlight=False)


def console() -> "Console":
    """For tables. They keep their width where standard output is a file or a pipe; names in them are neither markup nor
    commands to the terminal."""
    from rich.console import Console

    class Plain(Console):
        def render_str(self, text: str, **options: Any) -> "Text":
            return super().render_str(plain(text, lines=True), **options)

        def on_broken_pipe(self) -> None:
            raise  # BrokenPipeError, which ends every command in the same way

    return Plain(width=None if sys.stdout.isatty() else 160, markup=False, emoji=False)
