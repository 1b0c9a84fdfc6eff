"""Formulas in float64, and how far a computation in fewer bits may lie from them.

Bounds are of the first order: a sum of n products, in any order, is within n u of the products' sizes added up
(N. Higham, Accuracy and Stability of Numerical Algorithms, section 3.1), u being float32's unit roundoff, in which sums
are held; casting to the operands' dtype adds that dtype's. XLA's exp and log are within 4 u.

Shapes: B batch, T query length, S key length, H query heads, E head width, N tokens, D model width, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

FLOAT32 = 2.0**-24
UNIT = {"float32": FLOAT32, "bfloat16": 2.0**-8, "float16": 2.0**-11}

Bounded = tuple[np.ndarray, np.ndarray]  # what is exact, and how far from it a result may be


def within(got: Any, bounded: Bounded) -> float:
    """The largest error as a share of what is allowed; where nothing is allowed and something is wrong, infinity."""
    exact, allowed = bounded
    error = np.abs(np.asarray(got, np.float64) - exact)
    return float(np.divide(error, allowed, out=np.where(error > 0, np.inf, 0.0), where=allowed > 0).max())


def _exponentials(scores: np.ndarray, error: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(softmax over the last axis, the log of what the exponentials add up to, how far apart either may be: of a weight
    relative, of the log absolute). error: of the largest score that counts.

    Scores are within `error`, and with them their log-sum. Beside that, with b the largest score's size and n terms: a
    score less the largest one is off by 2 b u, its exponential by 4 u, the sum by n u, the log by 4 log(n) u, and
    adding the largest again by (b + log n) u; a score less that by (2 b + log n) u, and its exponential by 4 u.
    """
    count, seen = scores.shape[-1], np.isfinite(scores)
    biggest = np.abs(np.where(seen, scores, 0)).max(axis=-1, keepdims=True)
    most = np.where(seen.any(axis=-1, keepdims=True), scores.max(axis=-1, keepdims=True), 0)
    powers = np.exp(scores - most)
    total = np.maximum(powers.sum(axis=-1, keepdims=True), np.finfo(np.float64).tiny)
    relative = 2 * error + (count + 9 + 5 * biggest + 6 * np.log(count)) * FLOAT32
    return powers / total, most + np.log(total), relative


def seen_by(q_segments: Any, kv_segments: Any = None, window: int | None = None) -> np.ndarray:
    """bool [B, T, S]: which keys each query sees; queries are the last T of S tokens (of q_segments if there are no
    others), 0 is padding."""
    q_segments = np.asarray(q_segments)[:, :, None]
    kv_segments = q_segments.swapaxes(1, 2) if kv_segments is None else np.asarray(kv_segments)[:, None]
    length, keys = q_segments.shape[1], kv_segments.shape[2]
    distance = np.arange(keys - length, keys)[:, None] - np.arange(keys)
    own = (q_segments == kv_segments) & (q_segments != 0)
    return own & (distance >= 0) & (distance < (window or keys))


def attended(q: Any, k: Any, v: Any, seen: Any, dtype: str = "float32", **how: Any) -> Bounded:
    """The first result of `attention`."""
    return attention(q, k, v, np.zeros(np.shape(q)), seen, dtype, **how)[0]


