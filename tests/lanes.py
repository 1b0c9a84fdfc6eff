"""What the MLIR of a Mosaic GPU kernel computes, thread by thread, in numpy: for what interpret mode cannot run.

`simulate(monkeypatch)` replaces the MLIR builders that the kernels use by functions of numpy's, and `inline_mgpu` by
a loop over the 128 threads of a warpgroup. Where each thread's registers lie in an array is read from the kernels'
own layouts.
"""

import importlib
import types
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest


def simulate(monkeypatch: pytest.MonkeyPatch) -> None:
    from jax.experimental.mosaic import gpu as mgpu
    from jax.experimental.pallas import mosaic_gpu as plgpu
    from jax.extend import mlir
    from jax.extend.mlir import dialects

    for name in ("ir", "dialects.arith", "dialects.math", "dialects.vector"):
        importlib.import_module(f"jax.extend.mlir.{name}")  # what is loaded only then can be replaced

    def constant(function: Any) -> Any:
        return types.SimpleNamespace(get=function)

    ir = types.SimpleNamespace(
        F32Type=constant(lambda: np.float32),
        BF16Type=constant(lambda: ml_dtypes.bfloat16),
        IntegerType=types.SimpleNamespace(get_signless=lambda bits: np.dtype(f"uint{bits}").type),
        VectorType=constant(lambda shape, dtype: (shape[0], dtype)),
        IntegerAttr=constant(lambda dtype, x: dtype(x % 2 ** (8 * np.dtype(dtype).itemsize))),
        FloatAttr=constant(lambda dtype, x: dtype(x)),
        DenseI64ArrayAttr=constant(list),
    )
    arith = types.SimpleNamespace(
        constant=lambda _, x: x,
        andi=np.bitwise_and,
        xori=np.bitwise_xor,
        shrui=lambda x, by: np.uint32(x) >> np.uint32(by),
        addf=np.add,
        subf=np.subtract,
        mulf=np.multiply,
        truncf=lambda to, x: x.astype(to[1]),
    )
    math = types.SimpleNamespace(fma=lambda a, b, c: np.float32(np.float64(a) * np.float64(b) + np.float64(c)))
    vector = types.SimpleNamespace(
        bitcast=lambda to, x: x.view(to[1]).reshape(to[0]),
        broadcast=lambda to, x: np.full(to[0], x, to[1]),
        extract=lambda x, _, at: x[at[0]],
        shuffle=lambda a, b, order: np.concatenate([a, b])[order],
        from_elements=lambda to, x: np.array(x, to[1]).reshape(to[0]),
    )

    def fragment(_registers: Any, _layout: Any, _is_signed: Any = None) -> Any:
        return types.SimpleNamespace(registers=_registers, layout=_layout)

    monkeypatch.setattr(mlir, "ir", ir)
    for name, fake in {"arith": arith, "math": math, "vector": vector}.items():
        monkeypatch.setattr(dialects, name, fake)
    monkeypatch.setattr(mgpu, "FragmentedArray", fragment)

    def inline_mgpu(*, arg_types: Any, return_type: Any) -> Any:
        def run(function: Any) -> Any:
            def call(*arrays: Any) -> Any:
                outs, tree = jax.tree.flatten(return_type, is_leaf=lambda x: hasattr(x, "layout"))
                found = [np.zeros(out.shape, jnp.dtype(out.dtype)) for out in outs]
                for warp, lane in np.ndindex(4, 32):
                    fragments = [
                        fragment(_registers(np.asarray(x), layout.to_mgpu(), warp, lane), layout, None)
                        for x, layout in zip(arrays, arg_types, strict=True)
                    ]
                    results = jax.tree.leaves(function(None, *fragments), is_leaf=lambda x: hasattr(x, "registers"))
                    for out, result in zip(found, results, strict=True):
                        _write(out, result, warp, lane)
                return jax.tree.unflatten(tree, found)

            return call

        return run

    monkeypatch.setattr(plgpu, "inline_mgpu", inline_mgpu)


def _places(shape: tuple[int, ...], layout: Any, warp: int, lane: int) -> np.ndarray:
    """The flat indices of an array's elements that a thread holds, vectors last."""
    index = np.arange(np.prod(shape)).reshape(shape)
    for tile in layout.tiling.tiles:
        lead = index.shape[: index.ndim - len(tile)]
        split = [n for size, part in zip(index.shape[len(lead) :], tile, strict=True) for n in (size // part, part)]
        index = index.reshape(*lead, *split)
        first = len(lead)
        order = [*range(first), *range(first, index.ndim, 2), *range(first + 1, index.ndim, 2)]
        index = index.transpose(order)
    chosen: list[Any] = [slice(None)] * index.ndim
    for dims, number in ((layout.warp_dims, warp), (layout.lane_dims, lane)):
        sizes = [index.shape[d] if isinstance(d, int) else d.times for d in dims]
        for d, digit in zip(dims, np.unravel_index(number, sizes), strict=True):
            if isinstance(d, int):
                chosen[d] = slice(digit, digit + 1)
    assert layout.vector_dim == -1
    return index[tuple(chosen)][..., None, :]


def _registers(array: np.ndarray, layout: Any, warp: int, lane: int) -> np.ndarray:
    places = _places(array.shape, layout, warp, lane)
    registers = np.empty(places.shape[:-1], object)
    for i in np.ndindex(registers.shape):
        registers[i] = array.reshape(-1)[places[i]]
    assert registers.shape == layout.registers_shape(array.shape)
    return registers


def _write(out: np.ndarray, result: Any, warp: int, lane: int) -> None:
    places = _places(out.shape, result.layout, warp, lane)
    assert result.registers.shape == places.shape[:-1]
    for i in np.ndindex(result.registers.shape):
        out.reshape(-1)[places[i]] = result.registers[i]
