"""The `smollm3` command: parses, calls, prints."""

import argparse
import contextlib
import dataclasses
import functools
import io
import json
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jax
from rich.console import Console
from rich.table import Table

from sharding.mesh import AXES, parse_axes
from sharding.rules import STRATEGIES, ShardingError

from .config import (
    CACHE_SCHEMES,
    DTYPES,
    RELEASE,
    SMOLLM3_3B,
    WEIGHT_SCHEMES,
    GenerationConfig,
    ModelConfig,
    with_yarn,
)
from .errors import OptionError, SmolLM3Error
from .generation.sampling import MAX_LOGPROBS, SamplingParams
from .model import SmolLM3
from .perplexity import LENGTH, MAX_TOKENS, perplexity, read_documents
from .progress import busy
from .support import keep_to_the_cpu_without_accelerator
from .tokenizer import Tokenizer, load_tokenizer
from .weights.load import Checkpoint, load, open_checkpoint
from .weights.save import FORMATS

SOME_FAILED = 3
VERIFICATION_FAILED = 4


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code: 0, 2 (usage), 3 (bad input), 4 (verification failed)."""
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    if hasattr(args, "settings") and not any(word.startswith("-") for word in rest):
        args.settings += rest  # argparse takes only those before the first option
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    logging.basicConfig(format="smollm3: %(levelname)s: %(message)s", level=logging.WARNING)
    for package in ("smollm3_jax", "sharding"):
        logging.getLogger(package).setLevel(logging.INFO)
    logging.getLogger("smollm3_jax.generation.api").setLevel(logging.WARNING)
    keep_to_the_cpu_without_accelerator()
    try:
        return args.run(args)
    except (SmolLM3Error, ShardingError) as error:
        print(f"smollm3: {error}", file=sys.stderr)
        if args.run is _train:
            _leave(error.exit_code)
        return error.exit_code
    except KeyboardInterrupt as interrupt:
        print("; ".join(["smollm3: interrupted", *map(str, interrupt.args)]), file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="smollm3", description="SmolLM3 in JAX: run it, train it, convert it.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Any, help: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help, description=help)
        sub.set_defaults(run=run)
        return sub

    pull = command("pull", _pull, "fetch a model; prints its folder as the last line")
    pull.add_argument("model", help='"demo", or a hub id such as HuggingFaceTB/SmolLM3-3B')
    pull.add_argument("--revision", help="branch, tag or commit of the hub's repository")
    pull.add_argument("--token", help="access token of the hub (default: HF_TOKEN, or the login of hf)")

    convert = command("convert", _convert, "rewrite a checkpoint as a Hugging Face folder")
    convert.add_argument("source", metavar="SRC", help="a model folder, a .gguf file, or a hub id")
    convert.add_argument("folder", metavar="DST", help="the folder to write")
    convert.add_argument("--dtype", choices=DTYPES, help="cast all tensors (default: keep each as it is)")
    convert.add_argument("--format", choices=FORMATS, default="safetensors")
    convert.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="default: 5GB")

    verify = command("verify", _verify, "compare a checkpoint's computation with a reference; exit code 0 or 4")
    verify.add_argument("folder", metavar="DIR")
    verify.add_argument("--against", required=True, metavar="DIR2|transformers")
    verify.add_argument("--prompt", metavar="TEXT", help="the text to compute on (default: a built-in one)")
    verify.add_argument("--json", action="store_true")

    quantize = command("quantize", _quantize, "rewrite a checkpoint with quantized weights")
    quantize.add_argument("source", metavar="SRC", help="a model folder, a .gguf file, or a hub id")
    quantize.add_argument("folder", metavar="DST", help="the folder to write")
    quantize.add_argument("--weights", choices=WEIGHT_SCHEMES, required=True)
    quantize.add_argument("--cache", choices=CACHE_SCHEMES, help="what keys and values are to be kept in by default")
    quantize.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="default: 5GB")

    inspect = command("inspect", _inspect, "config, tensors, sizes and parameter count of a checkpoint")
    inspect.add_argument("folder", metavar="DIR")
    inspect.add_argument("--json", action="store_true")

    generate = command("generate", _generate, "continue a text, or answer a message")
    _add_model(generate)
    prompt = generate.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT", help="- reads standard input, without the newline at its end")
    prompt.add_argument("--prompt-file", metavar="FILE", help="the same from a file")
    prompt.add_argument("--input", metavar="FILE", help='many: JSON lines, each with a "prompt" or "messages"')
    generate.add_argument("--chat", action="store_true", help="the prompt is a user's message: apply the chat template")
    generate.add_argument("--no-think", action="store_true", help="with --chat: answer without reasoning first")
    generate.add_argument("--json", action="store_true", help="print one JSON object")
    generate.add_argument("--stats", action="store_true", help="speed on standard error, as a terminal always has it")
    lookup_help = "greedy only: draft N tokens at a time from the text so far, and verify them at once"
    generate.add_argument("--lookup", type=int, default=0, metavar="N", help=lookup_help)
    _add_sampling(generate)
    many = generate.add_argument_group(
        "many prompts (--input)",
        'A line of the input may have an "id" and any sampling option for itself, such as "max_new_tokens": 9. A line '
        "that cannot be run is answered with an error, and the exit code is then 3. A run that was stopped goes on "
        "when the same command is given again.",
    )
    many.add_argument("--output", metavar="FILE", help="gets a JSON line for each, as they finish")
    many.add_argument("--slots", type=int, metavar="N", help="sequences side by side, a power of two (default: 16)")
    many.add_argument("--context", type=int, metavar="N", help="most tokens of one, prompt included (default: counted)")

    chat = command("chat", _chat, "talk with a model in the terminal; /help lists what it understands")
    _add_model(chat)
    chat.add_argument("--system", metavar="TEXT", help="the system message")
    chat.add_argument("--no-think", action="store_true", help="answer without reasoning first")
    chat.add_argument("--load", metavar="FILE", help="go on with a conversation that /save wrote")
    chat.add_argument("--tools", metavar="FILE.py", help="let the model call the public functions of this file")
    chat.add_argument("--yes", action="store_true", help="run the tools that it calls without a question")
    _add_sampling(chat)
    chat.epilog = (
        "--max-new-tokens is here by default 4096 for a model that can think, else 1024. Where output is no terminal, "
        "answers are printed without the reasoning."
    )

    scored = command("perplexity", _perplexity, "how well a model predicts text, computed as it would generate it")
    _add_model(scored)
    text_help = 'JSON lines, each with a "text" and perhaps a "language"'
    scored.add_argument("--text", required=True, metavar="FILE.jsonl", help=text_help)
    scored.add_argument("--max-tokens", type=int, default=MAX_TOKENS, metavar="N", help=f"default: {MAX_TOKENS}")
    length_help = f"of a document, from its start (default: {LENGTH})"
    scored.add_argument("--length", type=int, default=LENGTH, metavar="N", help=length_help)
    scored.add_argument("--json", action="store_true")

    train = command("train", _train, "continue pretraining, in a run folder that a restart goes on from")
    train.add_argument(
        "--config", required=True, metavar="FILE.toml|RECIPE", help="settings; see smollm3_jax/train/recipes"
    )
    train.add_argument("settings", nargs="*", metavar="section.key=value", help="over those of the file")
    train.add_argument("--resume", choices=("auto",), help="go on from the newest sound checkpoint, if there is one")
    train.add_argument("--allow-restart", action="store_true", help="begin anew if all checkpoints are damaged")
    train.add_argument("--allow-changes", action="store_true", help="go on with settings or data that have changed")
    train.add_argument("--clean", action="store_true", help="remove what broken-off saves left in the run folder")
    train.add_argument("--dry-run", action="store_true", help="print steps, tokens, stages, mixture and memory")
    train.add_argument("--json", action="store_true", help="print the result as one JSON object")
    job = train.add_argument_group("a job of several processes (found by itself on TPU pods, Slurm, Kubernetes)")
    job.add_argument("--coordinator", metavar="HOST:PORT", help="of process 0")
    job.add_argument("--processes", type=int, metavar="N")
    job.add_argument("--process", type=int, metavar="I", help="which this is, from 0")
    job.add_argument("--wait", type=int, default=300, metavar="SECONDS", help="for the others (default: 300)")
    job.add_argument("--heartbeat", type=int, default=100, metavar="SECONDS", help="of silence: lost (default: 100)")

    export = command("export", _export, "write a run's checkpoint as a Hugging Face folder")
    export.add_argument("run_folder", metavar="RUN")
    export.add_argument("folder", metavar="DIR", help="the folder to write")
    export.add_argument("--step", type=int, metavar="N", help="default: the newest that is sound")
    export.add_argument("--average", type=int, default=1, metavar="N", help="the mean of the last N checkpoints")
    export.add_argument("--dtype", choices=DTYPES, default="float32")

    tokenize = command("tokenize", _tokenize, "write a corpus as shards of tokens, once")
    tokenize.add_argument("source", metavar="SRC", help="a file or folder of documents")
    tokenize.add_argument("folder", metavar="DST", help="the folder to write; a run that was stopped goes on")
    tokenize.add_argument("--model", required=True, metavar="DIR", help="whose tokenizer: a model folder or hub id")
    tokenize.add_argument("--field", default="text", help="of JSON lines and columns (default: text)")
    tokenize.add_argument("--workers", type=int, metavar="N", help="processes (default: one a core)")
    tokenize.add_argument("--shard-documents", type=int, default=10_000, metavar="N", help="default: 10000")
    tokenize.add_argument("--bad-records", type=int, default=100, metavar="N", help="how many may be skipped")
    tokenize.add_argument("--json", action="store_true")

    _add_plan(command("plan", None, "what hardware would give: real programs, compiled for it, without it"))

    doctor = command("doctor", _doctor, "versions, devices, and whether they are supported")
    doctor.add_argument("--json", action="store_true")
    return parser


def _add_plan(parser: argparse.ArgumentParser) -> None:
    """Four plans; see plan.py."""
    plans = parser.add_subparsers(required=True, metavar="PLAN")

    def plan(name: str, run: Any, help: str, compiles: bool) -> argparse.ArgumentParser:
        sub = plans.add_parser(name, help=help, description=help)
        sub.set_defaults(run=functools.partial(_plan, run))
        model_help = f"a model folder, whose config.json is read; default: the shape of {RELEASE}"
        sub.add_argument("--model", metavar="DIR", help=model_help)
        sub.add_argument("--json", action="store_true")
        if compiles:
            sub.add_argument(
                "--topology", default="v5e:4x4", metavar="CHIP:SHAPE", help="such as v5e:4x4 (the default) or h100:8"
            )
            sub.add_argument("--mesh", metavar="AXIS=N,...", help=f"of {', '.join(AXES)}; -1 fills; default: by rules")
            sub.add_argument("--dump-hlo", type=Path, metavar="FILE", help="write the compiled program")
        return sub

    train = plan("train", _plan_train, "memory, collectives and modelled time of a training step", True)
    train.add_argument("--slices", type=int, default=1, metavar="N", help="so many of the topology (default: 1)")
    train.add_argument("--rules", default="fsdp", choices=STRATEGIES, help="default: fsdp")
    train.add_argument("--batch", type=int, default=16, metavar="ROWS", help="over all devices (default: 16)")
    train.add_argument("--length", type=int, default=4096, metavar="N", help="tokens of a row (default: 4096)")
    remat_help = "what the backward pass computes again (default: as little as fits)"
    train.add_argument("--remat", metavar="POLICY", help=remat_help)
    train.add_argument("--micro-batches", type=int, default=1, metavar="N", help="default: 1")

    decode = plan("decode", _plan_decode, "memory and modelled time of decoding and prefill", True)
    decode.add_argument("--rules", default="serve_tp", choices=STRATEGIES, help="default: serve_tp")
    decode.add_argument("--batch", type=int, default=64, metavar="SLOTS", help="over all devices (default: 64)")
    decode.add_argument("--context", type=int, default=8192, metavar="N", help="tokens of a slot (default: 8192)")
    decode.add_argument("--weights", choices=WEIGHT_SCHEMES, help="default: bfloat16")
    decode.add_argument("--cache", choices=("bfloat16", "int8"), default="bfloat16")

    memory = plan("memory", _plan_memory, "weights by format and cache by context, exact to the byte", False)
    memory.add_argument("--batch", type=int, default=1, metavar="ROWS", help="sequences in the cache (default: 1)")
    memory.add_argument("--out", type=Path, metavar="FILE.png", help="draw it (needs the extra `bench`)")

    scale = plan("scale", _plan_scale, "a training step on more and more devices (v5e), and SmolLM3's own run", False)
    scale.add_argument("--devices", default="16,64,256", metavar="N,N,...", help="default: 16,64,256")
    scale.add_argument("--length", type=int, default=4096, metavar="N", help="tokens of a row (default: 4096)")


def _add_model(parser: argparse.ArgumentParser) -> None:
    """The model and how it is held in memory; see `_open_model`."""
    group = parser.add_argument_group("model")
    group.add_argument("--model", required=True, metavar="DIR", help="a model folder, a hub id, or demo")
    group.add_argument("--dtype", choices=DTYPES, help="default: the checkpoint's own")
    group.add_argument("--weights", choices=WEIGHT_SCHEMES, help="quantize the weights at loading")
    group.add_argument("--cache", choices=("bfloat16", "int8"), help="what keys and values are kept in")
    group.add_argument("--yarn", type=float, metavar="FACTOR", help="stretch the context this many times (YaRN)")


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    """One option for each field of SamplingParams, under its name; see `_sampling_params`."""
    group = parser.add_argument_group("sampling")
    own = "default: the model's generation_config.json"

    def option(name: str, kind: Any, metavar: str, help: str) -> None:
        group.add_argument(name, type=kind, metavar=metavar, help=help)

    def several(name: str, kind: Any, metavar: str, help: str) -> None:
        group.add_argument(name, type=kind, metavar=metavar, help=f"{help}; may be repeated", action="append")

    option("--max-new-tokens", int, "N", "default: 128")
    option("--temperature", float, "T", f"0 is greedy; {own}")
    option("--top-k", int, "K", f"sample among the K likeliest tokens; {own}")
    option("--top-p", float, "P", f"sample among the fewest tokens that hold this probability; {own}")
    option("--min-p", float, "P", "sample among tokens at least P times as likely as the likeliest")
    option("--repetition-penalty", float, "X", "above 1: tokens of the prompt and the text become less likely")
    option("--presence-penalty", float, "X", "subtracted from the logit of every token that was generated")
    option("--frequency-penalty", float, "X", "the same, once for each time that it was")
    several("--logit-bias", _bias, "ID=VALUE", "add VALUE to this token's logit")
    several("--stop", str, "TEXT", "end before this text")
    several("--stop-token-id", int, "ID", "end with this token")
    group.add_argument("--ignore-eos", action="store_true", help="go on after the model's own end (for benchmarks)")
    option("--seed", int, "S", "default: 0")
    option("--n", int, "N", "how many samples; sample i draws with seed + i")
    option("--logprobs", int, "N", f"log-probabilities, of the N likeliest tokens too (0 to {MAX_LOGPROBS})")
    group.add_argument("--prompt-logprobs", action="store_true", help="log-probabilities of the prompt's tokens")
    option("--max-thinking-tokens", int, "N", "after so many tokens of thinking the model has to answer")


def _bias(text: str) -> tuple[int, float]:
    token, _, value = text.partition("=")
    try:
        return int(token), float(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not ID=VALUE, such as 42=-1.5") from None


def _sampling_params(args: argparse.Namespace, own: GenerationConfig) -> SamplingParams:
    """What was given; for the rest the model's own settings, then the defaults of SamplingParams."""
    given = {field.name: getattr(args, field.name, None) for field in dataclasses.fields(SamplingParams)}
    given["logit_bias"] = dict(args.logit_bias or ())
    given["stop_token_ids"] = args.stop_token_id
    settings = {"temperature": own.temperature * own.do_sample, "top_p": own.top_p, "top_k": own.top_k}
    return SamplingParams(**settings | {name: value for name, value in given.items() if value is not None})


