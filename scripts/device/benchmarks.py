"""What is kept of a machine: one JSON in benchmarks/, and the README's table, which is made from all of them."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from smollm3_jax.files import write

from .report import modelled, note_of, of_kind, peers, share_of_floor
from .run import lines

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
NOTHING = "Nothing has been measured on an accelerator yet."
KEPT = ("machine", "ceiling", "parity", "speed", "modelled", "profile", "note", "error", "skipped", "part")


class MergeError(Exception):
    """Results that cannot be kept, and why."""


def merge(folders: Sequence[Path], into: Path) -> Path:
    """Keeps the results of one machine, which may have come in several runs, as one JSON; returns its path.

    Of a case that stands in several folders the last one's result is kept.

    Raises:
      MergeError: there are no results, they are tiny ones or a CPU's, or they are of several machines.
    """
    found = [line for folder in folders for line in lines(folder)]
    machines = [line for line in found if line["kind"] == "machine"]
    if not machines:
        raise MergeError(f"no results.jsonl with a machine in {', '.join(map(str, folders))}")
    if any(line.get("tiny") for line in found):
        raise MergeError("these are --tiny's results, of a small model that tries the run itself: they say nothing")
    if any(line["platform"] == "cpu" for line in machines):
        raise MergeError("these are a CPU's results; benchmarks/ holds accelerators'")
    names = {name_of(line) for line in machines}
    if len(names) > 1:
        raise MergeError(f"these are results of several machines: {', '.join(sorted(names))}; merge each by itself")
    into.mkdir(parents=True, exist_ok=True)
    file = into / f"{names.pop()}.json"
    kept = {
        "machine": {key: value for key, value in machines[-1].items() if key not in ("part", "kind", "case")},
        "results": [line for kind in KEPT[1:] for line in of_kind(found, kind)],
    }
    write(file, json.dumps(kept, indent=1) + "\n")
    return file


def name_of(machine: dict[str, Any]) -> str:
    """What its file is called: nvidia-h100-80gb-hbm3, 4-tpu-v5-lite."""
    words = re.sub(r"[^a-z0-9]+", "-", str(machine["device"]).lower()).strip("-")
    return words if machine["devices"] == 1 else f"{machine['devices']}-{words}"


def markdown(folder: Path = FOLDER) -> str:
    """The README's section on accelerators: a table a machine; a sentence where none was measured."""
    kept = [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]
    return "\n\n".join(_machine(**one) for one in kept) if kept else NOTHING


def _machine(machine: dict[str, Any], results: list[dict[str, Any]]) -> str:
    versions = machine["versions"]
    named = ", ".join(f"{name} {versions[name]}" for name in ("jax", "torch", "transformers") if name in versions)
    checks = of_kind(results, "parity")
    passed = sum(check["passed"] for check in checks)
    head = f"**{machine['devices']} x {machine['device']}**, {named}. Parity: {passed} of {len(checks)} checks passed."
    rows = ["| case | ms (min to max) | tokens/s | of the floor | modelled ms | PyTorch, tokens/s | ratio |"]
    rows.append("|---|---|---|---|---|---|---|")
    rows += [_row(line, results) for line in of_kind(results, "speed") if line["engine"] == "ours"]
    failed = [
        f"- failed: {check['case']}: {check['error']:.3g}, bound {check['bound']:g}"
        for check in checks
        if not check["passed"]
    ]
    return "\n".join([head, "", *rows, *(["", *failed] if failed else [])])


def _row(line: dict[str, Any], results: list[dict[str, Any]]) -> str:
    share, model, others = share_of_floor(line), modelled(results, line["case"]), peers(results, line["case"])
    return _cells(
        line["case"] + note_of(line),
        f"{line['ms']:.3g} ({line['ms_min']:.3g} to {line['ms_max']:.3g})",
        f"{line['tokens_per_second']:,.0f}",
        "" if share is None else f"{share:.2f}",
        "" if model is None else f"{model['ms']:.3g}",
        ", ".join(f"{other['tokens_per_second']:,.0f} ({other['engine']})" for other in others),
        ", ".join(f"{line['tokens_per_second'] / other['tokens_per_second']:.2f}" for other in others),
    )


def _cells(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def between_markers(text: str) -> str | None:
    """What a README has between its markers; None without them."""
    found = re.search(r"<!-- accelerators -->\n(.*?)\n<!-- /accelerators -->", text, re.DOTALL)
    return found and found[1].strip()
