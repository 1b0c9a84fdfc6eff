"""SmolLM3: a pre-norm Llama transformer whose every fourth layer has no position embedding.

The modules hold parameters and nothing else; what runs is plain `jax.jit` and `jax.lax.scan` over
them. For training the layers are one stacked `Block`, so that compile time does not grow with depth; for inference
they are one `Block` a layer, which is read where it lies. Weights keep Hugging Face's orientation ([out, in], heads
split from head width), so that conversion is a rename.

Shapes: B batch, T query length, S key length, D model width, F feed-forward width, H query heads,
K key-value heads, E head width, V vocabulary, L layers.
"""

import copy
import functools
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from sharding.rules import Sharding, platform_of

from . import nvidia, rope, xla_cpu
from .attention import attention, attention_after, decode_attention, decode_step
from .config import GenerationConfig, ModelConfig
from .kv_cache import KVCache, advance, read, rows, write
from .quantize import Quantized, Weight, linear, lookup, quantized, scheme_of


class Block(nnx.Module):
    """The parameters of all layers, stacked, or of one. `axes` names the dimensions."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype: Any):
        def normal(name: str, *axes: str, contracted: int = 1) -> Weight:
            return _weight(config, f"layers.{name}", ("layers", *axes), rngs, dtype, contracted)

        def constant(value: float, *axes: str) -> nnx.Param:
            shape = [config.axis_sizes[axis] for axis in ("layers", *axes)]
            return nnx.Param(jnp.full(shape, value, dtype), axes=("layers", *axes))

        def bias(present: bool, *axes: str) -> nnx.Param | None:
            return constant(0, *axes) if present else None

        self.attn_norm = constant(1, "embed")
        self.q = normal("q", "heads", "head", "embed")
        self.k = normal("k", "kv_heads", "head", "embed")
        self.v = normal("v", "kv_heads", "head", "embed")
        self.o = normal("o", "embed", "heads", "head", contracted=2)
        self.mlp_norm = constant(1, "embed")
        self.gate = normal("gate", "mlp", "embed")
        self.up = normal("up", "mlp", "embed")
        self.down = normal("down", "embed", "mlp")
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
        self.embed = _weight(config, "embed", ("vocab", "embed"), rngs, dtype)
        self.layers: Block | nnx.List[Block] = Block(config, rngs=rngs, dtype=dtype)
        self.norm = nnx.Param(jnp.ones(config.hidden_size, dtype), axes=("embed",))
        tied = config.tie_word_embeddings
        self.head = None if tied else _weight(config, "head", ("vocab", "embed"), rngs, dtype)

    def __call__(
        self,
        tokens: Array,
        positions: Array | None = None,
        segment_ids: Array | None = None,
        cache: KVCache | None = None,
        *,
        sharding: Sharding | None = None,
    ) -> Any:
        """Logits of the next token.

        Args:
          tokens: int32 [B, T].
          positions: int32 [B, T] for RoPE; None counts along the row, padding and documents included
            (only differences of positions within a document matter).
          segment_ids: int32 [B, T]; 0 is padding, other values name documents; None is one document.
            With a cache a row is one document, and padding may only stand at its end.
          cache: what came before these tokens. It is not donated: the old one stays valid.
          sharding: the mesh and rules that parameters and cache were placed by; None on one device, or for
            every device of the parameters' mesh to compute everything.

        Returns:
          float32 [B, T, V]; with a cache, also the cache that holds these tokens.
        """
        tokens = jnp.asarray(tokens)
        chex.assert_rank(tokens, 2)
        chex.assert_equal_shape([x for x in (tokens, positions, segment_ids) if x is not None])
        sharding = sharding or Sharding.of_array(self.norm[...])
        return _logits(self, tokens, positions, segment_ids, cache, sharding=sharding)

    def hidden(
        self,
        tokens: Array,
        positions: Array | None = None,
        segment_ids: Array | None = None,
        cache: KVCache | None = None,
        *,
        slot: Array | None = None,
        past: int | None = None,
        remat: Callable[..., Any] | None = None,
        sharding: Sharding | None = None,
    ) -> tuple[Array, Any]:
        """The model up to its final norm: [B, T, D] for `unembed`, and the cache (None without one).

        Args:
          slot: the row of the cache that the tokens, one row of them, continue; None if rows are rows.
          past: for prefill: at most so many tokens (static) are in the row already. They and the new
            ones are then seen as one sequence by the attention of whole sequences; None is for a few
            new tokens, which look at the cache itself.
          remat: a policy of `jax.checkpoint` for each layer: what its backward pass finds kept, by the names
            that `block` gives; None keeps everything.
        """
        norm = _norm_for(self.config, tokens, cache is not None, sharding)
        states, _, cache = _run_layers(self, tokens, positions, segment_ids, cache, slot, past, sharding, remat=remat)
        return norm(states, self.norm[...], self.config.rms_norm_eps), cache

    @property
    def dtype(self) -> Any:
        """Of the activations."""
        return self.norm.dtype

    @property
    def cache_dtype(self) -> Any:
        """What a quantized checkpoint asks its cache to be; the activations' dtype where it does not."""
        quantization = self.config.quantization
        return self.dtype if quantization is None else jnp.dtype(quantization.cache or self.dtype)

    def unembed(self, x: Array, sharding: Sharding | None = None) -> Array:
        """Logits, float32 [..., V], of final hidden states [..., D]."""
        return linear(x, self.embed if self.head is None else self.head, sharding=sharding)

    def layer_states(self, tokens: Array) -> Array:
        """What enters the first layer and what leaves each, [L + 1, B, T, D]: for finding where models part."""
        return _layer_states(self, tokens, sharding=Sharding.of_array(self.norm[...]))


