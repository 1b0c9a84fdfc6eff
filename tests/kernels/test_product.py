"""Kernels for products with quantized weights: what they compute, in interpret mode, what takes them, what compiles."""

import functools
import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rounding
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from lanes import simulate

from sharding import hlo
from sharding.mesh import make_mesh
from sharding.rules import Sharding
from smollm3_jax.config import WEIGHT_SCHEMES
from smollm3_jax.errors import SupportError
from smollm3_jax.kernels import product, product_gpu, product_tpu, product_wgmma
from smollm3_jax.kernels.product import WeightSharding, unpacked_product
from smollm3_jax.plan.devices import topology
from smollm3_jax.quantize import dequantize, linear, quantize_weight, range_scales, to_integers

GROUPED = [scheme for scheme, group in WEIGHT_SCHEMES.items() if group is not None]
GPU = pytest.mark.skipif(jax.__version_info__ < (0, 11, 2), reason="the kernels for GPUs need jax 0.11.2")
# All numbers of a sum go through fewer roundings than this, but for products that add up one after the other: 16 of
# products and their sums, 3 of up to four vectors of a group, 1 of the scale, 6 of three steps' sums (int4 has two of
# each), 31 of lanes, 3 of warpgroups, and 2 of the weight in float32 that `check` compares with.
ROUNDINGS = 64


def weight_of(channels: int, inputs: int, scheme: str) -> tuple:
    w_NK = np.random.RandomState(0).standard_normal((channels, inputs)).astype(np.float32)
    scale, minimum = range_scales(w_NK, scheme)
    # A scale of the least size float16 has, and one of zeros, are scales too.
    if minimum is not None:
        scale[0, 0], minimum[0, 0], minimum[0, 1] = 2.0**-24, -3 * 2.0**-24, 0
    return to_integers(w_NK, scale, minimum), scale, minimum


def matrices(packed: Any) -> tuple:
    """Its parts, of which those with inputs are matrices."""
    parts = (None if x is None else np.asarray(x[...]) for x in (packed.values, packed.scale, packed.minimum))
    return tuple(x if x is None or x.ndim == 1 else x.reshape(len(x), -1) for x in parts)


def activations(rows: int, inputs: int, dtype: str) -> jax.Array:
    return jnp.asarray(np.random.RandomState(1).standard_normal((rows, inputs)), dtype)


def check(got_RN: jax.Array, x_RK: jax.Array, parts: tuple, bias: int, roundings: int) -> None:
    """Against the product in float64; a number q counts as bias + q in the kernel, which the minimum takes back."""
    values, scale, minimum = parts
    x = np.asarray(x_RK, np.float64)
    expected = x @ dequantize(values, scale, minimum).astype(np.float64).T
    groups = scale.shape[-1] if scale.ndim == 2 else 1
    total = np.abs(x).reshape(len(x), groups, -1).sum(axis=2)
    steps = 15 + bias if minimum is not None else 127
    size = steps * scale.reshape(-1, groups).astype(np.float64)
    if minimum is not None:
        size += np.abs(minimum.astype(np.float64) - bias * scale)
    assert got_RN.dtype == jnp.float32
    assert (np.abs(np.asarray(got_RN) - expected) <= 2.0**-24 * roundings * total @ size.T).all()


@GPU
@pytest.mark.parametrize(
    ("channels", "inputs", "rows", "dtype"),
    [(64, 576, 1, "float32"), (32, 1536, 2, "bfloat16"), (16, 11008, 1, "bfloat16"), (1024, 2048, 2, "float32")],
)
@pytest.mark.parametrize("scheme", GROUPED)
def test_gpu(scheme, channels, inputs, rows, dtype):
    from jax.experimental.pallas import mosaic_gpu as plgpu

    if inputs % WEIGHT_SCHEMES[scheme]:
        pytest.skip("groups do not divide it")
    values, scale, minimum = weight_of(channels, inputs, scheme)
    x = activations(rows, inputs, dtype)
    arrays = (jnp.asarray(values), jnp.asarray(scale), None if minimum is None else jnp.asarray(minimum))
    got = product_gpu.product(x, *arrays, interpret=plgpu.InterpretGPUParams())
    check(got, x, (values, scale, minimum), 128, ROUNDINGS)


