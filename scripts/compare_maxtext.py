"""SmolLM3's training step beside MaxText's for the same sixteen v5e, compiled by the same compiler, run nowhere.

    pip install maxtext -e '.[plan]'     (MaxText 0.2.5 wants Python 3.12)
    python scripts/compare_maxtext.py [--only NAME ...] [--json]

MaxText has no SmolLM3; its plain decoder takes the same shape (RoPE on every layer, which costs nothing here). Both
programs are read by `sharding.roofline` under the assumptions that `smollm3 plan train` prints.
"""

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from sharding import hlo
from sharding.roofline import roofline
from smollm3_jax.config import SMOLLM3_3B, ModelConfig
from smollm3_jax.plan.devices import sharding_for, topology
from smollm3_jax.plan.train import TrainSetting
from smollm3_jax.progress import busy
from smollm3_jax.train.options import StepOptions
from smollm3_jax.weights.key_map import count_parameters

ROWS, LENGTH = 16, 4096
WHOLE = "compile_xla_flags=--xla_jf_spmd_threshold_for_windowed_einsum_mib=1000000"
# What is compiled -> options of MaxText, or of our step.
SETTINGS: dict[str, Any] = {
    "MaxText, default": ("remat_policy=full",),
    "MaxText, whole gathered weights": ("remat_policy=full", WHOLE),
    "MaxText, whole gathered weights, dots saved": ("remat_policy=minimal", WHOLE),
    "ours, --remat offload": StepOptions(remat="offload"),
    "ours, --remat dots": StepOptions(remat="dots"),
}


def maxtext(options: tuple[str, ...], config: ModelConfig) -> Any:
    """MaxText's own program for compiling ahead, and what it compiled."""
    from maxtext.trainers.pre_train import train_compile  # pyright: ignore[reportMissingImports]

    compiled = []
    compile_step = train_compile.jit_and_compile

    def kept(*args: Any) -> Any:
        compiled.append(compile_step(*args))
        return compiled[0]

    train_compile.jit_and_compile = kept
    base = Path(train_compile.__file__).parents[2] / "configs" / "base.yml"
    shape = {
        "base_emb_dim": config.hidden_size,
        "base_mlp_dim": config.intermediate_size,
        "base_num_query_heads": config.num_attention_heads,
        "base_num_kv_heads": config.num_key_value_heads,
        "base_num_decoder_layers": config.num_hidden_layers,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "logits_via_embedding": True,
        "decoder_block": "llama2",
        "attention": "flash",
        "per_device_batch_size": 1,
        "max_target_length": LENGTH,
        "ici_fsdp_parallelism": -1,
        "compile_topology": "v5e-16",
        "compile_topology_num_slices": 1,
        "enable_checkpointing": False,
    }
    try:
        with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(sys.stderr):
            words = [f"{name}={value}" for name, value in shape.items()]
            train_compile.main(["", str(base), *words, *options, f"base_output_directory={out}", "run_name=compare"])
    finally:
        train_compile.jit_and_compile = compile_step
    return compiled[0]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SETTINGS, default=list(SETTINGS), metavar="NAME")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    args = parser.parse_args()
    if any("MaxText" in name for name in args.only) and importlib.util.find_spec("maxtext") is None:
        print("compare_maxtext: MaxText is not installed: pip install maxtext (Python 3.12)", file=sys.stderr)
        return 2
    config = ModelConfig.from_hf(SMOLLM3_3B)
    chip, devices = topology("v5e:4x4")
    setting = TrainSetting(config, chip, sharding_for(config, devices, "fsdp", None), ROWS, LENGTH, StepOptions())
    report = {}
    for name in args.only:
        options = SETTINGS[name]
        with busy(name):
            ours = isinstance(options, StepOptions)
            compiled = dataclasses.replace(setting, options=options).compile() if ours else maxtext(options, config)
            model = roofline(hlo.operations(compiled), chip, setting.kernel_cost)
        useful = 6 * count_parameters(config) * ROWS * LENGTH / len(devices)
        report[name] = {
            "dot_seconds": model.dot_seconds,
            "exposed_collective_seconds": model.exposed_seconds,
            "step_seconds": model.seconds,
            "mfu": useful / (chip.peak * model.seconds),
            "hbm_bytes": hlo.memory(compiled).total,
            "kernels_not_counted": list(model.opaque),
        }
    if args.json:
        print(json.dumps(report, indent=2))
        return 0
    table = Table("v5e:4x4, 16 x 4,096 tokens", "dots s", "exposed collectives s", "step s", "MFU", "HBM GB")
    for name, row in report.items():
        seconds = (f"{row[key]:.3f}" for key in ("dot_seconds", "exposed_collective_seconds", "step_seconds"))
        table.add_row(name, *seconds, f"{row['mfu']:.3f}", f"{row['hbm_bytes'] / 1e9:.2f}")
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
