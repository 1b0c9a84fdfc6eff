"""Text generation: one prefill, then a decode loop that stays on the device until every row is done.

Shapes: B batch, T prompt length, N new tokens, V vocabulary.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from .errors import OptionError
from .kv_cache import empty_cache
from .model import SmolLM3


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to choose tokens, and when to stop.

    max_new_tokens: at most so many are generated, the end-of-sequence token included.
    temperature: 0 is greedy.
    top_k: sample among the k likeliest only; 0 is off.
    top_p: sample among the fewest tokens that hold this much probability; 1 is off.
    seed: row i of a batch draws with seed + i.

    Raises:
      OptionError: a value is out of range.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self):
        def check(ok: bool, field: str, must: str) -> None:
            if not ok:
                raise OptionError(f"{field} is {getattr(self, field)!r}; it must be {must}")

        check(isinstance(self.max_new_tokens, int) and self.max_new_tokens >= 1, "max_new_tokens", "at least 1")
        check(math.isfinite(self.temperature) and self.temperature >= 0, "temperature", "0 (greedy) or more")
        check(isinstance(self.top_k, int) and self.top_k >= 0, "top_k", "0 (off) or more")
        check(0 < self.top_p <= 1, "top_p", "above 0 and at most 1")
        check(isinstance(self.seed, int) and 0 <= self.seed < 2**32, "seed", "from 0 to 2**32 - 1")


def generate(model: SmolLM3, prompts: Sequence[Sequence[int]], params: SamplingParams | None = None) -> list[list[int]]:
    """New token ids for each prompt; a row that met an end-of-sequence token ends with it.

    Prompts may differ in length: a row's result does not depend on the other rows.

    Raises:
      OptionError: a prompt is empty, holds an id outside the vocabulary, or leaves no room in the context.
    """
    params = params or SamplingParams()
    config = model.config
    for row, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise OptionError(f"prompt {row} is empty; give at least one token")
        if bad := [i for i in prompt if not 0 <= i < config.vocab_size]:
            raise OptionError(f"prompt {row} holds the id {bad[0]}; the vocabulary has {config.vocab_size} tokens")
        if len(prompt) + params.max_new_tokens > config.max_position_embeddings:
            raise OptionError(
                f"prompt {row} has {len(prompt)} tokens; with max_new_tokens {params.max_new_tokens} that exceeds "
                f"the model's context of {config.max_position_embeddings}"
            )
    if len(prompts) == 0:
        return []
    # Lengths are rounded up to powers of two, so that few programs serve all requests.
    longest = _power_of_two(max(map(len, prompts)))
    room = _power_of_two(params.max_new_tokens)
    tokens_BT = np.zeros((len(prompts), longest), np.int32)
    for row, prompt in enumerate(prompts):
        tokens_BT[row, : len(prompt)] = prompt
    new_BN, counts_B = _generate(
        model,
        jnp.asarray(tokens_BT),
        jnp.array([len(prompt) for prompt in prompts], jnp.int32),
        jnp.array(params.max_new_tokens, jnp.int32),
        jnp.array([params.temperature, params.top_p], jnp.float32),
        jnp.array(params.top_k, jnp.int32),
        jnp.array([(params.seed + row) % 2**32 for row in range(len(prompts))], jnp.uint32),
        room=room,
        greedy=params.temperature == 0,
    )
    return [row[:count].tolist() for row, count in zip(np.asarray(new_BN), np.asarray(counts_B), strict=True)]


def _power_of_two(n: int) -> int:
    return max(16, 1 << (n - 1).bit_length())


@functools.partial(jax.jit, static_argnames=("room", "greedy"))
def _generate(
    model: SmolLM3,
    tokens_BT: Array,
    lengths_B: Array,
    limit: Array,
    temperature_top_p: Array,
    top_k: Array,
    seeds_B: Array,
    *,
    room: int,
    greedy: bool,
) -> tuple[Array, Array]:
    """(new tokens [B, N], how many of them count [B])."""
    batch, length = tokens_BT.shape
    stop_ids = jnp.array(model.generation_config.eos_token_id, jnp.int32)
    keys_B = jax.vmap(jax.random.key)(seeds_B)
    segments_BT = (jnp.arange(length) < lengths_B[:, None]).astype(jnp.int32)

    def choose(x_BD: Array, step: Array) -> Array:
        logits_BV = model.unembed(x_BD)
        if greedy:
            return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
        step_keys_B = jax.vmap(jax.random.fold_in, (0, None))(keys_B, step)
        return jax.vmap(sample, (0, 0, None, None, None))(
            logits_BV, step_keys_B, temperature_top_p[0], top_k, temperature_top_p[1]
        )

    cache = empty_cache(model.config, batch, length + room, model.embed.dtype)
    x_BTD, cache = model.hidden(tokens_BT, segment_ids=segments_BT, cache=cache)
    last_BD = jnp.take_along_axis(x_BTD, (lengths_B - 1)[:, None, None], axis=1)[:, 0]
    first_B = choose(last_BD, jnp.array(0))
    new_BN = jnp.zeros((batch, room), jnp.int32).at[:, 0].set(first_B)
    state = (jnp.array(1), new_BN, jnp.isin(first_B, stop_ids), jnp.ones(batch, jnp.int32), cache)

    def unfinished(state: tuple) -> Array:
        step, _, done_B, _, _ = state
        return (step < limit) & ~done_B.all()

    def decode(state: tuple) -> tuple:
        step, new_BN, done_B, counts_B, cache = state
        x_BTD, cache = model.hidden(jax.lax.dynamic_slice_in_dim(new_BN, step - 1, 1, axis=1), cache=cache)
        next_B = choose(x_BTD[:, 0], step)
        # A finished row runs along, but what it says is neither counted nor fed to anyone else.
        new_BN = jax.lax.dynamic_update_slice_in_dim(new_BN, next_B[:, None], step, axis=1)
        return step + 1, new_BN, done_B | jnp.isin(next_B, stop_ids), counts_B + ~done_B, cache

    _, new_BN, _, counts_B, _ = jax.lax.while_loop(unfinished, decode, state)
    return new_BN, counts_B


def sample(logits_V: Array, key: Array, temperature: Array, top_k: Array, top_p: Array) -> Array:
    """One token id, drawn after temperature, then top-k, then top-p (transformers' order)."""
    order_V = jnp.argsort(-logits_V)
    ranked_V = logits_V[order_V] / temperature
    rank_V = jnp.arange(logits_V.shape[0])
    ranked_V = jnp.where((top_k == 0) | (rank_V < top_k), ranked_V, -jnp.inf)
    weights_V = jax.nn.softmax(ranked_V)
    # Kept: every token before which less than top_p has been gathered, so at least the likeliest.
    before_V = jnp.cumsum(weights_V) - weights_V
    ranked_V = jnp.where((before_V < top_p) | (top_p >= 1), ranked_V, -jnp.inf)
    return order_V[jax.random.categorical(key, ranked_V)].astype(jnp.int32)
