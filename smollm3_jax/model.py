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
from typing import Any, NamedTuple, TypeVar, overload

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.core import Tracer
from jax.typing import DTypeLike

from sharding.rules import Sharding, platform_of

from . import rope, xla_cpu
from .attention import attention, cached_attention
from .config import GenerationConfig, ModelConfig
from .kv_cache import CacheView, KVCache, LayerCache
from .lora import LoraStack, LoraWeight, adapted, adapted_each, in_dtype
from .quantize import Weight, linear, lookup, quantize_weight, scheme_of
from .rms_norm import norm_for, rms_norm, widened

T = TypeVar("T")


class Block(nnx.Module):
    """The parameters of all layers, stacked, or of one. `axes` names the dimensions."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype: DTypeLike):
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
      sharding: the mesh and rules that the arrays are to lie by. It says so and moves nothing; None is one device.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.float32,
        generation_config: GenerationConfig | None = None,
        sharding: Sharding | None = None,
    ):
        self.config = config
        self.generation_config = generation_config or GenerationConfig.from_hf({}, config)
        # Static, as the configs are: what is compiled for one mesh is never taken for another.
        self.sharding = sharding
        # The names of those that sequences can choose among, the first of which is number 1; see `weights.served`.
        self.adapters: tuple[str, ...] = ()
        self.embed = _weight(config, "embed", ("vocab", "embed"), rngs, dtype)
        self.layers: Block | nnx.List[Block] = Block(config, rngs=rngs, dtype=dtype)
        self.norm = nnx.Param(jnp.ones(config.hidden_size, dtype), axes=("embed",))
        tied = config.tie_word_embeddings
        self.head = None if tied else _weight(config, "head", ("vocab", "embed"), rngs, dtype)

    @overload
    def __call__(
        self, tokens: Array, positions: Array | None = None, segment_ids: Array | None = None, cache: None = None
    ) -> Array: ...

    @overload
    def __call__(
        self, tokens: Array, positions: Array | None = None, segment_ids: Array | None = None, *, cache: KVCache
    ) -> tuple[Array, KVCache]: ...

    def __call__(
        self,
        tokens: Array,
        positions: Array | None = None,
        segment_ids: Array | None = None,
        cache: KVCache | None = None,
    ) -> Array | tuple[Array, KVCache]:
        """Logits of the next token.

        Args:
          tokens: int32 [B, T].
          positions: int32 [B, T] for RoPE; None counts along the row, padding and documents included
            (only differences of positions within a document matter).
          segment_ids: int32 [B, T]; 0 is padding, other values name documents; None is one document.
            With a cache a row is one document, and padding may only stand at its end.
          cache: what came before these tokens. It is not donated: the old one stays valid.

        Returns:
          float32 [B, T, V]; with a cache, also the cache that holds these tokens.
        """
        tokens = jnp.asarray(tokens)
        chex.assert_rank(tokens, 2)
        chex.assert_equal_shape([x for x in (tokens, positions, segment_ids) if x is not None])
        return _logits(where_it_lies(self), tokens, positions, segment_ids, cache)

    @overload
    def hidden(
        self,
        tokens: Array,
        positions: Array | None = None,
        segment_ids: Array | None = None,
        cache: None = None,
        *,
        remat: Callable[..., bool] | None = None,
        in_order: bool = False,
    ) -> tuple[Array, None]: ...

    @overload
    def hidden(
        self,
        tokens: Array,
        positions: Array | None = None,
        segment_ids: Array | None = None,
        *,
        cache: KVCache,
        slot: Array | None = None,
        past: bool | None = None,
    ) -> tuple[Array, KVCache]: ...

    def hidden(
        self,
        tokens: Array,
        positions: Array | None = None,
        segment_ids: Array | None = None,
        cache: KVCache | None = None,
        *,
        slot: Array | None = None,
        past: bool | None = None,
        remat: Callable[..., bool] | None = None,
        in_order: bool = False,
    ) -> tuple[Array, KVCache | None]:
        """The model up to its final norm: [B, T, D] for `unembed`, and the cache (None without one).

        Args:
          slot, past: as for `CacheView`.
          remat: a policy of `jax.checkpoint` for each layer: what its backward pass finds kept, by the names
            that `block` gives; None keeps everything.
          in_order: where the mesh splits rows, tokens come, and states go, in the order of `sharding.row_order`, with
            their positions; else in their own.
        """
        out = _run_layers(self, tokens, positions, segment_ids, cache, slot, past, remat=remat, in_order=in_order)
        norm = _norm_for(self, tokens, cache)
        return norm(out.x_BTD, self.norm[...], self.config.rms_norm_eps), out.cache

    @property
    def dtype(self) -> np.dtype:
        """Of the activations."""
        return self.norm.dtype

    @property
    def cache_dtype(self) -> np.dtype:
        """What a quantized checkpoint asks its cache to be; the activations' dtype where it does not."""
        quantization = self.config.quantization
        return self.dtype if quantization is None else jnp.dtype(quantization.cache or self.dtype)

    @property
    def platform(self) -> str:
        """What computes it: "cpu", "tpu" or "gpu"."""
        return platform_of(self.sharding)

    def unembed(self, x: Array) -> Array:
        """Logits, float32 [..., V], of final hidden states [..., D]."""
        return linear(x, self.embed if self.head is None else self.head, sharding=self.sharding)

    def layer_states(self, tokens: Array) -> Array:
        """What enters the first layer and what leaves each, [L + 1, B, T, D]: for finding where models part."""
        return _layer_states(where_it_lies(self), tokens)


