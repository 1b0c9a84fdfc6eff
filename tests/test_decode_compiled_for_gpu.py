"""What the GPU compiler makes of decoding, asked without a GPU: programs are compiled for an H100 and run nowhere.

Needs JAX's CUDA plug-in (`pip install smollm3-jax[plan-cuda]`).
"""

import functools
import json
import re
from collections import Counter

import jax
import pytest
from proxies import FULL

from sharding import hlo
from sharding.mesh import device_bytes
from smollm3_jax.config import ModelConfig
from smollm3_jax.generation.device_loop import decode
from smollm3_jax.plan.decode import DecodeSetting
from smollm3_jax.plan.devices import compile_for, sharding_for, topology

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(jax.__version_info__ < (0, 11, 2), reason="kernels for GPUs need jax 0.11.2"),
]

GIB = 2**30
DEEP = 36
# Names in the program that are no kernel: what they hold is counted where it stands.
NO_KERNEL = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast"),
    *("while", "conditional", "call", "after-all"),
}


@pytest.fixture(scope="module")
def compiled(release, tmp_path_factory):
    """Compiles decoding for one H100: what is asked for, the program, and the compiler's list of what it launches."""
    raw = json.loads((release / "config.json").read_text())
    raw.pop("layer_types", None)
    _, devices = topology("h100:1")

    @functools.cache
    def made(layers, batch, cache, page):
        cut = {**raw, "num_hidden_layers": layers, "no_rope_layers": raw["no_rope_layers"][:layers]}
        config = ModelConfig.from_hf(cut)
        sharding = sharding_for(config, devices, "serve_tp", None)
        pool = None if page is None else (batch * 8192 // page, page)
        setting = DecodeSetting(config, sharding, batch, 8192, cache, pool=pool)
        arguments = (setting.model, setting.cache, setting.slots, setting.scalar())
        dump = tmp_path_factory.mktemp("dump")
        program = compile_for(decode, *arguments, sharding=sharding, compiler_options={"xla_dump_to": str(dump)})
        return setting, program, next(dump.glob("*jit_decode*.thunk_sequence_after_thunk_passes.txt")).read_text()

    def compile(layers, batch, cache, page=None):  # so that None is one key, given or not
        return made(layers, batch, cache, page)

    return compile


def launches(program):
    """Of a token, without what only some requests need."""
    found = [op for op in hlo.operations(program) if op.in_loop and not op.in_branch and not op.in_fusion]
    return Counter(op.opcode if op.target is None else op.target for op in found if op.opcode not in NO_KERNEL)


def test_launches_of_a_token(compiled):
    few, more = (launches(compiled(layers, 1, "bfloat16")[1]) for layers in (2, 3))
    of_layer = more - few
    # Two norms, attention and its merge; five kernels of products, silu, the sum of down's parts.
    assert of_layer == {"__gpu$xla.gpu.triton": 4, "fusion": 7}
    assert sum(few.values()) + (DEEP - 2) * sum(of_layer.values()) <= 430


def test_all_tokens_of_a_call_are_one_cuda_graph(compiled):
    _, _, thunks = compiled(2, 1, "bfloat16")
    assert re.findall(r"^\d+: (k\w+)", thunks, flags=re.MULTILINE) == ["kCommandBuffer"]
    assert "kWhile" in thunks and "kConditional" in thunks


@pytest.mark.parametrize(("batch", "cache"), [(1, "bfloat16"), pytest.param(64, "int8", marks=FULL)])
def test_pages_that_lie_anywhere_take_no_launch_more(batch, cache, compiled):
    (_, rows, _), (setting, pages, _) = compiled(2, batch, cache), compiled(2, batch, cache, 256)
    assert launches(rows) == launches(pages)
    least, most = hlo.memory(rows), hlo.memory(pages)
    assert most.total - most.code <= least.total - least.code + 2 * device_bytes(setting.cache.table)


# Of one row each layer has two norms, attention and its merge, and there is a last norm; of 64 rows attention alone.
@pytest.mark.parametrize(
    ("batch", "cache", "page", "kernels"),
    [
        (1, "bfloat16", None, 9),
        (64, "bfloat16", None, 2),
        (64, "int8", None, 2),
        (1, "bfloat16", 256, 9),
        (64, "int8", 256, 2),
    ],
)
def test_the_cache_stays_where_it_is(batch, cache, page, kernels, compiled):
    setting, program, _ = compiled(2, batch, cache, page)
    memory, operations = hlo.memory(program), hlo.operations(program)
    # Four arrays of logits, where draws are cut; none of attention's.
    assert memory.temporaries <= 0.13 * GIB
    assert memory.aliased >= device_bytes((setting.cache, setting.slots))
    smallest = min(device_bytes(x) for x in jax.tree.leaves(setting.cache.layers[0]))
    assert not [op for op in hlo.moves(operations, smallest) if not op.in_branch]
    found = [op for op in operations if op.target == "__gpu$xla.gpu.triton"]
    assert len(found) == kernels
    assert len([op for op in found if "paged_attention" in op.op_name]) == 2
