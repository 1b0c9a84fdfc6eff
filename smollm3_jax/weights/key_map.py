"""The one table that says what every parameter is called elsewhere; import and export both read it.

Shapes need no table: a Hugging Face tensor has the parameter's dimensions in the same order, without
the leading `layers` and with heads and head width fused into rows. A quantized weight's values go by the
weight's name, its scale and minimum by that name and ".scale" and ".minimum".
"""

import dataclasses
import functools
import math
import re
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx
from jax.typing import DTypeLike

from sharding.rules import Sharding

from ..config import AXIS_FIELDS, GenerationConfig, ModelConfig
from ..model import SmolLM3, unstacked

# parameter of the model, Hugging Face name, GGUF name; {} is the layer. In Hugging Face's order,
# so that shards come out as the reference implementation writes them.
TABLE = (
    ("embed", "model.embed_tokens.weight", "token_embd.weight"),
    ("layers.q", "model.layers.{}.self_attn.q_proj.weight", "blk.{}.attn_q.weight"),
    ("layers.q_bias", "model.layers.{}.self_attn.q_proj.bias", "blk.{}.attn_q.bias"),
    ("layers.k", "model.layers.{}.self_attn.k_proj.weight", "blk.{}.attn_k.weight"),
    ("layers.k_bias", "model.layers.{}.self_attn.k_proj.bias", "blk.{}.attn_k.bias"),
    ("layers.v", "model.layers.{}.self_attn.v_proj.weight", "blk.{}.attn_v.weight"),
    ("layers.v_bias", "model.layers.{}.self_attn.v_proj.bias", "blk.{}.attn_v.bias"),
    ("layers.o", "model.layers.{}.self_attn.o_proj.weight", "blk.{}.attn_output.weight"),
    ("layers.o_bias", "model.layers.{}.self_attn.o_proj.bias", "blk.{}.attn_output.bias"),
    ("layers.gate", "model.layers.{}.mlp.gate_proj.weight", "blk.{}.ffn_gate.weight"),
    ("layers.gate_bias", "model.layers.{}.mlp.gate_proj.bias", "blk.{}.ffn_gate.bias"),
    ("layers.up", "model.layers.{}.mlp.up_proj.weight", "blk.{}.ffn_up.weight"),
    ("layers.up_bias", "model.layers.{}.mlp.up_proj.bias", "blk.{}.ffn_up.bias"),
    ("layers.down", "model.layers.{}.mlp.down_proj.weight", "blk.{}.ffn_down.weight"),
    ("layers.down_bias", "model.layers.{}.mlp.down_proj.bias", "blk.{}.ffn_down.bias"),
    ("layers.attn_norm", "model.layers.{}.input_layernorm.weight", "blk.{}.attn_norm.weight"),
    ("layers.mlp_norm", "model.layers.{}.post_attention_layernorm.weight", "blk.{}.ffn_norm.weight"),
    ("norm", "model.norm.weight", "output_norm.weight"),
    ("head", "lm_head.weight", "output.weight"),
)
# Part of a quantized weight -> what its name ends with; a plain weight is one part without a name.
PARTS = {"": "", ".values": "", ".scale": ".scale", ".minimum": ".minimum"}
# Hugging Face's name of a layer's projection -> the parameter: what an adapter can sit on.
PROJECTIONS = {
    name.split(".")[-2]: param.removeprefix("layers.") for param, name, _ in TABLE if name.endswith("_proj.weight")
}
EMBED_NAME, HEAD_NAME = "model.embed_tokens.weight", "lm_head.weight"


@dataclasses.dataclass(frozen=True)
class HFTensor:
    """Where one Hugging Face tensor lives in the model, and what its dimensions must be.

    `layer` is None for what is not stacked; `dims` names each dimension by its config fields; `dtype` is
    None for a plain tensor, which may be of any float dtype.
    """

    param: str
    layer: int | None
    shape: tuple[int, ...]
    dims: tuple[str, ...]
    dtype: str | None = None


