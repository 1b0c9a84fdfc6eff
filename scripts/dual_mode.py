"""Teaches the demo model SmolLM3's two modes, and measures what each part of it brought.

    python scripts/dual_mode.py --seed 0 --out DIR            # about an hour of processor time
    python scripts/dual_mode.py --seed 0 --out DIR --json     # the table as JSON; a done run is only shown

Fine-tuning on short tasks in both modes; APO on pairs that a checker makes of two samples; the mean of two checkpoints;
0.9 of that and 0.1 of the model that it began with. Then five models by whether they keep to the mode, by accuracy, by
what the checker passes on held-out prompts, and by perplexity in six languages. modes/dual-mode.toml fixes the rest.
The same command again goes on with a run that was stopped. docs/dual-mode.md says more.
"""

import argparse
import json
import sys
import tomllib
from pathlib import Path

from modes.report import show
from modes.stages import begin, run_stages
from rich.console import Console

from smollm3_jax.errors import SmolLM3Error

RECIPE = Path(__file__).parent / "modes" / "dual-mode.toml"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="all that the run makes")
    parser.add_argument("--seed", type=int, default=0, help="of the tasks, the order of the data, and the samples")
    parser.add_argument(
        "--recipe", type=Path, default=RECIPE, metavar="FILE.toml", help="default: modes/dual-mode.toml"
    )
    parser.add_argument("--json", action="store_true", help="print the table as JSON")
    args = parser.parse_args(argv)
    try:
        run_stages(begin(args.out, tomllib.loads(args.recipe.read_text()), args.seed))
    except SmolLM3Error as error:
        print(f"dual-mode: {error}", file=sys.stderr)
        return 3
    except KeyboardInterrupt:
        print("dual-mode: stopped; the same command goes on from here", file=sys.stderr)
        return 130
    found = json.loads((args.out / "report.json").read_text())
    if args.json:
        print(json.dumps(found))
    else:
        show(found, Console())
    return 0


if __name__ == "__main__":
    sys.exit(main())
