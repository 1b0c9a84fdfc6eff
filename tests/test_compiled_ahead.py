"""What the TPU compiler makes of inference, asked without a TPU: programs are compiled here and run nowhere.

The functions are those that `generate` calls, for SmolLM3-3B in bfloat16 and devices that are not there.
Needs libtpu (`pip install smollm3-jax[tpu]`), of the very version that jaxlib was built with.
"""

import importlib.util
import json
import os
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sharding import hlo
from sharding.rules import Sharding, named_sharding
from smollm3_jax import decode
from smollm3_jax.config import ModelConfig
from smollm3_jax.decode import Slots, slot_shardings
from smollm3_jax.kv_cache import KVCache, cache_shardings, empty_cache
from smollm3_jax.model import SmolLM3
from smollm3_jax.sampling import MAX_STOP_IDS, Choice, SamplingParams
from smollm3_jax.weights.key_map import abstract_model

pytestmark = pytest.mark.slow

MIB = 2**20
HBM = {"v5e": 16 * 1024 * MIB, "v6e": 32 * 1024 * MIB}
DEEP = 36


@pytest.fixture(scope="module")
def raw_config(shared):
    return json.loads((shared / "smollm3-3b" / "config.json").read_text())


@pytest.fixture(scope="module", autouse=True)
def libtpu():
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed: it comes with the extra `tpu`")
    # Neither a metadata server to ask nor a TPU to lock.
    wanted = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    yield
    for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.update({name: value})


class Setting:
    """A model, its cache and slots for named devices: shapes and places, no arrays."""

    # Stacked layers are what a mesh gets by default. At batch 1 XLA copies some weights out of their stacks in
    # every step, all layers' at once; one array a layer it reads in place.
    def __init__(self, raw, topology, shape, rules, layers, batch, capacity, stacked=True):
        raw = {**raw, "num_hidden_layers": layers, "no_rope_layers": raw["no_rope_layers"][:layers]}
        raw.pop("layer_types", None)
        self.config = ModelConfig.from_hf(raw)
        one_chip = {"chips_per_host_bounds": (1, 1, 1)} if topology.endswith("1x1") else {}
        devices = topologies.get_topology_desc(platform="tpu", topology_name=topology, **one_chip).devices
        self.mesh = Mesh(np.array(devices).reshape(shape), ("data", "tensor"))
        self.sharding = Sharding.of(self.mesh, rules)
        self.model = abstract_parameters(self.config, self.sharding, stacked)
        cache = jax.eval_shape(lambda: empty_cache(self.config, batch, capacity, jnp.bfloat16))
        self.cache: KVCache = jax.tree.map(placed, cache, cache_shardings(self.config, jnp.bfloat16, self.sharding))
        one = one_slot(self.config)
        slots = jax.tree.map(lambda x: jax.ShapeDtypeStruct((batch, *np.shape(x)), x.dtype), one)
        self.slots: Slots = jax.tree.map(placed, slots, slot_shardings(self.sharding))
        matrices = [x for x in jax.tree.leaves(self.model.layers) if len(x.shape) > 1 + stacked]
        # As one device has them.
        self.layer_weight = min(share(x) for x in matrices) // (layers if stacked else 1)
        self.layer_cache = share(self.cache.layers[0].k)
        self.state = sum(share(x) for x in jax.tree.leaves((self.cache, self.slots)))

    def scalar(self, *shape):
        """Of int32, the same on every device."""
        return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=NamedSharding(self.mesh, PartitionSpec()))

    def decode(self):
        return decode.decode.lower(self.model, self.cache, self.slots, self.scalar(), sharding=self.sharding).compile()

    def prefill(self, length, past):
        return decode.prefill.lower(
            self.model,
            self.cache,
            self.scalar(),
            self.scalar(1, length),
            self.scalar(length),
            self.scalar(),
            past=past,
            sharding=self.sharding,
        ).compile()


def abstract_parameters(config: ModelConfig, sharding: Sharding, stacked: bool) -> SmolLM3:
    def place(param):
        axes, value = param.get_metadata("axes"), param.get_value()
        at = named_sharding("weight", axes, value.shape, sharding.mesh, dict(sharding.rules))
        return param.replace(placed(value, at))

    return jax.tree.map(
        place, abstract_model(config, jnp.bfloat16, stacked=stacked), is_leaf=lambda x: isinstance(x, nnx.Variable)
    )


def one_slot(config):
    number, flag = np.int32(0), np.bool_(False)
    return Slots(
        token=number,
        active=flag,
        generated=number,
        limit=number,
        stop_ids=np.zeros(MAX_STOP_IDS, np.int32),
        think_ids=np.zeros(2, np.int32),
        thinking=flag,
        think_left=number,
        choice=Choice.of(SamplingParams(), [0], 0, config.vocab_size),
    )