def _open_checkpoint(args: argparse.Namespace) -> tuple[Checkpoint, Tokenizer]:
    """The model of `_add_model` as it will be loaded, headers only."""
    folder = _folder(args.model)
    checkpoint = open_checkpoint(folder)
    if args.yarn is not None:
        checkpoint = dataclasses.replace(checkpoint, config=with_yarn(checkpoint.config, args.yarn))
    return checkpoint, load_tokenizer(folder, checkpoint.config)


def _load(args: argparse.Namespace, checkpoint: Checkpoint) -> SmolLM3:
    return load(checkpoint, args.dtype, **({"weights": args.weights} if args.weights else {}))


def _open_model(args: argparse.Namespace) -> tuple[SmolLM3, Tokenizer, Checkpoint]:
    """The model of `_add_model`, its tokenizer, and what it was loaded from."""
    checkpoint, tokenizer = _open_checkpoint(args)
    return _load(args, checkpoint), tokenizer, checkpoint


def _print_json(content: Any) -> None:
    text = json.dumps(content, ensure_ascii=False, indent=2)
    print(text.encode(errors="backslashreplace").decode())  # half a surrogate pair cannot be printed


def _folder(model: str, revision: str | None = None, token: str | None = None) -> Path:
    from .weights.demo import model_folder

    return model_folder(model, revision, token)


