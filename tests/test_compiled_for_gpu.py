"""What the compiler for NVIDIA GPUs makes of SmolLM3-3B, asked without a GPU: programs are compiled here, run nowhere.

All at full depth, for an H100. Bytes and launches are those of `smollm3 plan`: kernels count as what they read at full
capacity. Bounds are those that the design was made for; see the README's table of an H100.
"""

import dataclasses
import re
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.stages import Compiled

from sharding import hlo
from sharding.arrays import total_bytes
from sharding.mesh import device_bytes
from sharding.products import product
from smollm3_jax.config import SMOLLM3_3B, ModelConfig
from smollm3_jax.generation.device_loop import decode
from smollm3_jax.kv_cache import cache_specs
from smollm3_jax.plan.decode import DecodeSetting
from smollm3_jax.plan.devices import compile_for, sharding_for, topology
from smollm3_jax.plan.memory import weight_bytes
from smollm3_jax.plan.train import TrainSetting
from smollm3_jax.train.options import StepOptions
from smollm3_jax.weights.key_map import count_parameters
from smollm3_jax.weights.quantized import with_scheme

OLD = tuple(int(part) for part in jax.__version__.split(".")[:3]) < (0, 11, 2)
# Where jax is new enough and the compiler is missing, these tests fail.
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(OLD, reason="kernels for GPUs need jax 0.11.2"),
]

GB, GIB, MIB = 1e9, 2**30, 2**20
RELEASED = ModelConfig.from_hf(SMOLLM3_3B)
CAPACITY, ROW = 8192, 4096


@pytest.fixture(scope="module", autouse=True)
def programs_as_users_run_them():
    """With all optimizations, which tests of tiny models do without. A program for a device that is not there can be
    written to the cache of compiled programs, but not be read again."""
    jax.config.update("jax_disable_most_optimizations", False)
    jax.config.update("jax_enable_compilation_cache", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)
    jax.config.update("jax_enable_compilation_cache", True)


@dataclasses.dataclass(frozen=True)
class Program:
    """A setting, what was compiled for it, and what that is made of."""

    setting: DecodeSetting | TrainSetting
    compiled: Compiled
    operations: list[hlo.Operation] = dataclasses.field(init=False)
    model: Any = dataclasses.field(init=False)

    def __post_init__(self):
        object.__setattr__(self, "operations", hlo.operations(self.compiled))
        object.__setattr__(self, "model", self.setting.model_of(self.compiled))
        assert not self.model.opaque


def cut(layers: int) -> ModelConfig:
    """SmolLM3 with fewer layers, for what every layer has alike."""
    return ModelConfig.from_hf(
        {**SMOLLM3_3B, "num_hidden_layers": layers, "no_rope_layers": SMOLLM3_3B["no_rope_layers"][:layers]}
    )


def decoding(batch: int, weights: str | None = None, **options) -> DecodeSetting:
    config = RELEASED if weights is None else with_scheme(RELEASED, weights)
    _, devices = topology("h100:1")
    return DecodeSetting(config, sharding_for(config, devices, "serve_tp", None), batch, CAPACITY, **options)


def training(
    name: str, rules: str, axes: dict[str, int] | None, batch: int, length: int, config: ModelConfig = RELEASED
) -> Program:
    chip, devices = topology(name)
    sharding = sharding_for(config, devices, rules, axes)
    setting = TrainSetting(config, chip, sharding, batch, length, StepOptions(remat="dots"))
    return Program(setting, setting.compile())


def scores(program: Program, queries: int, keys: int) -> list[hlo.Operation]:
    """What has scores in memory or computes them outside of a kernel: arrays of all queries and keys of a row, and
    products over the head width alone, which is what queries and keys are multiplied over."""
    by_name = {(op.computation, op.name): op for op in program.operations}

    def multiplies_heads(op: hlo.Operation) -> bool:
        found = product(op, by_name)
        return found is not None and found.flops == 2 * np.prod(op.shapes[0].dims) * program.setting.config.head_dim

    whole = Counter([queries, keys])
    return [
        op
        for op in program.operations
        if multiplies_heads(op) or any(Counter(shape.dims) >= whole for shape in op.shapes)
    ]


