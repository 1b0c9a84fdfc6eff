"""`smollm3 plan`."""

import argparse
import functools
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from ..config import RELEASE, SMOLLM3_3B, WEIGHT_SCHEMES, ModelConfig
from ..errors import OptionError
from .serve import CONTEXT, SLOTS
from .shared import add_model_name, count, dtype, folder, show


def add(parser: argparse.ArgumentParser) -> None:
    plans = parser.add_subparsers(required=True, metavar="PLAN", prog="smollm3 plan")
    plan = functools.partial(_add_plan, plans)
    train = plan("train", _plan_train, "memory, collectives and modelled time of a training step", "fsdp")
    train.add_argument(
        "--slices", type=count, default=1, metavar="N", help="how many slices of this topology (default: 1)"
    )
    train.add_argument("--batch", type=count, default=16, metavar="ROWS", help="over all devices (default: 16)")
    train.add_argument("--length", type=count, default=4096, metavar="N", help="tokens of a row (default: 4096)")
    remat_help = "what the backward pass computes again (default: as little as fits)"
    train.add_argument("--remat", metavar="POLICY", help=remat_help)
    train.add_argument("--micro-batches", type=count, default=1, metavar="N", help="default: 1")
    words_help = "as of `smollm3 train`: objective.kind=sft, lora.rank=16, lora.base=int8 and the like"
    train.add_argument("settings", nargs="*", metavar="section.key=value", help=words_help)

    decode = plan("decode", _plan_decode, "memory and modelled time of decoding and prefill", "serve_tp")
    decode.add_argument("--batch", type=count, default=64, metavar="SLOTS", help="over all devices (default: 64)")
    decode.add_argument("--context", type=count, default=8192, metavar="N", help="tokens of a slot (default: 8192)")
    _add_stored(decode)

    serve = plan(
        "serve", _plan_serve, "what a server's cache holds, its modelled speed and its largest context", "serve_tp"
    )
    add_serving(serve)
    serve.add_argument("--adapters", type=count, metavar="N", help="adapters beside the weights (default: none)")
    rank_help = "of the largest of them; all are on all projections (default: 16)"
    serve.add_argument("--adapter-rank", type=count, metavar="R", help=rank_help)

    prefill = plan(
        "prefill", _plan_prefill, "memory and modelled time of a long prompt, split over devices", "serve_cp"
    )
    length_help = "tokens of the prompt (default: 65536); for more than the model's context YaRN stretches it"
    prefill.add_argument("--length", type=count, default=65536, metavar="N", help=length_help)
    _add_stored(prefill)

    memory = plan("memory", _plan_memory, "weights by format and cache by context, exact to the byte")
    memory.add_argument("--batch", type=count, default=1, metavar="ROWS", help="sequences in the cache (default: 1)")
    memory.add_argument("--out", type=Path, metavar="FILE.png", help="draw it (needs matplotlib)")

    scale = plan("scale", _plan_scale, "a training step on more and more devices (v5e), and SmolLM3's own run")
    scale.add_argument("--devices", default="16,64,256", metavar="N,N,...", help="default: 16,64,256")
    scale.add_argument("--length", type=count, default=4096, metavar="N", help="tokens of a row (default: 4096)")


def add_serving(parser: argparse.ArgumentParser) -> None:
    """The shape of a server, as of `smollm3 serve`; see `serving_options`."""
    parser.add_argument("--slots", type=count, default=SLOTS, metavar="N", help=f"answers side by side ({SLOTS})")
    context_help = f"most tokens of a prompt and its answer (default: the model's, at most {CONTEXT:,})"
    parser.add_argument("--context", type=count, metavar="N", help=context_help)
    pool_help = "tokens that the answers share (default: slots times context, where slots lie on one device)"
    parser.add_argument("--cache-tokens", type=count, metavar="N", help=pool_help)
    _add_stored(parser)


def _add_plan(
    plans: "argparse._SubParsersAction[argparse.ArgumentParser]",
    name: str,
    run: Callable[[argparse.Namespace], int],
    help: str,
    rules: str | None = None,
) -> argparse.ArgumentParser:
    """rules: of a plan that compiles, its default strategy."""
    from sharding.strategies import AXES, STRATEGIES

    usage = f"smollm3 plan {name} [MODEL] [OPTION ...]"
    sub = plans.add_parser(name, help=help, description=help, usage=usage)
    sub.set_defaults(plan=run)
    model_help = f"a model, whose config.json is read; default: the shape of {RELEASE}"
    add_model_name(sub, help=model_help, needed=False)
    sub.add_argument("--json", action="store_true")
    if rules is not None:
        sub.add_argument(
            "--topology", default="v5e:4x4", metavar="CHIP:SHAPE", help="such as v5e:4x4 (the default) or h100:8"
        )
        sub.add_argument("--mesh", metavar="AXIS=N,...", help=f"of {', '.join(AXES)}; -1 fills; default: by rules")
        sub.add_argument("--rules", default=rules, choices=STRATEGIES, help=f"default: {rules}")
        sub.add_argument("--dump-hlo", type=Path, metavar="FILE", help="write the compiled program")
    return sub