def _pull(args: argparse.Namespace) -> int:
    print(_folder(args.model, args.revision, args.token))
    return 0


def _convert(args: argparse.Namespace) -> int:
    from .weights.save import convert

    convert(_folder(args.source), args.folder, args.dtype, args.format, args.max_shard_size)
    print(args.folder)
    return 0


def _quantize(args: argparse.Namespace) -> int:
    from .weights.save import quantize

    quantize(_folder(args.source), args.folder, args.weights, args.cache, args.max_shard_size)
    print(args.folder)
    return 0


def _perplexity(args: argparse.Namespace) -> int:
    checkpoint, tokenizer = _open_checkpoint(args)
    # Read before the model is loaded: a mistake in the text shows at once.
    documents = read_documents(Path(args.text), tokenizer, args.max_tokens, args.length)
    report = {"model": args.model, "text": args.text}
    report |= perplexity(_load(args, checkpoint), documents, args.cache)
    if args.json:
        _print_json(report)
        return 0
    table = Table("language", "perplexity", "nats a token", "tokens")
    for language, row in [*report["languages"].items(), ("all", report)]:
        values = [row["perplexity"], row["nats_per_token"]]
        shown = ["not finite" if value is None else f"{value:.4f}" for value in values]
        table.add_row(language or "-", *shown, f"{row['tokens']:,}")
    _console().print(table)
    print(f"{report['documents']} documents of up to {report['longest']} tokens, {report['rows']} side by side")
    print(f"weights {report['weights']}, activations {report['activations']}, cache {report['cache']}")
    return 0