@GPU
# (2,752 inputs are 86 or 43 groups: the last four are not all of a step's.)
@pytest.mark.parametrize(("channels", "inputs", "rows"), [(64, 11008, 3), (128, 1536, 20), (64, 2752, 9)])
@pytest.mark.parametrize("scheme", GROUPED)
def test_tensor_cores(scheme, channels, inputs, rows):
    """Against the product with the weight rounded to bfloat16."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    values, scale, minimum = weight_of(channels, inputs, scheme)
    x = activations(rows, inputs, "bfloat16")
    arrays = (jnp.asarray(values), jnp.asarray(scale), None if minimum is None else jnp.asarray(minimum))
    assert product_wgmma.fits(channels, scale.shape[1])
    got = product_wgmma.product(x, *arrays, interpret=plgpu.InterpretGPUParams())
    assert got.dtype == jnp.float32
    # The weight in float32 is exact (int4) or rounded once, on both sides. A number goes through sums of 128 products,
    # those of a warpgroup's steps, of its warpgroups and of shares; what they multiply is exact.
    added = product_wgmma.WARPGROUPS + product_wgmma.SHARES
    steps = -(-scale.shape[1] // (product_wgmma.GROUPS * product_wgmma.WARPGROUPS * product_wgmma.SHARES))
    roundings = 128 + steps * WEIGHT_SCHEMES[scheme] // 32 + added
    whole = dequantize(values, scale, minimum)
    x, whole, rounded = (np.asarray(a, np.float64) for a in (x, whole, jnp.asarray(whole).astype(jnp.bfloat16)))
    allowed = roundings * rounding.FLOAT32 * abs(x) @ abs(rounded).T
    assert rounding.within(got, (x @ rounded.T, allowed)) <= 1 < rounding.within(got, (x @ whole.T, allowed))


@GPU
@pytest.mark.parametrize("lanes", [32, 16])
@pytest.mark.parametrize("parts", [1, 2])
def test_inner_products_in_registers(lanes, parts, monkeypatch):
    """The kernel's own MLIR, thread by thread, against what stands for it in interpret mode."""
    random = np.random.RandomState(2)
    channels = 2 * 4 * 32 // lanes
    bytes_: Any = random.randint(0, 256, (channels, lanes, 16)).astype(np.uint8)
    bytes_ = bytes_ if parts == 2 else bytes_.view(np.int8)
    x: list[Any] = [random.standard_normal((lanes, 16)).astype(np.float32) for _ in range(parts)]
    layout = product_gpu._layout(lanes)
    interpreted = product_gpu._dot_interpreted(layout, jnp.asarray(bytes_), [jnp.asarray(part) for part in x])
    numbers = [bytes_] if parts == 1 else [128 + (bytes_ & 15), 128 + (bytes_ >> 4)]
    products = np.array([np.float64(part) * number for part, number in zip(x, numbers, strict=True)])
    simulate(monkeypatch)
    # Of 16 products each rounding, and those of their sums, in any order; and that of the sum of two.
    bounded = products.sum(axis=(0, -1)), (16 + parts) * rounding.FLOAT32 * abs(products).sum(axis=(0, -1))
    assert max(rounding.worst((interpreted, product_gpu._dot(layout, bytes_, x)), (bounded, bounded))) <= 1


