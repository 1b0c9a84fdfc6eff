"""What the TPU compiler makes of inference, asked without a TPU: programs are compiled here and run nowhere.

The functions are those that `generate` calls, for SmolLM3-3B with one array a layer and devices that are not there.
Needs libtpu (`pip install smollm3-jax[tpu]`), of the very version that jaxlib was built with.
"""

import functools
import importlib.util
import json
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from proxies import FULL

from sharding import hlo
from sharding.mesh import device_bytes
from sharding.rules import Sharding
from smollm3_jax import model, quantize
from smollm3_jax.config import ModelConfig
from smollm3_jax.plan.decode import DecodeSetting
from smollm3_jax.plan.devices import topology
from smollm3_jax.weights.quantized import with_scheme

pytestmark = pytest.mark.slow

MIB = 2**20
HBM = {"v5e": 16 * 1024 * MIB, "v6e": 32 * 1024 * MIB}
DEPTHS = [4, pytest.param(36, marks=FULL)]


@pytest.fixture(scope="module")
def raw_config(release):
    return json.loads((release / "config.json").read_text())


@pytest.fixture(scope="module", autouse=True)
def libtpu():
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed: it comes with the extra `plan`")


def decoding(raw, name, shape, rules, layers, batch, capacity, weights=None, cache="bfloat16", page=None):
    config = cut(raw, layers)
    config = config if weights is None else with_scheme(config, weights)
    _, devices = topology(name)
    mesh = Mesh(np.array(devices).reshape(shape), ("data", "tensor"))
    pool = None if page is None else (batch * capacity // page, page)
    return DecodeSetting(config, Sharding.of(mesh, rules), batch, capacity, cache, pool=pool)


def cut(raw, layers):
    raw = {**raw, "num_hidden_layers": layers, "no_rope_layers": raw["no_rope_layers"][:layers]}
    raw.pop("layer_types", None)
    return ModelConfig.from_hf(raw)


def layer_weight(setting):
    """Bytes of the smallest matrix of a layer, as one device has it."""
    return min(
        device_bytes(x) for x in jax.tree.leaves(setting.model.layers[0]) if x.ndim > 1 and x.dtype != jnp.float32
    )


def check_decode(setting, chip, collectives, kernels, gathered=0):
    """What must hold of the decode step on any devices; returns it, compiled."""
    compiled = setting.compile()
    memory, program = hlo.memory(compiled), hlo.operations(compiled)
    assert memory.temporaries <= 68 * MIB  # 66.6 of int8 at full depth, rows or pages; copies are seen below
    assert memory.total <= HBM[chip]
    # Donated in place: only what the call chose is new. (Layouts pad small arrays.)
    assert memory.aliased >= device_bytes((setting.cache, setting.slots))
    assert memory.outputs - memory.aliased < MIB
    # The caches stay where they are, and weights are read where they lie: the table of embeddings too, whose rows are
    # looked up and which is multiplied with.
    assert not [op for op in hlo.moves(program, layer_weight(setting)) if not op.in_branch]
    assert not hlo.moves(program, min(device_bytes(setting.cache.layers[0].k), 16 * MIB))
    if (scale := setting.cache.layers[0].k_scale) is not None:
        assert not [op for op in hlo.moves(program, device_bytes(scale)) if not op.in_branch]
    found = Counter(op.target for op in program if "paged_attention" in op.op_name or "paged_attention" in op.name)
    assert found["tpu_custom_call"] == kernels
    # Branches are what only some requests need: penalties, draws, lists of alternatives.
    found = [op for op in hlo.collectives(program) if not op.in_branch]
    each_step = Counter(op.opcode for op in found if op.in_loop)
    assert each_step == collectives, sorted((op.opcode, op.op_name) for op in found)
    # After the last step every host gets what all groups of devices chose: tokens, log-probabilities, the likeliest
    # alternatives and theirs, of which the compiler gathers two together. Before the first, all groups hear whether any
    # sequence keeps to a grammar.
    once = [op for op in hlo.collectives(program) if not op.in_loop]
    wanted = Counter({"all-gather": gathered, "all-reduce": int(gathered > 0)})
    assert Counter(op.opcode for op in once) == wanted, [op.op_name for op in once]
    return compiled


def tensor_parallel(layers, data):
    """The collectives of a decode step."""
    return Counter(
        {
            # After attention and after the MLP, in each layer; the embedding, whose rows are split; of the
            # logits, whose columns are, the largest, and the sum of all with the chosen one (one operation).
            # With several groups of devices: whether any has an active slot, and any with penalties or draws.
            "all-reduce": 2 * layers + 1 + 2 + (2 if data > 1 else 0),
            # The likeliest token: each device's own, and its logit.
            "all-gather": 2,
        }
    )


@pytest.mark.parametrize(
    ("topology", "tensor", "batch", "weights", "cache"),
    [
        pytest.param("v6e:2x2", 4, 64, None, "bfloat16", marks=FULL),
        ("v5e:1x1", 1, 8, None, "bfloat16"),
        pytest.param("v5e:1x1", 1, 1, "int8", "int8", marks=FULL),
        pytest.param("v6e:2x2", 4, 64, "int8", "int8", marks=FULL),
    ],
)
def test_decode_step(topology, tensor, batch, weights, cache, raw_config):
    setting = decoding(raw_config, topology, (1, tensor), "serve_tp", 2, batch, 8192, weights, cache)
    collectives = tensor_parallel(2, 1) if tensor > 1 else Counter()
    if weights and tensor > 1:
        collectives["all-reduce"] += 1  # the scales of the embeddings that were looked up
    check_decode(setting, topology[:3], collectives, kernels=2)


def test_looking_up_one_row_of_integers_would_copy_the_table(raw_config, monkeypatch):
    """What `quantize.lookup` does about it is not for nothing."""

    def plainly(table, index, dtype, _):
        return quantize.dequantize(table.values[...][index], table.scale[...][index]).astype(dtype)

    monkeypatch.setattr(model, "lookup", plainly)
    setting = decoding(raw_config, "v5e:1x1", (1, 1), "serve_tp", 1, 1, 256, "int8")
    table = device_bytes(setting.model.embed.values)
    assert [op.bytes for op in hlo.moves(hlo.operations(setting.compile()), table)] == [table]


@pytest.mark.parametrize("layers", DEPTHS)
@pytest.mark.parametrize(("topology", "shape"), [pytest.param("v5e:2x2", (1, 4), marks=FULL), ("v5e:4x4", (4, 4))])
def test_decode_step_of_groups_of_devices(topology, shape, layers, raw_config):
    setting = decoding(raw_config, topology, shape, "serve_tp", layers, 64, 8192)
    gathered = 3 if shape[0] > 1 else 0
    check_decode(setting, topology[:3], tensor_parallel(layers, shape[0]), kernels=layers, gathered=gathered)


def in_memory(compiled):
    """The arrays that a program makes in the main memory: how many there are of each dtype and number of bytes."""
    names = ("parameter", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "copy-start", "copy-done")
    made = [op for op in hlo.operations(compiled) if not op.in_fusion and op.opcode not in names]
    return Counter((shape.dtype, shape.bytes) for op in made for shape in op.results if shape.space == 0)


@pytest.mark.parametrize("layers", DEPTHS)
@pytest.mark.parametrize(
    ("topology", "tensor", "batch", "cache"),
    [("v5e:2x2", 4, 16, "bfloat16"), pytest.param("v5e:1x1", 1, 8, "int8", marks=FULL)],
)
def test_pages_that_lie_anywhere(topology, tensor, batch, cache, layers, raw_config):
    """The same decode step, and no more bytes than the table's; a piece of a prompt goes into its page."""
    setting = functools.partial(
        decoding, raw_config, topology, (1, tensor), "serve_tp", layers, batch, 8192, cache=cache
    )
    rows, pages = setting(), setting(page=256)
    collectives = tensor_parallel(layers, 1) if tensor > 1 else Counter()
    of_rows, of_pages = rows.compile(), check_decode(pages, topology[:3], collectives, kernels=layers)
    least, most = hlo.memory(of_rows), hlo.memory(of_pages)
    # The pool is as large as the rows, and an int32 table [slots, pages of each] lies in tiles of 8 x 128.
    slots, width = pages.cache.table.shape
    table = 4 * (slots + -slots % 8) * (width + -width % 128)
    assert most.arguments == least.arguments + table
    # In bfloat16 what is worked out from the table stays in VMEM: no array is in the main memory that is not there with
    # rows. More or less of temporaries is how the compiler packs the same arrays: at full depth it is less.
    whole = layers == 36 and cache == "bfloat16"
    assert cache == "int8" or not in_memory(of_pages) - in_memory(of_rows)
    packing = 0 if whole else 32 * 1024  # and the writing of int8's scales
    assert most.total - most.code <= least.total - least.code + table + packing
    check_prefill(pages, 256, past=8192)


@pytest.mark.parametrize("layers", DEPTHS)
def test_one_long_sequence(layers, raw_config):
    """131,072 tokens of context, in four parts: each device looks at its own, and parts of sums are put together."""
    setting = decoding(raw_config, "v5e:2x2", (1, 4), "serve_tp_long", layers, 1, 131072)
    # In each layer: its new query, key and value, and the largest score and the sums over the context, to every device;
    # then after attention and after the MLP. Besides: as above, of one sequence.
    check_decode(setting, "v5e", Counter({"all-gather": 3 * layers, "all-reduce": 4 * layers + 1 + 2 + 2}), kernels=0)


def test_a_kernel_beside_split_weights(raw_config, monkeypatch):
    """A model that says nothing of its mesh: `Sharding.of_array` finds it, and keeps the kernel apart from what is
    split. Without that the compiler refuses."""
    setting = decoding(raw_config, "v5e:2x2", (1, 4), "fsdp", 1, 1, 128)

    def logits(sharding):
        told = model.with_sharding(setting.model, sharding)
        return model._logits.lower(told, setting.scalar(1, 128), None, None, None).compile()

    program = hlo.operations(logits(Sharding.of(setting.sharding.mesh, {})))
    kernels = [op.name for op in program if op.target == "tpu_custom_call"]
    assert len(kernels) == 1 and kernels[0].startswith("splash_mha_fwd")
    assert hlo.collectives(program)
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    with pytest.raises(NotImplementedError, match="cannot be automatically partitioned"):
        logits(None)


@FULL
def test_prefill(raw_config):
    setting = decoding(raw_config, "v5e:2x2", (1, 4), "serve_tp", 2, 16, 8192)
    check_prefill(setting, 8192)


@FULL
def test_prefill_with_int8_weights(raw_config):
    setting = decoding(raw_config, "v6e:1x1", (1, 1), "serve_tp", 2, 1, 8192, "int8")
    check_prefill(setting, 2048, past=8192)


def test_prefill_behind_a_past(raw_config):
    """Several groups of devices: the past comes from the one that has the slot."""
    setting = decoding(raw_config, "v5e:4x4", (4, 4), "serve_tp", 2, 32, 16384)
    check_prefill(setting, 2048, past=8192)


def check_prefill(setting, length, past=0):
    compiled = setting.compile_prefill(length, whole=not past)
    memory, program = hlo.memory(compiled), hlo.operations(compiled)
    caches = device_bytes(setting.cache)
    assert memory.aliased >= caches and memory.outputs - memory.aliased < MIB
    # The last layer leaves keys and values; nobody asked what comes out of it.
    found = Counter(op.name.split(".")[0] for op in program if op.target == "tpu_custom_call")
    # Of a piece, itself and a block of what is before it.
    assert sum(found.values()) == (setting.config.num_hidden_layers - 1) * (2 if past else 1)
    assert all(name.startswith("splash_mha_fwd") for name in found)
    scores = Counter([length, length + past])
    assert not [op for op in program for shape in op.shapes if Counter(shape.dims) >= scores]
    assert not hlo.moves(program, device_bytes(setting.cache.layers[0].k))
    weights = {x.sharding.shard_shape(x.shape) for x in jax.tree.leaves(setting.model) if x.ndim > 1}
    assert not [op for op in hlo.moves(program, layer_weight(setting)) if op.shapes[0].dims in weights]