def attention(
    q: Any, k: Any, v: Any, g: Any, seen: Any, dtype: str = "float32", *, parts: int = 1, scaled: bool = False
) -> tuple[Bounded, ...]:
    """Attention and what comes back to q, k and v from a cotangent g, each with how far `dtype` may lie from it.

    q, g: [B, T, H, E]; k, v: [B, S, H / group, E], values that `dtype` holds, or int8 with a float32 scale for each
    key. seen: bool [B, T, S]. parts: in how many parts keys go by at most, that their normalizers put together.
    scaled: q is multiplied by the scale in `dtype`, before the scores.
    """
    u, c = FLOAT32, UNIT[dtype]
    q, k, v, g = (np.asarray(x, np.float64) for x in (q, k, v, g))
    group = q.shape[2] // k.shape[2]
    k, v = (np.repeat(x, group, axis=2) for x in (k, v))
    width, keys, queries = q.shape[3], k.shape[1], q.shape[1] * group
    scale, seen = width**-0.5, np.asarray(seen)[:, None]

    def pairs(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.einsum("BTHE,BSHE->BHTS", a, b)

    def of_queries(weights: np.ndarray, x: np.ndarray) -> np.ndarray:
        return np.einsum("BHTS,BSHE->BTHE", weights, x)

    def of_keys(weights: np.ndarray, x: np.ndarray) -> np.ndarray:
        added = np.einsum("BHTS,BTHE->BSHE", weights, x)
        return added.reshape(*added.shape[:2], -1, group, width).sum(axis=3)

    # What is the sum of several parts has them rounded, and their sums.
    added = c * parts if parts > 1 else 0.0
    # A score: its products, two roundings of the scale and one of a key's own; two of `dtype`, of the scale and of q,
    # where that is scaled first.
    sizes = np.where(seen, pairs(abs(q), abs(k)) * scale, 0)
    error = ((width + 3) * u + 2 * c * scaled) * sizes.max(axis=-1, keepdims=True)
    weights, _, relative = _exponentials(np.where(seen, pairs(q, k) * scale, -np.inf), error)
    if parts > 1:
        # A part's weight comes out times exp(its normalizer - that of all), and each may be off by `relative`. With b
        # and n as above, putting one part more to the others is exp(a - m) / (exp(a - m) + exp(b - m)) and
        # m + log(...): its differences, sums and exponentials are at most 7 (b + log n + 3) u.
        relative = 3 * relative + 7 * (parts - 1) * (sizes.max(axis=-1, keepdims=True) + np.log(keys) + 3) * u
    out = of_queries(weights, v)
    out_error = of_queries((relative + c + added + keys * u) * weights, abs(v)) + c * abs(out)
    # What comes back to a weight, less its mean; kernels take the mean from the output, which is rounded twice.
    back, back_sizes = pairs(g, v), pairs(abs(g), abs(v))
    mean, mean_sizes = ((weights * x).sum(axis=-1, keepdims=True) for x in (back, back_sizes))
    mean_error = (relative + 2 * c + added + (width + keys) * u) * mean_sizes
    into = weights * (back - mean) * scale
    into_error = (relative + c + 4 * u) * abs(into) + weights * scale * (width * u * back_sizes + mean_error)
    dq, dk, dv = of_queries(into, k), of_keys(into, q), of_keys(weights, g)
    dq_error = of_queries(into_error + (keys * u + c + added) * abs(into), abs(k)) + c * abs(dq)
    dk_error = of_keys(into_error + (queries * u + c + added) * abs(into), abs(q)) + c * abs(dk)
    dv_error = of_keys((relative + c + added + queries * u) * weights, abs(g)) + c * abs(dv)
    return (out, out_error), (dq, dq_error), (dk, dk_error), (dv, dv_error)


def cross_entropy(x: Any, head: Any, labels: Any, mask: Any, z_loss: float) -> tuple[Bounded, ...]:
    """(both losses together, the cross-entropy alone, the first's gradients of x and of head), float32's.

    x: [N, D]; head: [V, D]; labels: int [N]; mask: bool [N].
    """
    u = FLOAT32
    x, head = (np.asarray(a, np.float64) for a in (x, head))
    labels, mask = np.asarray(labels), np.asarray(mask)
    (tokens, width), words = x.shape, len(head)
    logits = x @ head.T
    error = width * u * (abs(x) @ abs(head).T).max(axis=1, keepdims=True)
    shares, normalizer, relative = _exponentials(logits, error)
    said = np.arange(words) == labels[:, None]
    nll = normalizer - logits[said][:, None]
    loss = nll + z_loss * normalizer**2
    # A normalizer is within `relative`, and is rounded once when a logit is taken from it.
    nll_error = relative + error + u * abs(nll)
    loss_error = nll_error + z_loss * (2 * abs(normalizer) * relative + 2 * u * normalizer**2) + u * abs(loss)
    factor = 1 + 2 * z_loss * normalizer
    into = mask[:, None] * (shares * factor - said)
    factor_error = 2 * z_loss * (relative + u * abs(normalizer)) + 2 * u * abs(factor)
    into_error = shares * (abs(factor) * (relative + u) + factor_error) * mask[:, None] + 2 * u * abs(into)

    def added(each: np.ndarray, each_error: np.ndarray) -> Bounded:
        each, each_error = each[mask], each_error[mask]
        return each.sum(), each_error.sum() + tokens * u * abs(each).sum()

    dx = into @ head, (into_error + words * u * abs(into)) @ abs(head)
    dhead = into.T @ x, (into_error + tokens * u * abs(into)).T @ abs(x)
    return added(loss, loss_error), added(nll, nll_error), dx, dhead


def token_logps(x: Any, head: Any, labels: Any, g: Any) -> tuple[Bounded, ...]:
    """(the log-probability of each label [N], what comes back to x and to head from a cotangent g [N]), float32's."""
    u = FLOAT32
    x, head, g = (np.asarray(a, np.float64) for a in (x, head, g))
    (tokens, width), words = x.shape, len(head)
    logits = x @ head.T
    error = width * u * (abs(x) @ abs(head).T).max(axis=1, keepdims=True)
    shares, normalizer, relative = _exponentials(logits, error)
    said = np.arange(words) == np.asarray(labels)[:, None]
    logps = logits[said][:, None] - normalizer
    logps_error = relative + error + u * abs(logps)
    # A share and the difference from it are rounded, and so is its product with g.
    into = g[:, None] * (said - shares)
    into_error = abs(g)[:, None] * shares * (relative + u) + 2 * u * abs(into)
    dx = into @ head, (into_error + words * u * abs(into)) @ abs(head)
    dhead = into.T @ x, (into_error + tokens * u * abs(into)).T @ abs(x)
    return (logps[:, 0], logps_error[:, 0]), dx, dhead


def log_softmax(logits: Any) -> Bounded:
    """Of float32 logits [N, V], over the last axis."""
    logits = np.asarray(logits, np.float64)
    _, normalizer, relative = _exponentials(logits, np.zeros((len(logits), 1)))
    said = logits - normalizer
    return said, relative + FLOAT32 * abs(said)


def shaken(compute: Callable[[Any], Any], model: Any, roundings: int = 16) -> tuple[Bounded, ...]:
    """The arrays of compute(model), of a whole model in float32, and how far off another way to compute them may be.

    A sum of n products as computed is the exact sum with factors that are moved by n u at most (Higham, section 3.1),
    and by the root of n times u where roundings are of either sign. So what is allowed is twice, once for each way, how
    far an array moves at most when every parameter is moved by `roundings` u to either side at random, four times; and
    as many roundings of itself. The small models' sums have up to 160 terms, whose root is 13. (As measured, their
    logits in float32 are about a twentieth as far from those in float64.)
    """
    random = np.random.RandomState(0)

    def moved(x: Any) -> Any:
        if not jax.numpy.issubdtype(x.dtype, np.floating):
            return x  # a quantized weight's integers, beside which its scales are moved
        sides = random.choice([-1, 1], x.shape)
        return x * (1 + roundings * FLOAT32 * sides).astype(x.dtype)

    def arrays(model: Any) -> list[np.ndarray]:
        return [np.asarray(x, np.float64) for x in jax.tree.leaves(jax.device_get(compute(model)))]

    exact = arrays(model)
    others = [arrays(jax.tree.map(moved, model)) for _ in range(4)]
    return tuple(
        (x, 2 * max(np.abs(other[i] - x).max() for other in others) + roundings * FLOAT32 * np.abs(x))
        for i, x in enumerate(exact)
    )


def worst(got: Any, bounded: tuple[Bounded, ...]) -> list[float]:
    """`within` of each of several results."""
    return [within(jax.device_get(x), b) for x, b in zip(got, bounded, strict=True)]
