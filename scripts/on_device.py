"""Measures this machine's accelerator, beside what was modelled for it, and writes one JSON to send in.

    python scripts/on_device.py [--model demo|DIR] [--out on_device.json]

Parity (logits against the CPU's, float32 at the highest precision), prefill, decoding, and the training step, on all
local devices. On a machine without a TPU or GPU it runs on the CPU, and says so: nothing is modelled for one.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import smollm3_jax as s3
from sharding import hlo
from sharding.hardware import chip_of
from sharding.mesh import make_mesh
from sharding.roofline import roofline
from sharding.rules import Sharding
from smollm3_jax.errors import SmolLM3Error
from smollm3_jax.plan import TrainSetting
from smollm3_jax.progress import busy
from smollm3_jax.support import version
from smollm3_jax.train.optimizer import adamw
from smollm3_jax.train.step import COMPILER_OPTIONS, Batch, StepOptions, init_state, state_shardings, train_step
from smollm3_jax.weights.demo import pull_demo

ROUNDS = 5


def seconds(run: Callable[[], Any]) -> float:
    """The median of ROUNDS, after one to warm up."""
    jax.block_until_ready(run())
    times = []
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def parity(folder: Path, tokens: np.ndarray) -> dict[str, Any]:
    """The largest difference of logits between the default device and the CPU, and of what size they are."""
    with jax.default_matmul_precision("highest"):
        model = s3.from_pretrained(folder, dtype="float32", stacked=True)
        here = np.asarray(model(jnp.asarray(tokens)))
        cpu = jax.devices("cpu")[0]
        with jax.default_device(cpu):
            there = np.asarray(jax.device_put(model, cpu)(jax.device_put(tokens, cpu)))
    difference = float(np.abs(here - there).max())
    agree = float((here.argmax(-1) == there.argmax(-1)).mean())
    return {"max_abs": difference, "max_logit": float(np.abs(there).max()), "argmax_agreement": agree}


def inference(folder: Path, tokens: np.ndarray) -> dict[str, Any]:
    """Tokens a second of prefill and of decoding at batch 1 and 8, in bfloat16 on one device."""
    model = s3.from_pretrained(folder, dtype="bfloat16")
    prompt = tokens[0].tolist()
    found: dict[str, Any] = {}
    for rows in (1, 8):
        prompts = [prompt[i : i + 32] for i in range(rows)]

        def run(new: int, prompts: list[list[int]] = prompts) -> list[list[int]]:
            return s3.generate(model, prompts, s3.SamplingParams(max_new_tokens=new, temperature=0, ignore_eos=True))

        found[f"decode_batch_{rows}"] = rows * 64 / (seconds(lambda: run(65)) - seconds(lambda: run(1)))
    greedy = s3.SamplingParams(max_new_tokens=1, temperature=0)
    found[f"prefill_{len(prompt)}"] = len(prompt) / seconds(lambda: s3.generate(model, [prompt], greedy))
    return found


def training(folder: Path, length: int) -> dict[str, Any]:
    """Seconds of a training step over all devices, a row of `length` a device, measured and modelled."""
    model = s3.from_pretrained(folder, dtype="float32", mesh=make_mesh({"fsdp": -1}), rules="fsdp")
    sharding = Sharding.of(make_mesh({"fsdp": -1}), "fsdp").fitted(model.config.axis_sizes)
    optimizer, options = adamw(1e-5), StepOptions()
    state = init_state(model, optimizer)
    state = jax.device_put(state, state_shardings(state, sharding))
    rows = jax.device_count()
    tokens = jnp.asarray(np.random.RandomState(0).randint(0, model.config.vocab_size, (rows, length)), jnp.int32)
    at = jax.sharding.NamedSharding(sharding.mesh, sharding.spec("batch", None))
    batch = jax.device_put(Batch(tokens, jnp.ones_like(tokens)), at)
    static = {"optimizer": optimizer, "options": options, "sharding": sharding}
    compiler_options = COMPILER_OPTIONS.get(sharding.platform)
    compiled = train_step.lower(state, batch, **static).compile(compiler_options=compiler_options)
    box = [state]

    def run() -> Any:
        box[0], metrics = compiled(box[0], batch)
        return metrics

    measured, chip = seconds(run), chip_of(jax.devices()[0])
    result: dict[str, Any] = {"rows": rows, "length": length, "seconds": measured}
    result["memory_bytes"] = hlo.memory(compiled).total
    if chip is not None:
        setting = TrainSetting(model.config, chip, sharding, rows, length, options)
        result["modelled_seconds"] = roofline(hlo.operations(compiled), chip, setting.kernel_cost).seconds
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", metavar="DIR", help="a model folder (default: demo)")
    parser.add_argument("--out", type=Path, default=Path("on_device.json"), metavar="FILE")
    parser.add_argument("--length", type=int, default=512, metavar="N", help="of prompts and rows (default: 512)")
    args = parser.parse_args()
    try:
        folder = pull_demo() if args.model == "demo" else Path(args.model)
        device = jax.devices()[0]
        accelerator = device.platform != "cpu"
        if not accelerator:
            print("no TPU or GPU here: this measures the CPU, for which nothing is modelled", file=sys.stderr)
        vocab = s3.ModelConfig.from_hf(folder).vocab_size
        tokens = np.random.RandomState(0).randint(0, vocab, (1, args.length)).astype(np.int32)
        report: dict[str, Any] = {
            "accelerator": accelerator,
            "device": f"{jax.device_count()} x {device.device_kind}",
            "chip": getattr(chip_of(jax.devices()[0]), "name", None),
            "host": platform.platform(),
            "versions": {name: version(name) for name in ("jax", "jaxlib", "flax", "libtpu")},
            "model": folder.name,
        }
        for name, part in (
            ("parity", lambda: parity(folder, tokens)),
            ("inference", lambda: inference(folder, tokens)),
            ("training", lambda: training(folder, args.length)),
        ):
            with busy(name):
                report[name] = part()
    except SmolLM3Error as error:
        print(f"on_device: {error}", file=sys.stderr)
        return error.exit_code
    text = json.dumps(report, indent=2)
    args.out.write_text(text + "\n")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
