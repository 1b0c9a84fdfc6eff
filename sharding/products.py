"""What products and attention kernels of a compiled program do, by what its text says of them.

Products are XLA's own (`dot`, and `convolution` where XLA for TPU writes one), alone or in fusions, and cuBLAS's;
attention is cuDNN's.
"""

import dataclasses
import math
import re
from collections.abc import Mapping

import numpy as np

from .hardware import Chip
from .hlo import Operation

CUBLAS = ("__cublas$gemm", "__cublas$lt$matmul", "__cublas$lt$matmul$f8")
CUDNN_ATTENTION = "__cudnn$fmha"

_PRECISION = re.compile(r'operand_precision"?[=:][{\[]"?highest', re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Product:
    """One product. flops: multiplications and additions; float32: whether an operand is, and so the product slow on a
    GPU; exact: whether it is at the highest precision."""

    flops: int
    float32: bool
    exact: bool

    def seconds(self, chip: Chip) -> float:
        """At the chip's peak for such operands."""
        rate = chip.peak if not self.float32 else chip.exact if self.exact else chip.float32
        return self.flops / rate


@dataclasses.dataclass(frozen=True)
class KernelCost:
    """What one call of a custom kernel does: operations, bytes, and the share of the peak that it reaches."""

    flops: float
    bytes: float
    share: float = 1.0


def product(op: Operation, by_name: Mapping[tuple[str, str], Operation]) -> Product | None:
    """What an instruction multiplies, if it is a product; by_name: all instructions, by computation and name."""
    if op.opcode not in ("dot", "convolution") and op.target not in CUBLAS:
        return None
    operands = [by_name[op.computation, name].shapes[0] for name in op.operands[:2]]
    lhs, rhs = (shape.dims for shape in operands)
    flops = _convolution(op, lhs, rhs) if op.opcode == "convolution" else _dot(op, lhs)
    float32 = any(shape.dtype == "f32" for shape in operands)
    return Product(flops, float32, float32 and _PRECISION.search(op.attributes) is not None)


def _dot(op: Operation, lhs: tuple[int, ...]) -> int:
    """The dimensions of XLA's `lhs_contracting_dims={1}` and of cuBLAS's `"lhs_contracting_dimensions":["1"]`."""
    contracted = re.search(r'lhs_contracting_dim(?:ension)?s"?[=:][{\[]([\d,"]*)[}\]]', op.attributes)
    numbers = re.findall(r"\d+", contracted[1]) if contracted else []
    return 2 * math.prod(op.shapes[0].dims) * math.prod(lhs[int(i)] for i in numbers)


def _convolution(op: Operation, lhs_dims: tuple[int, ...], rhs_dims: tuple[int, ...]) -> int:
    out = op.shapes[0].dims
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", op.attributes)
    assert labels is not None
    lhs, rhs, result = ([*x] for x in labels.groups())
    window = {key: value.split("x") for key, value in re.findall(r"(\w+)=([\d_x]+)", _window(op.attributes))}
    # Features and batch: full products. In space, where batch dimensions hide: only pairs that meet.
    total = 2 * rhs_dims[rhs.index("i")] * out[result.index("f")] * out[result.index("b")]
    for i in range(len(lhs) - 2):
        place = str(i)
        total *= _meeting(
            lhs_dims[lhs.index(place)],
            rhs_dims[rhs.index(place)],
            out[result.index(place)],
            int(window["stride"][i]) if "stride" in window else 1,
            int(window["pad"][i].split("_")[0]) if "pad" in window else 0,
            int(window["lhs_dilate"][i]) if "lhs_dilate" in window else 1,
            int(window["rhs_dilate"][i]) if "rhs_dilate" in window else 1,
        )
    return total


def _window(attributes: str) -> str:
    found = re.search(r"window=\{([^}]*)\}", attributes)
    return found[1] if found else ""


def _meeting(length: int, kernel: int, out: int, stride: int, pad: int, dilate: int, kernel_dilate: int) -> int:
    """How many pairs of a place of the output and one of the kernel meet an element of the input."""
    at = np.arange(out)[:, None] * stride + np.arange(kernel) * kernel_dilate - pad
    return int(((at >= 0) & (at % dilate == 0) & (at < (length - 1) * dilate + 1)).sum())


def attention_flops(op: Operation, by_name: Mapping[tuple[str, str], Operation]) -> float:
    """The operations of a call of cuDNN's attention: two products of queries, keys and head width forward,
    five backward, over half of the scores if it is causal. Where rows are several documents, or their lengths are known
    when it runs, it does less."""
    scores = re.search(r'"intermediate_tensor_shape": ?\{.*?"dimensions": ?\[([\d", ]*)\]', op.attributes)
    assert scores is not None, op.name
    width = by_name[op.computation, op.operands[0]].shapes[0].dims[-1]
    products = 5 if "Backward" in (op.target or "") else 2
    causal = re.search(r'"mask_type": ?"\w*CAUSAL', op.attributes) is not None
    return 2 * products * math.prod(int(n) for n in re.findall(r"\d+", scores[1])) * width / (2 if causal else 1)