# --- training ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def step():
    """One row of 4,096 tokens of several documents, on one H100."""
    return training("h100:1", "fsdp", None, 1, ROW)


def test_a_step_multiplies_in_the_compute_dtype(step):
    assert step.model.products > 20
    assert step.model.float32_products == 0


def test_a_step_does_what_it_should(step):
    """Six operations a parameter and token, attention, and what is computed again: no loop is lost from the count."""
    least = 6 * count_parameters(RELEASED) * ROW
    assert least < step.model.flops < 1.5 * least


def test_a_step_moves_no_more_than_it_has_to(step):
    assert step.model.bytes <= 280 * GB


def test_a_step_has_no_scores_in_memory(step):
    assert not scores(step, ROW, ROW)


@pytest.fixture(scope="module")
def sharded_step():
    """A row of 4,096 tokens for each of eight H100."""
    return training("h100:8", "fsdp", None, 8, ROW)


def test_a_sharded_step_copies_no_array_of_the_state(sharded_step):
    """Into another layout, as it comes in or goes out. Of bfloat16 one is turned: a device's share of the table's
    gradient, which a reduce-scatter along its rows gives in columns."""
    state, _ = sharded_step.setting.arguments
    layers = [x for x in jax.tree.leaves(state.model.layers) if len(x.shape) > 2]
    smallest = min(device_bytes(x) for x in layers)
    found = [op for op in hlo.moves(sharded_step.operations, smallest) if op.in_entry]
    assert not [(op.name, op.shapes) for op in found if op.shapes[0].dtype == "f32"]
    assert [op.shapes[0].dtype for op in found] in ([], ["bf16"])


def test_a_sharded_step_multiplies_in_the_compute_dtype(sharded_step):
    assert sharded_step.model.float32_products == 0


def test_long_rows_on_eight_devices_have_no_scores_in_memory():
    """65,536 tokens in eight parts."""
    program = training("h100:8", "fsdp_tp_cp", {"context": 8}, 1, 65536, cut(4))
    for queries in (65536 // 16, 65536 // 8):
        for keys in (65536 // 16, 65536 // 8, 65536):
            assert not scores(program, queries, keys)


# --- decoding ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """The decode loop of one sequence, and the sequence of what the GPU is told to do."""
    setting, folder = decoding(1), tmp_path_factory.mktemp("decode")
    arguments = (setting.model, setting.cache, setting.slots, setting.scalar())
    compiled = compile_for(decode, *arguments, sharding=setting.sharding, compiler_options={"xla_dump_to": str(folder)})
    (thunks,) = folder.glob("*thunk_sequence_after_thunk_passes.txt")
    return Program(setting, compiled), thunks.read_text()


def test_a_token_moves_the_weights_and_the_cache_once(single):
    program, _ = single
    floor = weight_bytes(RELEASED, "bfloat16") + total_bytes(cache_specs(RELEASED, 1, CAPACITY, jnp.bfloat16))
    assert 0.999 * floor < program.model.bytes <= 6.9 * GB


def test_a_token_takes_few_launches(single):
    program, _ = single
    assert program.model.loop_launches <= 500


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
    setting = decoding(64)
    memory = hlo.memory(setting.compile())
    assert memory.temporaries <= 0.15 * GIB
    # Donated in place: only what the call chose is new.
    assert memory.aliased >= device_bytes((setting.cache, setting.slots))
    assert memory.outputs - memory.aliased < MIB


def test_int4_moves_a_quarter():
    setting = decoding(1, "int4")
    model = Program(setting, setting.compile()).model
    assert weight_bytes(RELEASED, "int4") < model.bytes <= 2.8 * GB


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


def test_a_piece_of_a_prompt_after_a_past_has_no_scores_in_memory():
    setting = dataclasses.replace(decoding(1), context=2 * CAPACITY)
    program = Program(setting, setting.compile_prefill(2048, CAPACITY))
    # The piece is as long as the model is wide: of its own block only products are looked at.
    for keys in (CAPACITY, 2048 + CAPACITY):
        assert not scores(program, 2048, keys)
