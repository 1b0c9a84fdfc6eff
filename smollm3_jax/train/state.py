"""What training carries from step to step, and what a step takes in.

Shapes: B rows, T tokens of a row.
"""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array
from jax.tree_util import KeyPath

from sharding.arrays import shardings, specs_of
from sharding.rules import PyTree, Sharding

from ..errors import OptionError
from ..model import SmolLM3
from ..weights.key_map import parameters


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Parameters, optax's state and the count of steps.

    model: a SmolLM3 with all parameters, trained and frozen ones; float32, but for the frozen base of an adapter.
    optimizer: optax's state, of the trained parameters alone.
    step: int32, updates and skipped ones.
    trainable: a regular expression that the whole name of each trained parameter matches ("layers.q"; the names are
      those of weights/key_map.py); None trains all.
    """

    model: SmolLM3
    optimizer: optax.OptState
    step: Array
    trainable: str | None = dataclasses.field(default=None, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Packed rows: on the host NumPy's arrays, in a step JAX's.

    tokens: int32 [B, T].
    segment_ids: int32 [B, T]; 0 is padding, other values name documents.
    weights: float32 [B, T]; weights[b, t] is what the prediction made at token t, of the token at t + 1, counts by.
      It counts only where t + 1 is of the same document. None counts each prediction once.
    reference: float32 [B, T], of preferences: at each token of a completion, the log-probability that the reference
      gives all of the completion's weighted tokens.
    """

    tokens: Array
    segment_ids: Array
    weights: Any = None  # an Array or None, as the objective wants it
    reference: Any = None


def init_state(model: SmolLM3, optimizer: optax.GradientTransformation, trainable: str | None = None) -> TrainState:
    """The state before the first step. It keeps the model's arrays; the step donates them."""
    return TrainState(model, optimizer.init(split(model, trainable)[0]), jnp.zeros((), jnp.int32), trainable)


def split(model: SmolLM3, trainable: str | None) -> tuple[PyTree, PyTree]:
    """(the trained part, the frozen part) of a model: each is the model without the other's arrays.

    Raises:
      OptionError: `trainable` is no regular expression, or matches no parameter's name.
    """
    names = list(parameters(model))
    try:
        matches = trainable is None or any(re.fullmatch(trainable, name) for name in names)
    except re.error as error:
        raise OptionError(f"trainable is {trainable!r}, which is no regular expression: {error}") from None
    if not matches:
        raise OptionError(f"trainable is {trainable!r}, which matches no parameter; they are {', '.join(names)}")

    def part(trained: bool) -> PyTree:
        def kept(path: KeyPath, x: nnx.Variable) -> nnx.Variable:
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            return x if (trainable is None or bool(re.fullmatch(trainable, name))) == trained else x.replace(None)

        return jax.tree_util.tree_map_with_path(kept, model, is_leaf=lambda x: isinstance(x, nnx.Variable))

    return part(True), part(False)


def merge(trained: PyTree, frozen: PyTree) -> SmolLM3:
    """The model that `split` took apart."""
    return jax.tree.map(lambda a, b: b if a is None else a, trained, frozen, is_leaf=lambda x: x is None)


def count(model: PyTree) -> int:
    """How many numbers the arrays of a model, or of a part of one, have."""
    return sum(x.size for x in jax.tree.leaves(model))


def updates_of(state: TrainState) -> Array:
    """How many updates the optimizer has made since its moments were fresh; 0 if it does not count."""
    counts = optax.tree.get_all_with_path(state.optimizer, "count")
    return counts[0][1] if counts else jnp.zeros((), jnp.int32)


def state_shardings(tree: PyTree, sharding: Sharding) -> PyTree:
    """NamedShardings for a tree of parameters or of an optimizer's state: each lies as its parameter does."""
    return shardings(specs_of(tree), sharding)