@functools.partial(jax.jit, static_argnames="sharding")
def _logits(
    model: SmolLM3,
    tokens_BT: Array,
    positions_BT: Array | None,
    segments_BT: Array | None,
    cache: KVCache | None,
    *,
    sharding: Sharding | None = None,
) -> Any:
    x_BTD, new_cache = model.hidden(tokens_BT, positions_BT, segments_BT, cache, sharding=sharding)
    logits_BTV = model.unembed(x_BTD, sharding)
    return logits_BTV if new_cache is None else (logits_BTV, new_cache)


@functools.partial(jax.jit, static_argnames="sharding")
def _layer_states(model: SmolLM3, tokens_BT: Array, *, sharding: Sharding | None = None) -> Array:
    first_BTD = _embed(model, tokens_BT, sharding)
    _, states_LBTD, _ = _run_layers(model, tokens_BT, sharding=sharding, keep_states=True)
    return jnp.concatenate([first_BTD[None], states_LBTD])


def _run_layers(
    model: SmolLM3,
    tokens_BT: Array,
    positions_BT: Array | None = None,
    segments_BT: Array | None = None,
    cache: KVCache | None = None,
    slot: Array | None = None,
    past: int | None = None,
    sharding: Sharding | None = None,
    keep_states: bool = False,
    remat: Callable[..., Any] | None = None,
) -> tuple[Array, Any, KVCache | None]:
    """Embedding and all blocks: the last state, all of them if kept, and the new cache."""
    config = model.config
    index_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1], dtype=jnp.int32), tokens_BT.shape)
    # Without segments there is one document a row, and nothing for attention to mask by them.
    row_segments_BT = jnp.ones_like(index_BT) if segments_BT is None else segments_BT
    length_B = jnp.zeros((), jnp.int32)  # of no use without a cache
    if cache is not None:
        length_B = cache.length if slot is None else cache.length[slot][None]
        index_BT = index_BT + length_B[:, None]
    cos, sin = rope.cos_sin(config, index_BT if positions_BT is None else positions_BT)
    norm = _norm_for(config, tokens_BT, cache is not None, sharding)

    def step(x_BTD: Array, layer: tuple) -> tuple[Array, Any]:
        weights, use_rope, window, cached = layer
        if cached is None:
            weights = _in_dtype(weights, x_BTD.dtype)

        def attend(q_BTHE: Array, k_BTKE: Array, v_BTKE: Array) -> tuple[Array, Any]:
            if cached is not None and past is None and slot is None:
                angles, where = rope.of_layer(cos, sin, use_rope), {"length_B": length_B, "window": window}
                done = decode_step(q_BTHE, k_BTKE, v_BTKE, angles, cached, **where, sharding=sharding)
                if done is not None:
                    return done
            q, k, v = rope.rotate(q_BTHE, cos, sin, use_rope), rope.rotate(k_BTKE, cos, sin, use_rope), v_BTKE
            if cached is None:
                segments = {"q_segments_BT": segments_BT, "kv_segments_BS": segments_BT}
                return attention(q, k, v, **segments, window=window, sharding=sharding), None
            stored = write(cached, k, v, length_B, slot, sharding)
            if past is None:
                of_rows = rows(stored, slot, sharding)
                return decode_attention(q, of_rows, length_B=length_B, window=window, sharding=sharding), stored
            if past == 0:
                return attention(q, k, v, window=window, sharding=sharding), stored
            # Read back from what was just written, so that the update stays in place; what lies at or
            # behind the length is not the past.
            past_k, past_v = read(stored, slot, past, k.dtype, sharding)
            out = attention_after(
                q,
                k,
                v,
                past_k,
                past_v,
                length_B=length_B,
                segments_BT=row_segments_BT,
                window=window,
                sharding=sharding,
            )
            return out, stored

        x_BTD, stored = block(config, weights, x_BTD, attend, sharding, norm)
        return x_BTD, (x_BTD if keep_states else None, stored)

    scanned = cache is None and isinstance(model.layers, Block)
    # A GPU would copy each layer's weights out of their stack, and its activations and gradients into theirs: a third
    # of what a training step moves.
    unroll = platform_of(sharding) == "gpu"
    if remat is not None:
        # Inside a scan nothing moves between forward and backward pass: no barrier is needed against it.
        step = jax.checkpoint(step, policy=remat, prevent_cse=not scanned or unroll)
    x_BTD = _embed(model, tokens_BT, sharding)
    windows = (None,) * config.num_hidden_layers if config.windows is None else config.windows
    if scanned:
        layers = (model.layers, jnp.array(config.rope_layers), _int_or_none(config.windows), None)
        x_BTD, (states, _) = jax.lax.scan(step, x_BTD, layers, unroll=unroll or 1)
        return x_BTD, states, None
    # Unrolled: on CPU a scan would copy each layer's weights out of their stack, and a cache that goes
    # through a scan exists twice.
    kept = []
    for i, (use_rope, window) in enumerate(zip(config.rope_layers, windows, strict=True)):
        cached = None if cache is None else cache.layers[i]
        weights = (
            jax.tree.map(lambda x, i=i: x[i], model.layers) if isinstance(model.layers, Block) else model.layers[i]
        )
        x_BTD, out = step(x_BTD, (weights, jnp.array(use_rope), _int_or_none(window), cached))
        kept.append(out)
    states = jnp.stack([state for state, _ in kept]) if keep_states else None
    if cache is None:
        return x_BTD, states, None
    new_length_B = advance(length_B, row_segments_BT)
    length = new_length_B if slot is None else cache.length.at[slot].set(new_length_B[0])
    return x_BTD, states, KVCache(tuple(stored for _, stored in kept), length)


