"""What people read of a plan: whole numbers at 80 columns, three significant digits."""

import io
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from smollm3_jax.config import SMOLLM3_3B, ModelConfig
from smollm3_jax.plan.memory import plan_memory
from smollm3_jax.plan.tables import memory_tables, scale_tables, tables, three

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0, "0"),
        (4e-6, "< 0.001"),
        (0.0012346, "0.00123"),
        (0.0398, "0.0398"),
        (0.38, "0.380"),
        (0.9996, "1.00"),
        (1.999, "2.00"),
        (9.996, "10.0"),
        (13.66, "13.7"),
        (99.96, "100"),
        (597.07, "597"),
        (999.6, "1,000"),
        (10475.3, "10,500"),
        (109762.09, "110,000"),
    ],
)
def test_three_significant_digits(value, shown):
    assert three(value) == shown


def printed(parts) -> str:
    console = Console(file=io.StringIO(), width=80, markup=False)
    for part in parts:
        console.print(part, highlight=False)
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert "…" not in text and all(len(line.rstrip()) <= 80 for line in text.splitlines()), text
    return text


@pytest.mark.parametrize(("batch", "sequences"), [(1, "1 sequence of"), (1024, "1,024 sequences of")])
def test_memory_at_80_columns(batch, sequences):
    report = plan_memory(ModelConfig.from_hf(SMOLLM3_3B), batch)
    text = printed(memory_tables(report))
    assert f"3,075,098,624 parameters, batch {batch:,}\n" in text
    for size in [*report["weights"].values(), *report["cache"]["bfloat16"].values(), *report["cache"]["int8"].values()]:
        assert f" {size:,} " in text
    words = " ".join(text.split())
    assert "Weights and cache alone" in words and sequences in words and "come on top" in words
    assert "Beyond 65,536 tokens" in text


COLLECTIVES = [
    {"kind": "collective-permute", "count": 1468, "bytes": 10_475_300_000, "hidden": True, "bytes_across_slices": 0},
    {"kind": "all-reduce", "count": 1, "bytes": 4, "hidden": False, "bytes_across_slices": 123_456_789_000},
]
MODELLED = {"step_seconds": 0.59707, "tokens_per_second": 109762.09, "mfu": 0.6432, "bound_by": "products"}
STEP = {
    "topology": "v5e:16x16",
    "slices": 4,
    "devices": 1024,
    "rules": "fsdp",
    "mesh": {"data": 4, "fsdp": 256, "tensor": 1},
    "batch": 1,
    "length": 65536,
    "refused": [{"remat": "dots", "micro_batches": 1, "needed": 49e9, "limit": 16e9}],
    "fits": True,
    "remat": "full",
    "micro_batches": 2,
    "hbm": {"limit": 16_911_433_728, "total": 14_667_000_000, "code": 512},
    "program": {"flops": 87.939e12, "bytes_moved": 110.7e9, "products": 12345, "float32_products": 0},
    "collectives": COLLECTIVES,
    "modelled": MODELLED,
    "assumptions": ["modelled, not measured", "collectives over rings"],
}


def test_a_step_at_80_columns():
    text = printed(tables(STEP))
    assert "4 slices of v5e:16x16: 1,024 devices" in text and "batch 1: 1 row of 65,536 tokens" in " ".join(
        text.split()
    )
    for words in ("45.6 GiB of 14.9, refused", "597 ms", "110,000", "64.3 %", "10,500", "123,000", "< 0.001", "12,345"):
        assert words in text
    assert not re.search(r"\d\.\d{3,}", text.replace("< 0.001", "")), "more than three digits"


def test_one_device_sends_nothing():
    assert "no collectives\n" in printed(tables(STEP | {"collectives": []}))


def test_scale_at_80_columns():
    run = {"gpus": 384, "tensor": 2, "tokens_per_second_per_gpu": 14_000, "modelled_tokens_per_second_per_gpu": 15123.4}
    report = {"steps": [STEP, STEP | {"fits": False}], "h100": run | {"share_of_model_reached": 0.92571}}
    text = printed(scale_tables(report))
    assert "4 x v5e:16x16" in text and "too large" in text
    assert "15,100 tokens/s" in text and "92.6 % of it" in " ".join(text.split())


SLOW_COMPILER = """
import hashlib, sys
from smollm3_jax.commands import plan
from smollm3_jax.commands.main import main
from smollm3_jax.progress import busy

def compile(args):
    with busy("compiling"):
        print("begun", flush=True)
        hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)  # minutes in C, as a compiler's

plan._plan_memory = compile
sys.exit(main(["plan", "memory"]))
"""


def test_ctrl_c_is_heard_while_a_compiler_compiles():
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW_COMPILER],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout
    try:
        assert process.stdout.readline() == "begun\n"
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=10)[1] == "smollm3: interrupted\n"
        assert process.returncode == 130
    finally:
        process.kill()
        process.wait()
