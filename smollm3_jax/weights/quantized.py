"""Checkpoints quantized and dequantized as they are read, tensor by tensor."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from .. import quantize
from ..config import WEIGHT_SCHEMES, ModelConfig, QuantizationConfig
from ..errors import OptionError
from .key_map import HFTensor, hf_tensors
from .stored import StoredTensor

PIECE = 1 << 16  # numbers that are worked on at once: they stay in the processor's cache


def with_scheme(config: ModelConfig, weights: str, cache: str | None = None) -> ModelConfig:
    """The config of the same model quantized.

    Raises:
      OptionError: the scheme is unknown, or the model is quantized already, in another one.
      ConfigError: the model's dimensions are no multiples of the scheme's groups.
    """
    if weights not in WEIGHT_SCHEMES:
        raise OptionError(f"weights is {weights!r}; choose one of {', '.join(WEIGHT_SCHEMES)}")
    own = config.quantization
    if own is not None and own.weights != weights:
        raise OptionError(
            f"the checkpoint's weights are {own.weights} already and cannot become {weights}; start from the plain ones"
        )
    if own is not None and cache is None:
        return config
    return dataclasses.replace(config, quantization=QuantizationConfig(weights=weights, cache=cache))


def quantize_tensors(config: ModelConfig, tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """A plain checkpoint's tensors as a quantized config wants them.

    Scales are found at the first read of any part of a weight and kept; values are computed at each read.
    """
    assert config.quantization is not None
    out, scales = {}, {}
    for name, hf in hf_tensors(config).items():
        if hf.dtype is None:
            out[name] = tensors[name]
            continue
        weight, part = hf.param.rsplit(".", 1)
        if part == "values":
            source = tensors[name]
            scheme = quantize.scheme_of(weight, config.quantization.weights)
            scales[weight, hf.layer] = source, functools.cache(functools.partial(_scales, source, scheme))
        out[name] = _part(name, hf, part, *scales[weight, hf.layer])
    return out


def _part(
    name: str, hf: HFTensor, part: str, source: StoredTensor, scales: Callable[[], tuple[np.ndarray, Any]]
) -> StoredTensor:
    def read() -> np.ndarray:
        scale, minimum = scales()
        if part != "values":
            return scale if part == "scale" else minimum
        return _in_pieces(quantize.to_integers, source.read(), scale, minimum)

    assert hf.dtype is not None
    return StoredTensor(name=name, dtype=hf.dtype, shape=hf.shape, file=source.file, read=read)


def _scales(source: StoredTensor, scheme: str) -> tuple[np.ndarray, np.ndarray | None]:
    find = functools.partial(quantize.best_scales, scheme=scheme)
    return _in_pieces(find, source.read())


def _in_pieces(function: Callable[..., Any], *arrays: Any) -> Any:
    """function(arrays) computed from a few rows at a time, on all cores; its results are joined again."""
    rows = arrays[0].shape[0]
    step = max(1, PIECE // max(1, arrays[0].shape[1]))

    def one(start: int) -> Any:
        with np.errstate(all="ignore"):  # numbers that are not finite are for whoever loads the weights to report
            return function(*(None if array is None else array[start : start + step] for array in arrays))

    with ThreadPoolExecutor() as pool:
        pieces = list(pool.map(one, range(0, rows, step)))
    if isinstance(pieces[0], tuple):
        return tuple(None if part[0] is None else np.concatenate(part) for part in zip(*pieces, strict=True))
    return np.concatenate(pieces)


def dequantize_tensors(
    config: ModelConfig, tensors: Mapping[str, StoredTensor]
) -> tuple[ModelConfig, dict[str, StoredTensor]]:
    """A quantized checkpoint as a plain one; weights come as float32."""
    plain = dataclasses.replace(config, quantization=None)
    out = {}
    for name, hf in hf_tensors(plain).items():
        parts = [tensors.get(name + ending) for ending in ("", ".scale", ".minimum")]
        out[name] = tensors[name] if parts[1] is None else _whole(name, hf, *parts)
    return plain, out


def _whole(name: str, hf: HFTensor, *parts: StoredTensor | None) -> StoredTensor:
    def read() -> np.ndarray:
        return _in_pieces(quantize.dequantize, *(None if part is None else part.read() for part in parts))

    assert parts[0] is not None
    return StoredTensor(name=name, dtype="float32", shape=hf.shape, file=parts[0].file, read=read)