def with_sharding(model: SmolLM3, sharding: Sharding | None) -> SmolLM3:
    """The same arrays in a model that says that they lie by `sharding`; nothing is moved."""
    out = copy.copy(model)
    out.sharding = sharding
    return out


def where_it_lies(model: SmolLM3) -> SmolLM3:
    """The model itself; of one whose arrays somebody has moved, and who did not say by which rules, one whose every
    device computes everything."""
    norm = model.norm[...]
    if isinstance(norm, Tracer):
        return model
    if model.sharding is not None and norm.sharding.device_set == set(model.sharding.mesh.devices.flat):
        return model
    found = Sharding.of_array(norm)
    return model if found == model.sharding else with_sharding(model, found)


@jax.jit
def _logits(
    model: SmolLM3, tokens_BT: Array, positions_BT: Array | None, segments_BT: Array | None, cache: KVCache | None
) -> Array | tuple[Array, KVCache]:
    if cache is None:
        x_BTD, _ = model.hidden(tokens_BT, positions_BT, segments_BT)
        return model.unembed(x_BTD)
    x_BTD, cache = model.hidden(tokens_BT, positions_BT, segments_BT, cache=cache)
    return model.unembed(x_BTD), cache


@jax.jit
def _layer_states(model: SmolLM3, tokens_BT: Array) -> Array:
    states_LBTD = _run_layers(model, tokens_BT, keep_states=True).states_LBTD
    assert states_LBTD is not None
    return jnp.concatenate([_embed(model, tokens_BT)[None], states_LBTD])


class _Layers(NamedTuple):
    """What the layers make of tokens: the last one's output; every one's, where kept; the cache with the tokens."""

    x_BTD: Array
    states_LBTD: Array | None
    cache: KVCache | None


class _Layer(NamedTuple):
    """What differs from layer to layer. window: int32 scalar, or None; cached: what the layer's cache holds, if any."""

    weights: Block
    use_rope: Array
    window: Array | None
    cached: LayerCache | None


def _run_layers(
    model: SmolLM3,
    tokens_BT: Array,
    positions_BT: Array | None = None,
    segments_BT: Array | None = None,
    cache: KVCache | None = None,
    slot: Array | None = None,
    past: bool | None = None,
    *,
    keep_states: bool = False,
    remat: Callable[..., bool] | None = None,
    in_order: bool = False,
) -> _Layers:
    """Embedding and all blocks."""
    view = None if cache is None else CacheView.of(cache, segments_BT, slot, past)
    if positions_BT is None:
        positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1], dtype=jnp.int32), tokens_BT.shape)
        positions_BT = positions_BT if view is None else positions_BT + view.length_B[:, None]
    order = None if model.sharding is None else model.sharding.row_order(tokens_BT.shape[1])
    if in_order or (view is not None and view.past is None):  # a few new tokens are not split
        order = None
    if order is not None:
        tokens_BT, positions_BT = tokens_BT[:, order], positions_BT[:, order]
        segments_BT = None if segments_BT is None else segments_BT[:, order]
    angles = rope.cos_sin(model.config, positions_BT)
    norm = _norm_for(model, tokens_BT, cache)

    def step(x_BTD: Array, layer: _Layer) -> tuple[Array, tuple[Array | None, LayerCache | None]]:
        where: dict[str, Any] = {"window": layer.window, "sharding": model.sharding}

        def attend(q_BTHE: Array, k_BTKE: Array, v_BTKE: Array) -> tuple[Array, LayerCache | None]:
            if view is not None and layer.cached is not None:
                of_layer = angles, layer.cached, view
                return cached_attention(q_BTHE, k_BTKE, v_BTKE, *of_layer, use_rope=layer.use_rope, **where)
            q_BTHE, k_BTKE = (rope.rotate(x, *angles, layer.use_rope) for x in (q_BTHE, k_BTKE))
            return attention(q_BTHE, k_BTKE, v_BTKE, segments_BT=segments_BT, **where), None

        # They have the activations' dtype, but where training leaves it to us.
        weights = layer.weights if cache is not None else in_dtype(layer.weights, x_BTD.dtype)
        x_BTD, cached = block(model.config, weights, x_BTD, attend, model.sharding, norm)
        return x_BTD, (x_BTD if keep_states else None, cached)

    x_BTD, states_LBTD, cached = _layer_by_layer(step, model, _embed(model, tokens_BT), cache, remat)
    if order is not None:
        back = np.argsort(order)
        x_BTD, states_LBTD = x_BTD[:, back], None if states_LBTD is None else states_LBTD[:, :, back]
    if view is None or cache is None:
        return _Layers(x_BTD, states_LBTD, None)
    return _Layers(x_BTD, states_LBTD, view.with_tokens(cache, cached, tokens_BT.shape))


