"""LoRA and DoRA for training: a frozen base, in a dtype or a scheme of its own, and adapters on its projections.

The adapters are parameters of the model like others, named "layers.q.a" and so on, so that the state's trained part,
the optimizer, checkpoints and the table of sharding rules need to know nothing of them.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from sharding.rules import Sharding

from ..config import DTYPES, WEIGHT_SCHEMES, GenerationConfig, ModelConfig
from ..lora import LoraWeight, lengths
from ..model import Block, SmolLM3
from ..quantize import QuantizedWeight, Weight
from ..weights.key_map import EMBED_NAME, HEAD_NAME, PROJECTIONS, abstract_model, hf_tensors
from ..weights.load import Checkpoint, common_dtype, fill
from ..weights.quantized import dequantize_tensors, quantize_tensors, with_scheme
from ..weights.stored import StoredTensor, cast
from .settings import LoraSettings

# The names of what is trained, as `TrainState.trainable` has them.
TRAINED = r"layers\.\w+\.(a|b|magnitude)"


def scale_of(settings: LoraSettings) -> float:
    """What B A is multiplied by."""
    alpha = settings.alpha or 2.0 * settings.rank
    return alpha / (math.sqrt(settings.rank) if settings.rslora else settings.rank)


def targets_of(settings: LoraSettings) -> tuple[str, ...]:
    """Hugging Face's names of the projections that are adapted, in the table's order."""
    return tuple(name for name in PROJECTIONS if not settings.targets or name in settings.targets)


def attach(model: SmolLM3, settings: LoraSettings, seed: int = 0) -> SmolLM3:
    """The model with adapters that change nothing yet: B is 0, A uniform as in PEFT, DoRA's magnitudes the rows' own
    lengths. It shares the model's arrays, whose layers are stacked; its own lie by the model's sharding."""
    assert isinstance(model.layers, Block)
    layers = jax.tree.map(lambda x: x, model.layers)  # another Block of the same arrays

    def parameter(name: str, x: Array, *axes: str) -> nnx.Param:
        if model.sharding is not None:
            x = jax.device_put(x, model.sharding.named(f"layers.{name}", axes, x.shape))
        return nnx.Param(x, axes=axes)

    for i, target in enumerate(targets_of(settings)):
        name = PROJECTIONS[target]
        key = jax.random.fold_in(jax.random.key(seed), i)
        contracted = 2 if name == "o" else 1
        setattr(
            layers, name, _fresh(getattr(layers, name), contracted, settings, key, functools.partial(parameter, name))
        )
    out = jax.tree.map(lambda x: x, model)
    out.layers = layers
    return out


def _fresh(
    base: Weight, contracted: int, settings: LoraSettings, key: Array, parameter: Callable[..., nnx.Param]
) -> LoraWeight:
    """parameter(array, *axes) is one that lies where it should."""
    axes = (base.values if isinstance(base, QuantizedWeight) else base).get_metadata("axes")
    layers, out, inner = base.shape[0], base.shape[1:-contracted], base.shape[-contracted:]
    bound = 1 / math.sqrt(math.prod(inner))
    a = jax.random.uniform(key, (layers, settings.rank, *inner), jnp.float32, -bound, bound)
    weight = LoraWeight(
        base,
        parameter(a, "layers", "rank", *axes[-contracted:]),
        parameter(jnp.zeros((layers, *out, settings.rank), jnp.float32), *axes[:-contracted], "rank"),
        scale=scale_of(settings),
        dropout=settings.dropout,
    )
    if not settings.dora:
        return weight
    magnitude = jax.lax.map(functools.partial(lengths, contracted=contracted), weight)  # a layer at a time
    return weight.replaced(magnitude=parameter(magnitude, *axes[:-contracted]))


def with_dropout(model: SmolLM3, key: Array) -> SmolLM3:
    """The model as it is trained in one step: what its adapters drop is drawn from the key."""

    def seeded(weight: LoraWeight, key: Array) -> LoraWeight:
        keys = jax.random.split(key, weight.shape[0])
        return weight.replaced(seed=nnx.Variable(jax.random.key_data(keys)))

    layers, found = model.layers, _adapters(model)
    if not any(weight.dropout for weight in found.values()):
        return model
    out = jax.tree.map(lambda x: x, model)
    out.layers = jax.tree.map(lambda x: x, layers)
    for i, (name, weight) in enumerate(found.items()):
        setattr(out.layers, name, seeded(weight, jax.random.fold_in(key, i)))
    return out


def _adapters(model: SmolLM3) -> dict[str, LoraWeight]:
    found = {name: getattr(model.layers, name, None) for name in PROJECTIONS.values()}
    return {name: weight for name, weight in found.items() if isinstance(weight, LoraWeight)}


def base_of(checkpoint: Checkpoint, settings: LoraSettings) -> str:
    """The dtype, or the scheme of weights, that the frozen part is kept in."""
    own = checkpoint.config.quantization
    return settings.base or (common_dtype(checkpoint.tensors) if own is None else own.weights)


def abstract_base(
    config: ModelConfig,
    base: str,
    dtype: str,
    generation: GenerationConfig | None = None,
    sharding: Sharding | None = None,
) -> SmolLM3:
    """The stacked base without arrays. Quantized are the layers' weights; embedding and head stay plain, as the loss
    wants them.

    Args:
      base: a dtype, or a scheme of weights; dtype: of what a scheme leaves plain.
    """
    config = dataclasses.replace(config, quantization=None)
    model = abstract_model(config, base if base in DTYPES else dtype, generation, sharding=sharding)
    if base not in DTYPES:
        model.layers = abstract_model(with_scheme(config, base), dtype, generation).layers
    return model


def shapes_of(
    config: ModelConfig,
    settings: LoraSettings,
    base: str,
    dtype: str,
    generation: GenerationConfig | None = None,
    sharding: Sharding | None = None,
) -> SmolLM3:
    """What `attach` makes of `abstract_base`, without arrays."""
    model = abstract_base(config, base, dtype, generation, sharding)
    return jax.eval_shape(lambda model: attach(model, settings), model)


def planned(config: ModelConfig, settings: LoraSettings, sharding: Sharding | None = None) -> SmolLM3:
    """`shapes_of` where no checkpoint is read: one as its config.json says is in the config's dtype."""
    dtype = config.dtype or "float32"
    own = dtype if config.quantization is None else config.quantization.weights
    return shapes_of(config, settings, settings.base or own, dtype, sharding=sharding)