def _verify(args: argparse.Namespace) -> int:
    from .verify import verify

    against = args.against if args.against == "transformers" else _folder(args.against)
    report = verify(_folder(args.folder), against, args.prompt)
    if args.json:
        _print_json(report)
    else:
        print(f"{report['model']} against {report['against']}")
        table = Table(show_header=False)
        for name in (
            *("tokens", "max_abs", "max_abs_bound", "mean_abs", "max_logit", "kl", "top1", "top5"),
            *("greedy_agreement", "greedy_tokens", "first_diverging_layer"),
        ):
            value = report[name]
            table.add_row(name, f"{value:.3g}" if isinstance(value, float) else "none" if value is None else str(value))
        if report["weights"]:
            table.add_row("tensors that differ", f"{report['weights']['different']} of {report['weights']['tensors']}")
        for name, passed in report["checks"].items():
            table.add_row(f"check: {name}", "passed" if passed else "FAILED")
        _console().print(table)
        print(f"tolerance for {report['tolerance']['dtype']}: {report['tolerance']['source']}")
        print("verified" if report["ok"] else "NOT verified")
    return 0 if report["ok"] else VERIFICATION_FAILED


def _inspect(args: argparse.Namespace) -> int:
    from .weights.summary import summarize

    summary = summarize(_folder(args.folder))
    if args.json:
        _print_json(summary)
        return 0
    config = summary["config"]
    print(f"{summary['path']}: {config['architectures'][0]}")
    print(f"{summary['parameters']:,} parameters, {summary['bytes']:,} bytes")
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
    console = _console()
    console.print(table)
    for name, value in config.items():
        print(f"{name}: {json.dumps(value)}")
    print(f"text files: {', '.join(summary['text_files']) or 'none'}")
    return 0


