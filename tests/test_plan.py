"""Plans: exact memory, and what the TPU compiler says of small models of SmolLM3's width."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
import tiny

import smollm3_jax as s3
from sharding import hlo
from sharding.hardware import CHIPS, chip_of
from sharding.rules import Sharding
from smollm3_jax import support
from smollm3_jax.commands.main import main
from smollm3_jax.config import SMOLLM3_3B, ModelConfig
from smollm3_jax.errors import OptionError, SupportError
from smollm3_jax.kv_cache import empty_cache
from smollm3_jax.plan import plan_decode, plan_memory, plan_train, topology, weight_bytes
from smollm3_jax.plan_tables import tables
from smollm3_jax.weights.key_map import count_parameters

ROOT = Path(__file__).parents[1]
GOLDENS = Path(__file__).parent / "goldens" / "plan"
LAYERS = 4


def proxy(layers: int = LAYERS) -> ModelConfig:
    """SmolLM3 with fewer layers, whose step compiles sooner."""
    return ModelConfig.from_hf({**SMOLLM3_3B, "num_hidden_layers": layers, "no_rope_layers": [1, 1, 1, 0][:layers]})


SHORT = {"vocab_size": 1024, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
FULL = pytest.mark.skipif(not os.environ.get("FULL"), reason="takes minutes: `make test-full`")
needs_cuda = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None, reason="the compiler for NVIDIA GPUs is not installed"
)
needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")


def test_the_shape_of_the_release(release):
    ours, released = ModelConfig.from_hf(SMOLLM3_3B), ModelConfig.from_hf(release)
    assert dataclasses.replace(ours, source=released.source) == released


def test_memory_of_smollm3_is_known_to_the_byte():
    report = plan_memory(ModelConfig.from_hf(SMOLLM3_3B), batch=2, contexts=[8192])
    assert report["parameters"] == 3_075_098_624
    assert report["weights"]["bfloat16"] == 6_150_197_248
    # Keys and values of 36 layers, 4 heads of 128, 2 bytes; and one length a row.
    assert report["cache"]["bfloat16"]["8192"] == 2 * 8192 * 73_728 + 2 * 4


def live_bytes(tree):
    return sum(x.nbytes for x in jax.tree.leaves(tree))


@pytest.mark.parametrize("weights", ["float32", "bfloat16", "int8", "int4"])
def test_memory_is_what_is_allocated(weights, tmp_path):
    raw = tiny.raw_config("plain") | {"head_dim": 32}
    folder = tiny.write_checkpoint(tmp_path, raw, tiny.random_tensors(raw))
    quantized = weights.startswith("int")
    model = s3.from_pretrained(
        folder, dtype="bfloat16" if quantized else weights, weights=weights if quantized else None
    )
    assert live_bytes(model) == weight_bytes(ModelConfig.from_hf(folder), weights)
    for dtype in ("bfloat16", "int8"):
        cache = empty_cache(model.config, 3, 64, jnp.dtype(dtype))
        report = plan_memory(ModelConfig.from_hf(folder), batch=3, contexts=[64])
        assert live_bytes(cache) == report["cache"][dtype]["64"]


def test_formats_that_a_shape_does_not_take_are_left_out():
    assert "int4" not in plan_memory(ModelConfig.from_hf(tiny.raw_config("plain")))["weights"]


def test_the_table_of_memory_is_printed_and_drawn(capsys, tmp_path):
    assert main(["plan", "memory", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["weights"]["int8"] == 3_079_963_648
    assert main(["plan", "memory"]) == 0
    assert "6,150,197,248" in capsys.readouterr().out
    pytest.importorskip("matplotlib")
    picture = tmp_path / "memory.png"
    assert main(["plan", "memory", "--out", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ["v5e", "v9:2x2", "v5e:", "v5e:3x5"])
@needs_libtpu
def test_a_topology_that_is_not_there_is_named(name, capsys):
    assert main(["plan", "train", "--topology", name]) == 2
    assert name in capsys.readouterr().err


def test_without_the_compiler_an_error_says_where_to_get_it(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SupportError, match=r"pip install 'jax\[tpu\]"):
        topology("v5e:4x4")


@needs_cuda
@pytest.mark.parametrize(("name", "kind", "count"), [("h100:1", "H100 80GB HBM3", 1), ("h200:8", "H200", 8)])
def test_hosts_of_gpus(name, kind, count):
    chip, devices = topology(name)
    assert [device.device_kind for device in devices] == [f"NVIDIA {kind}"] * count
    assert chip_of(devices[0]) == chip == CHIPS[name[:4]]


@needs_cuda
def test_there_is_one_host_of_gpus():
    with pytest.raises(OptionError, match="h100:8 is one host"):
        topology("h100:8", slices=2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        pytest.param(["plan", "train", "--topology", "h100:2", "--batch", "3"], 2, marks=needs_cuda),
        pytest.param(["plan", "train", "--topology", "v5e:1x1", "--mesh", "fsdp=5"], 2, marks=needs_libtpu),
        (["doctor"], 0),
    ],
)
def test_plugins_that_only_compile_are_not_asked_for_devices(arguments, code):
    """The command as a user starts it, who has not told jax which platform to take."""
    if support._has_gpu() or support._has_tpu():
        pytest.skip("an accelerator is attached")
    environment = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
    done = subprocess.run(
        [sys.executable, "-m", "smollm3_jax", *arguments],
        cwd=ROOT,
        env=environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    # libtpu has warnings of its own before ours.
    assert done.stderr.splitlines()[-1].startswith("smollm3: ") if code else not done.stderr


@needs_libtpu
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--batch", "7"], "a batch of 7 rows does not divide over 16 devices"),
        (["--mesh", "fsdp=5"], "5 devices, but there are 16"),
        (["--rules", "tp", "--mesh", "fsdp=16"], "has no use for the mesh's axis 'fsdp'"),
        (["--remat", "some"], "there are none, dots"),
    ],
)
def test_mistakes_are_named(arguments, words, capsys):
    assert main(["plan", "train", *arguments]) == 2
    assert words in capsys.readouterr().err


# --- compiled: four pairs of a topology and a strategy, held by files -------------------------------------

PAIRS = {
    "v5e-4x4-fsdp": lambda: plan_train(proxy(), "v5e:4x4", "fsdp", 16, 4096, remat="dots"),
    "v5p-2x2x2-fsdp_tp": lambda: plan_train(
        proxy(), "v5p:2x2x2", "fsdp_tp", 8, 2048, axes={"fsdp": 4, "tensor": 2}, remat="qkv"
    ),
    "v6e-2x2-fsdp_tp_cp": lambda: plan_train(
        proxy(), "v6e:2x2", "fsdp_tp_cp", 2, 4096, axes={"fsdp": 2, "context": 2}, remat="attention"
    ),
    "v5e-2x2-serve_tp": lambda: plan_decode(proxy(2), "v5e:2x2", "serve_tp", 16, 4096, prompt=1024),
}
LONG = {"v5p-2x2x2-fsdp_tp"}


def held(report):
    """What a change of the code, and nothing else, may change."""
    assert report["fits"], report["refused"]
    kinds = [{k: row[k] for k in ("kind", "hidden", "count", "bytes")} for row in report["collectives"]]
    return {"collectives": kinds, "hbm": {k: v for k, v in report["hbm"].items() if k not in ("code", "limit")}}


def compare(found, golden):
    assert len(found["collectives"]) == len(golden["collectives"])
    for row, wanted in zip(found["collectives"], golden["collectives"], strict=True):
        assert row == {**wanted, "bytes": pytest.approx(wanted["bytes"], rel=0.01)}
    assert found["hbm"] == pytest.approx(golden["hbm"], rel=0.02)


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("pair", [pytest.param(pair, marks=[FULL] if pair in LONG else []) for pair in PAIRS])
def test_collectives_and_memory_are_those_of_the_golden_files(pair):
    """WRITE_GOLDENS=1 writes them anew."""
    found, file = held(PAIRS[pair]()), GOLDENS / f"{pair}.json"
    if os.environ.get("WRITE_GOLDENS"):
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(found, indent=1) + "\n")
    compare(found, json.loads(file.read_text()))


@needs_libtpu
@pytest.mark.slow
def test_the_golden_files_see_a_lost_axis(monkeypatch):
    """Activations whose constraint forgets that rows are split."""
    constrain = Sharding.constrain
    monkeypatch.setattr(Sharding, "constrain", lambda self, x, _, *axes: constrain(self, x, None, *axes))
    with pytest.raises(AssertionError):
        compare(held(PAIRS["v5e-4x4-fsdp"]()), json.loads((GOLDENS / "v5e-4x4-fsdp.json").read_text()))


@needs_libtpu
@pytest.mark.slow
def test_the_largest_batch_fits_and_the_next_is_refused():
    """Two layers with a short vocabulary: compiled at the batch that the plan names, and at a little more."""
    config = ModelConfig.from_hf({**SMOLLM3_3B, **SHORT, "num_hidden_layers": 2, "no_rope_layers": [1, 0]})
    report = plan_decode(config, "v5e:1x1", "serve_tp", 64, 8192, axes={"data": 1}, prompt=128)
    rows, cache_row = report["largest_batch"], report["hbm"]["cache"] // 64
    assert rows * cache_row > 0.9 * report["hbm"]["limit"]
    assert not plan_decode(config, "v5e:1x1", "serve_tp", rows + rows // 50, 8192, axes={"data": 1}, prompt=128)["fits"]
    assert plan_decode(config, "v5e:1x1", "serve_tp", rows - rows // 50, 8192, axes={"data": 1}, prompt=128)["fits"]


@needs_cuda
@pytest.mark.gpu
@pytest.mark.slow
def test_eight_h100_scatter_gradients_and_gather_ahead():
    """Four layers with a short vocabulary, through the compiler for CUDA."""
    config = ModelConfig.from_hf({**SMOLLM3_3B, **SHORT, "num_hidden_layers": LAYERS, "no_rope_layers": [1, 1, 1, 0]})
    report = plan_train(config, "h100:8", "fsdp", 8, 2048, remat="dots")
    sent = Counter()
    for row in report["collectives"]:
        sent[row["kind"], row["hidden"]] += row["bytes"]
    assert sent["all-gather", True] > 2 * sent["all-gather", False]
    scattered = sent["reduce-scatter", True] + sent["reduce-scatter", False]
    assert scattered > 2 * count_parameters(config) * 7 / 8  # at two bytes a gradient, seven of eight parts
    assert sent["all-reduce", True] + sent["all-reduce", False] < 2**20
    assert 0 < report["hbm"]["total"] < report["hbm"]["limit"]
    # The products of all eight devices: six operations a parameter and token, but for the embedding's lookup; and of
    # attention over the half of all pairs that causality leaves.
    program = report["program"]
    tokens, width = 8 * 2048, config.num_attention_heads * config.head_dim
    least = 6 * tokens * (count_parameters(config) + LAYERS * width * 2048 / 2)
    assert least < 8 * program["flops"] < 1.3 * least
    assert program["float32_products"] == 0 < program["products"]
    assert program["launches"] > 100 * LAYERS


@pytest.fixture(scope="module")
def small_on_h100(tmp_path_factory):
    """A plan for decoding by two layers with a short vocabulary, and the file that it wrote."""
    config = ModelConfig.from_hf({**SMOLLM3_3B, **SHORT, "num_hidden_layers": 2, "no_rope_layers": [1, 0]})
    dump = tmp_path_factory.mktemp("plan") / "decode.hlo"
    return plan_decode(config, "h100:1", "serve_tp", 4, 2048, prompt=256, dump=dump), dump


@needs_cuda
@pytest.mark.gpu
@pytest.mark.slow
def test_decoding_on_an_h100(small_on_h100):
    report, dump = small_on_h100
    assert report["fits"]
    # All weights and the whole cache are read once, and little else is moved.
    floor = report["hbm"]["weights"] + report["hbm"]["cache"]
    assert floor < report["program"]["bytes_moved"] < 1.25 * floor
    assert 20 < report["program"]["launches"] < 200
    assert "launches cost no time" in report["assumptions"]
    found = hlo.operations(dump.read_text())
    assert sum(op.opcode == "while" and op.in_entry for op in found) == 1
    printed = "\n".join(str(cell) for part in tables(report) for cell in cells(part))
    assert f"{report['program']['launches']:,}" in printed and "launches" in printed


def cells(part):
    return [part] if isinstance(part, str) else [cell for column in part.columns for cell in column.cells]


@needs_cuda
@pytest.mark.gpu
@pytest.mark.slow
def test_what_an_h100_has_no_memory_for_is_refused():
    """The compiler for GPUs compiles it all the same."""
    config = ModelConfig.from_hf({**SMOLLM3_3B, **SHORT, "num_hidden_layers": 1, "no_rope_layers": [1]})
    report = plan_decode(config, "h100:1", "serve_tp", 8192, 8192, prompt=128)
    assert not report["fits"]
    assert report["hbm"]["total"] > report["hbm"]["limit"] == CHIPS["h100"].hbm
    assert 0 < report["largest_batch"] < 8192


# --- at full depth: `make test-full` ----------------------------------------------------------------------

RELEASED = ModelConfig.from_hf(SMOLLM3_3B)
GB = 1e9


@FULL
@needs_libtpu
def test_sixteen_v5e_train_smollm3():
    report = plan_train(RELEASED, "v5e:4x4", "fsdp", 16, 4096, remat="dots")
    modelled = report["modelled"]
    assert report["fits"] and report["hbm"]["total"] <= 15 * GB
    assert modelled["dot_seconds"] <= 0.455
    # Gradients are reduced beside the next weight's product: all but a layer's last, and the embedding's.
    assert modelled["exposed_collective_seconds"] <= 0.07
    assert modelled["mfu"] >= 0.60


@FULL
@needs_libtpu
def test_a_lean_setting():
    """With each layer's input in the host's memory."""
    report = plan_train(RELEASED, "v5e:4x4", "fsdp", 16, 4096, remat="offload")
    assert report["fits"] and report["hbm"]["total"] <= 4.7 * GB


@FULL
@needs_libtpu
@pytest.mark.parametrize("name", ["v5p:4x4x1", "v6e:4x4"])
def test_other_chips_compile_and_report(name):
    assert plan_train(RELEASED, name, "fsdp", 16, 4096, remat="dots")["fits"]


@FULL
@needs_libtpu
def test_long_rows_fit_where_they_are_split():
    axes = {"fsdp": 16, "context": 4}
    assert plan_train(RELEASED, "v5p:4x4x4", "fsdp_tp_cp", 16, 65536, axes=axes, remat="attention")["fits"]


@FULL
@needs_libtpu
def test_a_pod_sends_no_more_for_each_device():
    few, many = (
        plan_train(RELEASED, name, "fsdp", rows, 4096, remat="dots")["collectives"]
        for name, rows in (("v5e:4x4", 16), ("v5e:16x16", 256))
    )
    assert sum(row["bytes"] for row in many) <= 1.2 * sum(row["bytes"] for row in few)
