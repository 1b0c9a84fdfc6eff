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
CHIP = CHIPS["v5e"]


def on_one_chip(**options):
    return plan_serve(proxy(2, **SHORT), "v5e:1x1", slots=SLOTS, context=CONTEXT, axes={"data": 1}, **options)


@pytest.fixture(scope="module")
def report():
    return on_one_chip()


@needs_libtpu
@pytest.mark.slow
def test_what_fits_beside_the_programs(report):
    assert report["fits"] and report["page"] == 256
    hbm, tokens = report["hbm"], report["tokens"]
    a_token = total_bytes(cache_specs(proxy(2, **SHORT), 1, 1024, "bfloat16").layers) / 1024
    assert hbm["limit"] == CHIP.hbm
    assert hbm["cache"] == pytest.approx(tokens["pool"] * a_token, rel=1e-3)
    assert tokens["pool"] == SLOTS * CONTEXT
    beside = hbm["weights"] + hbm["slots"] + hbm["temporaries"] + hbm["code"]
    assert hbm["total"] == beside + hbm["cache"]
    assert tokens["fit"] == pytest.approx((CHIP.hbm - beside) / a_token, rel=1e-3)
    assert tokens["pages"] == tokens["fit"] // 256
    # Not a copy of the cache, and not none of what attention computes.
    assert 0 < hbm["temporaries"] < 0.2 * hbm["cache"]
    # One sequence may have all of it; the model has been trained for less.
    assert report["largest_context"] == 65536 < tokens["fit"]


@needs_libtpu
@pytest.mark.slow
def test_a_gap_is_a_piece_and_a_call(report):
    prefill, gap, model = report["prefill"], report["gap"], report["modelled"]
    assert prefill["tokens"] == 256
    assert gap["call_seconds"] == MAX_STEPS * model["step_seconds"]
    assert gap["seconds"] == gap["call_seconds"] + gap["piece_seconds"]
    assert model["tokens_per_second"] == pytest.approx(SLOTS / model["step_seconds"])
    # Every slot's keys and values are read once a token.
    assert model["step_seconds"] > report["hbm"]["cache"] / CHIP.hbm_bandwidth
    # A piece reads what its slot holds before it, and multiplies by it; not in the last layer, of which prefill wants
    # keys and values alone.
    past = CONTEXT - 256
    config = proxy(2, **SHORT)
    flops = 4 * 256 * past * config.num_attention_heads * config.head_dim
    assert prefill["first_seconds"] + flops / CHIP.peak < prefill["last_seconds"] == gap["piece_seconds"]


@needs_libtpu
@pytest.mark.slow
def test_more_than_fits_is_refused_and_says_how_much_would(report):
    fit = report["tokens"]["fit"]
    more = on_one_chip(cache_tokens=fit + fit // 50)
    assert not more["fits"] and more["largest_context"] == 65536
    change, tokens = more["change"].split()
    assert change == "--cache-tokens" and 0.98 * fit < int(tokens) <= fit
    assert on_one_chip(cache_tokens=int(tokens))["fits"]


@needs_libtpu
@pytest.mark.slow
def test_rows_that_fit_alone_want_no_prefixes_kept():
    """Slots on four devices have rows. Of three layers these take more than two thirds of what there is."""
    config, shape = proxy(3, **SHORT), {"slots": 4 * SLOTS, "context": CONTEXT, "axes": {"data": 4}}
    report = plan_serve(config, "v5e:2x2", **shape)
    tokens = report["tokens"]
    assert (tokens["slots"], tokens["kept"]) == (4 * SLOTS * CONTEXT, 2 * SLOTS * CONTEXT)
    assert tokens["slots"] <= tokens["fit"] < tokens["slots"] + tokens["kept"]
    assert not report["fits"] and report["largest_context"] == CONTEXT // 2
    assert report["change"] == f"--no-prefix-cache of `smollm3 serve`, or --context {CONTEXT // 2}"


@needs_libtpu
def test_what_cannot_be_is_refused():
    with pytest.raises(OptionError, match=r"--context is 70000; the model has been trained for 65536"):
        plan_serve(proxy(1, **SHORT), "v5e:1x1", context=70000)
    with pytest.raises(OptionError, match=r"cache_tokens is 512; one sequence of 1024 tokens takes 1024"):
        plan_serve(proxy(1, **SHORT), "v5e:1x1", context=1024, cache_tokens=512)


@needs_libtpu
@pytest.mark.slow
def test_slots_are_those_of_the_engine():
    """Powers of two that the mesh divides; a context's capacity is one, too."""
    report = plan_serve(proxy(1, **SHORT), "v5e:2x2", slots=5, context=700, axes={"data": 4}, cache="int8")
    assert (report["slots"], report["context"], report["capacity"]) == (8, 700, 1024)
    assert report["tokens"]["slots"] == 8 * 1024
    assert report["tokens"]["kept"] == 8 * 700 // 2 // 256 // 4 * 4 * 256


@needs_cuda
@pytest.mark.gpu
@pytest.mark.slow
def test_a_server_on_an_h100():
    report = plan_serve(proxy(2, **SHORT), "h100:1", slots=8, context=8192)
    assert report["fits"] and report["hbm"]["total"] < report["hbm"]["limit"] == CHIPS["h100"].hbm
    assert report["tokens"]["pool"] == 65536 and report["largest_context"] == 65536
    assert report["prefill"]["first_seconds"] < report["prefill"]["last_seconds"]
