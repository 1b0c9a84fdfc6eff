"""One training step: loss, gradients, update. Parameters and what the optimizer keeps are float32.

Shapes: B rows, T tokens of a row, M micro-batches.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array
from jax.sharding import NamedSharding

from sharding.rules import Sharding

from ..model import SmolLM3
from .loss import cross_entropy, next_tokens

# What the backward pass finds kept, the rest it computes again; from all that matters to nothing but each layer's
# input, on the device or in the host's memory, where the loss computes its logits twice as well. (`block` in model.py
# gives the names.)
_INPUT = "input_bits"  # on a CPU; elsewhere a layer's input is kept in any case
_ATTENTION = (_INPUT, "attention", "attention_residuals")
_QKV = ("q", "k", "v", *_ATTENTION)
REMAT: dict[str, Callable[..., Any] | None] = {
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

# What the compiler is told, by platform. On TPU products wait for whole gathered weights, which come ahead of
# their use, instead of going through pieces as these arrive. Each weight's gradient is reduced while the next one's
# product runs: that takes all three of the other options, as reductions that were combined into one stay synchronous.
COMPILER_OPTIONS: dict[str, dict[str, Any]] = {
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
DETERMINISTIC: dict[str, dict[str, Any]] = {
    "gpu": {"xla_gpu_exclude_nondeterministic_ops": True, "xla_gpu_enable_triton_gemm": False},
}


def compiler_options(platform: str, deterministic: bool = False) -> dict[str, Any] | None:
    """What to compile a step with for a platform ("cpu", "tpu" or "gpu"); None leaves the compiler alone.

    Args:
      deterministic: two equal steps give equal bits, at some cost in speed on GPU. A CPU and a TPU do so anyway.
    """
    return COMPILER_OPTIONS.get(platform, {}) | (DETERMINISTIC.get(platform, {}) if deterministic else {}) or None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What training carries from step to step: float32 parameters, optax's state, and the count of steps (int32)."""

    model: SmolLM3
    optimizer: Any
    step: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Packed rows: tokens int32 [B, T]; segment_ids int32 [B, T], 0 is padding, other values name documents."""

    tokens: Any
    segment_ids: Any


@dataclasses.dataclass(frozen=True)
class StepOptions:
    """How a step computes: the dtype of its products; a key of REMAT; into how many micro-batches the
    batch's rows are split; the weight of the z-loss."""

    dtype: str = "bfloat16"
    remat: str = "dots"
    micro_batches: int = 1
    z_loss: float = 0.0


