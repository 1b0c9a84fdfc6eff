"""SmolLM3: a pre-norm Llama transformer whose every fourth layer has no position embedding.

The modules hold parameters and nothing else; what runs is plain `jax.jit` and `jax.lax.scan` over
them. Layers are stacked along a leading axis, so compile time does not grow with depth. Weights keep
Hugging Face's orientation ([out, in], heads split from head width), so that conversion is a rename.

Shapes: B batch, T query length, S key length, D model width, F feed-forward width, H query heads,
K key-value heads, E head width, V vocabulary, L layers.
"""

from typing import Any

import chex
import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from . import rope
from .attention import attention
from .config import GenerationConfig, ModelConfig
from .kv_cache import KVCache, advance, append


class Block(nnx.Module):
    """The parameters of all layers, stacked; inside the scan, of one. `axes` names the dimensions."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype: Any):
        def normal(*axes: str) -> nnx.Param:
            return _normal(config, ("layers", *axes), rngs, dtype)

        def constant(value: float, *axes: str) -> nnx.Param:
            shape = [config.axis_sizes[axis] for axis in ("layers", *axes)]
            return nnx.Param(jnp.full(shape, value, dtype), axes=("layers", *axes))

        def bias(present: bool, *axes: str) -> nnx.Param | None:
            return constant(0, *axes) if present else None

        self.attn_norm = constant(1, "embed")
        self.q = normal("heads", "head", "embed")
        self.k = normal("kv_heads", "head", "embed")
        self.v = normal("kv_heads", "head", "embed")
        self.o = normal("embed", "heads", "head")
        self.mlp_norm = constant(1, "embed")
        self.gate = normal("mlp", "embed")
        self.up = normal("mlp", "embed")
        self.down = normal("embed", "mlp")
        self.q_bias = bias(config.attention_bias, "heads", "head")
        self.k_bias = bias(config.attention_bias, "kv_heads", "head")
        self.v_bias = bias(config.attention_bias, "kv_heads", "head")
        self.o_bias = bias(config.attention_bias, "embed")
        self.gate_bias = bias(config.mlp_bias, "mlp")
        self.up_bias = bias(config.mlp_bias, "mlp")
        self.down_bias = bias(config.mlp_bias, "embed")


class SmolLM3(nnx.Module):
    """The language model. Random at construction; `from_pretrained` fills it.

    Args:
      config: the architecture.
      rngs: where the initial weights come from (normal, `initializer_range`).
      dtype: of the parameters, and with them of the activations.
      generation_config: when to stop, carried along for `generate` and `save_pretrained`.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        rngs: nnx.Rngs,
        dtype: Any = jnp.float32,
        generation_config: GenerationConfig | None = None,
    ):
        self.config = config
        self.generation_config = generation_config or GenerationConfig.from_hf({}, config)
        self.embed = _normal(config, ("vocab", "embed"), rngs, dtype)
        self.layers = Block(config, rngs=rngs, dtype=dtype)
        self.norm = nnx.Param(jnp.ones(config.hidden_size, dtype), axes=("embed",))
        self.head = None if config.tie_word_embeddings else _normal(config, ("vocab", "embed"), rngs, dtype)

    def __call__(
        self,
        tokens: Array,
        positions: Array | None = None,
        segment_ids: Array | None = None,
        cache: KVCache | None = None,
    ) -> Any:
        """Logits of the next token.

        Args:
          tokens: int32 [B, T].
          positions: int32 [B, T] for RoPE; None counts along the row, padding and documents included
            (only differences of positions within a document matter).
          segment_ids: int32 [B, T]; 0 is padding, other values name documents; None is one document.
          cache: what came before these tokens.

        Returns:
          float32 [B, T, V]; with a cache, also the cache that holds these tokens.
        """
        tokens = jnp.asarray(tokens)
        chex.assert_rank(tokens, 2)
        chex.assert_equal_shape([x for x in (tokens, positions, segment_ids) if x is not None])
        return _logits(self, tokens, positions, segment_ids, cache)

    def hidden(
        self,
        tokens: Array,
        positions: Array | None = None,
        segment_ids: Array | None = None,
        cache: KVCache | None = None,
    ) -> tuple[Array, KVCache | None]:
        """The model up to its final norm: [B, T, D] for `unembed`, and the cache (None without one)."""
        states, _, cache = _run_layers(self, tokens, positions, segment_ids, cache)
        return _rms_norm(states, self.norm[...], self.config.rms_norm_eps), cache

    def unembed(self, x: Array) -> Array:
        """Logits, float32 [..., V], of final hidden states [..., D]."""
        head = self.embed if self.head is None else self.head
        return jnp.einsum("...D,VD->...V", x, head[...], preferred_element_type=jnp.float32)

    def layer_states(self, tokens: Array) -> Array:
        """What enters the first layer and what leaves each, [L + 1, B, T, D]: for finding where models part."""
        return _layer_states(self, tokens)


@jax.jit
def _logits(
    model: SmolLM3, tokens_BT: Array, positions_BT: Array | None, segments_BT: Array | None, cache: KVCache | None
) -> Any:
    x_BTD, new_cache = model.hidden(tokens_BT, positions_BT, segments_BT, cache)
    logits_BTV = model.unembed(x_BTD)
    return logits_BTV if new_cache is None else (logits_BTV, new_cache)