def _layer_by_layer(
    step: Callable[[Array, _Layer], tuple[Array, tuple[Array | None, Any]]],
    model: SmolLM3,
    x_BTD: Array,
    cache: KVCache | None,
    remat: Callable[..., bool] | None,
) -> tuple[Array, Array | None, tuple[LayerCache, ...]]:
    """step(x_BTD, layer) -> (x_BTD, (state or None, cached or None)) through all layers: the last x_BTD, the states
    [L, B, T, D] if there are any, and the layers' caches, if there is one."""
    config, layers = model.config, model.layers
    scanned = isinstance(layers, Block) and cache is None
    # A GPU would copy each layer's weights out of their stack, and its activations and gradients into theirs: a third
    # of what a training step moves.
    unroll = model.platform == "gpu"
    if remat is not None:
        # Inside a scan nothing moves between forward and backward pass: no barrier is needed against it.
        step = jax.checkpoint(step, policy=remat, prevent_cse=not scanned or unroll)
    windows = None if config.windows is None else jnp.array(config.windows, jnp.int32)
    if isinstance(layers, Block) and scanned:
        stack = _Layer(layers, jnp.array(config.rope_layers), windows, None)
        x_BTD, (states_LBTD, _) = jax.lax.scan(step, x_BTD, stack, unroll=unroll or 1)
        return x_BTD, states_LBTD, ()
    # One by one: on CPU a scan would copy each layer's weights out of their stack, and a cache that goes
    # through a scan exists twice.
    states, caches = [], []
    for i, use_rope in enumerate(config.rope_layers):
        weights = jax.tree.map(lambda x, i=i: x[i], layers) if isinstance(layers, Block) else layers[i]
        window = None if config.windows is None else jnp.array(config.windows[i], jnp.int32)
        layer = _Layer(weights, jnp.array(use_rope), window, None if cache is None else cache.layers[i])
        x_BTD, (state, cached) = step(x_BTD, layer)
        states.append(state)
        caches.append(cached)
    return x_BTD, None if states[0] is None else jnp.stack(states), tuple(caches)


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


def block(
    config: ModelConfig,
    p: Block,
    x_BTD: Array,
    attend: Callable[[Array, Array, Array], tuple[Array, T]],
    sharding: Sharding | None = None,
    norm: Callable[..., Array] = rms_norm,
) -> tuple[Array, T]:
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
    x: Array,
    weight: Weight | LoraWeight | LoraStack,
    bias: nnx.Param | None,
    contracted: int = 1,
    sharding: Sharding | None = None,
) -> Array:
    """The products and the bias are added up in float32, then rounded once to x's dtype."""
    if isinstance(weight, LoraWeight):
        out = adapted(x, weight, contracted, sharding)
    elif isinstance(weight, LoraStack):
        out = adapted_each(x, weight, contracted, sharding)
    elif bias is None:
        return linear(x, weight, contracted, sharding=sharding, dtype=x.dtype)
    else:
        out = linear(x, weight, contracted, sharding=sharding)
    return (out if bias is None else out + widened(bias[...].astype(out.dtype), out)).astype(x.dtype)


def _norm_for(model: SmolLM3, tokens_BT: Array, cache: KVCache | None) -> Callable[..., Array]:
    if cache is None:  # gradients may be asked for
        return rms_norm
    return norm_for(model.config.hidden_size, tokens_BT.size, model.platform, model.sharding)


def _embed(model: SmolLM3, tokens_BT: Array) -> Array:
    x_BTD = lookup(model.embed, tokens_BT, model.dtype, model.platform)
    pad = model.config.pad_token_id
    if pad is None:
        return x_BTD
    # torch's Embedding(padding_idx) gives that row no gradient as an input; as an output it learns.
    return jnp.where((tokens_BT == pad)[..., None], jax.lax.stop_gradient(x_BTD), x_BTD)


def _weight(
    config: ModelConfig, name: str, axes: tuple[str, ...], rngs: nnx.Rngs, dtype: DTypeLike, contracted: int = 1
) -> Weight:
    shape = [config.axis_sizes[axis] for axis in axes]
    weight = nnx.Param(config.initializer_range * jax.random.normal(rngs.params(), shape, dtype), axes=axes)
    if config.quantization is None:
        return weight
    return quantize_weight(weight, scheme_of(name, config.quantization.weights), contracted)