def placed(x, sharding):
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def share(x):
    return int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize


def check_decode(setting, chip, collectives, kernels):
    """What must hold of the decode step on any devices."""
    compiled = setting.decode()
    memory, program = hlo.memory(compiled), hlo.operations(compiled)
    assert memory.temporaries <= 64 * MIB
    assert memory.total <= HBM[chip]
    # Donated in place: only what the call chose is new. (Layouts pad small arrays.)
    assert memory.aliased >= setting.state
    assert memory.outputs - memory.aliased < MIB
    # The caches stay where they are, and weights are read where they lie, stacked or not.
    assert not [op for op in hlo.moves(program, setting.layer_weight) if not op.in_branch]
    assert not hlo.moves(program, min(setting.layer_cache, 16 * MIB))
    found = Counter(op.target for op in program if "paged_attention" in op.op_name or "paged_attention" in op.name)
    assert found["tpu_custom_call"] == kernels
    # Branches are what only some requests need: penalties, draws, lists of alternatives.
    always = Counter(op.opcode for op in hlo.collectives(program) if not op.in_branch)
    assert always == collectives, sorted((op.opcode, op.op_name) for op in hlo.collectives(program) if not op.in_branch)
    assert all(op.in_loop for op in hlo.collectives(program))


def tensor_parallel(layers, data):
    """The collectives of a decode step."""
    return Counter(
        {
            # Behind attention and behind the MLP, in each layer; the embedding, whose rows are split; of the
            # logits, whose columns are, the largest, and the sum of all with the chosen one (one operation).
            # With several groups of devices: whether any has an active slot, and any with penalties or draws.
            "all-reduce": 2 * layers + 1 + 2 + (2 if data > 1 else 0),
            # The likeliest token: each device's own, and its logit.
            "all-gather": 2,
        }
    )


@pytest.mark.parametrize(("topology", "shape"), [("v6e:2x2", (1, 4)), ("v5e:1x1", (1, 1))])
def test_decode_step(topology, shape, raw_config):
    setting = Setting(raw_config, topology, shape, "serve_tp", 2, 64 if shape[1] == 4 else 8, 8192)
    collectives = tensor_parallel(2, shape[0]) if shape[1] == 4 else Counter()
    check_decode(setting, topology[:3], collectives, kernels=2)


@pytest.mark.parametrize(("topology", "shape"), [("v5e:2x2", (1, 4)), ("v5e:4x4", (4, 4))])
def test_decode_step_at_full_depth(topology, shape, raw_config):
    setting = Setting(raw_config, topology, shape, "serve_tp", DEEP, 64, 8192)
    check_decode(setting, topology[:3], tensor_parallel(DEEP, shape[0]), kernels=DEEP)


# Of one long sequence, in each layer: its new query, key and value, and the largest score and the sums over the
# context, to every device; then behind attention and behind the MLP. Besides: as above, of one sequence.
LONG = Counter({"all-gather": 3 * DEEP, "all-reduce": 4 * DEEP + 1 + 2 + 2})


def test_one_long_sequence_at_full_depth(raw_config):
    """131,072 tokens of context, in four parts: each device looks at its own, and parts of sums are put together."""
    setting = Setting(raw_config, "v5e:2x2", (1, 4), "serve_tp_long", DEEP, 1, 131072, stacked=False)
    check_decode(setting, "v5e", LONG, kernels=0)


def test_prefill(raw_config):
    setting = Setting(raw_config, "v5e:2x2", (1, 4), "serve_tp", 2, 16, 8192)
    check_prefill(setting, 8192, past=0)


def test_prefill_behind_a_past(raw_config):
    """Several groups of devices: the past comes from the one that has the slot."""
    setting = Setting(raw_config, "v5e:4x4", (4, 4), "serve_tp", 2, 32, 16384)
    check_prefill(setting, 2048, past=8192)


def check_prefill(setting, length, past):
    compiled = setting.prefill(length, past)
    memory, program = hlo.memory(compiled), hlo.operations(compiled)
    caches = sum(share(x) for x in jax.tree.leaves(setting.cache))
    assert memory.aliased >= caches and memory.outputs - memory.aliased < MIB
    # The last layer leaves keys and values; nobody asked what comes out of it.
    found = Counter(op.name.split(".")[0] for op in program if op.target == "tpu_custom_call")
    assert sum(found.values()) == setting.config.num_hidden_layers - 1
    assert all(name.startswith("splash_mha_fwd") for name in found)
    scores = Counter([length, length + past])
    assert not [op for op in program for shape in op.shapes if Counter(shape.dims) >= scores]
    assert not hlo.moves(program, setting.layer_cache)