def _generate(args: argparse.Namespace) -> int:
    from .generation.api import Completion, Request, check_request, stream
    from .generation.jsonl import encode_messages, spell_logprobs, spell_prompt_logprobs

    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # not every encoding has what a model says
    if args.input is not None:
        return _generate_many(args)
    if given := [name for name in ("output", "slots", "context") if getattr(args, name) is not None]:
        raise OptionError(f"--{given[0]} is for many prompts: give --input too")
    if args.no_think and not args.chat:
        raise OptionError("--no-think changes the chat template: give --chat too")
    if (args.logprobs is not None or args.prompt_logprobs) and not args.json:
        raise OptionError("--logprobs and --prompt-logprobs add to what --json prints: give --json too")
    checkpoint, tokenizer = _open_checkpoint(args)
    params = _sampling_params(args, checkpoint.generation_config)
    text = _prompt(args)
    if args.chat:
        prompt = encode_messages(tokenizer, [{"role": "user", "content": text}], not args.no_think)
    else:
        prompt = tokenizer.encode(text)
    request = Request(prompt, params)
    check_request(checkpoint.config, checkpoint.generation_config, request, tokenizer, lookup=args.lookup)
    model = _load(args, checkpoint)
    if args.stats or args.lookup:  # which sizes everything was rounded up to, and how many drafts were accepted
        logging.getLogger("smollm3_jax.generation.api").setLevel(logging.INFO)
    samples = [Completion.empty() for _ in range(params.n)]
    live = params.n == 1 and not args.json
    arrivals = []
    begin = time.monotonic()
    with contextlib.ExitStack() as waiting:
        waiting.enter_context(busy("generating"))
        for delta in stream(model, [request], tokenizer=tokenizer, cache_dtype=args.cache, lookup=args.lookup):
            arrivals.append((time.monotonic() - begin, len(delta.token_ids)))
            samples[delta.sample].add(delta)
            if live:
                waiting.close()  # or the spinner would write into the text
                print(delta.text, end="", flush=True)
    if live:
        print()
    elif args.json:
        shared = {"prompt_token_ids": prompt, **spell_prompt_logprobs(samples[0], prompt, tokenizer)}
        results = [
            {
                "text": sample.text,
                "token_ids": sample.token_ids,
                **(shared if params.n == 1 else {}),
                "finish_reason": sample.finish_reason,
                **spell_logprobs(sample, tokenizer),
            }
            for sample in samples
        ]
        print(json.dumps(results[0] if params.n == 1 else {**shared, "samples": results}))
    else:
        for i, sample in enumerate(samples, 1):
            print(f"--- sample {i} of {params.n} ---\n{sample.text}")
    if args.stats or sys.stderr.isatty():
        (first, count), (last, _) = arrivals[0], arrivals[-1]
        tokens = sum(number for _, number in arrivals)
        # One sequence's speed without its prompt; several begin and end at different times.
        rate = (tokens - count) / (last - first) if params.n == 1 and tokens > count else tokens / last
        print(f"{tokens} tokens in {last:.2f} s, {rate:.1f} tokens/s; the first after {first:.2f} s", file=sys.stderr)
    return 0