def _add_stored(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--weights", choices=WEIGHT_SCHEMES, help="default: bfloat16")
    sub.add_argument("--cache", type=dtype, choices=("bfloat16", "int8"), default="bfloat16")


def run(args: argparse.Namespace) -> int:
    """Runs one of the plans. They need no device: an attached accelerator stays free, and a plug-in that is installed
    to compile is not asked for one."""
    import jax

    jax.config.update("jax_platforms", "cpu")
    return stopped_by_ctrl_c(lambda: args.plan(args))


def stopped_by_ctrl_c(work: Callable[[], int]) -> int:
    """What `work` returns, in a thread of its own: compilers do not come back to Python to hear of a Ctrl-C."""
    result: Future[int] = Future()

    def run() -> None:
        try:
            result.set_result(work())
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    try:
        return result.result()
    except KeyboardInterrupt:
        if sys.stderr.isatty():
            print("\r\x1b[2K\x1b[?25h", end="", file=sys.stderr)  # the spinner's line; the cursor that it hid
        print("smollm3: interrupted", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(130)


def _plan_config(args: argparse.Namespace) -> ModelConfig:
    from ..weights.load import text_folder

    return ModelConfig.from_hf(text_folder(folder(args.model)) if args.model is not None else SMOLLM3_3B)


def _plan_train(args: argparse.Namespace) -> int:
    from sharding.mesh import parse_axes

    from ..plan.train import plan_train
    from ..train.settings_file import read_words

    settings = read_words(args.settings)
    axes = parse_axes(args.mesh) if args.mesh else None
    options = {"axes": axes, "slices": args.slices, "remat": args.remat, "micro_batches": args.micro_batches}
    report = plan_train(
        *(_plan_config(args), args.topology, args.rules, args.batch, args.length),
        **options,
        settings=settings,
        dump=args.dump_hlo,
    )
    return _show_plan(args, report)


def _plan_decode(args: argparse.Namespace) -> int:
    from sharding.mesh import parse_axes

    from ..plan.decode import plan_decode

    options = {"axes": parse_axes(args.mesh) if args.mesh else None, "weights": args.weights, "cache": args.cache}
    report = plan_decode(
        _plan_config(args), args.topology, args.rules, args.batch, args.context, **options, dump=args.dump_hlo
    )
    return _show_plan(args, report)


def _plan_serve(args: argparse.Namespace) -> int:
    from ..plan.serve import plan_serve
    from ..plan.tables import serve_tables

    if args.adapter_rank and not args.adapters:
        raise OptionError(f"--adapter-rank is {args.adapter_rank}, of no adapters; say how many: --adapters N")
    adapters = (args.adapters, args.adapter_rank or 16) if args.adapters else None
    config = _plan_config(args)
    options = serving_options(args, config)
    report = plan_serve(config, args.topology, **options, adapters=adapters, dump=args.dump_hlo)
    show(args, report, serve_tables)
    return 0


def serving_options(args: argparse.Namespace, config: ModelConfig) -> dict[str, Any]:
    """What `plan_serve` takes, of `add_serving` and --mesh."""
    from sharding.mesh import parse_axes

    return {
        "rules": args.rules,
        "slots": args.slots,
        "context": args.context or min(config.max_position_embeddings, CONTEXT),
        "axes": parse_axes(args.mesh) if args.mesh else None,
        "weights": args.weights,
        "cache": args.cache,
        "cache_tokens": args.cache_tokens,
    }


def _plan_prefill(args: argparse.Namespace) -> int:
    from sharding.mesh import parse_axes

    from ..plan.prefill import plan_prefill
    from ..plan.tables import prefill_tables

    options = {"axes": parse_axes(args.mesh) if args.mesh else None, "weights": args.weights, "cache": args.cache}
    report = plan_prefill(_plan_config(args), args.topology, args.rules, args.length, **options, dump=args.dump_hlo)
    show(args, report, prefill_tables)
    return 0


def _show_plan(args: argparse.Namespace, report: dict[str, Any]) -> int:
    from ..plan.tables import tables

    show(args, report, tables)
    return 0


def _plan_memory(args: argparse.Namespace) -> int:
    from ..plan.memory import plan_memory
    from ..plan.tables import draw_memory, memory_tables

    report = plan_memory(_plan_config(args), args.batch)
    if args.out:
        draw_memory(report, args.out)
    show(args, report, memory_tables)
    return 0


def _plan_scale(args: argparse.Namespace) -> int:
    from ..plan.scale import plan_scale
    from ..plan.tables import scale_tables

    try:
        devices = [int(part) for part in args.devices.split(",")]
    except ValueError:
        raise OptionError(f"--devices is {args.devices!r}; give numbers with commas between them") from None
    report = plan_scale(_plan_config(args), devices, args.length)
    show(args, report, scale_tables)
    return 0
