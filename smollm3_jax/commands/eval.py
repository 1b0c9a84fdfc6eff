"""`smollm3 eval`."""

import argparse
import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import OptionError, SupportError
from .shared import add_model, console, count, folder, load_model, open_model, print_json, say

if TYPE_CHECKING:
    from ..evaluate.protocols import Recipe


def add(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    what = parser.add_argument_group(
        "what is asked", "Tasks are lm-evaluation-harness's (the extra eval), those of this package, and one's own."
    )
    what.add_argument("--tasks", metavar="T[,T]", help='names, groups, patterns ("mmlu_*") or YAML files')
    recipe_help = "how a released model was evaluated: smollm3-base, smollm3-instruct; options given beside it count"
    what.add_argument("--recipe", metavar="NAME", help=recipe_help)
    what.add_argument("--include-path", action="append", default=[], metavar="DIR", help="of YAML files of tasks")
    what.add_argument("--limit", type=count, metavar="N", help="the first N questions of each task")
    what.add_argument(
        "--num-fewshot", type=int, metavar="N", help="examples before a question; default: the task's own"
    )
    metadata_help = 'told to tasks that make up their data: {"max_seq_lengths": [4096]}'
    what.add_argument("--metadata", metavar="JSON", help=metadata_help)
    what.add_argument("--confirm-run-unsafe-code", action="store_true", help="tasks may run what the model writes")
    how = parser.add_argument_group("how")
    how.add_argument("--chat", "--apply-chat-template", action="store_true", help="questions go through the template")
    thinking = how.add_mutually_exclusive_group()
    think_help = "with --chat, which it implies: reason first; what is thought is not graded"
    thinking.add_argument("--think", action="store_true", help=think_help)
    thinking.add_argument("--no-think", action="store_true", help="with --chat, which it implies: answer at once")
    how.add_argument("--system", metavar="TEXT", help="a system message (--chat), or what prompts begin with")
    kwargs_help = "over the tasks' own generation_kwargs: do_sample=true,temperature=0.6,max_gen_toks=4096"
    how.add_argument("--gen-kwargs", metavar="K=V[,K=V]", help=kwargs_help)
    how.add_argument(
        "--max-length", type=count, metavar="N", help="most tokens of a text; default: the model's context"
    )
    how.add_argument("--slots", type=count, metavar="N", help="answers that are generated side by side (default: 16)")
    out = parser.add_argument_group("output")
    output_help = "gets results and answers as lm-eval writes them; a run that was stopped goes on there"
    out.add_argument("--output", metavar="DIR", help=output_help)
    out.add_argument("--compare", action="store_true", help="the model card's scores beside")
    out.add_argument("--json", action="store_true")


def run(args: argparse.Namespace) -> int:
    recipe = _recipe(args)
    chat = args.chat or args.think or args.no_think or recipe.chat
    if recipe.chat and not (args.think or args.no_think):
        raise OptionError(f"the recipe {args.recipe} was run with thinking and without: give --think or --no-think")
    if not args.verbose:  # it tells what a task's file leaves out, and how its data could be had
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
    os.environ.setdefault("TQDM_DISABLE", "1")  # others' bars, beside ours; it is read when it is imported
    try:
        from ..evaluate import harness, suite
    except ModuleNotFoundError as error:
        from ..support import how_to_install

        raise SupportError(f"evaluation needs lm-eval ({error.name} is missing): {how_to_install('eval')}") from None
    from ..evaluate.answers import Answers

    checkpoint, tokenizer = open_model(args)
    if chat:
        tokenizer.template()
    about = _about(args)
    # Before the model is loaded: a mistake in a name shows at once.
    context = checkpoint.config.max_position_embeddings
    told = {"tokenizer": str(folder(args.model)), "chat": chat, "max_length": min(args.max_length or context, context)}
    tasks = suite.load_tasks(recipe.tasks, [*args.include_path], told | _metadata(args))
    output = None if args.output is None else Path(args.output)
    with Answers(output, about | {"files": _files(args)}) as answers:
        options = {"chat": chat, "thinking": True if args.think else False if args.no_think else None}
        options |= {"max_length": args.max_length, "slots": args.slots or harness.SLOTS, "cache_dtype": args.cache}
        lm = harness.EngineLM(load_model(args, checkpoint), tokenizer, answers, **options)
        results = suite.evaluate(
            lm,
            tasks,
            limit=args.limit,
            shots=recipe.shots,
            generation=recipe.generation,
            system=args.system,
            chat=chat,
            unsafe=args.confirm_run_unsafe_code,
            about=about | {"chat_date": answers.date.isoformat() if chat else None},
            output=output,
        )
    if args.json:
        print_json(results)
        return 0
    mode = ("think" if not args.no_think else "no_think") if chat else "base"
    console().print(_table(suite.rows(results), mode if args.compare else None, suite.said_of_cuts(results)))
    if args.compare:
        say("published: the model card's scores, by lighteval and vLLM, whose prompts differ from these")
    if output is not None:
        say(f"results and answers in {output}")
    return 0


def _recipe(args: argparse.Namespace) -> "Recipe":
    """What --recipe names, with the options given over it; without it, of these alone."""
    import dataclasses

    from ..errors import unknown_name
    from ..evaluate.protocols import RECIPES, Recipe

    if args.recipe is not None and args.recipe not in RECIPES:
        raise unknown_name("--recipe", args.recipe, RECIPES, {}, "name")
    tasks = None if args.tasks is None else tuple(filter(None, (name.strip() for name in args.tasks.split(","))))
    if not tasks and args.recipe is None:
        raise OptionError(f"give --tasks T[,T], or --recipe, one of {', '.join(RECIPES)}")
    found = RECIPES[args.recipe] if args.recipe else Recipe(())
    if args.num_fewshot is not None and args.num_fewshot < 0:
        raise OptionError(f"--num-fewshot is {args.num_fewshot}; it must be 0 or more")
    given: dict[str, Any] = {"shots": found.shots if args.num_fewshot is None else args.num_fewshot}
    given["generation"] = {**found.generation, **_gen_kwargs(args.gen_kwargs)}
    return dataclasses.replace(found, tasks=tasks or found.tasks, **given)


def _gen_kwargs(text: str | None) -> dict[str, Any]:
    """K=V[,K=V], values as in JSON, or else texts, True and False as Python writes them too."""
    import json

    found: dict[str, Any] = {}
    for pair in (text or "").split(",") if text else ():
        name, equals, value = pair.partition("=")
        if not equals or not name.strip():
            raise OptionError(f"--gen-kwargs: {pair!r} is not K=V, such as temperature=0.6")
        try:
            found[name.strip()] = json.loads(value.lower() if value in ("True", "False") else value)
        except ValueError:
            found[name.strip()] = value
    return found


def _metadata(args: argparse.Namespace) -> dict[str, Any]:
    import json

    try:
        found = json.loads(args.metadata or "{}")
        if not isinstance(found, dict):
            raise ValueError("it is no object")
    except ValueError as error:
        raise OptionError(f"--metadata is {args.metadata!r:.80}, no JSON object: {error}") from None
    return found


def _about(args: argparse.Namespace) -> dict[str, Any]:
    """The model and how it is held, for the results, and for what an answer depends on."""
    from .. import __version__

    about: dict[str, Any] = {"pretrained": args.model}  # lm-eval's word, which names the folder of results
    about |= {"adapter": args.adapter or None, "dtype": args.dtype, "weights": args.weights}
    about |= {name: getattr(args, name) for name in ("cache", "yarn", "mesh", "rules", "max_length")}
    about["thinking"] = True if args.think else False if args.no_think else None
    return {"smollm3_jax": __version__, **{name: value for name, value in about.items() if value is not None}}


def _files(args: argparse.Namespace) -> list[tuple[str, int, int]]:
    """(name, bytes, time) of all files of the model and its adapters: a model that is written anew is another one."""
    from ..weights.peft import parse_adapter

    found = []
    for path in [folder(args.model), *(Path(parse_adapter(one)[1]) for one in args.adapter)]:
        for file in sorted(path.iterdir()) if path.is_dir() else [path]:
            if file.is_file():
                about = file.stat()
                found.append((file.name, about.st_size, about.st_mtime_ns))
    return found


def _table(rows: "Iterable[tuple[str, str, str, float | None, float | None]]", mode: str | None, note: str = "") -> Any:
    from rich.table import Table

    from ..evaluate.protocols import published

    table = Table("task", "shots", "metric", "value", "±", *(["published, %"] if mode else []), caption=note or None)
    for task, shots, metric, value, error in rows:
        shown = ["-" if number is None else f"{number:.4f}" for number in (value, error)]
        table.add_row(
            task, shots, metric.removesuffix(",none"), *shown, *([published(task, metric, mode)] if mode else [])
        )
    return table
