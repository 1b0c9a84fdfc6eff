"""Plans as people read them: rich tables, and a picture of memory."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.table import Column, Table

from sharding.hardware import GIB

from ..errors import OptionError, SupportError
from ..files import write_output
from ..support import how_to_install


def three(value: float) -> str:
    """Three significant digits, as people write them: 597, 39.8, 110,000, 0.0398; the plan's --json has all."""
    if abs(value) < 1e-3:
        return "< 0.001" if value else "0"
    rounded = float(f"{value:.3g}")
    whole = len(str(int(abs(rounded))))
    return f"{rounded:,.{max(3 - whole, 0)}f}" if abs(rounded) >= 1 else f"{rounded:#.3g}"


def _ms(seconds: float) -> str:
    return f"{three(1e3 * seconds)} ms"


def _many(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def tables(report: dict[str, Any]) -> Iterator[RenderableType]:
    """What `plan train` and `plan decode` print of their reports."""
    slices = f"{report['slices']} slices of " if report.get("slices", 1) > 1 else ""
    row = "row" if "length" in report else "slot"
    yield (
        f"{slices}{_where(report)}, batch {report['batch']:,}: {_many(report['batch'], row)} of "
        f"{report.get('length', report.get('context')):,} tokens"
    )
    if "trained" in report and (report["objective"], report["trained"]) != ("pretrain", report["parameters"]):
        frozen = f", {report['parameters']:,} frozen" if report["trained"] < report["parameters"] else ""
        yield f"objective {report['objective']}: {report['trained']:,} parameters trained{frozen}"
    for refusal in report.get("refused", ()):
        what = f"remat {refusal['remat']}, micro-batches {refusal['micro_batches']}"
        yield f"{what}: {three(refusal['needed'] / GIB)} GiB of {three(refusal['limit'] / GIB)}, refused"
    if not report["fits"]:
        yield f"does not fit; try {report['change']}"
        return
    if "remat" in report:
        yield f"remat {report['remat']}, micro-batches {report['micro_batches']}"
    yield _memory(report["hbm"])
    if "largest_batch" in report:
        yield f"largest batch that fits: {report['largest_batch']:,}"
    yield _program(report["program"], "token" if "floor" in report else "step")
    yield _collectives(report["collectives"])
    yield _times(report["modelled"])
    if "floor" in report:
        floor = report["floor"]
        yield f"floor: {three(floor['ms_per_token'])} ms a token, {three(floor['tokens_per_second'])} tokens/s"
    if "prefill" in report:
        yield f"prefill of {report['prefill']['tokens']:,} tokens"
        yield _times(report["prefill"]["modelled"])
    yield "assumed: " + "; ".join(report["assumptions"])


def _compiled(report: dict[str, Any], each: str) -> Iterator[RenderableType]:
    """What a compiled program, run once for `each`, does."""
    yield _program(report["program"], each)
    yield _collectives(report["collectives"])
    yield _times(report["modelled"])


def serve_tables(report: dict[str, Any]) -> Iterator[RenderableType]:
    """What `plan serve` prints of its report."""
    yield (
        f"{_where(report)}, {_many(report['slots'], 'slot')}, context {report['context']:,}, "
        f"weights {report['weights']}, cache {report['cache']}"
    )
    if "adapters" in report:
        yield f"{_many(report['adapters'], 'adapter')} of rank {report['adapter_rank']} on all projections"
    if not report["fits"]:
        yield f"does not fit; try {report['change']}"
    yield _memory(report["hbm"])
    tokens = Table("tokens of cache, on all devices", "", f"pages of {report['page']:,}")
    labels = {"fit": "fit beside the rest", "pool": "in the pool", "slots": "in slots", "kept": "kept of prompts"}
    for name, label in labels.items():
        if name in report["tokens"]:
            tokens.add_row(label, f"{report['tokens'][name]:,}", f"{report['tokens'][name] // report['page']:,}")
    yield tokens
    yield f"largest context that fits: {report['largest_context']:,}"
    if "gap" in report:
        yield from _compiled(report, "token")
        prefill, gap = report["prefill"], report["gap"]
        yield (
            f"a piece of {report['page']:,} tokens of a prompt: {_ms(prefill['first_seconds'])}, at the end of a full "
            f"slot {_ms(prefill['last_seconds'])}; {three(prefill['tokens_per_second'])} tokens/s"
        )
        yield (
            f"longest gap between tokens: {_ms(gap['seconds'])}, a piece of {_ms(gap['piece_seconds'])} and a call of "
            f"{_ms(gap['call_seconds'])}"
        )
    yield "assumed: " + "; ".join(report["assumptions"])


def prefill_tables(report: dict[str, Any]) -> Iterator[RenderableType]:
    """What `plan prefill` prints of its report."""
    stretched = "" if report["yarn"] is None else f", context stretched {three(report['yarn'])} times (YaRN)"
    yield f"{_where(report)}, weights {report['weights']}, cache {report['cache']}"
    yield (
        f"a prompt of {report['prompt']:,} tokens in {_many(report['pieces'], 'piece')} of at most "
        f"{report['piece']:,}{stretched}"
    )
    if not report["fits"]:
        yield f"does not fit; try {report['change']}"
    yield _memory(report["hbm"])
    if report["fits"]:
        yield from _compiled(report, "last piece")
        yield (
            f"time to the first token: {_ms(report['time_to_first_token_seconds'])}, the first piece "
            f"{_ms(report['first_piece_seconds'])}, the last {_ms(report['last_piece_seconds'])}; then "
            f"{three(report['ms_per_token_after'])} ms a token"
        )
    yield "assumed: " + "; ".join(report["assumptions"])


def _where(report: dict[str, Any]) -> str:
    mesh = ", ".join(f"{axis} {length}" for axis, length in report["mesh"].items() if length > 1) or "one device"
    return f"{report['topology']}: {_many(report['devices'], 'device')}, rules {report['rules']} ({mesh})"


def _memory(sizes: dict[str, int]) -> Table:
    memory = Table("memory of a device", "GiB")
    for name, size in sizes.items():
        memory.add_row(name, three(size / GIB))
    return memory


def _program(program: dict[str, Any], what: str) -> Table:
    table = Table(f"a device, a {what}", "")
    table.add_row("operations of products and kernels", f"{three(program['flops'] / 1e12)} T")
    table.add_row("bytes moved", f"{three(program['bytes_moved'] / 1e9)} GB")
    table.add_row("products in the program", f"{program['products']:,}")
    table.add_row("of them with float32 operands", f"{program['float32_products']:,}")
    if "launches" in program:
        table.add_row("launches, in CUDA graphs or not", f"{program['launches']:,}")
    return table


def _collectives(rows: list[dict[str, Any]]) -> RenderableType:
    if not rows:
        return "no collectives"
    across = any(row["bytes_across_slices"] for row in rows)
    table = Table("collectives of a device", "how many", "MB sent", "", *(["MB across slices"] if across else []))
    for row in rows:
        where = "hidden" if row["hidden"] else "exposed"
        more = [three(row["bytes_across_slices"] / 1e6)] if across else []
        table.add_row(row["kind"], f"{row['count']:,}", three(row["bytes"] / 1e6), where, *more)
    return table


def _times(modelled: dict[str, Any]) -> Table:
    table = Table("modelled", "")
    for name, value in modelled.items():
        if name.endswith("_seconds"):
            table.add_row(name.removesuffix("_seconds").replace("_", " "), _ms(value))
        elif name == "mfu":
            table.add_row("MFU (6N)", f"{three(100 * value)} %")
        else:
            table.add_row(name.replace("_", " "), value if isinstance(value, str) else three(value))
    return table


def memory_tables(report: dict[str, Any]) -> Iterator[RenderableType]:
    """Weights by format and the cache by context, to the byte; both together in GiB. Nothing is wider than 80."""
    contexts = list(report["cache"]["bfloat16"])
    yield f"{report['parameters']:,} parameters, batch {report['batch']:,}"
    weights = Table("weights", Column("bytes", justify="right"))
    for name, size in report["weights"].items():
        weights.add_row(name, f"{size:,}")
    yield weights
    cache = Table("context", *(Column(f"{name} cache, bytes", justify="right") for name in report["cache"]))
    for n in contexts:
        cache.add_row(_thousands(n), *(f"{sizes[n]:,}" for sizes in report["cache"].values()))
    yield cache
    both = Table("weights", "cache", *(Column(_thousands(n), justify="right") for n in contexts))
    for name, size in report["weights"].items():
        for dtype, sizes in report["cache"].items():
            both.add_row(name, dtype, *(three((size + sizes[n]) / GIB) for n in contexts))
    yield "weights and cache together, GiB:"
    yield both
    yield (
        f"Weights and cache alone, a cache of {_many(report['batch'], 'sequence')} of that many tokens: activations, "
        "the compiled programs and what the framework keeps for itself come on top. `smollm3 plan decode` has the "
        "compiler count them."
    )
    if any(int(n) > report["own_context"] for n in contexts):
        yield f"Beyond {report['own_context']:,} tokens the model wants its context stretched (--yarn)."


def _thousands(tokens: str) -> str:
    return f"{int(tokens) // 1024}k"


def draw_memory(report: dict[str, Any], file: Path) -> None:
    """Draws the report as bars: weights, and the cache on top of them."""
    try:
        from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise SupportError(f"drawing needs matplotlib: {how_to_install('bench')}") from None
    contexts = list(report["cache"]["bfloat16"])
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.add_subplot()
    width = 0.8 / len(report["weights"])
    for i, (weights, size) in enumerate(report["weights"].items()):
        at = [number + i * width - 0.4 + width / 2 for number in range(len(contexts))]
        bars = axes.bar(at, size / GIB, width * 0.9, label=f"{weights} weights")
        tops = [report["cache"]["bfloat16"][n] / GIB for n in contexts]
        axes.bar(at, tops, width * 0.9, bottom=size / GIB, color=bars[0].get_facecolor(), alpha=0.4)
    axes.set_xticks(range(len(contexts)), [f"{int(n) // 1024}k" for n in contexts])
    axes.set_xlabel("context (tokens)")
    axes.set_ylabel("GiB")
    axes.set_title(f"Memory: weights, and the bfloat16 cache of batch {report['batch']:,} (pale)")
    axes.legend()
    axes.grid(axis="y", alpha=0.3)
    drawn = io.BytesIO()
    try:
        figure.savefig(drawn, dpi=120, format=file.suffix[1:] or "png")
    except ValueError as error:  # matplotlib names what it can write
        raise OptionError(f"--out {file}: {error}") from None
    write_output(file, drawn.getvalue())


def scale_tables(report: dict[str, Any]) -> Iterator[RenderableType]:
    """How a step grows with the devices; SmolLM3's own run below."""
    table = Table("devices", "topology", "step ms", "MFU", "GiB", "MB sent", "exposed MB")
    for step in report["steps"]:
        if not step["fits"]:
            table.add_row(f"{step['devices']:,}", step["topology"], "too large", "", "", "", "")
            continue
        sent = sum(row["bytes"] for row in step["collectives"])
        exposed = sum(row["bytes"] for row in step["collectives"] if not row["hidden"])
        table.add_row(
            f"{step['devices']:,}",
            f"{step['slices']} x {step['topology']}" if step["slices"] > 1 else step["topology"],
            three(1e3 * step["modelled"]["step_seconds"]),
            f"{three(100 * step['modelled']['mfu'])} %",
            three(step["hbm"]["total"] / GIB),
            three(sent / 1e6),
            three(exposed / 1e6),
        )
    yield table
    yield "Times and MFU are modelled; GiB is a device's whole memory for the step, MB what a device sends in one."
    run = report["h100"]
    yield (
        f"{run['gpus']} H100, tensor parallel {run['tensor']} (by arithmetic, everything exposed): "
        f"{three(run['modelled_tokens_per_second_per_gpu'])} tokens/s a GPU; SmolLM3's own run reached "
        f"{run['tokens_per_second_per_gpu']:,}, {three(100 * run['share_of_model_reached'])} % of it"
    )
