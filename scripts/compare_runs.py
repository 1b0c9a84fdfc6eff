"""How far a run has caught up with its control, by held-out text: the share of the first gap that is closed.

    python scripts/compare_runs.py RUN CONTROL [--out FILE.png] [--json]

Both are run folders of `smollm3 train` that evaluated the same held-out text at the same steps, from step 0 on: there
the gap is what the change of the model cost. Adaptation to the corpus itself, which both runs share, closes none of it.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from etils import epath
from rich.console import Console
from rich.table import Table

from smollm3_jax.files import new_file
from smollm3_jax.train.run.metrics import read_lines


def held_out(run: str) -> dict[int, dict[str, float]]:
    """Step -> source -> nats a token."""
    lines = [line for line in read_lines(epath.Path(run) / "metrics.jsonl") if "held_out" in line]
    return {line["step"]: {name: x["nats_per_token"] for name, x in line["held_out"].items()} for line in lines}


def compare(run: str, control: str) -> dict[str, Any]:
    """Gaps in nats a token, and closed shares, by source and step; `mean` is over the sources."""
    ours, theirs = held_out(run), held_out(control)
    steps = sorted({*ours} & {*theirs})
    if len(steps) < 2 or steps[0] != 0:
        raise SystemExit(f"compare_runs: {run} and {control} have no held-out losses in common from step 0 on")
    gaps = {step: {name: ours[step][name] - theirs[step][name] for name in ours[step]} for step in steps}
    for gap in gaps.values():
        gap["mean"] = sum(gap.values()) / len(gap)
    closed = {step: {name: 1 - x / gaps[0][name] for name, x in gap.items()} for step, gap in gaps.items()}
    return {"steps": steps, "run": ours, "control": theirs, "gaps": gaps, "closed": closed}


def draw(found: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports]

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    losses, shares = figure.subplots(1, 2)
    for i, name in enumerate(found["run"][0]):
        color = f"C{i}"
        losses.plot(found["steps"], [found["run"][step][name] for step in found["steps"]], color=color, label=name)
        losses.plot(found["steps"], [found["control"][step][name] for step in found["steps"]], color=color, ls=":")
        shares.plot(found["steps"], [100 * found["closed"][step][name] for step in found["steps"]], color=color)
    shares.plot(found["steps"], [100 * found["closed"][step]["mean"] for step in found["steps"]], color="black", lw=2)
    losses.set(title="held-out text, nats a token (dotted: control)", xlabel="step")
    shares.set(title="gap to the control closed, % (black: mean)", xlabel="step")
    losses.legend()
    with new_file(path) as file:
        figure.savefig(file, dpi=110, format=path.suffix[1:] or "png")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("control")
    parser.add_argument("--out", type=Path, metavar="FILE.png", help="draw the curves (needs matplotlib)")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    found = compare(args.run, args.control)
    if args.out is not None:
        draw(found, args.out)
    if args.json:
        print(json.dumps(found, indent=2))
        return 0
    last = found["steps"][-1]
    table = Table("held out", "gap at step 0", *(f"closed at {step}" for step in found["steps"][1:]), f"gap at {last}")
    for name, gap in found["gaps"][0].items():
        closed = (f"{100 * found['closed'][step][name]:.0f} %" for step in found["steps"][1:])
        table.add_row(name, f"{gap:.3f}", *closed, f"{found['gaps'][last][name]:.3f}")
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
