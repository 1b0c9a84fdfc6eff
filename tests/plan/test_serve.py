"""Plans for servers: what their cache holds, what bounds a gap between tokens, and the largest context."""

import pytest
from proxies import SHORT, needs_cuda, needs_libtpu, proxy

from sharding.arrays import total_bytes
from sharding.hardware import CHIPS
from smollm3_jax.errors import OptionError
from smollm3_jax.generation.device_loop import MAX_STEPS
from smollm3_jax.kv_cache import cache_specs
from smollm3_jax.plan.serve import plan_serve

# A cache of half of the device's memory, beside two layers, which compile soon.
SLOTS, CONTEXT = 256, 8192


@pytest.fixture(scope="module")
def on_one_chip():
    return plan_serve(proxy(2, **SHORT), "v5e:1x1", slots=SLOTS, context=CONTEXT, axes={"data": 1})


@needs_libtpu
@pytest.mark.slow
def test_what_fits_beside_the_programs(on_one_chip):
    report = on_one_chip
    assert report["fits"] and report["page"] == 256
    hbm, tokens = report["hbm"], report["tokens"]
    a_token = total_bytes(cache_specs(proxy(2, **SHORT), 1, 1024, "bfloat16").layers) / 1024
    assert hbm["limit"] == CHIPS["v5e"].hbm
    assert hbm["cache"] == pytest.approx(tokens["slots"] * a_token, rel=1e-3)
    assert (tokens["slots"], tokens["kept"]) == (SLOTS * CONTEXT, SLOTS * CONTEXT // 2)
    beside = hbm["weights"] + hbm["slots"] + hbm["temporaries"] + hbm["code"]
    assert hbm["total"] == pytest.approx(beside + hbm["cache"] + hbm["kept"], rel=1e-6)
    assert tokens["fit"] == pytest.approx((hbm["limit"] - beside) / a_token, rel=1e-3)
    assert tokens["pages"] == tokens["fit"] // 256
    # Not a copy of the cache, and not none of what attention computes.
    assert 0 < hbm["temporaries"] < 0.2 * hbm["cache"]


@needs_libtpu
@pytest.mark.slow
def test_a_gap_is_a_piece_and_a_call(on_one_chip):
    report = on_one_chip
    prefill, gap, model = report["prefill"], report["gap"], report["modelled"]
    assert prefill["tokens"] == 256
    assert gap["call_seconds"] == MAX_STEPS * model["step_seconds"]
    assert gap["seconds"] == gap["call_seconds"] + gap["piece_seconds"]
    assert model["tokens_per_second"] == pytest.approx(SLOTS / model["step_seconds"])
    # Every slot's keys and values are read once a token.
    assert model["step_seconds"] > report["hbm"]["cache"] / CHIPS["v5e"].hbm_bandwidth
    # A piece reads what its slot holds before it, and multiplies by it; not in the last layer, of which prefill wants
    # keys and values alone.
    past = CONTEXT - 256
    config = proxy(2, **SHORT)
    flops = 4 * 256 * past * config.num_attention_heads * config.head_dim
    assert prefill["first_seconds"] + flops / CHIPS["v5e"].peak < prefill["last_seconds"] == gap["piece_seconds"]


@needs_libtpu
@pytest.mark.slow
def test_the_largest_context_fits_and_twice_as_much_does_not(on_one_chip):
    largest = on_one_chip["largest_context"]
    tokens = on_one_chip["tokens"]
    assert SLOTS * largest * 3 // 2 <= tokens["fit"] < 2 * SLOTS * largest * 3 // 2
    more = plan_serve(proxy(2, **SHORT), "v5e:1x1", slots=SLOTS, context=2 * largest, axes={"data": 1})
    assert not more["fits"] and more["largest_context"] == largest
    assert f"--context {largest}" in more["change"]


@needs_libtpu
@pytest.mark.slow
def test_slots_that_fit_alone_want_no_prefixes_kept():
    """Another layer, and slots take more than two thirds of what there is."""
    report = plan_serve(proxy(3, **SHORT), "v5e:1x1", slots=SLOTS, context=CONTEXT, axes={"data": 1})
    assert report["tokens"]["slots"] <= report["tokens"]["fit"] < report["tokens"]["slots"] + report["tokens"]["kept"]
    assert not report["fits"] and report["change"].startswith("--no-prefix-cache")
    assert report["largest_context"] == CONTEXT // 2


@needs_libtpu
def test_a_context_beyond_the_model_is_refused():
    with pytest.raises(OptionError, match=r"--context is 70000; the model has been trained for 65536"):
        plan_serve(proxy(2, **SHORT), "v5e:1x1", context=70000)


@needs_libtpu
@pytest.mark.slow
def test_slots_are_those_of_the_engine():
    """Powers of two that the mesh divides; a context's capacity is one, too."""
    report = plan_serve(proxy(2, **SHORT), "v5e:2x2", slots=5, context=700, axes={"data": 4}, cache="int8")
    assert (report["slots"], report["context"], report["capacity"]) == (8, 700, 1024)
    assert report["tokens"]["slots"] == 8 * 1024
    assert report["tokens"]["kept"] == 8 * 700 // 2 // 256 // 4 * 4 * 256


@needs_cuda
@pytest.mark.gpu
@pytest.mark.slow
def test_a_server_on_an_h100():
    report = plan_serve(proxy(2, **SHORT), "h100:1", slots=8, context=8192)
    assert report["fits"] and report["hbm"]["total"] < report["hbm"]["limit"] == CHIPS["h100"].hbm
    assert report["largest_context"] == 65536
    assert report["prefill"]["first_seconds"] < report["prefill"]["last_seconds"]
