"""A training step on more and more devices, beside SmolLM3's own run."""

from collections.abc import Iterable
from typing import Any

from sharding.hardware import CHIPS

from ..config import ModelConfig
from ..errors import OptionError
from ..weights.key_map import count_parameters
from .train import plan_train

# Devices -> topology and slices of it: a v5e pod has 256 chips.
V5E = {16: ("v5e:4x4", 1), 64: ("v5e:8x8", 1), 256: ("v5e:16x16", 1), 1024: ("v5e:16x16", 4)}
# SmolLM3's own run: 384 H100, tensor parallel 2, data parallel 192; 14k tokens/s a GPU (its blog post).
H100_RUN = {"gpus": 384, "tensor": 2, "rows": 576, "length": 4096, "tokens_per_second_per_gpu": 14_000}


def plan_scale(
    config: ModelConfig, devices: Iterable[int], length: int = 4096, *, remat: str = "dots"
) -> dict[str, Any]:
    """The training step on more and more v5e chips, a row a device: modelled time, memory and bytes of collectives.

    Beside it SmolLM3's own layout on H100, by arithmetic from `hardware.CHIPS` alone.
    """
    rows, devices = [], list(devices)
    if unknown := [count for count in devices if count not in V5E]:
        raise OptionError(f"--devices names {unknown[0]}; choose among {', '.join(map(str, V5E))}")
    for count in devices:
        name, slices = V5E[count]
        report = plan_train(config, name, "fsdp", count, length, slices=slices, remat=remat)
        rows.append(report)
    return {"length": length, "steps": rows, "h100": h100_run(config)}


def h100_run(config: ModelConfig) -> dict[str, Any]:
    """SmolLM3's pretraining layout: products at the peak, all collectives exposed; nothing is compiled."""
    chip, run = CHIPS["h100"], H100_RUN
    groups = run["gpus"] // run["tensor"]
    tokens = run["rows"] * run["length"] / groups  # of a group of two
    attention = 6 * config.num_hidden_layers * tokens * run["length"] * config.num_attention_heads * config.head_dim
    flops = (6 * count_parameters(config) * tokens + attention) / run["tensor"]
    # Four all-reduces of the activations a layer, forward and backward; the gradients once, in bfloat16.
    activations = (
        4 * config.num_hidden_layers * tokens * config.hidden_size * 2 * (run["tensor"] - 1) / run["tensor"] * 2
    )
    gradients = 2 * 2 * count_parameters(config) / run["tensor"] * (groups - 1) / groups
    seconds = {
        "dot_seconds": flops / chip.peak,
        "tensor_parallel_seconds": activations / chip.link,
        "gradient_seconds": gradients / chip.network,
    }
    total = sum(seconds.values())
    rate = run["rows"] * run["length"] / total / run["gpus"]
    return {
        **run,
        **seconds,
        "modelled_tokens_per_second_per_gpu": rate,
        "share_of_model_reached": run["tokens_per_second_per_gpu"] / rate,
    }
