"""Plans for decoding: what fits, what is refused, and what a GPU would move."""

import pytest
from proxies import FULL, SHORT, needs_cuda, needs_libtpu, proxy

from sharding import hlo
from sharding.hardware import CHIPS
from smollm3_jax.plan.decode import plan_decode
from smollm3_jax.plan.tables import tables


@needs_libtpu
@pytest.mark.slow
@FULL
def test_the_largest_batch_fits_and_the_next_is_refused():
    """Two layers with a short vocabulary: compiled at the batch that the plan names, and at a little more."""
    config = proxy(2, **SHORT)
    report = plan_decode(config, "v5e:1x1", "serve_tp", 64, 8192, axes={"data": 1}, prompt=128)
    rows, cache_row = report["largest_batch"], report["hbm"]["cache"] // 64
    assert rows * cache_row > 0.9 * report["hbm"]["limit"]
    assert not plan_decode(config, "v5e:1x1", "serve_tp", rows + rows // 50, 8192, axes={"data": 1}, prompt=128)["fits"]
    assert plan_decode(config, "v5e:1x1", "serve_tp", rows - rows // 50, 8192, axes={"data": 1}, prompt=128)["fits"]


@pytest.fixture(scope="module")
def small_on_h100(tmp_path_factory):
    """A plan for decoding by two layers with a short vocabulary, and the file that it wrote."""
    config = proxy(2, **SHORT)
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


@FULL
@needs_cuda
@pytest.mark.gpu
def test_what_an_h100_has_no_memory_for_is_refused():
    """The compiler for GPUs compiles it all the same."""
    config = proxy(1, **SHORT)
    report = plan_decode(config, "h100:1", "serve_tp", 8192, 8192, prompt=128)
    assert not report["fits"]
    assert report["hbm"]["total"] > report["hbm"]["limit"] == CHIPS["h100"].hbm
    assert 0 < report["largest_batch"] < 8192