def unstacked(model: SmolLM3) -> SmolLM3:
    """The same model with one Block a layer (`nnx.List`) instead of one stack of all; both compute the same.

    It copies the layers: to load a large model so, ask the loader.
    """

    def layer(i: int) -> Block:
        block = jax.tree.map(lambda x: x[i], model.layers)
        for param in jax.tree.leaves(block, is_leaf=lambda x: isinstance(x, nnx.Variable)):
            param.set_metadata(axes=param.get_metadata("axes")[1:])
        return block

    out = copy.copy(model)
    out.layers = nnx.List([layer(i) for i in range(model.config.num_hidden_layers)])
    return out


def _in_dtype(weights: Block, dtype: Any) -> Block:
    """Weights that are not quantized, in the activations' dtype, which they have but where training leaves it to us."""

    def is_quantized(x: Any) -> bool:
        return isinstance(x, Quantized)

    return jax.tree.map(lambda x: x if is_quantized(x) else x.astype(dtype), weights, is_leaf=is_quantized)


def _int_or_none(x: Any) -> Array | None:
    return None if x is None else jnp.array(x, jnp.int32)


def _rms_norm(x_BTD: Array, weight_D: Array, eps: float, addends: tuple[Array, ...] = ()) -> Array:
    """RMSNorm with transformers' rounding: variance in float32, cast to x's dtype, then the weight.

    addends: what x is the sum of, which only a kernel asks for.
    """
    x = x_BTD.astype(jnp.float32)
    x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)
    return _scaled(x.astype(x_BTD.dtype), weight_D)


def _widened(x: Array, like: Array) -> Array:
    """x with as many dimensions as `like`, the new ones in front: a caller may forbid JAX to do that by itself."""
    return jnp.expand_dims(x, tuple(range(like.ndim - x.ndim)))


@jax.custom_vjp
def _scaled(x_BTD: Array, weight_D: Array) -> Array:
    """x times the weight, whose gradient is added up over all tokens in float32."""
    return x_BTD * _widened(weight_D, x_BTD)


