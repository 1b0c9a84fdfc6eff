"""Plans as people read them: rich tables, and a picture of memory."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.table import Table

from sharding.hardware import GIB

from .errors import OptionError, SupportError
from .files import write_output
from .support import how_to_install


def tables(report: dict[str, Any]) -> Iterator[Any]:
    """What `plan train` and `plan decode` print of their reports."""
    mesh = ", ".join(f"{axis} {length}" for axis, length in report["mesh"].items() if length > 1) or "one device"
    slices = f"{report['slices']} slices of " if report.get("slices", 1) > 1 else ""
    rows = "rows of" if "length" in report else "slots of"
    yield (
        f"{slices}{report['topology']}: {report['devices']} devices, rules {report['rules']} ({mesh}), "
        f"{report['batch']} {rows} {report.get('length', report.get('context')):,} tokens"
    )
    for refusal in report.get("refused", ()):
        what = f"remat {refusal['remat']}, micro-batches {refusal['micro_batches']}"
        yield f"{what}: {refusal['needed'] / GIB:.2f} GiB of {refusal['limit'] / GIB:.2f}, refused"
    if not report["fits"]:
        yield f"does not fit; try {report['change']}"
        return
    if "remat" in report:
        yield f"remat {report['remat']}, micro-batches {report['micro_batches']}"
    memory = Table("memory of a device", "GiB")
    for name, size in report["hbm"].items():
        memory.add_row(name, f"{size / GIB:.2f}")
    yield memory
    if "largest_batch" in report:
        yield f"largest batch that fits: {report['largest_batch']}"
    yield _program(report["program"], "token" if "floor" in report else "step")
    yield _collectives(report["collectives"])
    yield _times(report["modelled"])
    if "floor" in report:
        floor = report["floor"]
        yield f"floor: {floor['ms_per_token']:.2f} ms a token, {floor['tokens_per_second']:,.0f} tokens/s"
    if "prefill" in report:
        yield f"prefill of {report['prefill']['tokens']:,} tokens"
        yield _times(report["prefill"]["modelled"])
    yield "assumed: " + "; ".join(report["assumptions"])


def _program(program: dict[str, Any], what: str) -> Table:
    table = Table(f"a device, a {what}", "")
    table.add_row("operations of products and kernels", f"{program['flops'] / 1e12:,.3f} T")
    table.add_row("bytes moved", f"{program['bytes_moved'] / 1e9:,.2f} GB")
    table.add_row("products in the program", str(program["products"]))
    table.add_row("of them with float32 operands", str(program["float32_products"]))
    if "launches" in program:
        table.add_row("launches, in CUDA graphs or not", f"{program['launches']:,}")
    return table


def _collectives(rows: list[dict[str, Any]]) -> Table:
    table = Table("collective", "how many", "MB that a device sends", "")
    for row in rows:
        where = "hidden" if row["hidden"] else "exposed"
        across = f", {row['bytes_across_slices'] / 1e6:,.1f} MB across slices" if row["bytes_across_slices"] else ""
        table.add_row(row["kind"], str(row["count"]), f"{row['bytes'] / 1e6:,.1f}", where + across)
    return table


def _times(modelled: dict[str, Any]) -> Table:
    table = Table("modelled", "")
    for name, value in modelled.items():
        if name.endswith("_seconds"):
            table.add_row(name.removesuffix("_seconds").replace("_", " "), f"{1e3 * value:,.2f} ms")
        elif name == "mfu":
            table.add_row("MFU (6N)", f"{100 * value:.1f} %")
        else:
            table.add_row(name.replace("_", " "), value if isinstance(value, str) else f"{value:,.2f}")
    return table


def memory_table(report: dict[str, Any]) -> Table:
    """GiB of weights and cache together, a row for each format of the weights, with bytes of both alone."""
    contexts = list(report["cache"]["bfloat16"])
    title = f"GiB, {report['parameters']:,} parameters, {report['batch']} in the cache"
    table = Table("weights", "cache", "bytes of weights", *(f"{int(n) // 1024}k" for n in contexts), title=title)
    for weights, size in report["weights"].items():
        for cache, sizes in report["cache"].items():
            table.add_row(weights, cache, f"{size:,}", *(f"{(size + sizes[n]) / GIB:.2f}" for n in contexts))
    table.add_section()
    for cache, sizes in report["cache"].items():
        table.add_row("", cache, "bytes of cache", *(f"{sizes[n]:,}" for n in contexts))
    return table


def draw_memory(report: dict[str, Any], file: Path) -> None:
    """The same as bars: weights, and the cache on top of them."""
    try:
        from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise SupportError(f"drawing needs matplotlib: {how_to_install('bench')}") from None
    contexts = list(report["cache"]["bfloat16"])
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.add_subplot()
    width = 0.8 / len(report["weights"])
    for i, (weights, size) in enumerate(report["weights"].items()):
        at = [place + i * width - 0.4 + width / 2 for place in range(len(contexts))]
        bars = axes.bar(at, size / GIB, width * 0.9, label=f"{weights} weights")
        tops = [report["cache"]["bfloat16"][n] / GIB for n in contexts]
        axes.bar(at, tops, width * 0.9, bottom=size / GIB, color=bars[0].get_facecolor(), alpha=0.4)
    axes.set_xticks(range(len(contexts)), [f"{int(n) // 1024}k" for n in contexts])
    axes.set_xlabel("context (tokens)")
    axes.set_ylabel("GiB")
    axes.set_title(f"Memory: weights, and a bfloat16 cache of {report['batch']} (pale)")
    axes.legend()
    axes.grid(axis="y", alpha=0.3)
    drawn = io.BytesIO()
    try:
        figure.savefig(drawn, dpi=120, format=file.suffix[1:] or "png")
    except ValueError as error:  # matplotlib names what it can write
        raise OptionError(f"--out {file}: {error}") from None
    write_output(file, drawn.getvalue())


def scale_tables(report: dict[str, Any]) -> Iterator[Any]:
    """How a step grows with the devices; SmolLM3's own run below."""
    table = Table("devices", "topology", "step, ms (modelled)", "MFU", "GiB", "MB sent", "of it exposed")
    for step in report["steps"]:
        if not step["fits"]:
            table.add_row(str(step["devices"]), step["topology"], "does not fit", "", "", "", "")
            continue
        sent = sum(row["bytes"] for row in step["collectives"])
        exposed = sum(row["bytes"] for row in step["collectives"] if not row["hidden"])
        table.add_row(
            str(step["devices"]),
            f"{step['slices']} x {step['topology']}" if step["slices"] > 1 else step["topology"],
            f"{1e3 * step['modelled']['step_seconds']:,.0f}",
            f"{100 * step['modelled']['mfu']:.1f} %",
            f"{step['hbm']['total'] / GIB:.2f}",
            f"{sent / 1e6:,.0f}",
            f"{exposed / 1e6:,.0f}",
        )
    yield table
    run = report["h100"]
    yield (
        f"{run['gpus']} H100, tensor parallel {run['tensor']} (by arithmetic, everything exposed): "
        f"{run['modelled_tokens_per_second_per_gpu']:,.0f} tokens/s a GPU; SmolLM3's own run reached "
        f"{run['tokens_per_second_per_gpu']:,}, {100 * run['share_of_model_reached']:.0f} % of it"
    )