def _prompt(args: argparse.Namespace) -> str:
    if args.prompt_file is None and args.prompt != "-":
        return args.prompt
    try:
        if args.prompt_file is None and sys.stdin is None:
            raise ValueError("it is closed")
        content = sys.stdin.buffer.read() if args.prompt_file is None else Path(args.prompt_file).read_bytes()
        return re.sub(r"\r?\n\Z", "", content.decode())
    except (OSError, ValueError) as error:
        raise OptionError(f"the prompt of {args.prompt_file or 'standard input'} cannot be read: {error}") from None


def _generate_many(args: argparse.Namespace) -> int:
    from .generation.jsonl import SLOTS, Batch

    if args.output is None:
        raise OptionError("--input needs --output, the file that the answers go to")
    if given := [name for name in ("json", "stats", "lookup") if getattr(args, name)]:
        raise OptionError(f"--{given[0]} is for one prompt: leave it out with --input")
    checkpoint, tokenizer = _open_checkpoint(args)
    params = _sampling_params(args, checkpoint.generation_config)
    # A folder under all of its names; a hub id stays one.
    settings = {"model": str(Path(args.model).resolve()) if Path(args.model).exists() else args.model}
    settings |= {name: getattr(args, name) for name in ("dtype", "weights", "cache", "yarn")}
    with Batch(args.input, args.output, params, chat=args.chat, thinking=not args.no_think, settings=settings) as batch:
        if batch.left:
            slots = SLOTS if args.slots is None else args.slots
            batch.run(_load(args, checkpoint), tokenizer, slots=slots, context=args.context, cache_dtype=args.cache)
    speed = f"; {batch.tokens} tokens, {batch.tokens / batch.seconds:.1f} tokens/s" if batch.tokens else ""
    failed = f", {batch.failed} of them errors" if batch.failed else ""
    print(f"smollm3: {batch.done} lines in {args.output}{failed}{speed}", file=sys.stderr)
    return SOME_FAILED if batch.failed else 0