@jax.jit
def _layer_states(model: SmolLM3, tokens_BT: Array) -> Array:
    first_BTD = _embed(model, tokens_BT)
    _, states_LBTD, _ = _run_layers(model, tokens_BT, None, None, None, keep_states=True)
    return jnp.concatenate([first_BTD[None], states_LBTD])


def _run_layers(
    model: SmolLM3,
    tokens_BT: Array,
    positions_BT: Array | None,
    segments_BT: Array | None,
    cache: KVCache | None,
    keep_states: bool = False,
) -> tuple[Array, Any, KVCache | None]:
    """Embedding and all blocks: the last state, all of them if kept, and the new cache."""
    config = model.config
    index_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1], dtype=jnp.int32), tokens_BT.shape)
    segments_BT = jnp.ones_like(index_BT) if segments_BT is None else segments_BT
    kv_segments_BS = segments_BT
    if cache is not None:
        index_BT = index_BT + cache.length[:, None]
        kv_segments_BS = append(cache.segment_ids, segments_BT, cache.length)
    cos, sin = rope.cos_sin(config, index_BT if positions_BT is None else positions_BT)

    def step(x_BTD: Array, layer: tuple) -> tuple[Array, Any]:
        weights, use_rope, window, cached = layer

        def attend(q_BTHE: Array, k_BTKE: Array, v_BTKE: Array) -> tuple[Array, Any]:
            q, k, v = rope.rotate(q_BTHE, cos, sin, use_rope), rope.rotate(k_BTKE, cos, sin, use_rope), v_BTKE
            stored = None
            if cache is not None:
                stored = append(cached[0], k, cache.length), append(cached[1], v, cache.length)
                k, v = stored
            out = attention(
                q, k, v, q_segments_BT=segments_BT, kv_segments_BS=kv_segments_BS, q_index_BT=index_BT, window=window
            )
            return out, stored

        x_BTD, stored = block(config, weights, x_BTD, attend)
        return x_BTD, (x_BTD if keep_states else None, stored)

    layers = (
        model.layers,
        jnp.array(config.rope_layers),
        None if config.windows is None else jnp.array(config.windows, jnp.int32),
        None if cache is None else (cache.k, cache.v),
    )
    x_BTD, (states, stored) = jax.lax.scan(step, _embed(model, tokens_BT), layers)
    if cache is None:
        return x_BTD, states, None
    new_cache = KVCache(*stored, segment_ids=kv_segments_BS, length=advance(cache.length, segments_BT))
    return x_BTD, states, new_cache


def block(config: ModelConfig, p: Block, x_BTD: Array, attend: Any) -> tuple[Array, Any]:
    """One layer. `attend` maps q, k and v to attention's output [B, T, H, E] and what it wants kept."""
    h_BTD = _rms_norm(x_BTD, p.attn_norm[...], config.rms_norm_eps)
    q_BTHE = _linear("BTD,HED->BTHE", h_BTD, p.q, p.q_bias)
    k_BTKE = _linear("BTD,KED->BTKE", h_BTD, p.k, p.k_bias)
    v_BTKE = _linear("BTD,KED->BTKE", h_BTD, p.v, p.v_bias)
    out_BTHE, kept = attend(q_BTHE, k_BTKE, v_BTKE)
    x_BTD = x_BTD + _linear("BTHE,DHE->BTD", out_BTHE, p.o, p.o_bias)

    h_BTD = _rms_norm(x_BTD, p.mlp_norm[...], config.rms_norm_eps)
    gate_BTF = jax.nn.silu(_linear("BTD,FD->BTF", h_BTD, p.gate, p.gate_bias))
    up_BTF = _linear("BTD,FD->BTF", h_BTD, p.up, p.up_bias)
    return x_BTD + _linear("BTF,DF->BTD", gate_BTF * up_BTF, p.down, p.down_bias), kept


def _linear(spec: str, x: Array, weight: nnx.Param, bias: nnx.Param | None) -> Array:
    """einsum that accumulates and adds the bias in float32, then rounds once to x's dtype."""
    out = jnp.einsum(spec, x, weight[...], preferred_element_type=jnp.float32)
    return (out if bias is None else out + bias[...]).astype(x.dtype)


def _rms_norm(x_BTD: Array, weight_D: Array, eps: float) -> Array:
    """RMSNorm with transformers' rounding: variance in float32, cast to x's dtype, then the weight."""
    x = x_BTD.astype(jnp.float32)
    x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)
    return x.astype(x_BTD.dtype) * weight_D


def _embed(model: SmolLM3, tokens_BT: Array) -> Array:
    x_BTD = model.embed[...][tokens_BT]
    pad = model.config.pad_token_id
    if pad is None:
        return x_BTD
    # torch's Embedding(padding_idx) gives that row no gradient as an input; as an output it learns.
    return jnp.where((tokens_BT == pad)[..., None], jax.lax.stop_gradient(x_BTD), x_BTD)


def _normal(config: ModelConfig, axes: tuple[str, ...], rngs: nnx.Rngs, dtype: Any) -> nnx.Param:
    shape = [config.axis_sizes[axis] for axis in axes]
    return nnx.Param(config.initializer_range * jax.random.normal(rngs.params(), shape, dtype), axes=axes)
