"""A training step beside PyTorch's on this machine: seconds, tokens/s and peak memory, in one run.

    python scripts/bench_train.py [--model demo|DIR] [--peer transformers] [--dtype float32|bfloat16]
        [--beside TREE] [--post-training] [--plan v5e:4x4] [--json]

Each engine is a process of its own that loads once and then takes steps in turn with the other: AdamW, clipping by the
global norm, rows of random tokens. In bfloat16 PyTorch runs eager autocast over float32 weights; we cast the weights
once a step. The loss of the first step is printed beside the times: both compute the same one. `--beside` adds the
step of another checkout of this repository, by its own code. `--post-training` adds
steps on the same rows with other objectives, and their ratios: fine-tuning, preferences whose reference's sums are
stored, and fine-tuning of an adapter (rank 16, all projections). `--plan` adds what `smollm3 plan train` models of
SmolLM3-3B's step on that topology; it runs nowhere.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

HERE = Path(__file__).resolve()
ENGINES = ("smollm3_jax", "transformers")
POST_TRAINING = ("sft", "preference", "lora")
# What each is compared with.
BESIDE = {"sft": "smollm3_jax", "preference": "sft", "lora": "sft"}
OTHER = "beside"
WARM_UP = 2  # steps that compile, and touch memory for the first time


def serve(engine: str, settings: dict[str, Any]) -> None:
    """Answers every line of standard input with one step's seconds, loss and the peak of memory so far."""
    import numpy as np

    tokens = (
        np.random.RandomState(0).randint(0, settings["words"], (settings["rows"], settings["length"])).astype(np.int64)
    )
    step = _torch(settings, tokens) if engine == "transformers" else _ours(settings, tokens, engine)
    for _ in sys.stdin:
        begin = time.perf_counter()
        loss = step()
        seconds = time.perf_counter() - begin
        print(json.dumps({"seconds": seconds, "loss": loss, "peak_bytes": _peak_bytes()}), flush=True)


