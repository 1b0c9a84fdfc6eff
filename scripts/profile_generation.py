"""Where a CPU's time goes while a token is decoded, or a prompt is read: XLA's operations by kind.

    python scripts/profile_generation.py decode [--model DIR|demo] [--dtype bfloat16] [--weights int8] [--held 128]
                                                [--new 65] [--slots 8] [--capacity 8192]
    python scripts/profile_generation.py prefill [--held 512] ...

Products of matrices are called "ynn_fusion", "dot" or "convolution"; where they are nearly all, a faster token needs
a faster product of XLA's, for which `bench_products.py` has the rates. Profiling itself costs time: the title's time is
measured without it, and the operations' sum is larger.
"""

import argparse
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

import smollm3_jax as s3
from smollm3_jax.generation.api import complete
from smollm3_jax.weights.demo import pull_demo

TOP = 12


def operation_times(trace: Path, program: str) -> tuple[Counter[str], Counter[str]]:
    """Kind of operation -> nanoseconds, and -> how often it ran, in one program."""
    times, counts = Counter[str](), Counter[str]()
    for plane in jax.profiler.ProfileData.from_file(str(trace)).planes:
        for event in (event for line in plane.lines for event in line.events):
            about = dict(event.stats)
            if about.get("hlo_module") == program:
                kind = str(about["hlo_op"]).split(".")[0]
                if kind not in ("while", "call", "conditional"):  # what they run is listed itself
                    times[kind] += int(event.duration_ns)
                    counts[kind] += 1
    return times, counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", choices=("decode", "prefill"))
    parser.add_argument("--model", default="demo")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--weights", choices=("int8", "int8-g64", "int4"))
    parser.add_argument("--held", type=int, default=128, metavar="N", help="tokens of the prompt")
    parser.add_argument("--slots", type=int, default=1, metavar="N", help="prompts that are decoded side by side")
    parser.add_argument("--capacity", type=int, metavar="N", help="places of a slot (default: what is needed)")
    parser.add_argument("--new", type=int, default=65, metavar="N", help="tokens that are decoded")
    args = parser.parse_args()
    folder = pull_demo() if args.model == "demo" else Path(args.model)
    quantized: dict[str, Any] = {} if args.weights is None else {"weights": args.weights}
    model = s3.from_pretrained(folder, args.dtype, **quantized)
    shape = {"max_slots": args.slots, "capacity": args.capacity or args.held + args.new}

    def seconds(new: int) -> float:
        params = s3.SamplingParams(max_new_tokens=new, temperature=0.0, ignore_eos=True)
        begin = time.perf_counter()
        complete(model, [s3.Request(list(range(1, args.held + 1)), params)] * args.slots, **shape)
        return time.perf_counter() - begin

    for new in (1, args.new):  # compilation
        seconds(new)
    if args.program == "decode":
        of, new, count = "a token of all slots", args.new, args.new - 1
        taken = min((seconds(new) - seconds(1)) / count for _ in range(3))
    else:
        of, new, count = "a prompt and its first token", 1, args.slots
        taken = min(seconds(new) / count for _ in range(3))
    options = jax.profiler.ProfileOptions()
    options.host_tracer_level, options.python_tracer_level = 2, 0
    with tempfile.TemporaryDirectory(prefix="profile-") as kept:
        with jax.profiler.trace(kept, profiler_options=options):
            seconds(new)
        times, counts = operation_times(next(Path(kept).rglob("*.xplane.pb")), f"jit_{args.program}")
    whole = times.total()
    table = Table("operation", "times", "ms", "share", title=f"{taken * 1e3:.1f} ms {of}")
    for kind, spent in times.most_common(TOP):
        table.add_row(kind, f"{counts[kind] / count:.0f}", f"{spent / count / 1e6:.2f}", f"{spent / whole:.1%}")
    table.add_row("all", "", f"{whole / count / 1e6:.2f}", "100.0%")
    Console().print(table)


if __name__ == "__main__":
    main()