@GPU
@pytest.mark.parametrize("scheme", GROUPED)
def test_operands_in_registers(scheme, monkeypatch):
    """Every number of a group, scaled, in the column of the tensor cores' operand where the activations expect it."""
    values, scale, minimum = weight_of(64, 4 * WEIGHT_SCHEMES[scheme], scheme)
    vectors: Any = np.split(values.reshape(64, 4, -1), values.shape[1] // 64, axis=2)
    scales = [part.astype(np.float32) for part in (scale, minimum) if part is not None]
    expected = product_wgmma._unpack_interpreted(None, [jnp.asarray(v) for v in vectors], scales)
    simulate(monkeypatch)
    got = product_wgmma._unpack(product_wgmma.layout(), vectors, scales)
    assert len(got) == len(expected) == WEIGHT_SCHEMES[scheme] // 32
    # int4: a scale and a minimum of 11 bits and 128 + q of 8 bits give a result that float32 holds exactly. int8: a
    # product is rounded once. So both sides round the same float32 number to bfloat16.
    for one, other in zip(got, expected, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("channels", "inputs", "rows", "dtype"),
    [(128, 2048, 1, "bfloat16"), (256, 512, 3, "float32"), (128, 11008, 2, "bfloat16")],
)
@pytest.mark.parametrize("scheme", WEIGHT_SCHEMES)
def test_tpu(scheme, channels, inputs, rows, dtype):
    values, scale, minimum = weight_of(channels, inputs, scheme)
    x = activations(rows, inputs, dtype)
    by_channel = WEIGHT_SCHEMES[scheme] is None
    assert product_tpu.fits(channels, values.shape[1], None if by_channel else scale.shape[1])
    scales = (None, None) if by_channel else (jnp.asarray(scale), None if minimum is None else jnp.asarray(minimum))
    got = product_tpu.product(x, jnp.asarray(values), *scales, interpret=True)
    # The products of 512 bytes may add up one after the other.
    check(got * scale[None] if by_channel else got, x, (values, scale, minimum), 8, ROUNDINGS + 512)


@pytest.mark.parametrize(("groups", "fits"), [(64, True), (344, True), (172, False), (18, False)])
def test_tpu_blocks(groups, fits):
    """Of int4. Halves of its groups of 16 bytes would be less than a tile of lanes."""
    assert product_tpu.fits(256, 16 * groups, groups) == fits
    assert product_tpu.fits(256, 64 * 172, 172) and not product_tpu.fits(192, 1024, 64)


def test_gpu_geometry():
    """Of a row: enough programs for an H100, warps on whole rows, and long rows shared by warpgroups."""
    assert product_gpu.geometry(1, 11008, 64) == (32, 8, 1)
    assert product_gpu.geometry(1, 2048, 344) == (32, 4, 4)
    assert product_gpu.geometry(1, 512, 64) == (32, 1, 1)
    assert product_gpu.geometry(2, 11008, 64) == (32, 4, 1)
    assert product_gpu.geometry(1, 576, 18) == (16, 1, 1)
    assert product_gpu.geometry(1, 30, 64) is None


def squares_of_rounded(x: Any, parts: tuple, by_kernel: bool) -> tuple[rounding.Bounded, ...]:
    """The sum of (x w^T)^2 and what comes back to x, in bfloat16, with how far rounding may have them from that.

    The kernel multiplies with the weight as it is, what has none with a grouped one rounded to bfloat16, and so does
    what comes back; one scale for each channel joins what is multiplied instead.
    """
    c, u, (values, scale, minimum) = rounding.UNIT["bfloat16"], rounding.FLOAT32, parts
    whole = dequantize(values, scale, minimum)
    rounded = np.asarray(jnp.asarray(whole).astype(jnp.bfloat16) if scale.ndim > 1 else whole, np.float64)
    w = whole.astype(np.float64) if by_kernel else rounded
    x = np.asarray(x, np.float64).reshape(-1, w.shape[1])
    y = x @ w.T
    size = 3 * abs(x).sum(axis=1, keepdims=True) * abs(w).max(axis=1)  # int4's q - 8 and minimum count by themselves
    y_error = c * abs(y) + (ROUNDINGS + 512) * u * size
    # A square is rounded, and the sum of all.
    value = np.square(y).sum()
    value_error = (2 * abs(y) * y_error + c * np.square(y)).sum() + c * value
    # 2 y is what comes back to y, and is rounded again where it is scaled.
    dx = 2 * y @ rounded
    dx_error = 2 * (y_error + (c * (scale.ndim == 1) + len(w) * u) * abs(y)) @ abs(rounded) + c * abs(dx)
    return (value, value_error), (dx, dx_error)


@pytest.mark.parametrize("scheme", WEIGHT_SCHEMES)
def test_linear_by_a_kernel(scheme, monkeypatch):
    """The model's product, its dimensions as attention's output projection has them, and its gradient."""
    weight = nnx.Param(
        jnp.asarray(activations(128, 512, "float32")).reshape(128, 4, 128), axes=("embed", "heads", "head")
    )
    packed = quantize_weight(weight, scheme, contracted=2)
    x = activations(2, 512, "bfloat16").reshape(1, 2, 4, 128)
    parts = matrices(packed)

    def off(x) -> float:
        def squares(x):
            return (linear(x, packed, contracted=2, platform="tpu") ** 2).sum()

        value, gradient = jax.value_and_grad(squares)(x)
        got = (value, gradient.reshape(2, -1))
        return max(rounding.worst(got, squares_of_rounded(sent, parts, len(called) == 1)))

    called, sent = [], x

    def recorded(*arrays):
        called.append(arrays)
        return kernel(*arrays, interpret=True)

    kernel = product_tpu.product
    monkeypatch.setattr(product_tpu, "product", recorded)
    assert off(x) <= 1 and len(called) == 1
    monkeypatch.setattr(product, "product_tpu", product_gpu)
    monkeypatch.setattr(product_gpu, "ROWS", {True: 0, False: 0})
    assert off(x) <= 1 and len(called) == 1
    assert off(x.at[0, 1].multiply(1.0625)) > 1


def on(
    platform: str, rows: int = 1, channels: int = 256, scheme: str = "int4", dtype: str = "bfloat16", layout=None
) -> bool:
    """Whether a kernel takes it."""
    parts = (None if part is None else jnp.asarray(part) for part in weight_of(channels, 512, scheme))
    x = activations(rows, 512, dtype)

    def call(x, *parts):
        return unpacked_product(x, *parts, WEIGHT_SCHEMES[scheme], platform, layout)

    return jax.eval_shape(call, x, *parts) is not None


def test_what_kernels_take(caplog):
    caplog.set_level(logging.INFO)
    assert on("tpu") and on("tpu", scheme="int8") and on("tpu", rows=100, scheme="int8")
    assert not on("cpu") and not on("tpu", rows=17) and not caplog.records
    assert not on("tpu", channels=200)
    assert "does not take 200 output channels of 512 inputs: plain XLA" in caplog.text
    mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("data", "tensor"))
    assert on("tpu", layout=WeightSharding(Sharding.of(mesh, "serve_tp"), ("mlp", "embed")))
    assert not on("tpu", dtype="float16") and "1 rows of float16" in caplog.text
    # This machine's device is no GPU.
    assert not on("gpu") and "a device before Hopper" in caplog.text
    assert not on("gpu", scheme="int8") and not on("gpu", rows=65)
    caplog.clear()
    assert not on("gpu", rows=3) and "other than Hopper" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rules", "axes", "shape", "contracted", "batch", "scheme", "expected"),
    [
        ("serve_tp", ("mlp", "embed"), (256, 512), 1, 4, "int4", [((2, 512), (128, 256))]),
        ("serve_tp", ("embed", "heads", "head"), (128, 4, 256), 2, 4, "int8-g32", [((2, 512), (128, 512))]),
        ("serve_tp", ("mlp", "embed"), (256, 512), 1, 1, "int8", [((1, 512), (128, 512))]),
        # Rows and inputs on the same axis of the mesh: XLA divides the product as it can.
        ({"embed": "data", "batch": "data"}, ("mlp", "embed"), (256, 512), 1, 4, "int8", []),
    ],
)
def test_on_several_devices(rules, axes, shape, contracted, batch, scheme, expected, monkeypatch):
    """Each device's kernel has its part: of rows and channels, of rows and inputs, and all rows where they are few."""
    product, called = product_tpu.product, []

    def interpreted(x, values, *rest):
        called.append((x.shape, values.shape))
        return product(x, values, *rest, interpret=True)

    monkeypatch.setattr(product_tpu, "product", interpreted)
    sharding = Sharding.of(make_mesh({"data": 2, "tensor": 2}, jax.devices()[:4]), rules)
    random = np.random.RandomState(0)
    w = nnx.Param(jnp.asarray(random.standard_normal(shape), jnp.float32), axes=axes)
    packed = quantize_weight(w, scheme, contracted)
    parts = matrices(packed)
    for param in (packed.values, packed.scale, packed.minimum):
        if param is not None:
            param.set_value(jax.device_put(param[...], sharding.named("w", param.get_metadata("axes"), param.shape)))
    x = jnp.asarray(random.standard_normal((batch, 1, *shape[-contracted:])), jnp.float32)
    run = jax.jit(functools.partial(linear, contracted=contracted, platform="tpu", sharding=sharding))
    got = np.asarray(run(x, packed))[:, 0]
    check(jnp.asarray(got), x.reshape(batch, -1), parts, 8, ROUNDINGS + 512)
    assert called == expected, called


