import jax
import jax.numpy as jnp
import pytest

from sharding import hlo
from sharding.hlo import Shape

PROGRAM = """\
HloModule jit_f, is_scheduled=true, entry_computation_layout={(f32[8,128]{1,0:T(8,128)})->f32[8,128]{1,0:T(8,128)}}

FileNames
1 "a.py"

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[]{:T(128)} parameter(0)
  %y = f32[]{:T(128)} parameter(1)
  ROOT %add.1 = f32[]{:T(128)} add(%x, %y)
}

%fused_turn (p: bf16[256,512]) -> bf16[512,256] {
  %p = bf16[256,512]{1,0:T(8,128)(2,1)} parameter(0)
  %copy.9 = bf16[256,512]{0,1:T(8,128)(2,1)} copy(%p)
  ROOT %bitcast.1 = bf16[512,256]{1,0:T(8,128)(2,1)} bitcast(%copy.9)
}

%fused_outer (p.1: bf16[256,512]) -> bf16[512,256] {
  %p.1 = bf16[256,512]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %fusion.9 = bf16[512,256]{1,0:T(8,128)(2,1)} fusion(%p.1), kind=kLoop, calls=%fused_turn
}

%fused_work (p.2: bf16[256,512]) -> bf16[512,256] {
  %p.2 = bf16[256,512]{1,0:T(8,128)(2,1)} parameter(0)
  %transpose.2 = bf16[512,256]{1,0:T(8,128)(2,1)} transpose(%p.2), dimensions={1,0}
  ROOT %negate.2 = bf16[512,256]{1,0:T(8,128)(2,1)} negate(%transpose.2)
}

%fused_start (p.3: f32[8,128]) -> (f32[8,128], u32[]) {
  %p.3 = f32[8,128]{1,0:T(8,128)} parameter(0)
  %all-gather.5 = f32[8,128]{1,0:T(8,128)} all-gather(%p.3), channel_id=2, dimensions={0}
  ROOT %started = (f32[8,128]{1,0:T(8,128)}, u32[]{:S(2)}) custom-call(%all-gather.5), \
custom_call_target="AsyncCollectiveStart"
}

%fused_done (p.4: f32[8,128], p.5: u32[]) -> f32[8,128] {
  %p.4 = f32[8,128]{1,0:T(8,128)} parameter(0)
  %p.5 = u32[]{:S(2)} parameter(1)
  %all-gather.6 = f32[8,128]{1,0:T(8,128)} all-gather(%p.4), channel_id=2, dimensions={0}
  ROOT %done = f32[8,128]{1,0:T(8,128)} custom-call(%p.5, %all-gather.6), custom_call_target="AsyncCollectiveDone"
}

%greedy (t: (f32[8,128], pred[])) -> f32[8,128] {
  %t = (f32[8,128]{1,0:T(8,128)}, pred[]{:T(512)}) parameter(0)
  %gte = f32[8,128]{1,0:T(8,128)} get-tuple-element(%t), index=0
  ROOT %copy.3 = f32[8,128]{1,0:T(8,128)} copy(%gte)
}

%drawn (t.1: (f32[8,128], pred[])) -> f32[8,128] {
  %t.1 = (f32[8,128]{1,0:T(8,128)}, pred[]{:T(512)}) parameter(0)
  %gte.1 = f32[8,128]{1,0:T(8,128)} get-tuple-element(%t.1), index=0
  ROOT %all-gather.1 = f32[8,128]{1,0:T(8,128)} all-gather(%gte.1), channel_id=3, dimensions={0}
}

%body (s: (s32[], f32[8,128], bf16[256,512])) -> (s32[], f32[8,128], bf16[256,512]) {
  %s = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}, /*index=2*/bf16[256,512]{1,0:T(8,128)(2,1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%s), index=0
  %w = bf16[256,512]{1,0:T(8,128)(2,1)} get-tuple-element(%s), index=2
  %copy-start.1 = (bf16[256,512]{1,0:T(8,128)(2,1)S(1)}, bf16[256,512]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) copy-start(%w)
  %copy-done.1 = bf16[256,512]{1,0:T(8,128)(2,1)S(1)} copy-done(%copy-start.1)
  %fusion.1 = bf16[512,256]{1,0:T(8,128)(2,1)} fusion(%copy-done.1), kind=kLoop, calls=%fused_outer
  %fusion.2 = bf16[512,256]{1,0:T(8,128)(2,1)} fusion(%w), kind=kLoop, calls=%fused_work
  %kernel.1 = (f32[8,128]{1,0:T(8,128)}, f32[8]{0:T(128)}) custom-call(%w), custom_call_target="tpu_custom_call", \
metadata={op_name="jit(f)/while/body/paged_attention" stack_frame_id=7}, backend_config={"a":"b{(c"}
  %x.1 = f32[8,128]{1,0:T(8,128)} get-tuple-element(%kernel.1), index=0
  %fusion.5 = (f32[8,128]{1,0:T(8,128)}, u32[]{:S(2)}) fusion(%x.1), kind=kCustom, calls=%fused_start
  %fusion.6 = f32[8,128]{1,0:T(8,128)} fusion(%fusion.5), kind=kCustom, calls=%fused_done
  %all-reduce.1 = f32[8,128]{1,0:T(8,128)} all-reduce(%x.1), channel_id=1, replica_groups=[1,4]<=[4], to_apply=%add
  %conditional.1 = f32[8,128]{1,0:T(8,128)} conditional(%i, %s, %s), branch_computations={%greedy, %drawn}
  ROOT %tuple.1 = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}, bf16[256,512]{1,0:T(8,128)(2,1)}) tuple(%i, %x.1, %w)
}

%condition (s.1: (s32[], f32[8,128], bf16[256,512])) -> pred[] {
  %s.1 = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}, bf16[256,512]{1,0:T(8,128)(2,1)}) parameter(0)
  ROOT %constant.1 = pred[]{:T(512)} constant(true)
}

ENTRY %main (a: f32[8,128]) -> f32[8,128] {
  %a = f32[8,128]{1,0:T(8,128)} parameter(0), metadata={op_name="a"}
  %slice.1 = s4[3,<=5]{1,0:T(8,128)} slice(%a), slice={[0:3], [0:5]}
  %tuple.2 = () tuple()
  %while.1 = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}, bf16[256,512]{1,0:T(8,128)(2,1)}) while(%a), \
condition=%condition, body=%body
  ROOT %out = f32[8,128]{1,0:T(8,128)} get-tuple-element(%while.1), index=1, control-predecessors={%a, %slice.1}
}
"""


