"""A month alone, in minutes: training, or the server, under faults that a seed draws, with what must hold after each.

    python scripts/soak.py train --seed 0 --minutes 30 --out DIR           # kills, full disks, slow data, clock jumps
    python scripts/soak.py serve --seed 0 --minutes 30 --out DIR --json    # clients that leave, floods, SIGTERM, ...

The schedule is printed and written to DIR/schedule.json: the same seed draws the same one, of which as much is run as
the minutes allow. DIR/report.json says what was done, and what did not hold (a finding; the files that show it lie in
DIR/findings). Commands are those of a user, in processes of their own. Full disks are small ones that are mounted where
nobody else sees them, which needs Linux with user namespaces; where there are none, they are left out.
Exit code 0: all held; 1: there are findings.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table
from soaks import serving, training
from soaks.common import Disk, Soak, processor, small_model

from smollm3_jax.files import write

MOUNTS = "SMOLLM3_SOAK_MOUNTS"  # set where this script runs with mounts of its own
OWN_MOUNTS = ["unshare", "--user", "--map-root-user", "--mount"]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("train", "serve"))
    parser.add_argument("--seed", type=int, default=0, help="of the schedule (default: 0)")
    parser.add_argument("--minutes", type=float, default=30.0, help="of faults; then no new one begins (default: 30)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="an empty folder, or none yet")
    parser.add_argument("--model", help="a folder, or demo (default: a SmolLM3 of 4 layers and random weights)")
    parser.add_argument("--each", type=int, metavar="N", help="instead: N faults of each kind, in the kinds' order")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    args = parser.parse_args(argv)
    out = args.out.absolute()
    if out.exists() and any(out.iterdir()) and MOUNTS not in os.environ:
        parser.error(f"{out} is not empty")
    out.mkdir(parents=True, exist_ok=True)
    mounts = os.environ.get(MOUNTS) or _can_mount()
    if MOUNTS not in os.environ and mounts == "yes":
        os.environ[MOUNTS] = mounts
        os.execvp(OWN_MOUNTS[0], [*OWN_MOUNTS, sys.executable, *(sys.argv if argv is None else [__file__, *argv])])

    module = {"train": training, "serve": serving}[args.what]
    schedule = module.draw(random.Random(args.seed), args.each)
    write(out / "schedule.json", json.dumps(schedule, indent=1) + "\n")
    console = Console(stderr=True)
    for number, life in enumerate(schedule if args.each else schedule[: max(1, int(args.minutes))]):
        console.print(f"{number}: {json.dumps(life)}", style="dim", highlight=False, soft_wrap=True)
    soak = Soak(
        out=out,
        model=args.model or str(small_model(out / "model")),
        disk=Disk.mounted(out / "disk", module.DISK) if mounts == "yes" else Disk(out / "disk", 0),
        logs=Disk.mounted(out / "logs", 64 << 10) if mounts == "yes" else Disk(out / "logs", 0),
        until=time.monotonic() + 60 * args.minutes,
        say=lambda text: console.print(text, highlight=False, markup=False, soft_wrap=True),
    )
    begin = time.monotonic()
    try:
        module.run(soak, schedule)
    except KeyboardInterrupt:
        soak.say("stopped; the report is of what was done until then")
    finally:
        soak.end()
    report = {
        "command": f"soak.py {args.what} --seed {args.seed} --minutes {args.minutes:g}"
        + (f" --each {args.each}" if args.each else ""),
        "processor": processor(),
        "seconds": round(time.monotonic() - begin, 1),
        "full disks": mounts == "yes",
        "faults": soak.done,
        "measured": soak.measured,
        "findings": soak.findings,
    }
    write(out / "report.json", json.dumps(report, indent=1) + "\n")
    if args.json:
        print(json.dumps(report))
    else:
        show(report, Console())
    return 1 if soak.findings else 0


def show(report: dict, console: Console) -> None:
    kinds: dict[str, list[dict]] = {}
    for fault in report["faults"]:
        kinds.setdefault(fault["kind"], []).append(fault)
    table = Table("fault", "times", "seconds", "findings")
    for kind, faults in kinds.items():
        found = sum(fault["findings"] for fault in faults)
        table.add_row(kind, str(len(faults)), f"{sum(fault['seconds'] for fault in faults):.0f}", str(found))
    console.print(table)
    for name, value in report["measured"].items():
        console.print(f"{name}: {value}", highlight=False)
    for finding in report["findings"]:
        console.print(f"finding: {finding}", highlight=False, markup=False, soft_wrap=True)
    total = f"{len(report['faults'])} faults in {report['seconds'] / 60:.1f} minutes on {report['processor']}"
    console.print(f"{total}: {len(report['findings'])} findings", highlight=False)


def _can_mount() -> str:
    """ "yes" where a process can have mounts that nobody else sees."""
    if shutil.which(OWN_MOUNTS[0]) is None:
        return "no"
    return "no" if subprocess.run([*OWN_MOUNTS, "true"], capture_output=True).returncode else "yes"


if __name__ == "__main__":
    sys.exit(main())
