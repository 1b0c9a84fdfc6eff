"""One training step: loss, gradients, update. Parameters and what the optimizer keeps are float32.

Shapes: M micro-batches.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import optax
from jax import Array

from sharding.rules import PyTree

from .lora import with_dropout
from .objectives import Objective
from .objectives.pretrain import Pretrain
from .options import StepOptions
from .state import Batch, TrainState, merge, split, state_shardings, updates_of

PRETRAINING = Pretrain()


@functools.partial(jax.jit, static_argnames=("objective", "optimizer", "options"), donate_argnames="state")
def train_step(
    state: TrainState,
    batch: Batch,
    *,
    objective: Objective = PRETRAINING,
    optimizer: optax.GradientTransformation,
    options: StepOptions,
) -> tuple[TrainState, dict[str, Array]]:
    """The state after one update, and float32 metrics.

    These are, in pretraining, loss (nats a token), objective (loss and z-loss), grad_norm (of the trained parameters),
    tokens (that had a label, or the sum of their weights), updates (before this one), and bad (how many micro-batches
    had a loss or gradient that was not finite: they are left out, and if all are, the loss is NaN and the state stays
    as it was). Of preferences there are pairs as well, whose mean the loss is. Frozen parameters come out as they went
    in.
    """
    trained, frozen = split(state.model, state.trainable)
    key = jax.random.fold_in(jax.random.key(options.seed), state.step)
    ((total, sums), gradients), bad = _gradients(trained, frozen, batch, objective, options, key)
    counts = {name: sums.pop(name) for name in ("tokens", "pairs") if name in sums}
    # Of nothing the sums are 0, and so are means. Weights may add up to less than 1.
    counts = {name: jnp.maximum(x, jnp.finfo(jnp.float32).tiny) for name, x in counts.items()}
    count = counts.get("pairs", counts["tokens"])
    gradients = jax.tree.map(lambda x: x / count, gradients)
    if state.model.sharding is not None:
        gradients = jax.lax.with_sharding_constraint(gradients, state_shardings(gradients, state.model.sharding))
    with jax.numpy_dtype_promotion("standard"):  # optax mixes floats with its int32 count, whatever the caller forbids
        updates, kept = optimizer.update(gradients, state.optimizer, trained)
    updated = merge(optax.apply_updates(trained, updates), frozen)
    new = dataclasses.replace(state, model=updated, optimizer=kept, step=state.step + 1)
    old = dataclasses.replace(state, step=new.step)
    good = bad < options.micro_batches
    metrics = {name: jnp.where(good, x / count, jnp.nan) for name, x in {**sums, "objective": total}.items()}
    metrics |= {"grad_norm": optax.tree.norm(gradients), **counts, "bad": bad, "updates": updates_of(state)}
    return jax.tree.map(functools.partial(jnp.where, good), new, old), metrics


def _gradients(
    trained: PyTree, frozen: PyTree, batch: Batch, objective: Objective, options: StepOptions, key: Array
) -> tuple[tuple[tuple[Array, dict[str, Array]], PyTree], Array]:
    """((sums, gradients of the trained part), how many micro-batches were not finite)."""

    def sums(trained: PyTree, batch: Batch, key: Array) -> tuple[Array, dict[str, Array]]:
        return objective(with_dropout(merge(trained, frozen), key), batch, options)

    gradient = jax.value_and_grad(sums, has_aux=True)

    def is_bad(found: tuple[tuple[Array, dict[str, Array]], PyTree]) -> Array:
        return ~jnp.isfinite(found[0][0] + optax.tree.norm(found[1]))

    if options.micro_batches == 1:
        found = gradient(trained, batch, key)
        return found, is_bad(found).astype(jnp.float32)
    # Rows are dealt out, so that each micro-batch has some of every device's.
    micro = jax.tree.map(lambda x: x.reshape(-1, options.micro_batches, *x.shape[1:]).swapaxes(0, 1), batch)

    def step(carry: tuple, part: tuple[Batch, Array]) -> tuple:
        found = gradient(trained, *part)
        bad = is_bad(found)
        added = jax.tree.map(lambda old, new: old + jnp.where(bad, 0, new), carry[0], found)
        return (added, carry[1] + bad.astype(jnp.float32)), None

    zeros = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype),
        jax.eval_shape(lambda: gradient(trained, jax.tree.map(lambda x: x[0], micro), key)),
    )
    keys = jax.random.split(key, options.micro_batches)
    return jax.lax.scan(step, (zeros, jnp.zeros((), jnp.float32)), (micro, keys))[0]