def load_base(
    checkpoint: Checkpoint, config: ModelConfig, settings: LoraSettings, sharding: Sharding | None
) -> SmolLM3:
    """`abstract_base` with its arrays, read straight to where they stay."""
    base, plain_config = base_of(checkpoint, settings), dataclasses.replace(config, quantization=None)
    model = abstract_base(config, base, common_dtype(checkpoint.tensors), checkpoint.generation_config, sharding)
    plain: Mapping[str, StoredTensor] = checkpoint.tensors
    if checkpoint.config.quantization is not None:
        plain = dequantize_tensors(checkpoint.config, checkpoint.tensors)[1]
    where, tensors = hf_tensors(plain_config), dict(plain)
    if base in WEIGHT_SCHEMES:
        scheme = with_scheme(plain_config, base)
        own = checkpoint.config.quantization
        tensors |= checkpoint.tensors if own is not None and own.weights == base else quantize_tensors(scheme, plain)
        tensors |= {name: plain[name] for name in (EMBED_NAME, HEAD_NAME) if name in plain}
        where = {name: hf for name, hf in hf_tensors(scheme).items() if hf.layer is not None} | {
            name: hf for name, hf in where.items() if hf.layer is None
        }
    fill(model, where, tensors)
    return model


def base_tensors(checkpoint: Checkpoint, settings: LoraSettings) -> dict[str, StoredTensor]:
    """The base as an adapter was trained on it, as plain float32 tensors: rounded, or quantized and back, where
    `lora.base` asked for it."""
    model_config, base = dataclasses.replace(checkpoint.config, quantization=None), base_of(checkpoint, settings)
    plain = dict(checkpoint.tensors)
    if checkpoint.config.quantization is not None:
        plain = dequantize_tensors(checkpoint.config, checkpoint.tensors)[1]
    if base in WEIGHT_SCHEMES:
        scheme, own = with_scheme(model_config, base), checkpoint.config.quantization
        same = own is not None and own.weights == base
        quantized = dequantize_tensors(scheme, checkpoint.tensors if same else quantize_tensors(scheme, plain))[1]
        quantized |= {name: plain[name] for name, hf in hf_tensors(model_config).items() if hf.layer is None}
        plain = quantized
    else:
        plain = {name: cast(tensor, base) for name, tensor in plain.items()}
    return {name: cast(tensor, "float32") for name, tensor in plain.items()}
