"""What the compiler for NVIDIA GPUs makes of inference with SmolLM3-3B, asked without a GPU: nothing runs.

See h100.py for what is counted.
"""

import dataclasses
import re

import jax.numpy as jnp
import pytest
from h100 import CAPACITY, DEEP, GB, GIB, MARKS, MIB, Program, cut, decoding, scores
from proxies import FULL

from sharding import hlo
from sharding.arrays import total_bytes
from sharding.mesh import device_bytes
from smollm3_jax.generation.device_loop import decode, prefill
from smollm3_jax.kv_cache import cache_specs
from smollm3_jax.plan.decode import DecodeSetting
from smollm3_jax.plan.devices import compile_for, sharding_for, topology
from smollm3_jax.plan.memory import weight_bytes

pytestmark = [*MARKS, pytest.mark.usefixtures("compiled_as_for_users")]


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """The decode loop of one sequence, and the sequence of what the GPU is told to do."""
    setting, folder = decoding(DEEP, 1), tmp_path_factory.mktemp("decode")
    arguments = (setting.model, setting.cache, setting.slots, setting.scalar())
    compiled = compile_for(decode, *arguments, sharding=setting.sharding, compiler_options={"xla_dump_to": str(folder)})
    (thunks,) = folder.glob("*thunk_sequence_after_thunk_passes.txt")
    return Program(setting, compiled), thunks.read_text()


def test_a_token_moves_the_weights_and_the_cache_once(single):
    program, _ = single
    config = program.setting.config
    floor = weight_bytes(config, "bfloat16") + total_bytes(cache_specs(config, 1, CAPACITY, jnp.bfloat16))
    assert 0.999 * floor < program.model.bytes <= 1.02 * floor
    assert program.model.bytes <= 6.9 * GB


def test_a_token_takes_few_launches(single):
    program, _ = single
    assert program.model.loop_launches <= 430


def test_launches_are_what_the_compiler_has_a_gpu_told(single):
    """Those of the loop that are always made: kernels and copies, in CUDA graphs or not."""
    program, thunks = single
    assert program.model.loop_launches == launches_of_the_loop(thunks)


def test_conditions_stay_in_cuda_graphs(single):
    """The driver is new enough for that."""
    _, thunks = single
    graph, inside = None, []
    for indent, kind in listed(thunks):
        graph = None if graph is not None and indent <= graph else graph
        graph = indent if graph is None and kind == "kCommandBuffer" else graph
        if kind == "kConditional":
            inside.append(graph is not None)
    assert any(inside)


def listed(thunks: str) -> list[tuple[int, str]]:
    """(indentation, kind) of each line of the compiler's list of what the GPU is told to do."""
    found = (re.match(r"(\s*)\d+: (k\w+)", line) for line in thunks.splitlines())
    return [(len(line[1]), line[2]) for line in found if line]


def launches_of_the_loop(thunks: str) -> int:
    """Of what stands in the first loop, outside of conditions' branches."""
    count, loop, branch = 0, None, None
    for indent, kind in listed(thunks):
        if loop is not None and indent <= loop:
            break
        branch = None if branch is not None and indent <= branch else branch
        if kind == "kWhile" and loop is None:
            loop = indent
        elif loop is not None and branch is None:
            branch = indent if kind == "kConditional" else None
            count += kind not in ("kConditional", "kCommandBuffer", "kWhile", "kSequential")
    return count


def test_sixty_four_sequences_take_little_beside_weights_and_cache():
    setting = decoding(DEEP, 64)
    memory = hlo.memory(setting.compile())
    assert memory.temporaries <= 0.15 * GIB
    # Donated in place: only what the call chose is new.
    assert memory.aliased >= device_bytes((setting.cache, setting.slots))
    assert memory.outputs - memory.aliased < MIB


def test_int4_moves_a_quarter():
    setting = decoding(DEEP, 1, "int4")
    model = Program(setting, setting.compile()).model
    weights, cache = weight_bytes(cut(DEEP), "int4"), total_bytes(cache_specs(cut(DEEP), 1, CAPACITY, jnp.bfloat16))
    assert weights < model.bytes <= 1.06 * (weights + cache)
    assert model.bytes <= 2.8 * GB


@pytest.mark.parametrize("batch", [1, 16])
@pytest.mark.parametrize("weights", [None, "int4"])
def test_four_devices_send_each_other_a_few_rows(batch, weights):
    """Of a weight or a cache nothing goes from one to another."""
    setting = decoding(2, batch, weights, "h100:4")
    compiled = setting.compile()
    assert hlo.memory(compiled).temporaries <= MIB * batch
    sent = [op for op in hlo.collectives(hlo.operations(compiled)) if op.in_loop]
    # A row of logits is the most, a device's part of which goes in and the whole of which comes out.
    logits = setting.config.vocab_size * jnp.dtype(jnp.float32).itemsize
    assert len(sent) > 2 * setting.config.num_hidden_layers and max(op.bytes for op in sent) <= 1.26 * logits


@FULL
def test_stacked_layers_are_copied():
    """What the bound on bytes is there to see: two layers, stacked as training has them."""
    config = cut(2)
    _, devices = topology("h100:1")
    sharding = sharding_for(config, devices, "serve_tp", None)
    moved = {}
    for stacked in (False, True):
        setting = DecodeSetting(config, sharding, 1, CAPACITY, stacked=stacked)
        moved[stacked] = setting.model_of(setting.compile()).bytes
    assert moved[False] < 1.02 * (
        weight_bytes(config, "bfloat16") + total_bytes(cache_specs(config, 1, CAPACITY, jnp.bfloat16))
    )
    assert moved[True] > 1.2 * moved[False]


# --- prefill ----------------------------------------------------------------------------------------------


def test_a_piece_and_its_past_are_one_cuda_graph(tmp_path):
    setting = decoding(2, 1)
    piece = (setting.scalar(), setting.scalar(), setting.scalar(1, 2048), setting.scalar(2048), setting.scalar())
    options = {"xla_dump_to": str(tmp_path)}
    compile_for(prefill, setting.model, setting.cache, *piece, sharding=setting.sharding, compiler_options=options)
    thunks = next(tmp_path.glob("*jit_prefill*thunk_sequence_after_thunk_passes.txt")).read_text()
    found = listed(thunks)
    assert [kind for indent, kind in found if indent == 0] == ["kCommandBuffer"]
    assert {"kWhile", "kCuDnn"} <= {kind for _, kind in found}


def test_a_piece_of_a_prompt_after_a_past_has_no_scores_in_memory():
    setting = dataclasses.replace(decoding(DEEP, 1), context=2 * CAPACITY)
    program = Program(setting, setting.compile_prefill(2048, whole=False))
    # The piece is as long as the model is wide: of its own block only products are looked at.
    for keys in (CAPACITY, 2048 + CAPACITY):
        assert not scores(program, 2048, keys)