def init_state(model: Any, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step. It keeps the model's arrays; the step donates them."""
    return TrainState(model, optimizer.init(model), jnp.zeros((), jnp.int32))


@functools.partial(jax.jit, static_argnames=("optimizer", "options"), donate_argnames="state")
def train_step(
    state: TrainState,
    batch: Batch,
    *,
    optimizer: optax.GradientTransformation,
    options: StepOptions,
) -> tuple[TrainState, dict[str, Array]]:
    """The state after one update, and float32 metrics: loss (nats a token), objective (loss and z-loss),
    grad_norm, tokens (that had a label), updates (before this one), and bad (how many micro-batches had a loss
    or gradient that was not finite: they are left out, and if all are, the loss is NaN and the state stays as it
    was)."""
    model: Any = state.model  # optax's types know no modules
    ((total, (nll, count)), gradients), bad = _gradients(model, batch, options)
    count = jnp.maximum(count, 1)
    gradients = jax.tree.map(lambda x: x / count, gradients)
    if model.sharding is not None:
        gradients = jax.lax.with_sharding_constraint(gradients, state_shardings(gradients, model.sharding))
    with jax.numpy_dtype_promotion("standard"):  # optax mixes floats with its int32 count, whatever the caller forbids
        updates, kept = optimizer.update(gradients, state.optimizer, model)
    updated: Any = optax.apply_updates(model, updates)
    new = TrainState(updated, kept, state.step + 1)
    old = dataclasses.replace(state, step=new.step)
    good = bad < options.micro_batches
    metrics = {"loss": jnp.where(good, nll / count, jnp.nan), "objective": jnp.where(good, total / count, jnp.nan)}
    metrics |= {"grad_norm": optax.tree.norm(gradients), "tokens": count, "bad": bad, "updates": updates_of(state)}
    return jax.tree.map(functools.partial(jnp.where, good), new, old), metrics


def updates_of(state: TrainState) -> Array:
    """How many updates the optimizer has made since its moments were fresh; 0 if it does not count."""
    counts = optax.tree.get_all_with_path(state.optimizer, "count")
    return counts[0][1] if counts else jnp.zeros((), jnp.int32)


def loss_sums(model: SmolLM3, batch: Batch, options: StepOptions) -> tuple[Array, tuple[Array, Array]]:
    """(what is minimised, (cross-entropy, labels)), all of them sums over the batch, float32."""
    sharding = model.sharding
    cast = jax.tree.map(lambda x: x.astype(options.dtype), model)
    if model.platform == "cpu":
        # Each layer casts its own: XLA:CPU writes gradients into a stack of bfloat16 by way of all of it in float32.
        cast.layers = model.layers
    if model.platform == "gpu":
        # Left to itself XLA for GPU rounds the table after every device has gathered it, at twice the bytes.
        cast.embed = jax.lax.optimization_barrier(cast.embed)
    tokens_BT, segments_BT = batch.tokens, batch.segment_ids
    labels_BT, mask_BT = next_tokens(tokens_BT, segments_BT)
    positions_BT = None
    order = None if sharding is None else sharding.row_order(tokens_BT.shape[1])
    if order is not None:
        positions_BT = jnp.broadcast_to(jnp.array(order, jnp.int32), tokens_BT.shape)
        tokens_BT, segments_BT, labels_BT, mask_BT = (x[:, order] for x in (tokens_BT, segments_BT, labels_BT, mask_BT))
    x_BTD, _ = cast.hidden(tokens_BT, positions_BT, segments_BT, remat=REMAT[options.remat])
    head = cast.embed if cast.head is None else cast.head
    lean = options.remat in ("full", "offload")
    total, nll = cross_entropy(
        x_BTD, head[...], labels_BT, mask_BT, z_loss=options.z_loss, by_words=lean, sharding=sharding
    )
    return total, (nll, mask_BT.sum().astype(jnp.float32))


def _gradients(
    model: SmolLM3, batch: Batch, options: StepOptions
) -> tuple[tuple[tuple[Array, tuple[Array, Array]], Any], Array]:
    """((sums, gradients), how many micro-batches were not finite)."""
    gradient = jax.value_and_grad(loss_sums, has_aux=True)

    def is_bad(found: Any) -> Array:
        return ~jnp.isfinite(found[0][0] + optax.tree.norm(found[1]))

    if options.micro_batches == 1:
        found = gradient(model, batch, options)
        return found, is_bad(found).astype(jnp.float32)
    # Rows are dealt out, so that each micro-batch has some of every device's.
    micro = jax.tree.map(lambda x: x.reshape(-1, options.micro_batches, *x.shape[1:]).swapaxes(0, 1), batch)

    def step(carry: tuple, batch: Batch) -> tuple:
        found = gradient(model, batch, options)
        bad = is_bad(found)
        added = jax.tree.map(lambda old, new: old + jnp.where(bad, 0, new), carry[0], found)
        return (added, carry[1] + bad.astype(jnp.float32)), None

    zeros = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype),
        jax.eval_shape(lambda: gradient(model, jax.tree.map(lambda x: x[0], micro), options)),
    )
    return jax.lax.scan(step, (zeros, jnp.zeros((), jnp.float32)), micro)[0]


def state_shardings(tree: Any, sharding: Sharding) -> Any:
    """NamedShardings for a tree of parameters or of an optimizer's state: each lies as its parameter does."""

    def place(x: Any) -> Any:
        if not isinstance(x, nnx.Variable):
            return NamedSharding(sharding.mesh, sharding.spec())
        axes, shape = x.get_metadata("axes"), x.get_value().shape
        return x.replace(sharding.named("parameter", axes, shape))

    return jax.tree.map(place, tree, is_leaf=lambda x: isinstance(x, nnx.Variable))