@pytest.fixture(scope="module")
def program():
    return hlo.operations(PROGRAM)


def test_every_instruction_is_read(program):
    found = {op.name: op for op in program}
    assert len(found) == PROGRAM.count(" = ")
    start = found["copy-start.1"]
    assert start.shapes == (Shape("bf16", (256, 512), 1), Shape("bf16", (256, 512), 0), Shape("u32", (), 2))
    assert start.bytes == 2 * 2 * 256 * 512 + 4
    kernel = found["kernel.1"]
    assert (kernel.opcode, kernel.target) == ("custom-call", "tpu_custom_call")
    assert kernel.op_name == "jit(f)/while/body/paged_attention"
    assert found["slice.1"].shapes == (Shape("s4", (3, 5), 0),)
    assert found["slice.1"].bytes == 8
    assert found["constant.1"].bytes == 1
    assert found["s"].shapes[2] == Shape("bf16", (256, 512), 0)
    assert found["tuple.2"].shapes == ()
    assert found["out"].calls == ()
    assert found["conditional.1"].calls == ("greedy", "drawn")


def test_where_an_instruction_stands(program):
    places = {
        op.name: {place for place in ("entry", "loop", "branch", "fusion") if getattr(op, f"in_{place}")}
        for op in program
    }
    assert places["slice.1"] == {"entry"}
    assert places["all-reduce.1"] == places["constant.1"] == {"loop"}
    assert places["all-gather.1"] == {"loop", "branch"}
    assert places["copy.9"] == places["add.1"] == {"loop", "fusion"}


def test_collectives_and_moves(program):
    # The asynchronous one is in the fusions that start it, that work meanwhile and that end it.
    assert [(op.name, op.in_branch) for op in hlo.collectives(program)] == [
        ("all-gather.5", False),
        ("all-gather.1", True),
        ("all-reduce.1", False),
    ]
    # Not the prefetch into VMEM, not the copy inside of a fusion, not the fusion that also negates.
    assert [op.name for op in hlo.moves(program, 0)] == ["copy.3", "fusion.1", "slice.1"]
    assert [op.name for op in hlo.moves(program, 4096)] == ["copy.3", "fusion.1"]
    assert [op.name for op in hlo.moves(program, 4097)] == ["fusion.1"]


def test_zeros_are_no_move():
    """As XLA for GPU makes two stacks of them, in which a loop then keeps what it has computed."""
    text = """
%zeros () -> (f32[64,64], f32[64,64]) {
  %zero = f32[] constant(0)
  %broadcast.1 = f32[64,64]{1,0} broadcast(%zero), dimensions={}
  %copy.1 = f32[64,64]{1,0} copy(%broadcast.1)
  ROOT %tuple.1 = (f32[64,64]{1,0}, f32[64,64]{1,0}) tuple(%broadcast.1, %copy.1)
}

ENTRY %main () -> (f32[64,64], f32[64,64]) {
  ROOT %fusion.1 = (f32[64,64]{1,0}, f32[64,64]{1,0}) fusion(), kind=kLoop, calls=%zeros
}
"""
    assert not hlo.moves(hlo.operations(text), 0)
    copied = text.replace("constant(0)", "parameter(0)").replace("fusion()", "fusion(%elsewhere)")
    assert [op.name for op in hlo.moves(hlo.operations(copied), 0)] == ["fusion.1"]


def test_a_program_compiled_here():
    @jax.jit
    def f(x, w):
        return jax.lax.fori_loop(0, 5, lambda _, x: jnp.tanh(x @ w), x)

    x, w = jnp.ones((4, 8)), jnp.ones((8, 8))
    compiled = f.lower(x, w).compile()
    found = hlo.operations(compiled)
    (loop,) = [op for op in found if op.opcode == "while"]
    assert loop.in_entry and not loop.in_loop
    assert [op.in_loop for op in found if "dot_general" in op.op_name and op.opcode in ("dot", "custom-call")]
    memory = hlo.memory(compiled)
    assert (memory.arguments, memory.outputs, memory.aliased) == (4 * (32 + 64), 4 * 32, 0)
    assert memory.total >= memory.arguments + memory.outputs + memory.temporaries


def test_donated_memory_is_counted_once():
    compiled = jax.jit(lambda x: x + 1, donate_argnums=0).lower(jnp.ones(1000)).compile()
    memory = hlo.memory(compiled)
    assert memory.arguments == memory.outputs == memory.aliased == 4000
    assert memory.total == 4000 + memory.temporaries + memory.code
