"""Counts of products, loops and collectives, against what a hand computes."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sharding import hlo
from sharding.collectives import _groups
from sharding.hardware import CHIPS, Chip, chip_of
from sharding.products import KernelCost, _meeting
from sharding.roofline import roofline

CHIP = Chip("toy", peak=1e12, float32=1e12, exact=1e12, hbm=2**30, hbm_bandwidth=1e12, link=1e9, network=1e8)


def model_of(function, *shapes):
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return roofline(hlo.operations(jax.jit(function).lower(*arrays).compile()), CHIP)


def test_a_product():
    model = model_of(lambda a, b: a @ b, (64, 128), (128, 32))
    assert model.flops == 2 * 64 * 128 * 32
    assert model.dot_seconds == model.flops / CHIP.peak
    assert model.bytes == 4 * (64 * 128 + 128 * 32 + 64 * 32)


def test_a_product_of_batches():
    assert model_of(lambda a, b: jnp.einsum("bij,bjk->bik", a, b), (5, 64, 128), (5, 128, 32)).flops == (
        2 * 5 * 64 * 128 * 32
    )


def scanned(a, b, times):
    return jax.lax.scan(lambda x, _: (jnp.tanh(x @ b), None), a, None, length=times)[0]


def test_a_scan_runs_its_body_as_often_as_it_says():
    for times in (1, 7, 36):
        model = model_of(lambda a, b, times=times: scanned(a, b, times), (64, 64), (64, 64))
        assert model.flops == times * 2 * 64**3
        assert model.unknown_loops == 0


def test_nested_loops_multiply():
    def nested(a, b):
        return jax.lax.scan(lambda x, _: (scanned(x, b, 5), None), a, None, length=3)[0]

    assert model_of(nested, (64, 64), (64, 64)).flops == 15 * 2 * 64**3


def test_a_loop_without_a_known_end_is_told():
    def until(a, b):
        return jax.lax.while_loop(lambda x: x.sum() < 1e9, lambda x: x @ b, a)

    model = model_of(until, (64, 64), (64, 64))
    assert (model.flops, model.unknown_loops) == (2 * 64**3, 1)


# As XLA for TPU writes them: products as convolutions, counters in tuples, no types of operands.
PROGRAM = """HloModule jit_f, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%fused_scatter (p: bf16[64,512]) -> bf16[16,512] {
  %p = bf16[64,512]{1,0} parameter(0)
  %zero = s32[] constant(0)
  %reduced = bf16[64,512]{1,0} all-reduce(%p), channel_id=2, replica_groups=[1,4]<=[4], to_apply=%add
  ROOT %cut = bf16[16,512]{1,0} dynamic-slice(%reduced, %zero, %zero), dynamic_slice_sizes={16,512}
}

%fused_start (q: bf16[16,512]) -> bf16[32,512] {
  %q = bf16[16,512]{1,0} parameter(0)
  %started = bf16[16,512]{1,0} custom-call(%q), custom_call_target="AsyncCollectiveStart"
  ROOT %gathered = bf16[32,512]{1,0} all-gather(%q), channel_id=3, replica_groups=mesh['a'=2,'b'=2] {'b'}
}