def _scaled_forward(x_BTD: Array, weight_D: Array) -> tuple[Array, tuple[Array, Array]]:
    return x_BTD * _widened(weight_D, x_BTD), (x_BTD, weight_D)


def _scaled_backward(kept: tuple[Array, Array], gradient_BTD: Array) -> tuple[Array, Array]:
    x_BTD, weight_D = kept
    by_token_BTD = gradient_BTD.astype(jnp.float32) * x_BTD.astype(jnp.float32)
    return gradient_BTD * _widened(weight_D, gradient_BTD), by_token_BTD.sum(axis=(0, 1)).astype(weight_D.dtype)


_scaled.defvjp(_scaled_forward, _scaled_backward)


def block(
    config: ModelConfig, p: Block, x_BTD: Array, attend: Any, sharding: Sharding | None = None, norm: Any = _rms_norm
) -> tuple[Array, Any]:
    """One layer. `attend` maps q, k and v to attention's output [B, T, H, E] and what it wants kept."""

    def placed(x_BTD: Array) -> Array:
        return x_BTD if sharding is None else sharding.constrain(x_BTD, "batch", "length", "residual")

    platform = platform_of(sharding)
    multiply = functools.partial(_linear, sharding=sharding)
    named = functools.partial(xla_cpu.named, platform=platform)
    x_BTD = named(x_BTD, "input_bits" if xla_cpu.keeps_bits(x_BTD, platform) else "input")
    h_BTD = norm(x_BTD, p.attn_norm[...], config.rms_norm_eps)
    q_BTHE = named(multiply(h_BTD, p.q, p.q_bias), "q")
    k_BTKE = named(multiply(h_BTD, p.k, p.k_bias), "k")
    v_BTKE = named(multiply(h_BTD, p.v, p.v_bias), "v")
    out_BTHE, kept = attend(q_BTHE, k_BTKE, v_BTKE)
    addends = x_BTD, multiply(out_BTHE, p.o, p.o_bias, contracted=2)
    x_BTD = placed(addends[0] + addends[1])

    h_BTD = norm(x_BTD, p.mlp_norm[...], config.rms_norm_eps, addends)
    gate_BTF = jax.nn.silu(named(multiply(h_BTD, p.gate, p.gate_bias), "gate"))
    up_BTF = named(multiply(h_BTD, p.up, p.up_bias), "up")
    return placed(x_BTD + multiply(gate_BTF * up_BTF, p.down, p.down_bias)), kept


def _linear(
    x: Array, weight: Weight, bias: nnx.Param | None, contracted: int = 1, sharding: Sharding | None = None
) -> Array:
    """The product and the bias are added up in float32, then rounded once to x's dtype."""
    if bias is None:
        return linear(x, weight, contracted, sharding=sharding, dtype=x.dtype)
    out = linear(x, weight, contracted, sharding=sharding)
    return (out + _widened(bias[...].astype(out.dtype), out)).astype(x.dtype)


def _norm_for(config: ModelConfig, tokens_BT: Array, cached: bool, sharding: Sharding | None) -> Callable[..., Array]:
    """`_rms_norm`, or its kernel: for one token on one GPU, and with a cache, as then nothing asks for gradients."""
    alone = sharding is None or sharding.mesh.size == 1
    fits = config.hidden_size.bit_count() == 1
    if cached and alone and fits and tokens_BT.size == 1 and platform_of(sharding) == "gpu" and nvidia.kernels_fit():
        from .kernels import rms_norm_gpu

        return functools.partial(rms_norm_gpu.rms_norm, sharding=sharding)
    return _rms_norm


def _embed(model: SmolLM3, tokens_BT: Array, sharding: Sharding | None = None) -> Array:
    x_BTD = lookup(model.embed, tokens_BT, model.dtype, platform_of(sharding))
    pad = model.config.pad_token_id
    if pad is None:
        return x_BTD
    # torch's Embedding(padding_idx) gives that row no gradient as an input; as an output it learns.
    return jnp.where((tokens_BT == pad)[..., None], jax.lax.stop_gradient(x_BTD), x_BTD)


def _weight(
    config: ModelConfig, name: str, axes: tuple[str, ...], rngs: nnx.Rngs, dtype: Any, contracted: int = 1
) -> Weight:
    shape = [config.axis_sizes[axis] for axis in axes]
    weight = nnx.Param(config.initializer_range * jax.random.normal(rngs.params(), shape, dtype), axes=axes)
    if config.quantization is None:
        return weight
    return quantized(weight, scheme_of(name, config.quantization.weights), contracted)