def _ours(settings: dict[str, Any], tokens: Any, engine: str) -> Any:
    import jax.numpy as jnp
    import numpy as np

    import smollm3_jax as s3
    from smollm3_jax.train import lora
    from smollm3_jax.train.objectives.preference import Preference
    from smollm3_jax.train.objectives.pretrain import Pretrain
    from smollm3_jax.train.objectives.sft import Sft
    from smollm3_jax.train.optimizer import adamw
    from smollm3_jax.train.options import StepOptions
    from smollm3_jax.train.settings import LoraSettings
    from smollm3_jax.train.state import Batch, init_state
    from smollm3_jax.train.step import train_step
    from smollm3_jax.weights.load import open_checkpoint

    trainable = None
    if engine == "lora":
        opened, adapter = open_checkpoint(Path(settings["folder"])), LoraSettings(rank=16, base=settings["dtype"])
        model = lora.attach(lora.load_base(opened, opened.config, adapter, None), adapter)
        trainable = lora.TRAINED
    else:
        model = s3.from_pretrained(settings["folder"], dtype="float32", stacked=True)
    optimizer = adamw(1e-5, weight_decay=0.1)
    options = StepOptions(dtype=settings["dtype"], remat=settings["remat"])
    # With other objectives: two completions with their prompts a row, of which the second half is learned.
    place = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    half = tokens.shape[1] // 2
    segments = np.where(settings["post_training"], 1 + place // half, 1).clip(max=2)
    weights = (place % half >= half // 2).astype(np.float32)
    more = {"smollm3_jax": (), "preference": (weights, np.zeros(tokens.shape, np.float32))}.get(engine, (weights,))
    batch = Batch(
        *(jnp.asarray(x, jnp.float32 if x.dtype == np.float32 else jnp.int32) for x in (tokens, segments, *more))
    )
    objective = {"smollm3_jax": Pretrain(), "preference": Preference("sigmoid")}.get(engine, Sft())
    box = [init_state(model, optimizer, trainable)]
    del model

    def step() -> float:
        box[0], metrics = train_step(box[0], batch, objective=objective, optimizer=optimizer, options=options)
        return float(metrics["loss"])

    return step


def _torch(settings: dict[str, Any], tokens: Any) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(os.cpu_count() or 1)
    model: Any = AutoModelForCausalLM.from_pretrained(settings["folder"], dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, betas=(0.9, 0.95), weight_decay=0.1)
    ids = torch.tensor(tokens)

    def step() -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=settings["dtype"] == "bfloat16"):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def _peak_bytes() -> int:
    """Memory of this process, as the kernel counts it."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return 1024 * int(line.split()[1])
    return 0


def measure(
    engines: list[str], settings: dict[str, Any], rounds: int, beside: Path | None
) -> dict[str, list[dict[str, Any]]]:
    """Steps of each engine, in turn, those that warm up first; `beside` is the checkout of the engine "beside"."""

    def start(engine: str) -> subprocess.Popen[str]:
        script, environment = HERE, dict(os.environ)
        if engine == OTHER and beside:
            script, engine = beside / "scripts" / HERE.name, ENGINES[0]
            environment["PYTHONPATH"] = str(beside)
        command = [sys.executable, script, "--serve", engine, json.dumps(settings)]
        return subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    processes = {engine: start(engine) for engine in engines}
    found: dict[str, list[dict[str, Any]]] = {engine: [] for engine in engines}
    for number in range(WARM_UP + rounds):
        for engine, process in processes.items():
            assert process.stdin is not None and process.stdout is not None
            process.stdin.write("step\n")
            process.stdin.flush()
            answer = process.stdout.readline()
            if not answer:
                raise SystemExit(f"bench_train: {engine} died")
            found[engine].append(json.loads(answer))
            print(f"{engine}, step {number}: {found[engine][-1]['seconds']:.2f} s", file=sys.stderr)
    for process in processes.values():
        assert process.stdin is not None
        process.stdin.close()
        process.wait()
    return found


def _ratio(one: dict[str, Any], other: dict[str, Any]) -> dict[str, float]:
    return {key: one[key] / other[key] for key in ("tokens_per_second", "peak_bytes")}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", metavar="DIR", help="a model folder (default: demo)")
    parser.add_argument("--peer", action="append", default=[], choices=ENGINES[1:])
    parser.add_argument("--beside", type=Path, metavar="TREE", help="another checkout of this repository")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--remat", default="dots", help="what ours computes again in the backward pass")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--post-training", action="store_true", help="steps of the other objectives, and of an adapter")
    parser.add_argument("--plan", metavar="TOPOLOGY", help="add the modelled step of SmolLM3-3B there, like v5e:4x4")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if args.beside and not (args.beside / "scripts" / HERE.name).is_file():
        parser.error(f"--beside: {args.beside} is no checkout with scripts/{HERE.name}")
    return args


def main() -> int:
    if sys.argv[1:2] == ["--serve"]:
        serve(sys.argv[2], json.loads(sys.argv[3]))
        return 0
    args = parse()
    from smollm3_jax.config import ModelConfig
    from smollm3_jax.weights.demo import model_folder

    folder = str(model_folder(args.model))
    words = min(40_000, ModelConfig.from_hf(Path(folder)).vocab_size)
    settings = {key: getattr(args, key) for key in ("dtype", "remat", "rows", "length", "post_training")}
    settings |= {"folder": folder, "words": words}
    added = POST_TRAINING if args.post_training else ()
    others = [OTHER] if args.beside else []
    found = measure([ENGINES[0], *args.peer, *others, *added], settings, args.rounds, args.beside)
    rows = {}
    for engine, steps in found.items():
        seconds = statistics.median(step["seconds"] for step in steps[WARM_UP:])
        rows[engine] = {
            "seconds": seconds,
            "tokens_per_second": args.rows * args.length / seconds,
            "peak_bytes": max(step["peak_bytes"] for step in steps),
            "first_loss": steps[0]["loss"],
        }
    ratios = {f"ours / {peer}": _ratio(rows[ENGINES[0]], rows[peer]) for peer in [*args.peer, *others]}
    ratios |= {f"{one} / {BESIDE[one]}": _ratio(rows[one], rows[BESIDE[one]]) for one in added}
    plan = None
    if args.plan:
        command = [sys.executable, "-m", "smollm3_jax", "plan", "train", "--topology", args.plan, "--json"]
        plan = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    if args.json:
        print(json.dumps({**settings, "engines": rows, "ratios": ratios, "plan": plan}, indent=2))
        return 0
    table = Table(f"{args.dtype}, {args.rows} x {args.length} tokens", "s", "tokens/s", "peak GiB", "first loss")
    for engine, row in rows.items():
        figures = (f"{row['seconds']:.2f}", f"{row['tokens_per_second']:.0f}", f"{row['peak_bytes'] / 2**30:.2f}")
        table.add_row(engine, *figures, f"{row['first_loss']:.4f}")
    Console().print(table)
    for name, ratio in ratios.items():
        speed, memory = ratio["tokens_per_second"], ratio["peak_bytes"]
        print(f"{name}: {speed:.3f} x tokens/s, {memory:.2f} x memory")
    if plan is not None:
        modelled = plan["modelled"]
        print(
            f"SmolLM3-3B on {args.plan}, modelled: {modelled['step_seconds']:.3f} s a step, MFU {modelled['mfu']:.3f}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