def program_of(name: str, scheme: str, shape: tuple[int, ...], contracted: int, rows: int) -> list[hlo.Operation]:
    """What the compiler for a topology makes of a product in bfloat16 with a weight of this shape."""
    try:
        _, devices = topology(name)
    except SupportError as error:
        pytest.skip(str(error))
    if name.startswith("h100") and jax.__version_info__ < (0, 11, 2):
        pytest.skip("the kernels for GPUs need jax 0.11.2")
    sharding = Sharding.of(Mesh(np.array(devices).reshape(1, 1), ("data", "tensor")), "serve_tp")
    at = NamedSharding(sharding.mesh, PartitionSpec())
    weight = jax.eval_shape(
        lambda w: quantize_weight(nnx.Param(w, axes=("embed", "heads", "head")[: len(shape)]), scheme, contracted),
        jax.ShapeDtypeStruct(shape, jnp.float32),
    )
    x = jax.ShapeDtypeStruct((rows, *shape[-contracted:]), jnp.bfloat16)
    weight, x = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), (weight, x))
    lowered = jax.jit(lambda x, weight: linear(x, weight, contracted, sharding=sharding)).lower(x, weight)
    return hlo.operations(lowered.compile().as_text() or "")


SHAPES = [((11008, 2048), 1), ((2048, 16, 128), 2), ((2048, 11008), 1), ((512, 2048), 1)]


