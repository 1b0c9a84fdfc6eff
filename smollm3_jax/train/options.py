"""How a training step computes, and what its compiler is told."""

import dataclasses
from collections.abc import Callable

import jax

# What is kept for the backward pass, which computes the rest again; from all that matters to nothing but each layer's
# input, on the device or in the host's memory, where the loss computes its logits twice as well. (`block` in model.py
# gives the names.)
_INPUT = "input_bits"  # on a CPU; elsewhere a layer's input is kept in any case
_ATTENTION = (_INPUT, "attention", "attention_residuals")
_QKV = ("q", "k", "v", *_ATTENTION)
REMAT: dict[str, Callable[..., bool] | None] = {
    "none": None,
    "dots": jax.checkpoint_policies.save_only_these_names(*_QKV, "gate", "up"),
    "qkv": jax.checkpoint_policies.save_only_these_names(*_QKV),
    "attention": jax.checkpoint_policies.save_only_these_names(*_ATTENTION),
    "full": jax.checkpoint_policies.save_only_these_names(_INPUT),
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=["input"],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}
# What the compiler is told, by platform. On TPU products wait for whole gathered weights, which arrive ahead of
# their use, instead of going through pieces as these arrive. Each weight's gradient is reduced while the next one's
# product runs: that takes all three of the other options, as reductions that were combined into one stay synchronous.
COMPILER_OPTIONS: dict[str, dict[str, bool | str]] = {
    "tpu": {
        "xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000",
        "xla_enable_async_all_reduce": "true",
        "xla_tpu_enable_async_collective_fusion_fuse_all_reduce": "true",
        "xla_jf_crs_combiner_threshold_count": "1",
    },
}
# What makes two equal steps equal bit for bit, where they are not so anyway. On GPU the embedding's gradient is added
# up by atomics, and cuDNN's backward pass may be: XLA's flag sorts the one and asks cuDNN for its deterministic
# algorithm, which a program's text does not show (scripts/on_device.py compares the bits). With it XLA does not time
# kernels against each other, so that products are left to cuBLAS and its heuristics: Triton's, untimed, would be slow,
# and from 0.11 on XLA refuses to choose among them without a device.
DETERMINISTIC: dict[str, dict[str, bool | str]] = {
    "gpu": {"xla_gpu_exclude_nondeterministic_ops": True, "xla_gpu_enable_triton_gemm": False},
}


# Where one processor stands for several devices, each must come to the collectives in the same order: else all threads
# wait in one for a device that waits in another.
SEVERAL = {"cpu": {"xla_cpu_enable_concurrency_optimized_scheduler": False}}


def compiler_options(platform: str, deterministic: bool = False, devices: int = 1) -> dict[str, bool | str] | None:
    """What to compile a step with for a platform ("cpu", "tpu" or "gpu"); None leaves the compiler alone.

    Args:
      deterministic: two equal steps give equal bits, at some cost in speed on GPU. A CPU and a TPU do so anyway.
      devices: how many the step runs on.
    """
    options = COMPILER_OPTIONS.get(platform, {}) | (DETERMINISTIC.get(platform, {}) if deterministic else {})
    return options | (SEVERAL.get(platform, {}) if devices > 1 else {}) or None


@dataclasses.dataclass(frozen=True)
class StepOptions:
    """How a step computes: the dtype of its products; a key of REMAT; into how many micro-batches the batch's rows are
    split; the seed of dropout."""

    dtype: str = "bfloat16"
    remat: str = "dots"
    micro_batches: int = 1
    seed: int = 0