%body (s: (s32[], bf16[8,128], bf16[4,128,128])) -> (s32[], bf16[8,128], bf16[4,128,128]) {
  %s = (s32[], bf16[8,128]{1,0}, bf16[4,128,128]{2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %x.1 = bf16[8,128]{1,0} get-tuple-element(%s), index=1
  %w = bf16[4,128,128]{2,1,0} get-tuple-element(%s), index=2
  %layer = bf16[128,128]{1,0} fusion(%w, %i), kind=kLoop, calls=%fused_slice
  %dot = bf16[8,128]{1,0} convolution(%x.1, %layer), dim_labels=bf_oi->bf
  %kernel = bf16[8,128]{1,0} custom-call(%dot), custom_call_target="tpu_custom_call", metadata={op_name="f/attention"}
  ROOT %tuple = (s32[], bf16[8,128]{1,0}, bf16[4,128,128]{2,1,0}) tuple(%next, %kernel, %w)
}

%fused_slice (v: bf16[4,128,128], j: s32[]) -> bf16[128,128] {
  %v = bf16[4,128,128]{2,1,0} parameter(0)
  %j = s32[] parameter(1)
  %none = s32[] constant(0)
  %piece = bf16[1,128,128]{2,1,0} dynamic-slice(%v, %j, %none, %none), dynamic_slice_sizes={1,128,128}
  ROOT %flat = bf16[128,128]{1,0} bitcast(%piece)
}

%condition (t: (s32[], bf16[8,128], bf16[4,128,128])) -> pred[] {
  %t = (s32[], bf16[8,128]{1,0}, bf16[4,128,128]{2,1,0}) parameter(0)
  %k = s32[] get-tuple-element(%t), index=0
  %limit = s32[] constant(4)
  ROOT %less = pred[] compare(%k, %limit), direction=LT
}

ENTRY %main (a: bf16[8,128], b: bf16[4,128,128], g: bf16[64,512], h: bf16[16,512]) -> bf16[8,128] {
  %a = bf16[8,128]{1,0} parameter(0)
  %b = bf16[4,128,128]{2,1,0} parameter(1)
  %g = bf16[64,512]{1,0} parameter(2)
  %h = bf16[16,512]{1,0} parameter(3)
  %start = s32[] constant(0)
  %init = (s32[], bf16[8,128]{1,0}, bf16[4,128,128]{2,1,0}) tuple(%start, %a, %b)
  %loop = (s32[], bf16[8,128]{1,0}, bf16[4,128,128]{2,1,0}) while(%init), condition=%condition, body=%body
  %scattered = bf16[16,512]{1,0} fusion(%g), kind=kCustom, calls=%fused_scatter
  %ahead = bf16[32,512]{1,0} fusion(%h), kind=kCustom, calls=%fused_start
  ROOT %result = bf16[8,128]{1,0} get-tuple-element(%loop), index=1
}
"""


def test_the_loop_of_a_tpu_program():
    model = roofline(
        hlo.operations(PROGRAM), CHIP, lambda op: KernelCost(1000, 0, 0.5) if "attention" in op.op_name else None
    )
    assert model.flops == 4 * (2 * 8 * 128 * 128 + 1000)
    assert model.kernel_seconds == pytest.approx(4 * 1000 / (0.5 * CHIP.peak))
    assert model.unknown_loops == 0
    # Of the stack one layer a round is read, and written as what is cut out; then read by the product.
    counter = (4 + 4 + 4) + (4 + 4 + 1) + 4  # added to, compared, and read for the cut
    assert model.bytes == 4 * (2 * (3 * 128 * 128 + 2 * 8 * 128) + counter)
    assert roofline(hlo.operations(PROGRAM), CHIP).opaque == ("f/attention",)


def test_collectives_of_a_tpu_program():
    scatter, gather = sorted(roofline(hlo.operations(PROGRAM), CHIP).collectives, key=lambda c: c.hidden)
    assert (scatter.kind, scatter.hidden, scatter.group) == ("reduce-scatter", False, 4)
    assert scatter.bytes == 64 * 512 * 2 * 3 // 4
    assert (gather.kind, gather.hidden, gather.group) == ("all-gather", True, 2)
    assert gather.bytes == 16 * 512 * 2
    model = roofline(hlo.operations(PROGRAM), CHIP)
    assert model.exposed_seconds == pytest.approx(scatter.bytes / CHIP.link)
    assert model.hidden_seconds == pytest.approx(gather.bytes / CHIP.link)


def test_what_leaves_a_slice_takes_the_slow_network():
    model = roofline(hlo.operations(PROGRAM), CHIP, slice_devices=2)
    by_kind = {c.kind: c for c in model.collectives}
    assert by_kind["reduce-scatter"].across_slices
    assert not by_kind["all-gather"].across_slices
    assert model.exposed_seconds == pytest.approx(by_kind["reduce-scatter"].bytes / CHIP.network)


def test_what_goes_through_the_hosts_leaves_the_slice():
    send = "(f32[64], u32[], token[]) send(%a, %t), channel_id=6, is_host_transfer=true"
    text = f"ENTRY %main (a: f32[64]) -> f32[64] {{\n  %a = f32[64] parameter(0)\n  %x = {send}\n}}\n"
    model = roofline(hlo.operations(text), CHIP, slice_devices=2)
    (sent,) = model.collectives
    assert (sent.kind, sent.bytes, sent.across_slices, sent.hidden) == ("send", 256, True, False)
    assert model.exposed_seconds == 256 / CHIP.network


@pytest.mark.parametrize(
    ("instruction", "sent"),
    [
        ("f32[64] all-gather(%a), replica_groups=[1,4]<=[4]", 192),
        ("(f32[16], f32[64]) all-gather-start(%a), replica_groups=[1,4]<=[4]", 192),
        ("f32[16] reduce-scatter(%a), replica_groups=[1,4]<=[4]", 192),
        ("(f32[64], f32[16]) reduce-scatter-start(%a), replica_groups=[1,4]<=[4]", 192),
        ("f32[64] all-reduce(%a), replica_groups=[1,4]<=[4]", 384),
        ("f32[64] all-reduce-start(%a), replica_groups=[1,4]<=[4]", 384),
        ("f32[64] all-to-all(%a), replica_groups=[1,4]<=[4]", 192),
        ("((f32[64]), f32[64]) all-to-all-start(%a), replica_groups=[1,4]<=[4]", 192),
        ("(f32[64], f32[64]) collective-permute-start(%a), source_target_pairs={{0,1},{1,0}}", 256),
    ],
)
def test_what_a_device_sends_over_a_ring(instruction, sent):
    text = f"ENTRY %main (a: f32[16]) -> f32[16] {{\n  %a = f32[16] parameter(0)\n  ROOT %x = {instruction}\n}}\n"
    (collective,) = roofline(hlo.operations(text), CHIP).collectives
    assert (collective.bytes, collective.hidden) == (sent, "-start" in instruction)


@pytest.mark.parametrize(
    ("instruction", "moved"),
    [
        ("(f32[64]{0:S(1)}, f32[64], u32[]) copy-start(%a)", 256),  # into VMEM: read once
        ("(f32[64], f32[64], u32[]) copy-start(%a)", 512),
        ("((f32[64]), f32[16]{0:S(1)}, s32[]) slice-start(%a), slice={[0:16]}", 64),
        (
            "((f32[64]{0:S(5)}, f32[16], s32[]), f32[64]{0:S(5)}, u32[]) dynamic-update-slice-start(%a)",
            64,
        ),  # to the host
    ],
)
def test_what_a_transfer_costs_main_memory(instruction, moved):
    text = f"ENTRY %main (a: f32[64]) -> f32[64] {{\n  %a = f32[64] parameter(0)\n  ROOT %x = {instruction}\n}}\n"
    assert roofline(hlo.operations(text), CHIP).bytes == moved


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("replica_groups={{0,1},{2,3}}, x=1", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[4]", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[2,2]T(1,0)", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a','b'}", [[0, 1, 2, 3]]),
        ("channel_id=1", None),
    ],
)
def test_groups_are_read_in_every_spelling(text, groups):
    found = _groups(text)
    assert (found if found is None else found.tolist()) == groups


def test_places_of_a_window_that_meet_something():
    # A batch dimension, as XLA for TPU hides it in a window: each place of the output meets one of the input.
    assert _meeting(length=64, kernel=64, out=64, stride=63, pad=0, dilate=64, kernel_dilate=1) == 64
    assert _meeting(length=1, kernel=4, out=4, stride=1, pad=3, dilate=1, kernel_dilate=1) == 4
    # A true convolution: three by three over five, without padding.
    assert _meeting(length=5, kernel=3, out=3, stride=1, pad=0, dilate=1, kernel_dilate=1) == 9


# As XLA for GPU writes them: fusions that start here and are awaited later, products by cuBLAS and Triton, attention by
# cuDNN, a Pallas kernel that writes in place, a loop whose rounds are known, and a computation that runs meanwhile.
GPU_PROGRAM = """HloModule jit_f, is_scheduled=true

%fused_slice (v: bf16[4,128,128], j: s32[]) -> bf16[1,128,128] {
  %v = bf16[4,128,128]{2,1,0} parameter(0)
  %j = s32[] parameter(1)
  %none = s32[] constant(0)
  ROOT %piece = bf16[1,128,128]{2,1,0} dynamic-slice(%v, %j, %none, %none), dynamic_slice_sizes={1,128,128}
}

%fused_update (k: f32[4,8,128], i: s32[], n: f32[1,8,128]) -> f32[4,8,128] {
  %k = f32[4,8,128]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %n = f32[1,8,128]{2,1,0} parameter(2)
  %nought = s32[] constant(0)
  ROOT %updated = f32[4,8,128]{2,1,0} dynamic-update-slice(%k, %n, %i, %nought, %nought)
}

%triton_gemm (p: bf16[8,128], q: bf16[128,128]) -> f32[8,128] {
  %p = bf16[8,128]{1,0} parameter(0)
  %q = bf16[128,128]{1,0} parameter(1)
  %wide.p = f32[8,128]{1,0} convert(%p)
  %wide.q = f32[128,128]{1,0} convert(%q)
  ROOT %dot = f32[8,128]{1,0} dot(%wide.p, %wide.q), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%meanwhile (m: f32[16]) -> f32[64] {
  %m = f32[16]{0} parameter(0)
  ROOT %gathered = f32[64]{0} all-gather(%m), channel_id=3, replica_groups=[1,4]<=[4]
}

%body (s: (s32[], bf16[8,128], bf16[4,128,128], f32[4,8,128])) -> (s32[], bf16[8,128], bf16[4,128,128], f32[4,8,128]) {
  %s = (s32[], bf16[8,128]{1,0}, bf16[4,128,128]{2,1,0}, f32[4,8,128]{2,1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%s), index=0
  %x = bf16[8,128]{1,0} get-tuple-element(%s), index=1
  %w = bf16[4,128,128]{2,1,0} get-tuple-element(%s), index=2
  %kept = f32[4,8,128]{2,1,0} get-tuple-element(%s), index=3
  %fusion-start.1 = ((bf16[4,128,128]{2,1,0}, s32[]), bf16[1,128,128]{2,1,0}, u32[]) fusion-start(%w, %i.1), \
kind=kLoop, calls=%fused_slice
  %fusion-done.1 = bf16[1,128,128]{2,1,0} fusion-done(%fusion-start.1)
  %flat = bf16[128,128]{1,0} bitcast(%fusion-done.1)
  %gemm.1 = (bf16[8,128]{1,0}, s8[4194304]{0}) custom-call(%x, %flat), custom_call_target="__cublas$lt$matmul", \
backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],\
"rhs_contracting_dimensions":["0"]},"precision_config":{"operand_precision":["DEFAULT","DEFAULT"]}}}
  %y = bf16[8,128]{1,0} get-tuple-element(%gemm.1), index=0
  %gemm.2 = f32[8,128]{1,0} fusion(%y, %flat), kind=kCustom, calls=%triton_gemm
  %new = f32[1,8,128]{2,1,0} bitcast(%gemm.2)
  %fusion-start.2 = ((f32[4,8,128]{2,1,0}, s32[], f32[1,8,128]{2,1,0}), f32[4,8,128]{2,1,0}, u32[]) \
fusion-start(%kept, %i.1, %new), kind=kLoop, calls=%fused_update
  %fusion-done.2 = f32[4,8,128]{2,1,0} fusion-done(%fusion-start.2)
  ROOT %tuple = (s32[], bf16[8,128]{1,0}, bf16[4,128,128]{2,1,0}, f32[4,8,128]{2,1,0}) tuple(%i.1, %y, %w, \
%fusion-done.2)
}