def parameters(model: SmolLM3) -> dict[str, nnx.Param]:
    """Every parameter by its path ("embed", "layers.q", ...), abstract or not, in the table's order."""
    leaves = jax.tree_util.tree_leaves_with_path(model, is_leaf=lambda x: isinstance(x, nnx.Variable))
    found = {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
    ordered = [param + part for param, _, _ in TABLE for part in PARTS]
    return {param: found.pop(param) for param in ordered if param in found} | found


def locate(hf: HFTensor, params: Mapping[str, object]) -> tuple[str, int | None]:
    """The path of the parameter that holds an HF tensor, and its index there if layers are stacked."""
    if hf.layer is None or hf.param in params:
        return hf.param, hf.layer
    return hf.param.replace("layers.", f"layers.{hf.layer}.", 1), None


def abstract_model(
    config: ModelConfig,
    dtype: DTypeLike,
    generation_config: GenerationConfig | None = None,
    stacked: bool = True,
    sharding: Sharding | None = None,
) -> SmolLM3:
    """The model with `jax.ShapeDtypeStruct`s in place of arrays; its layers as one stack, or one by one."""

    def build() -> SmolLM3:
        own: dict[str, Any] = {"dtype": dtype, "generation_config": generation_config, "sharding": sharding}
        model = SmolLM3(config, rngs=nnx.Rngs(0), **own)
        return model if stacked else unstacked(model)

    return jax.eval_shape(build)


@functools.cache
def count_parameters(config: ModelConfig) -> int:
    """How many numbers a model of this config holds."""
    return sum(math.prod(x.shape) for x in jax.tree.leaves(abstract_model(config, "float32")))


def hf_tensors(config: ModelConfig) -> dict[str, HFTensor]:
    """Every Hugging Face tensor that a checkpoint of this config holds -> where it lives, in Hugging Face's order."""
    params = parameters(abstract_model(config, "float32"))
    first, stacked, last = {}, {}, {}
    for table_param, table_name, _ in TABLE:
        for part, ending in PARTS.items():
            param, hf_name = table_param + part, table_name + ending
            if param not in params:
                continue
            axes, shape = params[param].get_metadata("axes"), params[param].shape
            dtype = params[param].dtype.name if part else None
            if axes[0] == "layers":
                stacked[hf_name] = (param, *_hf_dims(config, axes[1:], shape[1:]), dtype)
            else:
                where = last if stacked else first
                where[hf_name] = HFTensor(param, None, *_hf_dims(config, axes, shape), dtype)
    layers = {
        name.format(layer): HFTensor(param, layer, *rest)
        for layer in range(config.num_hidden_layers)
        for name, (param, *rest) in stacked.items()
    }
    return first | layers | last


def _hf_dims(
    config: ModelConfig, axes: tuple[str, ...], shape: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """(shape, names of its dimensions): heads and head width are one dimension there."""
    groups: list[list[int]] = []
    for i, axis in enumerate(axes):
        if axis == "head":
            groups[-1].append(i)
        else:
            groups.append([i])

    def name(group: list[int], length: int) -> str:
        whole = math.prod(config.axis_sizes[axes[i]] for i in group)  # of which packing leaves less
        fields = " * ".join(AXIS_FIELDS[axes[i]] for i in group)
        return fields if whole == length else f"{fields} / {whole // length}"

    lengths = tuple(math.prod(shape[i] for i in group) for group in groups)
    return lengths, tuple(name(group, length) for group, length in zip(groups, lengths, strict=True))


def gguf_name(hf: HFTensor) -> str:
    """What GGUF calls a tensor."""
    return next(name for param, _, name in TABLE if param == hf.param).format(hf.layer)


@functools.cache
def _gguf_rows() -> dict[str, str]:
    return {gguf_name: hf_name for _, hf_name, gguf_name in TABLE}


def hf_name_of_gguf(name: str) -> str | None:
    """The Hugging Face name of a GGUF tensor; None if the table does not have it."""
    layer = re.match(r"blk\.(\d+)\.", name)
    if layer is None:
        return _gguf_rows().get(name)
    row = _gguf_rows().get(f"blk.{{}}.{name[layer.end() :]}")
    return row and row.format(layer[1])
