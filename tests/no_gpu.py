"""Stands in for cuDNN where there is no GPU: the same calls in plain JAX, by the definition.

What no range covers holds NaN, as it may on a GPU. Products are added up in float32.
"""

import jax
import jax.numpy as jnp


def ranges_of(q, k, causal, ranges):
    """(bool mask [N, T, S] over flat tokens and keys of each range, the row's batch of each) as index arrays."""
    batch, length, keys = q.shape[0], q.shape[1], k.shape[1]
    if ranges is None:
        full = jnp.full(batch, length, jnp.int32), jnp.full(batch, keys, jnp.int32)
        return (*full, jnp.arange(batch) * length, jnp.arange(batch) * keys)
    if ranges.q_first is None:
        return ranges.q_length, ranges.kv_length, jnp.arange(batch) * length, jnp.arange(batch) * keys
    # As cuDNN wants them: in order, the unused ones last and empty.
    assert len(ranges.q_first) % batch == 0 and len(ranges.q_first) > batch
    return ranges.q_length, ranges.kv_length, ranges.q_first, ranges.kv_first


def of_range(q, k, v, causal, q_length, kv_length, q_first, kv_first):
    """The scores [H, T, S] of one range, -inf where a query sees nothing; and what it takes from the flat arrays."""
    length, heads, width = q.shape[1:]
    keys, kv_heads = k.shape[1:3]
    t, s = jnp.arange(length), jnp.arange(keys)
    flat = [x.reshape(-1, *x.shape[2:]).astype(jnp.float32) for x in (q, k, v)]
    q_at, kv_at = jnp.clip(q_first + t, 0, len(flat[0]) - 1), jnp.clip(kv_first + s, 0, len(flat[1]) - 1)
    own_q, own_k, own_v = flat[0][q_at], *(jnp.repeat(x[kv_at], heads // kv_heads, axis=1) for x in flat[1:])
    scores = jnp.einsum("THE,SHE->HTS", own_q, own_k) * width**-0.5
    seen = (t < q_length)[:, None] & (s < kv_length)[None]
    if causal:
        seen &= s[None] <= t[:, None]
    return jnp.where(seen, scores, -jnp.inf), seen, own_q, own_k, own_v, q_at, kv_at


def placed(x, parts, index, lengths):
    """The parts of ranges [N, T, ...] where they belong in an array like x, NaN elsewhere."""
    out = jnp.full((x.shape[0] * x.shape[1], *parts.shape[2:]), jnp.nan, jnp.float32)
    inside = jnp.arange(index.shape[1])[None] < lengths[:, None]
    out = out.at[jnp.where(inside, index, len(out))].set(parts, mode="drop")
    return out.reshape(*x.shape[:2], *parts.shape[2:]).astype(x.dtype)


def forward(q, k, v, causal, ranges):
    every = ranges_of(q, k, causal, ranges)

    def one(q_length, kv_length, q_first, kv_first):
        scores, seen, _, _, own_v, q_at, _ = of_range(q, k, v, causal, q_length, kv_length, q_first, kv_first)
        normalizer = jax.nn.logsumexp(scores, axis=-1)
        weights = jnp.where(seen, jnp.exp(scores - normalizer[..., None]), 0)
        return jnp.einsum("HTS,SHE->THE", weights, own_v), normalizer, q_at

    out, normalizer, q_at = jax.vmap(one)(*every)
    inside = (jnp.arange(q.shape[1])[None] < every[0][:, None])[:, None]
    return placed(q, out, q_at, every[0]), jnp.where(inside, normalizer, jnp.nan)


def backward(q, k, v, causal, ranges, normalizer, out, gradient):
    every = ranges_of(q, k, causal, ranges)
    flat = [x.reshape(-1, *x.shape[2:]).astype(jnp.float32) for x in (out, gradient)]

    def one(normalizer, q_length, kv_length, q_first, kv_first):
        scores, seen, own_q, own_k, own_v, q_at, kv_at = of_range(
            q, k, v, causal, q_length, kv_length, q_first, kv_first
        )
        own_out, own_gradient = (jnp.where((jnp.arange(len(q_at)) < q_length)[:, None, None], x[q_at], 0) for x in flat)
        weights = jnp.where(seen, jnp.exp(scores - normalizer[..., None]), 0)
        into_weights = jnp.einsum("THE,SHE->HTS", own_gradient, own_v)
        mean = (own_out * own_gradient).sum(-1).T[..., None]
        into_scores = jnp.where(seen, weights * (into_weights - mean), 0) * q.shape[-1] ** -0.5
        groups = (*own_k.shape[:1], k.shape[2], -1, k.shape[3])
        return (
            jnp.einsum("HTS,SHE->THE", into_scores, own_k),
            jnp.einsum("HTS,THE->SHE", into_scores, own_q).reshape(groups).sum(2),
            jnp.einsum("HTS,THE->SHE", weights, own_gradient).reshape(groups).sum(2),
            q_at,
            kv_at,
        )

    q_part, k_part, v_part, q_at, kv_at = jax.vmap(one)(normalizer, *every)
    return (
        placed(q, q_part, q_at, every[0]),
        placed(k, k_part, kv_at, every[1]),
        placed(v, v_part, kv_at, every[1]),
    )
