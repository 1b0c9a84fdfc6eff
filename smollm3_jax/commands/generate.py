"""`smollm3 generate`."""

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
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import OptionError
from ..progress import busy
from ..screen_text import plain
from .shared import (
    add_job,
    add_model,
    add_sampling,
    join_if_asked,
    load_model,
    open_model,
    opened,
    sampling_params,
    say,
)

if TYPE_CHECKING:
    from ..generation.requests import Completion
    from ..model import SmolLM3
    from ..tokenizer import Tokenizer
    from ..weights.load import Checkpoint

SOME_FAILED = 3
# Of a prompt; more than any context holds.
MOST_BYTES = 2**26


def add(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add_job(parser)
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("-p", "--prompt", metavar="TEXT", help="- reads standard input, without the newline at its end")
    prompt.add_argument("--prompt-file", metavar="FILE", help="the same from a file")
    prompt.add_argument("--input", metavar="FILE", help='many: JSON lines, each with a "prompt" or "messages"')
    parser.add_argument("--chat", action="store_true", help="the prompt is a user's message: apply the chat template")
    parser.add_argument("--system", metavar="TEXT", help="with --chat: the system message")
    parser.add_argument("--no-think", action="store_true", help="with --chat: answer without reasoning first")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--stats", action="store_true", help="speed (a terminal always has it), and which programs ran")
    lookup_help = "greedy only: draft N tokens at a time from the text so far, and verify them at once"
    parser.add_argument("--lookup", type=int, default=0, metavar="N", help=lookup_help)
    schema_help = "the answer keeps to this JSON schema, after its thinking (needs the extra serve)"
    parser.add_argument("--json-schema", metavar="FILE", help=schema_help)
    add_sampling(parser)
    many = parser.add_argument_group(
        "many prompts (--input)",
        'A line of the input may have an "id", a "json_schema" and any sampling option for itself, such as '
        '"max_new_tokens": 9. A line that cannot be run is answered with an error, and the exit code is then 3. A run '
        "that was stopped goes on when the same command is given again. With --slots and --context answers are those "
        "of `smollm3 serve` with the same, to the bit.",
    )
    many.add_argument("--output", metavar="FILE", help="gets a JSON line for each, as they finish")
    many.add_argument("--slots", type=int, metavar="N", help="sequences side by side, a power of two (default: 16)")
    many.add_argument("--context", type=int, metavar="N", help="most tokens of one, prompt included (default: counted)")
    ray_help = "answer on a Ray cluster (HOST:PORT, auto, or local to start one): a model in each of its actors"
    many.add_argument("--ray", metavar="ADDRESS", help=ray_help)
    actors_help = "with --ray (default: one for each GPU, or TPU chip, or machine)"
    many.add_argument("--actors", type=int, metavar="N", help=actors_help)


def run(args: argparse.Namespace) -> int:
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # not every encoding has what a model says
    if args.input is None:
        _check_options(args)
    else:
        _check_options_for_many(args)
    if args.ray is not None:
        import jax

        jax.config.update("jax_platforms", "cpu")  # this process computes nothing; the devices are the actors'
    join_if_asked(args)
    with opened(args) as model:
        if model is None:
            return 0
        return (_generate if args.input is None else _generate_many)(args, *model)


def _generate(
    args: argparse.Namespace, checkpoint: "Checkpoint", tokenizer: "Tokenizer", load: "Callable[[], SmolLM3]"
) -> int:
    from ..chat.template import encode_for_answer
    from ..generation.api import stream
    from ..generation.lines import fitted_request
    from ..generation.requests import Completion, chat_ends, check_request
    from ..generation.stats import Stats

    params = sampling_params(args, checkpoint)
    text, free = _prompt(args), args.max_new_tokens is None
    context = checkpoint.config.max_position_embeddings
    if args.chat:
        messages = [{"role": "system", "content": args.system}] if args.system is not None else []
        messages.append({"role": "user", "content": text})
        prompt = encode_for_answer(tokenizer, messages, context=context, thinking=not args.no_think)
        ends = chat_ends(tokenizer, checkpoint.config)
    else:
        prompt, ends = tokenizer.encode(text, context=context), ()
    request = fitted_request(checkpoint.config, prompt, params, ends, fit=free)
    request = dataclasses.replace(request, grammar=_grammar(args.json_schema))
    params = request.params
    check_request(checkpoint.config, checkpoint.generation_config, request, tokenizer, lookup=args.lookup)
    model = load()
    if args.lookup and not args.quiet:  # how many drafts were accepted
        logging.getLogger("smollm3_jax.generation").setLevel(logging.INFO)
    samples = [Completion.empty() for _ in range(params.n)]
    live = params.n == 1 and not args.json
    stats = Stats()
    options = {"tokenizer": tokenizer, "cache_dtype": args.cache, "lookup": args.lookup, "stats": stats}
    with contextlib.ExitStack() as waiting:
        waiting.enter_context(busy("generating"))
        for delta in stream(model, [request], **options):
            samples[delta.sample].add(delta)
            if live:
                waiting.close()  # or the spinner would write into the text
                say(delta.text, end="")
    if live:
        print()
    elif args.json:
        _print_json(params.n, prompt, samples, tokenizer)
    else:
        for i, sample in enumerate(samples, 1):
            say(f"--- sample {i} of {params.n} ---\n{sample.text}")
    if args.stats or (sys.stderr.isatty() and not args.quiet):
        print(f"smollm3: {stats.line()}", file=sys.stderr)
    if args.stats:
        print(f"smollm3: {stats.listed()}", file=sys.stderr)
    return 0


def _check_options(args: argparse.Namespace) -> None:
    if given := [name for name in ("output", "slots", "context", "ray", "actors") if getattr(args, name) is not None]:
        raise OptionError(f"--{given[0]} is for many prompts: give --input too")
    if args.no_think and not args.chat:
        raise OptionError("--no-think changes the chat template: give --chat too")
    if args.system is not None and not args.chat:
        raise OptionError("--system is a message of a chat: give --chat too")
    if (args.logprobs is not None or args.prompt_logprobs) and not args.json:
        raise OptionError("--logprobs and --prompt-logprobs add to what --json prints: give --json too")


def _print_json(n: int, prompt: list[int], samples: "list[Completion]", tokenizer: "Tokenizer") -> None:
    """One object: of the one sample, or of all n of them."""
    from ..generation.lines import spell_logprobs, spell_prompt_logprobs

    shared = {"prompt_token_ids": prompt, **spell_prompt_logprobs(samples[0], prompt, tokenizer)}
    results = [
        {
            "text": sample.text,
            "token_ids": sample.token_ids,
            **(shared if n == 1 else {}),
            "finish_reason": sample.finish_reason,
            **spell_logprobs(sample, tokenizer),
        }
        for sample in samples
    ]
    print(json.dumps(results[0] if n == 1 else {**shared, "samples": results}))


def _prompt(args: argparse.Namespace) -> str:
    from ..reading import read_file, why
    from ..text_files import decode

    if args.prompt_file is None and args.prompt != "-":
        return args.prompt
    try:
        if args.prompt_file is None and sys.stdin is None:
            raise ValueError("it is closed")
        if args.prompt_file is not None:
            content = read_file(args.prompt_file, MOST_BYTES)
        elif len(content := sys.stdin.buffer.read(MOST_BYTES + 1)) > MOST_BYTES:
            raise ValueError(f"it is larger than {MOST_BYTES:,} bytes")
        return re.sub(r"\r?\n\Z", "", decode(content))
    except (OSError, ValueError) as error:
        of = args.prompt_file or "standard input"
        raise OptionError(f"the prompt of {of} cannot be read: {why(error)}") from None


def _grammar(file: str | None) -> str | None:
    """Of a file with a JSON schema."""
    from ..generation.grammar import json_schema
    from ..reading import read_file, why
    from ..text_files import decode

    if file is None:
        return None
    try:
        schema = json.loads(decode(read_file(file, MOST_BYTES)))
    except (OSError, ValueError, RecursionError) as error:
        raise OptionError(f"the JSON schema of {file} cannot be read: {why(error)}") from None
    return json_schema(schema)


def _check_options_for_many(args: argparse.Namespace) -> None:
    if args.output is None:
        raise OptionError("--input needs --output, the file that the answers go to")
    if given := [name for name in ("json", "lookup", "system") if getattr(args, name)]:
        raise OptionError(f"--{given[0]} is for one prompt: leave it out with --input")
    if args.json_schema is not None:
        raise OptionError('--json-schema is for one prompt: with --input each line may have its "json_schema"')
    if args.actors is not None and args.ray is None:
        raise OptionError("--actors are Ray's: give --ray too")
    if args.ray is not None and (args.mesh or args.rules or args.coordinator):
        raise OptionError(
            "--ray has a whole model on one device of each actor: leave out --mesh, --rules, --coordinator"
        )


def _generate_many(
    args: argparse.Namespace, checkpoint: "Checkpoint", tokenizer: "Tokenizer", load: "Callable[[], SmolLM3]"
) -> int:
    from ..chat.template import encode_for_answer
    from ..generation.jsonl import Batch

    params = sampling_params(args, checkpoint)
    # A folder under all of its names; a hub id stays one.
    settings = {"model": str(Path(args.model).resolve()) if Path(args.model).exists() else args.model}
    settings |= {name: getattr(args, name) for name in ("dtype", "weights", "cache", "yarn")}
    settings |= {name: value for name in ("mesh", "rules") if (value := getattr(args, name)) is not None}
    options = {"chat": args.chat, "thinking": not args.no_think, "fit": args.max_new_tokens is None}
    options["encode_messages"] = encode_for_answer
    with Batch(args.input, args.output, params, settings=settings, **options) as batch:
        if batch.left and args.ray is not None:
            from ..on_ray import run_on_ray

            shape = batch.shape(checkpoint.config, checkpoint.generation_config, tokenizer, args.slots, args.context)
            loading = functools.partial(_load_there, _model_options(args), os.getcwd())
            run_on_ray(batch, args.ray, loading, shape, actors=args.actors, cache_dtype=args.cache)
        elif batch.left:
            batch.run(load(), tokenizer, slots=args.slots, context=args.context, cache_dtype=args.cache)
    speed = f"; {batch.stats.line()}" if batch.stats.tokens else ""
    failed = f", {batch.failed} of them errors" if batch.failed else ""
    if not args.quiet or batch.failed:
        print(f"smollm3: {batch.done} lines in {plain(args.output)}{failed}{speed}", file=sys.stderr)
    if args.stats:
        print(f"smollm3: {batch.stats.listed()}", file=sys.stderr)
    return SOME_FAILED if batch.failed else 0


def _model_options(args: argparse.Namespace) -> argparse.Namespace:
    """Those of `add_model`, which a process on another machine can have."""
    names = ("model", "adapter", "dtype", "weights", "cache", "yarn", "mesh", "rules")
    return argparse.Namespace(**{name: getattr(args, name) for name in names})


def _load_there(args: argparse.Namespace, folder: str) -> "SmolLM3":
    """The model, with its tokenizer, on a machine where the same paths, from this folder, name the same files."""
    from ..tokenizer import carry_tokenizer

    with contextlib.chdir(folder) if os.path.isdir(folder) else contextlib.nullcontext():
        checkpoint, tokenizer = open_model(args)
        model = load_model(args, checkpoint)
    carry_tokenizer(model, lambda: tokenizer)
    return model
