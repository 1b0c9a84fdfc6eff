"""`smollm3 merge`."""

import argparse
from typing import TYPE_CHECKING

from ..config import DTYPES
from .shared import adapters_of, add_adapter, dtype, folder, say

if TYPE_CHECKING:
    from ..weights.card import Origin
    from ..weights.load import Checkpoint

METHODS = ("linear", "slerp", "ties", "dare")


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "models",
        nargs="*",
        metavar="MODEL=WEIGHT",
        help="what to merge (linear and ties divide the weights by their sum); of a run RUN@STEP, or RUN, its newest",
    )
    parser.add_argument("--config", metavar="FILE.yml", help="the merge in mergekit's words, or smollm3-merge")
    parser.add_argument("--out", required=True, metavar="DIR", help="the folder to write")
    add_adapter(parser)
    own = "default: linear; slerp goes from the first model to the second, by the second's share of the weights"
    parser.add_argument("--method", choices=METHODS, default=None, help=own)
    parser.add_argument("--base", metavar="MODEL", help="of ties and dare: what the models were trained from")
    parser.add_argument(
        "--density", type=float, metavar="SHARE", help="of ties and dare: of each difference, what stays"
    )
    parser.add_argument("--dtype", type=dtype, choices=DTYPES, help="of what is written; default: the base's own")
    parser.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="default: 5GB")
    parser.add_argument("--force", action="store_true", help="DIR may be there: replace the model in it")


def run(args: argparse.Namespace) -> int:
    from ..errors import OptionError
    from ..train.settings_file import RECIPES
    from ..weights import merge
    from ..weights.merge_file import read_merge

    if args.adapter:
        return _fold(args)
    if args.config is None:
        asked = _of_words(args)
    else:
        if args.models or args.method or args.base or args.density is not None or args.dtype:
            raise OptionError("--config says what to merge and how: give it and --out alone")
        shipped = RECIPES / f"{args.config}.yml"
        asked = read_merge(shipped if shipped.is_file() else args.config)
    merge.merge(asked, args.out, args.max_shard_size, args.force, _open)
    say(args.out)
    return 0


def _open(name: str) -> "tuple[Checkpoint, Origin]":
    """A checkpoint of a run, or any other model."""
    from ..train.run.folder import named_run
    from ..weights.merge import open_model

    found = named_run(name)
    if found is None:
        return open_model(name)
    from ..train.run.saved_model import open_saved  # with Orbax

    return open_saved(*found)


def _fold(args: argparse.Namespace) -> int:
    """A model with its adapters folded in: in the model's own dtype, unless another is asked for."""
    from ..errors import OptionError
    from ..weights.save import check_target, convert

    if len(args.models) != 1 or args.config or args.method or args.base or args.density is not None:
        raise OptionError("--adapter is folded into one model: smollm3 merge MODEL --adapter DIR --out OUT")
    check_target(args.out, args.force)
    adapters = adapters_of(args)
    options = {"dtype": args.dtype, "max_shard_size": args.max_shard_size, "force": args.force}
    convert(folder(args.models[0]), args.out, **options, adapters=adapters)
    say(args.out)
    return 0


def _of_words(args: argparse.Namespace):
    """The merge that the command's words describe."""
    from ..errors import OptionError
    from ..weights.merge_file import ALIASES, Merge, Part

    if not args.models:
        raise OptionError("name the models and their weights, as in A=0.9 B=0.1, or a file, --config FILE.yml")
    method = args.method or "linear"
    if args.density is not None and method not in ("ties", "dare"):
        raise OptionError(f"--density is of ties and dare; {method} has none")
    if args.density is None and method == "dare":
        raise OptionError("dare drops a part of each difference: say what share stays, as in --density 0.5")
    density = 1.0 if args.density is None else args.density
    parts = []
    for word in args.models:
        model, equals, text = word.rpartition("=")
        try:
            parts.append(Part(model, float(text), density))
        except ValueError:
            equals = ""
        if not equals or not model:
            raise OptionError(f"{word}: write MODEL=WEIGHT, as in {model or word}=0.5")
    base, t = args.base, None
    if method == "slerp":
        total = sum(part.weight for part in parts)
        if len(parts) != 2 or base not in (None, parts[0].model) or not total:
            raise OptionError("slerp goes from the first of two models to the second: A=0.9 B=0.1, without --base")
        base, t = parts[0].model, parts[1].weight / total
    return Merge(ALIASES.get(method, method), tuple(parts), base, t, dtype=args.dtype)