def _doctor(args: argparse.Namespace) -> int:
    from .support import diagnose

    report = diagnose()
    if args.json:
        _print_json(report)
    else:
        for name, version in report["versions"].items():
            print(f"{name:18} {version or '-'}")
        for device in report["devices"]:
            print(f"{'device':18} {device}")
        for problem in report["problems"]:
            print(f"{'problem':18} {problem}")
        print(f"{'verdict':18} {report['verdict']}")
    return 3 if report["problems"] else 0


def _train(args: argparse.Namespace) -> int:
    import jax

    from sharding.mesh import start

    from .train.settings import read_settings

    settings = read_settings(args.config, args.settings)
    if args.dry_run:
        from .train.dry_run import describe, tables

        report = describe(settings)
        if args.json:
            _print_json(report)
        else:
            for part in tables(report):
                _console().print(part, highlight=False)
        return 0
    start(args.coordinator, args.processes, args.process, args.wait, args.heartbeat)
    from .train.loop import STOPPED, train
    from .train.monitor import plain

    result = train(
        settings,
        resume=args.resume == "auto",
        allow_restart=args.allow_restart,
        allow_changes=args.allow_changes,
        clean=args.clean,
    )
    if args.json:
        _print_json(plain(result))
    else:
        how = "stopped" if result["stopped"] else "done"
        loss = "none yet" if result["loss"] is None else f"{result['loss']:.4f}"
        print(f"{how} at step {result['step']}, loss {loss}, checkpoints in {settings.run.dir}/checkpoints")
    if jax.distributed.is_initialized():
        jax.distributed.shutdown()  # waits for the others
    _leave(STOPPED if result["stopped"] else 0)


