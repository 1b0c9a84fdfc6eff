"""The `smollm3` command: parses, calls, prints."""

import argparse
import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from sharding.rules import ShardingError

from .config import DTYPES
from .errors import OptionError, SmolLM3Error
from .progress import busy
from .weights.save import FORMATS

VERIFICATION_FAILED = 4


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code: 0, 2 (usage), 3 (bad input), 4 (verification failed)."""
    args = _parser().parse_args(argv)
    logging.basicConfig(format="smollm3: %(levelname)s: %(message)s", level=logging.WARNING)
    for package in ("smollm3_jax", "sharding"):
        logging.getLogger(package).setLevel(logging.INFO)
    try:
        return args.run(args)
    except (SmolLM3Error, ShardingError) as error:
        print(f"smollm3: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("smollm3: interrupted", file=sys.stderr)
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

    inspect = command("inspect", _inspect, "config, tensors, sizes and parameter count of a checkpoint")
    inspect.add_argument("folder", metavar="DIR")
    inspect.add_argument("--json", action="store_true")

    generate = command("generate", _generate, "continue a text, or answer a message")
    generate.add_argument("--model", required=True, metavar="DIR", help="a model folder, a hub id, or demo")
    generate.add_argument("--prompt", required=True, metavar="TEXT")
    generate.add_argument("--chat", action="store_true", help="the prompt is a user's message: apply the chat template")
    generate.add_argument("--no-think", action="store_true", help="with --chat: answer without reasoning first")
    generate.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="default: 128")
    sampling = "default: the model's generation_config.json"
    generate.add_argument("--temperature", type=float, metavar="T", help=f"0 is greedy; {sampling}")
    generate.add_argument("--top-p", type=float, metavar="P", help=sampling)
    generate.add_argument("--top-k", type=int, metavar="K", help=sampling)
    generate.add_argument("--seed", type=int, default=0, metavar="S", help="default: 0")
    generate.add_argument("--dtype", choices=DTYPES, help="default: the checkpoint's own")
    generate.add_argument("--json", action="store_true", help="print one JSON object")

    doctor = command("doctor", _doctor, "versions, devices, and whether they are supported")
    doctor.add_argument("--json", action="store_true")
    return parser


def _print_json(content: Any) -> None:
    text = json.dumps(content, ensure_ascii=False, indent=2)
    print(text.encode(errors="backslashreplace").decode())  # half a surrogate pair cannot be printed


def _folder(model: str, revision: str | None = None, token: str | None = None) -> Path:
    from .weights import demo, hub

    if model == "demo" and not Path(model).exists():
        return demo.pull_demo()
    return hub.resolve(model, revision, token)


def _pull(args: argparse.Namespace) -> int:
    print(_folder(args.model, args.revision, args.token))
    return 0


def _convert(args: argparse.Namespace) -> int:
    from .weights.save import convert

    convert(_folder(args.source), args.folder, args.dtype, args.format, args.max_shard_size)
    print(args.folder)
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
    from .chat.template import render
    from .generate import generate
    from .sampling import SamplingParams
    from .tokenizer import load_tokenizer
    from .weights.load import load, open_checkpoint

    folder = _folder(args.model)
    checkpoint = open_checkpoint(folder)
    tokenizer = load_tokenizer(folder, checkpoint.config)
    own = checkpoint.generation_config
    params = SamplingParams(
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature if args.temperature is not None else own.temperature * own.do_sample,
        top_p=args.top_p if args.top_p is not None else own.top_p,
        top_k=args.top_k if args.top_k is not None else own.top_k,
        seed=args.seed,
    )
    if args.no_think and not args.chat:
        raise OptionError("--no-think changes the chat template: give --chat too")
    if args.chat:
        messages = [{"role": "user", "content": args.prompt}]
        text = render(
            tokenizer.chat_template,
            messages,
            add_generation_prompt=True,
            special_tokens=tokenizer.special_tokens,
            enable_thinking=not args.no_think,
        )
        prompt = tokenizer.encode(text, add_special_tokens=False)
    else:
        prompt = tokenizer.encode(args.prompt)
    if not prompt:
        raise OptionError("--prompt has no tokens; give some text")
    model = load(checkpoint, args.dtype)
    with busy("generating"):
        (new,) = generate(model, [prompt], params)
    text = tokenizer.decode(new)
    if args.json:
        stopped = new[-1] in own.eos_token_id
        reason = "stop" if stopped else "length"
        print(json.dumps({"text": text, "token_ids": new, "prompt_token_ids": prompt, "finish_reason": reason}))
    else:
        print(text)
    return 0


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


def _console() -> Console:
    """Tables keep their width where standard output is a file or a pipe."""
    return Console(width=None if sys.stdout.isatty() else 160)


if __name__ == "__main__":
    sys.exit(main())