%condition (t: (s32[], bf16[8,128], bf16[4,128,128], f32[4,8,128])) -> pred[] {
  %t = (s32[], bf16[8,128]{1,0}, bf16[4,128,128]{2,1,0}, f32[4,8,128]{2,1,0}) parameter(0)
  %k.1 = s32[] get-tuple-element(%t), index=0
  %limit = s32[] constant(4)
  ROOT %less = pred[] compare(%k.1, %limit), direction=LT
}

ENTRY %main (a: bf16[8,128], b: bf16[4,128,128], c: f32[4,8,128], q.1: bf16[2,64,4,32], h: f32[16]) -> bf16[8,128] {
  %a = bf16[8,128]{1,0} parameter(0)
  %b = bf16[4,128,128]{2,1,0} parameter(1)
  %c = f32[4,8,128]{2,1,0} parameter(2)
  %q.1 = bf16[2,64,4,32]{3,2,1,0} parameter(3)
  %h = f32[16]{0} parameter(4)
  %start = s32[] constant(0)
  %init = (s32[], bf16[8,128]{1,0}, bf16[4,128,128]{2,1,0}, f32[4,8,128]{2,1,0}) tuple(%start, %a, %b, %c)
  %loop = (s32[], bf16[8,128]{1,0}, bf16[4,128,128]{2,1,0}, f32[4,8,128]{2,1,0}) while(%init), condition=%condition, \
body=%body, backend_config={"known_trip_count":{"n":"4"}}
  %begun = ((f32[16]{0}), f32[64]{0}) async-start(%h), calls=%meanwhile
  %forward = (bf16[2,4,64,32]{3,1,2,0}, f32[2,4,64]{2,1,0}, u8[128]{0}) custom-call(%q.1, %q.1, %q.1), \
custom_call_target="__cudnn$fmhaSoftmax", backend_config={"cudnn_fmha_backend_config": {"intermediate_tensor_shape": \
{"element_type": "BF16", "dimensions": ["2", "4", "64", "64"]}, "mask_type": "CAUSAL"}}
  %o = bf16[2,4,64,32]{3,1,2,0} get-tuple-element(%forward), index=0
  %backward = (bf16[2,4,64,32]{3,1,2,0}, u8[0]{0}) custom-call(%q.1, %o), \
custom_call_target="__cudnn$fmhaSoftmaxBackward", backend_config={"cudnn_fmha_backend_config": \
{"intermediate_tensor_shape": {"dimensions": ["2", "4", "64", "64"]}, \
"mask_type": "NO_MASK"}}
  %kernel = (f32[4,8,128]{2,1,0}, f32[8]{0}) custom-call(%c, %a), custom_call_target="__gpu$xla.gpu.triton", \
output_to_operand_aliasing={{0}: (0, {})}, backend_config={grid_x = 16 : i32}
  %ended = f32[64]{0} async-done(%begun)
  ROOT %result = bf16[8,128]{1,0} get-tuple-element(%loop), index=1
}
"""


def test_the_loop_of_a_gpu_program():
    chip = dataclasses.replace(CHIP, float32=CHIP.peak / 2)
    model = roofline(hlo.operations(GPU_PROGRAM), chip)
    one = 2 * 8 * 128 * 128  # of either product
    scores = 2 * 4 * 64 * 64
    forward, backward = 2 * 2 * scores * 32 / 2, 2 * 5 * scores * 32
    assert model.flops == 4 * 2 * one + forward + backward
    # What a Triton kernel widens it multiplies as float32, at that rate.
    assert (model.products, model.float32_products) == (2, 1)
    assert model.dot_seconds == pytest.approx(4 * (one / chip.peak + one / chip.float32))
    slice_, update = 2 * 2 * 128 * 128 + 4, 2 * 4 * 8 * 128 + 4  # and the index
    products = (2 * 2 * 8 * 128 + 2 * 128 * 128) + (2 * 8 * 128 + 2 * 128 * 128 + 4 * 8 * 128)
    attention = 2 * 2 * 2 * 64 * 4 * 32 + 4 * 2 * 4 * 64 + 3 * 2 * 2 * 64 * 4 * 32
    # Of the Pallas kernel what it takes, of which it writes one in place, and what else it gives.
    kernel = 4 * 4 * 8 * 128 + 2 * 8 * 128 + 4 * 8
    assert model.bytes == 4 * (slice_ + update + products) + attention + kernel
    # Attention at half of the peak, the kernel at the bandwidth.
    seconds = 2 * (forward + backward) / chip.peak + kernel / chip.hbm_bandwidth
    assert model.kernel_seconds == pytest.approx(seconds)
    # Nobody compares the counter of a loop whose rounds are known.
    assert (model.launches, model.loop_launches) == (4 * 4 + 4, 4 * 4)
    assert [(c.kind, c.hidden) for c in model.collectives] == [("all-gather", True)]
    assert model.opaque == () and model.unknown_loops == 0


def test_moves_of_a_gpu_program():
    found = hlo.moves(hlo.operations(GPU_PROGRAM), 2 * 128 * 128)
    # The piece, not the stack that it is cut from; an update in place is none.
    assert [(op.name, op.bytes) for op in found] == [("fusion-start.1", 2 * 128 * 128)]


@pytest.mark.parametrize(
    ("dtype", "precision", "rate"),
    [
        ("bf16", "default", "peak"),
        ("f32", "default", "float32"),
        ("f32", "highest", "exact"),
        ("bf16", "highest", "peak"),
    ],
)
@pytest.mark.parametrize("library", [False, True])
def test_the_rate_of_a_product_is_that_of_its_operands(dtype, precision, rate, library):
    if library:
        call = (
            'custom-call(%a, %a), custom_call_target="__cublas$gemm", backend_config={"gemm_backend_config":'
            '{"dot_dimension_numbers":{"lhs_contracting_dimensions":["0"]},"precision_config":{"operand_precision":'
            f'["{precision.upper()}","{precision.upper()}"]}}}}}}'
        )
    else:
        call = f"dot(%a, %a), lhs_contracting_dims={{0}}, operand_precision={{{precision},{precision}}}"
    text = f"ENTRY %main (a: x) -> x {{\n  %a = {dtype}[64,32] parameter(0)\n  ROOT %x = {dtype}[32,32] {call}\n}}\n"
    h100 = CHIPS["h100"]
    model = roofline(hlo.operations(text), h100)
    assert model.flops == 2 * 64 * 32 * 32
    assert model.dot_seconds == model.flops / getattr(h100, rate)
    assert model.float32_products == (dtype == "f32")


@pytest.mark.parametrize(("trips", "times"), [(1, 1), (0, 0), (3, 3)])
def test_a_loop_without_a_known_end_counts_as_often_as_asked(trips, times):
    compiled = jax.jit(lambda a, b: jax.lax.while_loop(lambda x: x.sum() < 1e9, lambda x: x @ b, a))
    arrays = [jax.ShapeDtypeStruct((64, 64), jnp.float32)] * 2
    model = roofline(hlo.operations(compiled.lower(*arrays).compile()), CHIP, unknown_trips=trips)
    assert model.flops == times * 2 * 64**3


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H200 NVL", None),
        ("NVIDIA GH200 480GB", None),
        ("TPU v5 lite", "v5e"),
        ("TPU v5", "v5p"),
        ("TPU v6 lite", "v6e"),
        ("TPU7x", "tpu7x"),
        ("cpu", None),
    ],
)
def test_a_chip_is_known_by_what_jax_calls_it(kind, name):
    chip = chip_of(SimpleNamespace(device_kind=kind))
    assert (chip and chip.name) == name


@pytest.mark.parametrize("chip", CHIPS.values(), ids=lambda chip: chip.name)
def test_chips_have_figures_that_can_be(chip):
    assert all(value > 0 for value in dataclasses.astuple(chip)[1:])
    # No chip computes less than a few dozen operations for each byte, or more than a thousand.
    assert 30 < chip.peak / chip.hbm_bandwidth < 1000
    assert chip.network < chip.link < chip.hbm_bandwidth
    assert np.log2(chip.hbm / 10**9) > 3
