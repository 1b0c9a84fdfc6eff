"""Plans for servers: what their cache holds, what bounds a gap between tokens, and the largest context."""

import types

import pytest
from proxies import FULL, SHORT, needs_cuda, needs_libtpu, proxy

from sharding import hlo
from sharding.arrays import total_bytes
from sharding.hardware import CHIPS
from sharding.mesh import device_bytes
from smollm3_jax.commands.main import main
from smollm3_jax.errors import OptionError
from smollm3_jax.generation.device_loop import MAX_STEPS
from smollm3_jax.kv_cache import cache_specs
from smollm3_jax.plan import serve
from smollm3_jax.plan.decode import DecodeSetting
from smollm3_jax.plan.devices import DoesNotFit, sharding_for, topology
from smollm3_jax.plan.serve import ServeSetting, plan_serve
from smollm3_jax.weights.quantized import with_scheme

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
@FULL
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
@FULL
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
@FULL
def test_more_than_fits_is_refused_and_says_how_much_would(report):
    fit = report["tokens"]["fit"]
    more = on_one_chip(cache_tokens=fit + fit // 50)
    assert not more["fits"] and more["largest_context"] == 65536
    change, tokens = more["change"].split()
    assert change == "--cache-tokens" and 0.98 * fit < int(tokens) <= fit
    assert on_one_chip(cache_tokens=int(tokens))["fits"]


@needs_libtpu
@pytest.mark.slow
@FULL
def test_rows_that_fit_alone_want_no_prefixes_kept():
    """Slots on four devices have rows. Of three layers these take more than two thirds of what there is."""
    config, shape = proxy(3, **SHORT), {"slots": 4 * SLOTS, "context": CONTEXT, "axes": {"data": 4}}
    report = plan_serve(config, "v5e:2x2", **shape)
    tokens = report["tokens"]
    assert (tokens["slots"], tokens["kept"]) == (4 * SLOTS * CONTEXT, 2 * SLOTS * CONTEXT)
    assert tokens["slots"] <= tokens["fit"] < tokens["slots"] + tokens["kept"]
    assert not report["fits"] and report["largest_context"] == CONTEXT // 2
    assert report["change"] == f"--no-prefix-cache of `smollm3 serve`, or --context {CONTEXT // 2}"


TEMPORARIES, CODE = 1 << 30, 1 << 20


def needing(decode):
    """What a program of a setting takes, as if it were compiled."""
    own = sum(map(device_bytes, (decode.model, decode.slots, decode.cache)))
    return own + TEMPORARIES + CODE


@pytest.fixture
def uncompiled(monkeypatch):
    """Programs that are not compiled: a GiB of temporaries, and refused where the device has no room for one."""

    def compiled(decode, *_, **__):
        if (needed := needing(decode)) > CHIP.hbm:
            raise DoesNotFit(needed, CHIP.hbm)
        sizes = dict.fromkeys((f"{x}_size_in_bytes" for x in ("argument", "output", "alias")), 0)
        sizes |= {"temp_size_in_bytes": TEMPORARIES, "generated_code_size_in_bytes": CODE}
        return types.SimpleNamespace(memory_analysis=lambda: types.SimpleNamespace(**sizes))

    monkeypatch.setattr(DecodeSetting, "compile", compiled)
    monkeypatch.setattr(DecodeSetting, "compile_prefill", compiled)
    monkeypatch.setattr(serve, "_speed", lambda setting: {})
    return lambda slots, context, where="v5e:1x1", data=1, **options: plan_serve(
        proxy(2, **SHORT), where, slots=slots, context=context, axes={"data": data}, **options
    )


@needs_libtpu
def test_a_pool_is_as_large_as_its_options_say_and_no_larger_than_fits(uncompiled):
    report = uncompiled(SLOTS, CONTEXT)
    fit, hbm = report["tokens"]["fit"], report["hbm"]
    assert report["fits"] and "change" not in report
    assert report["tokens"] == {"fit": fit, "pages": fit // 256, "pool": SLOTS * CONTEXT}
    assert hbm["total"] == sum(hbm[name] for name in ("cache", "weights", "slots", "temporaries", "code"))
    assert (hbm["temporaries"], hbm["code"]) == (TEMPORARIES, 7 * CODE)  # of decoding, and of six of pieces
    a_token = 2 * 2 * 4 * 128 * 2
    assert fit == pytest.approx((CHIP.hbm - (hbm["total"] - hbm["cache"])) / a_token, rel=1e-3)
    assert report["largest_context"] == 65536
    # All of it, and a page more: whether or not a program alone is refused.
    assert uncompiled(SLOTS, CONTEXT, cache_tokens=fit)["fits"]
    for more in (256, fit // 50):
        report = uncompiled(SLOTS, CONTEXT, cache_tokens=fit + more)
        assert not report["fits"] and report["largest_context"] == 65536
        change, tokens = report["change"].split()
        assert change == "--cache-tokens" and 0.999 * fit < int(tokens) <= 1.01 * fit


@needs_libtpu
def test_a_sequence_that_does_not_fit_alone_is_told_so(uncompiled, monkeypatch):
    # So much that half of its tokens are left.
    hbm = uncompiled(1, 65536)["hbm"]
    all_but_half = CHIP.hbm - hbm["weights"] - hbm["slots"] - hbm["code"] - hbm["cache"] // 2
    monkeypatch.setitem(uncompiled.__globals__, "TEMPORARIES", all_but_half)
    report = uncompiled(1, 65536)
    largest = report["largest_context"]
    assert not report["fits"] and 0 < largest < 65536 and largest % 256 == 0
    assert report["change"] == f"--context {largest} --cache-tokens {largest}"
    assert uncompiled(1, largest, cache_tokens=largest)["fits"]
    monkeypatch.setitem(uncompiled.__globals__, "TEMPORARIES", 2 * CHIP.hbm)
    report = uncompiled(1, 65536)
    assert report["largest_context"] == 0 and report["change"].startswith("fewer --slots")


@needs_libtpu
def test_rows_hold_every_context_and_what_is_kept_beside_them(uncompiled):
    on_four = {"where": "v5e:2x2", "data": 4}
    report = uncompiled(4 * SLOTS, CONTEXT, **on_four)
    assert report["fits"] and report["largest_context"] == CONTEXT
    tokens = report["tokens"]
    assert (tokens["slots"], tokens["kept"]) == (4 * SLOTS * CONTEXT, 2 * SLOTS * CONTEXT)
    assert tokens["slots"] + tokens["kept"] <= tokens["fit"] < 2 * (tokens["slots"] + tokens["kept"])
    report = uncompiled(4 * SLOTS, 2 * CONTEXT, **on_four)
    assert not report["fits"] and report["change"] == f"--context {CONTEXT}" and report["largest_context"] == CONTEXT
    with pytest.raises(OptionError, match="split slots"):
        uncompiled(4 * SLOTS, CONTEXT, cache_tokens=1 << 20, **on_four)


# Of one rank, of the seven projections of a layer: inputs and outputs.
WIDTH, KEYS, INNER = 2048, 512, 11008
A_RANK = 2 * 2 * WIDTH + 2 * (WIDTH + KEYS) + 3 * (WIDTH + INNER)


@needs_libtpu
def test_adapters_take_what_the_cache_would_have(uncompiled):
    plain, own = (uncompiled(SLOTS, CONTEXT, adapters=adapters) for adapters in (None, (3, 8)))
    assert "adapters" not in plain["hbm"] and "adapters" not in plain
    assert (own["adapters"], own["adapter_rank"]) == (3, 8)
    assert own["hbm"]["adapters"] == 2 * 3 * 8 * A_RANK * 2
    assert own["hbm"]["weights"] == plain["hbm"]["weights"]
    more = own["hbm"]["adapters"] + 4 * SLOTS  # and which of them each slot has
    assert own["hbm"]["total"] - plain["hbm"]["total"] == more
    a_token = 2 * 2 * KEYS * 2
    assert plain["tokens"]["fit"] - own["tokens"]["fit"] == pytest.approx(more / a_token, abs=2)


@needs_libtpu
@pytest.mark.slow
def test_the_compiled_programs_hold_the_adapters():
    """As many bytes more among what they take in, and every slot's products with all of them; beside int8 weights."""
    config, (_, devices) = with_scheme(proxy(1, **SHORT), "int8"), topology("v5e:2x2")
    slots, sharding = 8, sharding_for(config, devices, "serve_tp", {"tensor": 4})
    settings = [DecodeSetting(config, sharding, slots, 1024, pool=(32, 256), adapters=one) for one in (None, (4, 16))]
    plain, own = (setting.compile() for setting in settings)
    adapters = ServeSetting(settings[1], 1024).weights["adapters"]
    # Split as the weights are: heads, and what is within the MLP. The model's width, seven times, is not.
    assert adapters == 4 * 16 * 2 * (7 * WIDTH + (A_RANK - 7 * WIDTH) / 4)
    assert adapters <= hlo.memory(own).arguments - hlo.memory(plain).arguments <= 1.02 * adapters + 4096
    flops, before = (setting.model_of(one).flops for setting, one in zip(settings[::-1], (own, plain), strict=True))
    assert flops - before == pytest.approx(2 * slots * adapters / 2, rel=0.01)
    piece, before = (hlo.memory(setting.compile_prefill(256, whole=False)) for setting in settings[::-1])
    assert piece.arguments > before.arguments


@needs_libtpu
def test_what_cannot_be_is_refused(capsys):
    assert main(["plan", "serve", "--adapter-rank", "8"]) == 2
    assert "--adapter-rank is 8, of no adapters; say how many: --adapters N" in capsys.readouterr().err
    with pytest.raises(OptionError, match=r"--context is 70000; the model has been trained for 65536"):
        plan_serve(proxy(1, **SHORT), "v5e:1x1", context=70000)
    with pytest.raises(OptionError, match=r"cache_tokens is 512; one sequence of 1024 tokens takes 1024"):
        plan_serve(proxy(1, **SHORT), "v5e:1x1", context=1024, cache_tokens=512)


@FULL
@needs_libtpu
def test_slots_are_those_of_the_engine():
    """Powers of two that the mesh divides; a context's capacity is one, too."""
    report = plan_serve(proxy(1, **SHORT), "v5e:2x2", slots=5, context=700, axes={"data": 4}, cache="int8")
    assert (report["slots"], report["context"], report["capacity"]) == (8, 700, 1024)
    assert report["tokens"]["slots"] == 8 * 1024
    assert report["tokens"]["kept"] == 8 * 700 // 2 // 256 // 4 * 4 * 256


@FULL
@needs_cuda
@pytest.mark.gpu
def test_a_server_on_an_h100():
    report = plan_serve(proxy(2, **SHORT), "h100:1", slots=8, context=8192)
    assert report["fits"] and report["hbm"]["total"] < report["hbm"]["limit"] == CHIPS["h100"].hbm
    assert report["tokens"]["pool"] == 65536 and report["largest_context"] == 65536
    assert report["prefill"]["first_seconds"] < report["prefill"]["last_seconds"]
