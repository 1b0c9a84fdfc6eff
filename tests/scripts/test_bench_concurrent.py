"""What the comparison of a server with its engine makes of its rounds."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
import bench_concurrent as bench


def rounds(rates: list[float], cpu: float) -> list[dict[str, float]]:
    return [{"rate": rate, "cpu": cpu} for rate in rates]


ROUNDS = {
    "serve": rounds([90.0, 100.0, 50.0], 8.0),
    "engine": rounds([100.0, 80.0, 100.0], 6.0),
    "llama.cpp": rounds([45.0, 200.0, 100.0], 10.0),
}


def test_ratios_are_of_medians_and_of_single_rounds():
    assert bench.ratios(ROUNDS) == {
        "engine": {"rate": 0.9, "low": 0.5, "high": 1.25, "cpu": 0.75},
        "llama.cpp": {"rate": 0.9, "low": 0.5, "high": 2.0, "cpu": 1.25},
    }


def test_the_table():
    columns = [list(column.cells) for column in bench.table(ROUNDS).columns]
    assert columns == [
        ["serve", "engine", "llama.cpp"],
        ["90", "100", "100"],
        ["", "0.90", "0.90"],
        ["", "0.50 to 1.25", "0.50 to 2.00"],
        ["8.00", "6.00", "10.00"],
        ["", "0.75", "1.25"],
    ]


def test_options(capsys):
    args = bench.parse(["--prompt", "100", "--new", "20"])
    assert (args.context, args.slots, args.dtype, args.peer) == (120, 16, "bfloat16", [])
    for options in (["--new", "1"], ["--rounds", "0"]):
        with pytest.raises(SystemExit):
            bench.parse(options)
    assert "above" in capsys.readouterr().err
