"""How the weights of several models become one: linear, slerp, TIES and DARE, in float32, tensor by tensor.

The conventions are mergekit's, whose files and numbers people compare with: DARE, for one, keeps the sum of the
absolute differences, rather than divide by the density as its paper does.
"""

import hashlib
from collections.abc import Sequence

import numpy as np

# Of two directions that are closer than this, or opposite, slerp takes the straight line between them.
STRAIGHT = 0.9995


def linear(arrays: Sequence[np.ndarray], weights: Sequence[float], normalize: bool = True) -> np.ndarray:
    """The weighted sum (Wortsman et al. 2022, arXiv 2203.05482), divided by the sum of the weights if asked for."""
    out = np.zeros(arrays[0].shape, np.float32)
    for array, weight in zip(arrays, weights, strict=True):
        out += np.float32(weight) * array
    return out / np.float32(sum(weights)) if normalize else out


def slerp(base: np.ndarray, other: np.ndarray, t: float) -> np.ndarray:
    """The point at t on the great circle between the directions of two tensors: 0 is the base, 1 the other."""
    lengths = [float(np.linalg.norm(x.reshape(-1))) for x in (base, other)]
    directions = [
        x / np.float32(length if length > 1e-8 else 1) for x, length in zip((base, other), lengths, strict=True)
    ]
    cosine = float(np.clip(np.vdot(*directions), -1, 1))
    if abs(cosine) > STRAIGHT:
        shares = 1 - t, t
    else:
        angle = np.arccos(cosine)
        shares = np.sin((1 - t) * angle) / np.sin(angle), np.sin(t * angle) / np.sin(angle)
    return np.float32(shares[0]) * base + np.float32(shares[1]) * other


def largest(delta: np.ndarray, density: float) -> np.ndarray:
    """TIES' trimming: the share `density` of the differences that is largest stays, at least one; the rest becomes 0.

    Of equal ones at the border those stay that come first.
    """
    if density >= 1:
        return delta
    flat = np.abs(delta).reshape(-1)
    if density <= 0 or not flat.size:
        return np.zeros_like(delta)
    count = max(1, int(density * flat.size))
    border = np.partition(flat, flat.size - count)[flat.size - count]
    kept = flat > border
    kept[np.flatnonzero(flat == border)[: count - np.count_nonzero(kept)]] = True
    return delta * kept.reshape(delta.shape)


def dropped(delta: np.ndarray, density: float, rescale: bool, kept: np.ndarray) -> np.ndarray:
    """DARE's dropping: what `kept` names stays, and is made larger until the absolute differences sum up to what they
    did.

    Args:
      kept: bool, drawn with probability `density`; see `drawn`.
    """
    if density >= 1:
        return delta
    out = delta * kept
    before, after = float(np.abs(delta).sum()), float(np.abs(out).sum())
    return out * np.float32(before / after) if rescale and min(before, after) >= 1e-7 else out


def drawn(shape: tuple[int, ...], density: float, *of: object) -> np.ndarray:
    """bool: True with probability `density`; the same for the same `of` on any machine."""
    seed = int.from_bytes(hashlib.sha256(repr(of).encode()).digest()[:16])
    return np.random.Generator(np.random.Philox(seed)).random(shape, np.float32) < density


def added(
    base: np.ndarray,
    deltas: Sequence[np.ndarray],
    weights: Sequence[float],
    normalize: bool,
    elect: bool,
    scale: float = 1.0,
) -> np.ndarray:
    """The base and the weighted sum of the differences from it.

    Args:
      normalize: divide by the sum of the weights (of those that counted, where signs are elected).
      elect: TIES' election (Yadav et al. 2023, arXiv 2306.01708): of each number count only the differences whose sign
        is that of the sum of all.
      scale: of the sum, mergekit's lambda.
    """
    deltas = [np.float32(weight) * delta for weight, delta in zip(weights, deltas, strict=True)]
    if elect:
        sign = np.where(sum(deltas) >= 0, np.int8(1), np.int8(-1))
        counts = [np.sign(delta).astype(np.int8) == sign for delta in deltas]
        total = sum(delta * count for delta, count in zip(deltas, counts, strict=True))
        divisor = sum(np.float32(weight) * count for weight, count in zip(weights, counts, strict=True))
        divisor = np.where(divisor == 0, np.float32(1), divisor)
    else:
        total, divisor = sum(deltas), np.float32(sum(weights) if abs(sum(weights)) >= 1e-8 else 1)
    total = total / divisor if normalize else total
    return base + np.float32(scale) * total
