"""The lines of metrics.jsonl: written as JSON, which knows no NaN, and read again."""

import json
import math
from collections.abc import Mapping
from typing import Any

from etils import epath


def as_text(line: Mapping[str, Any]) -> str:
    return json.dumps(plain(line)) + "\n"


def plain(x: Any) -> Any:
    """The same for JSON, which knows no NaN: numbers that are not finite are None."""
    if isinstance(x, Mapping):
        return {key: plain(value) for key, value in x.items()}
    return None if isinstance(x, float) and not math.isfinite(x) else x


def read_lines(path: epath.Path) -> list[dict[str, Any]]:
    """Of a run's metrics.jsonl, null read as NaN; one that a kill cut short, or that no run wrote, is passed over."""
    return known_lines(path)[0]


def known_lines(path: epath.Path) -> tuple[list[dict[str, Any]], int]:
    """(the lines that a run wrote, how many others there are but for a torn last one)."""
    if not path.exists():
        return [], 0
    *whole, torn = path.read_bytes().split(b"\n")
    lines = [_line(text) for text in (*whole, torn)]
    others = sum(line is None and bool(text.strip()) for line, text in zip(lines, whole, strict=False))
    return [line for line in lines if line is not None], others


def _line(text: bytes) -> dict[str, Any] | None:
    try:
        line = _with_nan(json.loads(text.decode()))
    except (ValueError, RecursionError):
        return None
    if not isinstance(line, dict) or type(line.get("step")) is not int or not 0 <= line["step"] < 2**53:
        return None
    if "held_out" in line:
        found = line["held_out"]
        sound = isinstance(found, dict) and all(
            isinstance(x, dict)
            and ("nats_per_token" in x or "loss" in x)
            and "tokens" in x
            and all(map(_is_number, x.values()))
            for x in found.values()
        )
        return line if sound else None
    sound = all(_is_number(x) for x in line.values()) and {"loss", "seconds", "bad", "tokens"} <= line.keys()
    return line if sound and math.isfinite(line["bad"]) and math.isfinite(line["tokens"]) else None


def _is_number(x: object) -> bool:
    return isinstance(x, float) or (isinstance(x, int) and abs(x) < 2**63)


def _with_nan(x: Any) -> Any:
    if isinstance(x, dict):
        return {key: _with_nan(value) for key, value in x.items()}
    return math.nan if x is None else x