@GPU
@pytest.mark.parametrize(("shape", "contracted"), SHAPES)
@pytest.mark.parametrize("scheme", GROUPED)
def test_compiled_for_h100(scheme, shape, contracted):
    """SmolLM3's weights lie as the kernel reads them: nothing stands beside it."""
    program = program_of("h100:1", scheme, shape, contracted, rows=1)
    assert [op.target for op in program if op.target] == ["mosaic_gpu_v2"]
    assert not [op for op in program if op.opcode in ("fusion", "copy", "transpose")]


@GPU
@pytest.mark.parametrize(("rows", "inputs"), [(8, 11008), (64, 11008), (8, 2752)])
@pytest.mark.parametrize("scheme", GROUPED)
def test_tensor_cores_compiled_for_h100(scheme, rows, inputs):
    """Activations are arranged before, and sums of shares added up after: no weight is copied."""
    program = program_of("h100:1", scheme, (2048, inputs), 1, rows)
    assert [op.target for op in program if op.target] == ["mosaic_gpu_v2"]
    assert not [op for op in program if op.opcode == "copy" and op.shapes[0].bytes > 2**20]
    assert all(shape.bytes <= 2 * rows * 11008 for op in program if op.opcode == "fusion" for shape in op.shapes)


def test_one_scale_a_channel_for_h100():
    """XLA converts the integers in the product itself."""
    program = program_of("h100:1", "int8", (11008, 2048), 1, rows=1)
    kernels = [op for op in program if not op.in_fusion and op.opcode not in ("parameter", "bitcast")]
    assert all(shape.bytes < 2**20 for op in kernels for shape in op.shapes)


@pytest.mark.parametrize("chip", ["v5e", "v6e"])
@pytest.mark.parametrize("scheme", ["int4", "int8-g64", "int8"])
def test_compiled_for_tpu(scheme, chip):
    program = program_of(f"{chip}:1x1", scheme, (2048, 11008), 1, rows=4)
    assert [op.target for op in program if op.target == "tpu_custom_call"] == ["tpu_custom_call"]
    # Activations are arranged, and float16 scales read as integers; no weight is.
    assert all(shape.bytes <= 2048 * 344 * 2 for op in program if op.opcode == "fusion" for shape in op.shapes)
    assert not hlo.moves(program, 2048 * 344 * 4)