def _leave(code: int) -> NoReturn:
    """Ends the process at once: a normal exit waits for threads (data, a failed save) or breaks off in their midst."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _export(args: argparse.Namespace) -> int:
    from .train.checkpoint import run_folder
    from .train.export import export

    steps = export(run_folder(args.run_folder), Path(args.folder), args.step, args.average, args.dtype)
    print(f"{args.folder}: step {', '.join(map(str, steps))}")
    return 0


def _tokenize(args: argparse.Namespace) -> int:
    from .train.tokenize import tokenize

    report = tokenize(
        args.source,
        Path(args.folder),
        _folder(args.model),
        field=args.field,
        workers=args.workers or os.cpu_count() or 1,
        shard_documents=args.shard_documents,
        bad_records=args.bad_records,
    )
    if args.json:
        _print_json(report)
    else:
        print(f"{report['documents']:,} documents, {report['tokens']:,} tokens, {report['shards']} shards")
    return 0


def _plan(run: Callable[[argparse.Namespace], int], args: argparse.Namespace) -> int:
    """Runs one of the plans. They need no device: an accelerator that there is stays with whoever has it, and a plug-in
    that is here to compile is not asked for one."""
    jax.config.update("jax_platforms", "cpu")
    return run(args)


def _plan_config(args: argparse.Namespace) -> ModelConfig:
    return ModelConfig.from_hf(_folder(args.model) if args.model else SMOLLM3_3B)


def _plan_train(args: argparse.Namespace) -> int:
    from .plan import plan_train

    axes = parse_axes(args.mesh) if args.mesh else None
    options = {"axes": axes, "slices": args.slices, "remat": args.remat, "micro_batches": args.micro_batches}
    report = plan_train(
        _plan_config(args), args.topology, args.rules, args.batch, args.length, **options, dump=args.dump_hlo
    )
    return _show_plan(args, report)


def _plan_decode(args: argparse.Namespace) -> int:
    from .plan import plan_decode

    options = {"axes": parse_axes(args.mesh) if args.mesh else None, "weights": args.weights, "cache": args.cache}
    report = plan_decode(
        _plan_config(args), args.topology, args.rules, args.batch, args.context, **options, dump=args.dump_hlo
    )
    return _show_plan(args, report)


def _show_plan(args: argparse.Namespace, report: dict[str, Any]) -> int:
    if args.json:
        _print_json(report)
    else:
        from .plan_tables import tables

        console = _console()
        for part in tables(report):
            console.print(part, highlight=False)
    return 0


def _plan_memory(args: argparse.Namespace) -> int:
    from .plan import plan_memory
    from .plan_tables import draw_memory, memory_table

    report = plan_memory(_plan_config(args), args.batch)
    if args.out:
        draw_memory(report, args.out)
    if args.json:
        _print_json(report)
    else:
        _console().print(memory_table(report))
    return 0


def _plan_scale(args: argparse.Namespace) -> int:
    from .plan import plan_scale
    from .plan_tables import scale_tables

    try:
        devices = [int(part) for part in args.devices.split(",")]
    except ValueError:
        raise OptionError(f"--devices {args.devices}: not numbers, with commas between them") from None
    report = plan_scale(_plan_config(args), devices, args.length)
    if args.json:
        _print_json(report)
    else:
        for part in scale_tables(report):
            _console().print(part, highlight=False)
    return 0


def _chat(args: argparse.Namespace) -> int:
    from .chat import terminal
    from .chat.screen import Screen, is_interactive, line_reader
    from .chat.tools import load_tools
    from .generation.api import Delta, Request, check_request, stream, think_ids
    from .weights.hub import cache_dir

    for file, errors in ((sys.stdin, "replace"), (sys.stdout, "backslashreplace")):
        if isinstance(file, io.TextIOWrapper):
            file.reconfigure(errors=errors)
    checkpoint, tokenizer = _open_checkpoint(args)
    if args.max_new_tokens is None:
        args.max_new_tokens = 1024 if -1 in think_ids(tokenizer) else 4096
    params = _sampling_params(args, checkpoint.generation_config)
    if params.n != 1 or params.logprobs is not None or params.prompt_logprobs:
        raise OptionError("--n, --logprobs and --prompt-logprobs are for `smollm3 generate`: a chat shows one answer")
    probe = Request([0], dataclasses.replace(params, max_new_tokens=1))
    check_request(checkpoint.config, checkpoint.generation_config, probe, tokenizer)

    def generate(prompt: list[int], params: SamplingParams, capacity: int) -> Generator[Delta, None, None]:
        # Few steps at a time: an answer should flow.
        options = {"max_slots": 1, "capacity": capacity, "cache_dtype": args.cache, "steps": 4}
        yield from stream(model, [Request(prompt, params)], tokenizer=tokenizer, **options)

    chat = terminal.Chat(
        tokenizer=tokenizer,
        context=checkpoint.config.max_position_embeddings,
        params=params,
        generate=generate,
        read=line_reader(cache_dir() / "history"),
        screen=Screen(_console(), Console(stderr=True)),
        interactive=is_interactive(),
        tools=load_tools(args.tools) if args.tools else {},
        yes=args.yes,
        think=not args.no_think,
    )
    if args.load:
        terminal.load(chat, args.load)
    if args.system is not None:
        chat.system = args.system
    model = _load(args, checkpoint)  # not before all else has been found right
    return terminal.converse(chat)


def _console() -> Console:
    """Tables keep their width where standard output is a file or a pipe."""
    return Console(width=None if sys.stdout.isatty() else 160)


if __name__ == "__main__":
    sys.exit(main())
