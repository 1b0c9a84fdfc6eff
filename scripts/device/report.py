"""The table at the end of a run: everything that was measured, in the width of a terminal."""

from collections.abc import Sequence
from typing import Any

from .aims import AIMS, FLOOR, MFU

NAME_WIDTH, WIDTHS = 42, (7, 7, 7, 9, 9, 9, 10)


def table(lines: Sequence[dict[str, Any]]) -> str:
    """What the lines of results.jsonl say, for a person to read."""
    sections = [_head(lines), _speeds(lines), _parity(lines), _kernels(lines), _troubles(lines)]
    if any(line.get("tiny") for line in lines):
        sections.insert(0, ["TINY: a small model, to try the run itself; these are no results."])
    return "\n\n".join("\n".join(section) for section in sections if section) + "\n"


def of_kind(lines: Sequence[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    """The last line of each case (and engine) of a kind, in the order of the first."""
    found = {(line["case"], line.get("engine")): line for line in lines if line["kind"] == kind}
    return list(found.values())


def share_of_floor(speed: dict[str, Any]) -> float | None:
    """Floor over time: 1 is as fast as the measured ceilings allow."""
    return speed["floor_ms"] / speed["ms"] if speed.get("floor_ms") else None


def modelled(lines: Sequence[dict[str, Any]], case: str) -> dict[str, Any] | None:
    return next((line for line in of_kind(lines, "modelled") if line["case"] == case), None)


def peers(lines: Sequence[dict[str, Any]], case: str) -> list[dict[str, Any]]:
    return [line for line in of_kind(lines, "speed") if line["case"] == case and line["engine"] != "ours"]


def reached(lines: Sequence[dict[str, Any]], speed: dict[str, Any]) -> tuple[float, float] | None:
    """How much of what a row is to reach, and its aim; None without either."""
    least, of = AIMS.get((speed["case"], speed["engine"]), (0.0, None))
    if of == FLOOR:
        found = share_of_floor(speed)
    elif of == MFU:
        found = speed.get("mfu")
    else:
        rates: dict[Any, float] = {
            (line["case"], line["engine"]): line["tokens_per_second"] for line in of_kind(lines, "speed")
        }
        ours, other = rates.get((speed["case"], "ours")), rates.get(of)
        found = None if ours is None or other is None else ours / other
    return None if found is None else (found, least)


def _head(lines: Sequence[dict[str, Any]]) -> list[str]:
    out = []
    for line in of_kind(lines, "machine"):
        packages = ", ".join(f"{name} {number}" for name, number in line["versions"].items())
        out += [f"{line['devices']} x {line['device']} ({line['platform']}), {line['host']}", packages]
        out += [f"as found: {line['gpus_as_found']}"] if line["gpus_as_found"] else []
        out += [f"XLA_FLAGS={line['xla_flags']}"] if line["xla_flags"] else []
    for line in of_kind(lines, "ceiling"):
        out.append(f"{line['case']}: {line['value']:.4g} {line['unit']}")
    return out


def _speeds(lines: Sequence[dict[str, Any]]) -> list[str]:
    """A row a case: ours, and each peer's below. An aim stands beside what it is of: met, or not."""
    heads = ("ms", "min", "max", "tokens/s", "of floor", "modelled", "aim")
    rows = []
    for case in dict.fromkeys(line["case"] for line in of_kind(lines, "speed")):
        engines = [line for line in of_kind(lines, "speed") if line["case"] == case]
        for line in sorted(engines, key=lambda line: line["engine"] != "ours"):
            ours = line["engine"] == "ours"
            model, share = modelled(lines, case) if ours else None, share_of_floor(line)
            values = [_number(line[key]) for key in ("ms", "ms_min", "ms_max", "tokens_per_second")]
            values += ["" if share is None else f"{share:.2f}", "" if model is None else _number(model["ms"])]
            aim = reached(lines, line)
            values.append("" if aim is None else f"{aim[0]:.2f}{'>=' if aim[0] >= aim[1] else '<'}{aim[1]:.2g}")
            rows.append(_row((case if ours else f"{case}, {line['engine']}") + note_of(line), values))
    return [_row("", heads), *rows] if rows else []


def _parity(lines: Sequence[dict[str, Any]]) -> list[str]:
    out = []
    for line in of_kind(lines, "parity"):
        verdict = "ok  " if line["passed"] else "FAIL"
        out.append(f"{verdict} {line['error']:8.2g} of {line['bound']:<6g} {line['case']}{note_of(line)}")
    return out


def _kernels(lines: Sequence[dict[str, Any]]) -> list[str]:
    out = []
    for line in of_kind(lines, "profile"):
        out.append(f"{line['case']}: {line['launches']:.0f} launches, {line['microseconds']:.0f} us; the dearest:")
        out += [f"{x['microseconds']:10.1f} us {x['launches']:7.1f} x {x['name'][:70]}" for x in line["kernels"]]
    return out


def _troubles(lines: Sequence[dict[str, Any]]) -> list[str]:
    done = {(line["part"], line["case"]) for line in lines if line["kind"] == "done"}
    out = [
        f"failed: {line['part']}: {line['case']}: {line['error'][:200]}"
        for line in of_kind(lines, "error")
        if (line["part"], line["case"]) not in done
    ]
    out += [f"skipped: {line['part']}: {line['reason']}" for line in of_kind(lines, "skipped")]
    parts = [line for line in lines if line["kind"] == "part"]
    out += [
        f"{line['part']}: {line['ended']} after {line['seconds']:.0f} s{note_of(line)}"
        for line in parts
        if line["ended"] != "exit code 0"
    ]
    return [*out, " ".join(f"{line['part']} {line['seconds']:.0f} s" for line in parts)] if parts else out


def note_of(line: dict[str, Any]) -> str:
    """What stands beside a case's name."""
    mfu = f", MFU {line['mfu']:.2f}" if line.get("mfu") else ""
    return mfu + (" [no CUDA graphs]" if line.get("cuda_graphs") is False else "")


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _row(name: str, values: Sequence[str]) -> str:
    cells = "".join(f"{value:>{width}}" for value, width in zip(values, WIDTHS, strict=True))
    return f"{name[:NAME_WIDTH]:{NAME_WIDTH}}{cells}".rstrip()
