"""Adapters beside a model that stays as it is: several models of their own over one base, for the engine.

Shapes: A adapters, r rank, N outputs, K inputs of a projection.
"""

import copy
import dataclasses
import itertools
from collections.abc import Sequence

import jax
import numpy as np
from flax import nnx

from sharding.arrays import ArraySpec
from sharding.rules import Sharding

from ..config import ModelConfig
from ..errors import CheckpointFormatError, OptionError
from ..lora import LoraStack
from ..model import SmolLM3
from ..quantize import QuantizedWeight, Weight
from .key_map import PROJECTIONS, hf_tensors
from .peft import Adapter, LowRank, check_base, parse_adapter, read_adapter


@dataclasses.dataclass(frozen=True)
class ServedAdapter:
    """name: what requests call it; scale: what its addition is multiplied by, beside its own."""

    name: str
    adapter: Adapter
    scale: float = 1.0


def read_served(words: Sequence[str], base: str) -> list[ServedAdapter]:
    """The adapters of [NAME=]DIR[:SCALE], each of which is a model of its own beside one that is called `base`.

    Raises:
      OptionError: a word names no adapter, or two models have one name.
      CheckpointFormatError: an adapter is damaged, or of a kind that is not read.
    """
    found = [ServedAdapter(name, read_adapter(folder), scale) for name, folder, scale in map(parse_adapter, words)]
    names = [base, *(one.name for one in found)]
    for word, one in zip(words, found, strict=True):
        if names.count(one.name) > 1:
            raise OptionError(f"--adapter {word}: two models are called {one.name!r}; name this one: NAME={word}")
    return found


def check_served(config: ModelConfig, adapters: Sequence[ServedAdapter]) -> None:
    """
    Raises:
      CheckpointFormatError: an adapter is of another model, or a DoRA adapter.
    """
    shapes = {name: hf.shape for name, hf in hf_tensors(dataclasses.replace(config, quantization=None)).items()}
    for one in adapters:
        check_base(one.adapter, shapes)
        if any(part.magnitude is not None for part in one.adapter.parts.values()):
            folder = one.adapter.folder
            raise CheckpointFormatError(
                f"{folder} is a DoRA adapter, which changes the weights themselves and cannot lie beside them: fold it "
                f"in (smollm3 merge BASE --adapter {folder} --out OUT), and serve what comes out"
            )


def attach(model: SmolLM3, adapters: Sequence[ServedAdapter]) -> SmolLM3:
    """The model, one Block a layer, with adapters beside its weights, in its dtype; it shares the model's arrays.

    Raises:
      CheckpointFormatError: as `check_served`, or an adapter's numbers are not finite in this dtype.
    """
    assert isinstance(model.layers, nnx.List)
    check_served(model.config, adapters)
    out = copy.copy(model)
    layers = [copy.copy(layer) for layer in model.layers]
    for name, hf in hf_tensors(dataclasses.replace(model.config, quantization=None)).items():
        parts = [one.adapter.parts.get(name) for one in adapters]
        if hf.layer is None or not any(parts):
            continue
        kind = hf.param.removeprefix("layers.")
        arrays = _stacked(name, adapters, parts, np.dtype(model.dtype))
        base = getattr(layers[hf.layer], kind)
        setattr(layers[hf.layer], kind, _beside(base, f"layers.{hf.layer}.{kind}", *arrays, model.sharding))
    out.layers = nnx.List(layers)
    out.adapters = tuple(one.name for one in adapters)
    return out


def _stacked(
    name: str, adapters: Sequence[ServedAdapter], parts: Sequence[LowRank | None], dtype: np.dtype
) -> tuple[np.ndarray, np.ndarray]:
    """a [A, r, K] and b [N, A, r] of one weight, with its scale; zeros where an adapter has less."""
    there = [part for part in parts if part is not None]
    rank = max(part.a.shape[0] for part in there)
    a_ArK = np.zeros((len(parts), rank, there[0].a.shape[1]), dtype)
    b_NAr = np.zeros((there[0].b.shape[0], len(parts), rank), dtype)
    for i, (one, part) in enumerate(zip(adapters, parts, strict=True)):
        if part is None:
            continue
        own = part.a.shape[0]
        with np.errstate(over="ignore"):  # of a cast: the numbers are looked at next
            a_ArK[i, :own] = part.a.read()
            # As a folded one: the product with the scale is rounded once.
            b_NAr[:, i, :own] = np.float32(one.scale * part.scale) * part.b.read().astype(np.float32)
        if not all(np.isfinite(x.astype(np.float32)).all() for x in (a_ArK[i], b_NAr[:, i])):
            raise CheckpointFormatError(
                f"{one.adapter.folder}: what it has of {name} is not finite, or too large for {dtype.name}"
            )
    return a_ArK, b_NAr


def _beside(base: Weight, path: str, a_ArK: np.ndarray, b_NAr: np.ndarray, sharding: Sharding | None) -> LoraStack:
    """A weight with adapters beside it; path: the weight's, "layers.3.q"."""

    def parameter(part: str, x: np.ndarray, of: ArraySpec) -> nnx.Param:
        x, at = x.reshape(of.shape), _first(base)[...].sharding
        if sharding is not None:
            at = sharding.named(f"{path}.{part}", of.axes, of.shape)
        return nnx.Param(jax.make_array_from_callback(x.shape, at, lambda index: x[index]), axes=of.axes)

    count, rank, _ = a_ArK.shape
    of_a, of_b = _specs(base, path.rpartition(".")[2], count, rank, a_ArK.dtype)
    return LoraStack(base, parameter("a", a_ArK, of_a), parameter("b", b_NAr, of_b))


def planned(model: SmolLM3, count: int, rank: int) -> SmolLM3:
    """What `attach` makes of a model without arrays, of `count` adapters of this rank on all projections."""
    assert isinstance(model.layers, nnx.List)
    out = copy.copy(model)
    layers = [copy.copy(layer) for layer in model.layers]
    for layer, kind in itertools.product(layers, PROJECTIONS.values()):
        base = getattr(layer, kind)
        specs = _specs(base, kind, count, rank, model.dtype)
        parts = [nnx.Param(jax.ShapeDtypeStruct(of.shape, of.dtype), axes=of.axes) for of in specs]
        setattr(layer, kind, LoraStack(base, *parts))
    out.layers = nnx.List(layers)
    out.adapters = tuple(f"adapter-{1 + i}" for i in range(count))
    return out


def _specs(base: Weight, kind: str, count: int, rank: int, dtype: np.dtype) -> tuple[ArraySpec, ArraySpec]:
    """Of the a and the b of `count` adapters beside a projection's weight."""
    axes = _first(base).get_metadata("axes")
    split = 1 if kind == "o" else len(axes) - 1  # what comes into o has heads and their width
    of_a = ArraySpec((count, rank, *base.shape[split:]), dtype, ("adapters", "rank", *axes[split:]))
    return of_a, ArraySpec((*base.shape[:split], count, rank), dtype, (*axes[:split], "adapters", "rank"))


def _first(base: Weight) -> nnx.Param:
    """A weight's numbers, or what stands for them."""
    return base.values if isinstance(base, QuantizedWeight) else base
