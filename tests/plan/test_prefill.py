"""Plans for long prompts: what a piece that is split over devices keeps, sends and takes; what is refused."""

import io
import math

import jax
import jax.numpy as jnp
import pytest
from proxies import FULL, SHORT, needs_libtpu, proxy
from rich.console import Console

from sharding import hlo
from sharding.arrays import shapes, spec
from sharding.hardware import CHIPS
from smollm3_jax.attention import piece_over_length
from smollm3_jax.attention.piece import DENSE_BLOCK
from smollm3_jax.config import SMOLLM3_3B, ModelConfig, with_yarn
from smollm3_jax.errors import OptionError
from smollm3_jax.kv_cache import cache_specs
from smollm3_jax.plan.decode import DecodeSetting
from smollm3_jax.plan.devices import DoesNotFit, compile_for, sharding_for, topology
from smollm3_jax.plan.prefill import plan_prefill
from smollm3_jax.plan.tables import prefill_tables

HEADS, KV_HEADS, WIDTH = 16, 4, 128
LAYERS, DEVICES, PIECE, LENGTH = 2, 4, 4 * 2048, 16384
CHIP = CHIPS["v5e"]


def scores(program, queries):
    """What is as large, in float32, as the scores of a device's queries and the fewest keys that go by at a time."""
    least = HEADS * queries * DENSE_BLOCK
    return [
        op.name
        for op in program
        if not op.in_fusion and any(x.dtype == "f32" and math.prod(x.dims) >= least for x in op.shapes)
    ]


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    """Two layers with a short vocabulary, and the piece's program."""
    dump = tmp_path_factory.mktemp("plan") / "piece.hlo"
    report = plan_prefill(proxy(LAYERS, **SHORT), "v5e:2x2", length=LENGTH, dump=dump)
    return report, hlo.operations(dump.read_text())


@needs_libtpu
@pytest.mark.slow
@FULL
def test_a_piece_on_four_chips(planned):
    report, program = planned
    assert report["fits"] and report["mesh"]["context"] == DEVICES
    assert (report["piece"], report["pieces"], report["capacity"], report["yarn"]) == (PIECE, 2, LENGTH, None)
    hbm = report["hbm"]
    assert hbm["total"] == sum(hbm[name] for name in ("weights", "cache", "slots", "temporaries", "code"))
    a_token = LAYERS * 2 * KV_HEADS * WIDTH * 2
    assert hbm["cache"] == pytest.approx(LENGTH * a_token / DEVICES, rel=1e-3)
    # Of each layer but the last, which gives keys and values alone: the piece itself, and a block of what is before it.
    kernels = [(op.in_loop, op.name) for op in program if op.target == "tpu_custom_call"]
    assert all(name.startswith("splash_mha_fwd") for _, name in kernels)
    assert sorted(in_loop for in_loop, _ in kernels) == [False] * (LAYERS - 1) + [True] * (LAYERS - 1)
    assert scores(program, PIECE // DEVICES) == []
    # Keys and values of every layer's piece, and of the past where somebody looks at it, go to all: nothing else does.
    sent = [(row["kind"], row["count"]) for row in report["collectives"]]
    assert {kind for kind, _ in sent} == {"all-gather"} and sum(n for _, n in sent) == 2 * LAYERS + 2 * (LAYERS - 1)
    a_layer = a_token / LAYERS * (LAYERS * PIECE + (LAYERS - 1) * LENGTH)
    assert sum(row["bytes"] for row in report["collectives"]) == pytest.approx(a_layer * (1 - 1 / DEVICES), rel=1e-3)


@needs_libtpu
@pytest.mark.slow
@FULL
def test_the_first_token_comes_after_all_pieces(planned):
    report, _ = planned
    first, last = report["first_piece_seconds"], report["last_piece_seconds"]
    # The second piece looks at the first one, at half of the peak.
    flops = 4 * HEADS * WIDTH * (PIECE // DEVICES) * PIECE
    assert last - first >= flops / CHIP.peak / 0.5
    assert report["modelled"]["prompt_seconds"] == pytest.approx(first + last)
    assert report["modelled"]["tokens_per_second"] == pytest.approx(LENGTH / (first + last))
    token = report["time_to_first_token_seconds"] - first - last
    assert token == pytest.approx(report["ms_per_token_after"] / 1e3)
    assert token > (report["hbm"]["weights"] + report["hbm"]["cache"]) / CHIP.hbm_bandwidth


@needs_libtpu
@pytest.mark.parametrize("window", [None, pytest.param(1024, marks=FULL)])
def test_scores_would_be_seen(window):
    """Of attention alone: no kernel takes a window."""
    piece, config, (_, devices) = 2048, proxy(1, **SHORT), topology("v5e:2x2")
    sharding = sharding_for(config, devices, "serve_cp", None)
    q, k = (spec(jnp.bfloat16, batch=1, length=piece, heads=n, head=WIDTH) for n in (HEADS, KV_HEADS))
    layer = cache_specs(config, 1, 2 * piece, "bfloat16").layers[0]
    number = spec(jnp.int32)

    def attend(q, k, v, layer, length):
        least = None if window is None else jnp.int32(window)
        return piece_over_length(q, k, v, layer, slot=length, length=length, window=least, sharding=sharding)

    compiled = compile_for(jax.jit(attend), *shapes((q, k, k, layer, number), sharding), sharding=sharding)
    assert bool(scores(hlo.operations(compiled), piece // DEVICES)) == (window is not None)


@needs_libtpu
@pytest.mark.slow
@FULL
@pytest.mark.parametrize(("where", "context"), [("v5e:2x4", 8), ("v5p:2x2x1", 4)])
@pytest.mark.parametrize("length", [65536, 131072])
def test_full_depth_fits(where, context, length):
    """In weights that every device has, a part of the cache, and 0.25 to 0.47 GiB of what a piece computes."""
    report = plan_prefill(ModelConfig.from_hf(SMOLLM3_3B), where, length=length)
    hbm = report["hbm"]
    assert report["fits"] and report["mesh"]["context"] == context
    assert hbm["cache"] == pytest.approx(36 * 2 * KV_HEADS * WIDTH * 2 * length / context, rel=1e-3)
    assert hbm["total"] - hbm["weights"] - hbm["cache"] - hbm["code"] < 0.55 * 2**30


@needs_libtpu
def test_what_does_not_fit_says_what_would(monkeypatch):
    def refused(*_, **__):
        raise DoesNotFit(20e9, 16e9)

    monkeypatch.setattr(DecodeSetting, "compile_prefill", refused)
    report = plan_prefill(proxy(2, **SHORT), "v5e:2x4", length=131072, cache="int8")
    assert not report["fits"] and (report["yarn"], report["pieces"]) == (2, 8)
    out = io.StringIO()
    for part in prefill_tables(report):
        Console(file=out, width=120).print(part)
    assert "131,072 tokens in 8 pieces of at most 16,384, context stretched 2.00 times (YaRN)" in out.getvalue()
    assert "does not fit; try --weights int8" in out.getvalue()


@needs_libtpu
def test_what_cannot_be_is_refused():
    with pytest.raises(OptionError, match="rules fsdp split slots over 4 devices, and a prompt is in one"):
        plan_prefill(proxy(1, **SHORT), "v5e:2x2", "fsdp")
    scaled = with_yarn(proxy(1, **SHORT), 1.5)
    with pytest.raises(OptionError, match="scales RoPE already"):
        plan_prefill(scaled, "v5e:2x2", length=131072)
