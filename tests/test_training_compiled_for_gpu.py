"""What the compiler for NVIDIA GPUs makes of training SmolLM3-3B, asked without a GPU: nothing runs.

See h100.py for what is counted.
"""

import jax
import pytest
from h100 import DEEP, GB, MARKS, scores, training

from sharding import hlo
from sharding.mesh import device_bytes
from smollm3_jax.weights.key_map import count_parameters

pytestmark = [*MARKS, pytest.mark.usefixtures("compiled_as_for_users")]
ROW = 4096


@pytest.fixture(scope="module")
def step():
    """One row of 4,096 tokens of several documents, on one H100."""
    return training(DEEP, "h100:1", "fsdp", None, 1, ROW)


def test_a_step_multiplies_in_the_compute_dtype(step):
    assert step.model.products > 20
    assert step.model.float32_products == 0


def test_a_step_does_what_it_should(step):
    """Six operations a parameter and token, attention, and what is computed again: no loop is lost from the count."""
    least = 6 * count_parameters(step.setting.config) * ROW
    assert least < step.model.flops < 1.5 * least


def test_a_step_moves_no_more_than_it_has_to(step):
    assert step.model.bytes <= 280 * GB


def test_a_step_has_no_scores_in_memory(step):
    assert not scores(step, ROW, ROW)


@pytest.fixture(scope="module")
def sharded_step():
    """A row of 4,096 tokens for each of eight H100."""
    return training(DEEP, "h100:8", "fsdp", None, 8, ROW)


def test_a_sharded_step_copies_no_array_of_the_state(sharded_step):
    """Into another layout, as it comes in or goes out. Of bfloat16 one is turned: a device's share of the table's
    gradient, which a reduce-scatter along its rows gives in columns."""
    state, _ = sharded_step.setting.arguments
    layers = [x for x in jax.tree.leaves(state.model.layers) if len(x.shape) > 2]
    smallest = min(device_bytes(x) for x in layers)
    found = [op for op in hlo.moves(sharded_step.operations, smallest) if op.in_entry]
    assert not [(op.name, op.shapes) for op in found if op.shapes[0].dtype == "f32"]
    assert [op.shapes[0].dtype for op in found] in ([], ["bf16"])
    # Smaller ones: its shares of the layers' gradients, turned likewise, and weights gathered together, cut apart.
    share = 2 * count_parameters(sharded_step.setting.config) / 8
    assert sum(op.bytes for op in hlo.moves(sharded_step.operations, 2**20) if op.in_entry) <= 2.6 * share


def test_a_sharded_step_multiplies_in_the_compute_dtype(sharded_step):
    assert sharded_step.model.float32_products == 0


def test_long_rows_on_eight_devices_have_no_scores_in_memory():
    """65,536 tokens in eight parts."""
    program = training(4, "h100:8", "fsdp_tp_cp", {"context": 8}, 1, 65536)
    for queries in (65536 // 16, 65536 // 8):
        for keys in (65536 // 16, 65536 // 8, 65536):
            assert not scores(program, queries, keys)
