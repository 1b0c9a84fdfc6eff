"""Plans for training: mistakes, what eight GPUs send, and SmolLM3 at full depth (`make test-full`)."""

from collections import Counter

import pytest
from proxies import FULL, SHORT, needs_cuda, needs_libtpu, proxy

from sharding.mesh import device_bytes
from smollm3_jax.commands.main import main
from smollm3_jax.config import SMOLLM3_3B, ModelConfig
from smollm3_jax.plan.devices import sharding_for, topology
from smollm3_jax.plan.train import TrainSetting, plan_train
from smollm3_jax.train.options import StepOptions
from smollm3_jax.train.settings_file import read_words
from smollm3_jax.weights.key_map import count_parameters

LAYERS = 4


@needs_libtpu
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--batch", "7"], "a batch of 7 rows does not divide over 16 devices"),
        (["--mesh", "fsdp=5"], "5 devices, but there are 16"),
        (["--rules", "tp", "--mesh", "fsdp=16"], "has no use for the mesh's axis 'fsdp'"),
        (["--remat", "some"], "choose one of none, dots"),
        (["data.rows=3"], "data.rows=3: a plan takes objective.KEY=VALUE, lora.KEY=VALUE"),
        (["--batch", "16", "lora.rank=4", "lora.base=int3"], "lora.base is 'int3'"),
        (["lora.dora=true"], "lora.rank=0 means no adapter"),
        (["objective.kind=sfd"], "objective.kind is 'sfd'"),
    ],
)
def test_mistakes_are_named(arguments, words, capsys):
    assert main(["plan", "train", *arguments]) == 2
    assert words in capsys.readouterr().err


@needs_libtpu
@pytest.mark.parametrize(
    ("words", "arrays", "bytes_each"),
    [
        ([], 2, 4),
        (["objective.kind=sft", "lora.rank=4"], 3, 2),
        (["objective.kind=preference", "lora.rank=4", "lora.base=float32", "lora.targets=['q_proj']"], 4, 4),
    ],
)
def test_what_a_step_takes_in(words, arrays, bytes_each):
    """The batch of the objective, the base in its dtype, and moments of what is trained alone."""
    chip, devices = topology("v5e:1x1")
    config = proxy(2, **SHORT)
    sharding = sharding_for(config, devices, "fsdp", None)
    setting = TrainSetting(config, chip, sharding, 2, 64, StepOptions(), read_words(words))
    state, batch = setting.arguments
    assert device_bytes(batch) == arrays * 4 * 2 * 64
    adapter = setting.trained if setting.trainable else 0
    assert device_bytes(state.model) == bytes_each * count_parameters(config) + 4 * adapter
    assert device_bytes(state.optimizer) - 8 * setting.trained < 64  # its count of steps
    if adapter:
        width, queries, inner = 2048, 16 * 128, 11008
        each = [width + queries] if len(words) > 3 else [2 * (width + queries), 2 * (width + 512), 3 * (width + inner)]
        assert adapter == 2 * 4 * sum(each)


@needs_libtpu
@FULL
def test_an_adapters_step_multiplies_no_gradient_of_what_is_frozen():
    """Two layers with a short vocabulary: two products for each frozen weight, and no float32 copy of it."""
    config = proxy(2, **SHORT)
    settings = read_words(["objective.kind=sft", "lora.rank=16"])
    report = plan_train(config, "v5e:1x1", "fsdp", 1, 1024, remat="dots", settings=settings)
    frozen, trained, width = count_parameters(config), report["trained"], 16 * 128
    least = 1024 * (4 * frozen + 6 * trained + 2 * 6 * width * 1024 / 2)
    assert 0.95 * least < report["program"]["flops"] < 1.2 * least
    assert report["program"]["float32_products"] == 0
    assert report["hbm"]["parameters"] == 2 * frozen + 4 * trained
    assert report["hbm"]["temporaries"] < 4 * frozen


@needs_cuda
@pytest.mark.gpu
@pytest.mark.slow
def test_eight_h100_scatter_gradients_and_gather_ahead():
    """Four layers with a short vocabulary, through the compiler for CUDA."""
    config = proxy(LAYERS, **SHORT)
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


@FULL
@needs_libtpu
def test_an_adapter_of_smollm3_fits_one_v5e_chip():
    """All seven projections at rank 16 on a bfloat16 base, rows of 4,096. Saving all products takes 15.82 GiB of 15.75,
    which the compiler lets pass; the plan does not."""
    settings = read_words(["objective.kind=sft", "lora.rank=16", "lora.base=bfloat16"])
    report = plan_train(RELEASED, "v5e:1x1", "fsdp", 1, 4096, settings=settings)
    assert report["fits"] and report["trained"] == 30_228_480
    assert report["refused"][0]["remat"] == "dots" != report["remat"]
    assert report["hbm"]["total"] <= 10.7 * GB < report["hbm"]["limit"]


@FULL
@needs_libtpu
def test_sixteen_v5e_fine_tune_smollm3_on_rows_of_8192():
    settings = read_words(["objective.kind=sft"])
    report = plan_train(RELEASED, "v5e:4x4", "fsdp", 16, 8192, remat="qkv", settings=settings)
    assert report["fits"] and report["trained"] == count_parameters(RELEASED)
    assert report["hbm"]["total"] <= 11.1 * GB < report["hbm"]["limit"]
    assert report["program"]["float32_products"] == 0
    assert report["modelled"]["mfu"] >= 0.5 and report["modelled"]["exposed_collective_seconds"] <= 0.07
