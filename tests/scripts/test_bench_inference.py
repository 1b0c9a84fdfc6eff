import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tiny import tiny_checkpoint

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
import bench_inference as bench
from bench_peers import BenchError

from smollm3_jax.config import ModelConfig
from smollm3_jax.weights.load import open_checkpoint

LABELS = {"smollm3_jax": "smollm3_jax bfloat16", "transformers": "transformers bfloat16"}
COMMANDS = {
    "prefill 128": {"do": "prefill", "prompts": [[7] * 128]},
    "decode, batch 2": {"do": "decode", "prompts": [[1, 2], [3, 4]], "new": 50},
}


def made_samples() -> list[dict]:
    """Three rounds with a warm-up and an outlier; ours takes 2 s a prefill, the peer 4 s."""
    samples = []
    for number in range(4):
        for engine, factor in {"smollm3_jax": 1, "transformers": 2}.items():
            slow = {0: 100, 3: 10}.get(number, 1)
            common = {"round": number, "engine": engine, "others": 0.0, "peak_bytes": factor * 2**30 + number}
            samples.append(common | {"what": "load", "seconds": 3 * factor * slow})
            samples.append(common | {"what": "prefill 128", "seconds": 2 * factor * slow})
            tokens = [[5, 6, 7, 8 + factor], [0, 0, 0, 0]]
            samples.append(common | {"what": "decode, batch 2", "seconds": 4 * factor * slow, "tokens": tokens})
    return samples


def test_medians_and_ratios():
    load, prefill, decode, memory = bench.summarize(made_samples(), COMMANDS)
    assert load == {
        "what": "load",
        "unit": "s",
        "values": {"smollm3_jax": 3, "transformers": 6},
        "ratios": {"transformers": 2.0},  # less time is better ...
    }
    assert prefill["values"] == {"smollm3_jax": 64, "transformers": 32}
    assert prefill["ratios"] == {"transformers": 2.0}  # ... and more tokens a second
    assert decode["values"] == {"smollm3_jax": 25, "transformers": 12.5}
    assert memory["values"]["transformers"] == 2 + 3 / 2**30 and memory["unit"] == "GiB"
    assert memory["ratios"]["transformers"] == pytest.approx(2)


def test_without_a_peer_there_are_no_ratios():
    alone = [sample for sample in made_samples() if sample["engine"] == "smollm3_jax"]
    assert all(row["ratios"] == {} for row in bench.summarize(alone, COMMANDS))
    assert len(bench.table(bench.summarize(alone, COMMANDS), {"smollm3_jax": "ours"}).columns) == 3


def test_agreement_counts_up_to_the_first_difference():
    assert bench.agreement(made_samples()) == {"transformers": "3 of 4"}


def test_the_table_shows_every_measurement():
    out = io.StringIO()
    Console(file=out, width=120).print(bench.table(bench.summarize(made_samples(), COMMANDS), LABELS))
    for words in ("transformers bfloat16", "prefill 128", "decode, batch 2", "tokens/s", "peak memory", "12.5", "2.00"):
        assert words in out.getvalue()


def test_what_does_not_fit_into_the_context_is_left_out(tmp_path):
    folder = tiny_checkpoint(tmp_path)
    config = ModelConfig.from_hf(folder)
    args = bench.parse(["--model", str(folder), "--prompt", "440", "--batch", "2"])
    ids = bench.token_ids(folder, config, 2048)
    commands = bench.plan(args, config, ids)  # 512 tokens of context
    assert list(commands) == ["prefill 128", "decode, batch 2"]
    assert commands["decode, batch 2"]["prompts"] == [ids[:440], ids[440:880]]
    assert bench.token_count(commands["decode, batch 2"]) == 128


@pytest.mark.parametrize("one_at_a_time", [False, True])
def test_rounds_are_interleaved(one_at_a_time):
    class Fake:
        peak = 0

        def __init__(self, engine):
            self.engine, self.load = engine, {"seconds": 1.0}
            alive.append(engine)
            Fake.peak = max(Fake.peak, len(alive))

        def ask(self, command):
            return {"seconds": 1.0}

        def __enter__(self):
            return self

        def __exit__(self, *_):
            alive.remove(self.engine)

    alive: list[str] = []
    start: Any = {name: lambda name=name: Fake(name) for name in ("a", "b")}
    samples = bench.measure(start, COMMANDS, 2, one_at_a_time, lambda text: None)
    measured = [(s["round"], s["what"], s["engine"]) for s in samples if s["round"]]
    order = ["load", *COMMANDS]
    if one_at_a_time:
        assert measured == [(r, what, e) for r in (1, 2) for e in "ab" for what in order]
        assert Fake.peak == 1
    else:
        assert measured == [(r, what, e) for r in (1, 2) for what in order for e in "ab"]
    assert not alive


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "/nowhere/to/be"], "/nowhere/to/be"),
        (["--model", "demo", "--rounds", "0"], "positive number"),
        (["--model", "demo", "--threads", "100000"], "100000"),
        (["--model", "demo", "--out", "bench.txt"], ".json"),
        (["--model", "demo", "--out", "/nowhere/to/be/bench.json"], "/nowhere/to/be"),
        (["--model", "demo", "--peer", "vllm"], "vllm"),
        (["--model", "demo", "--beside", "/nowhere/to/be"], "no checkout"),
    ],
)
def test_mistakes_are_named(arguments, words, capsys):
    with pytest.raises(SystemExit) as stopped:
        bench.parse(arguments)
    assert stopped.value.code == 2
    assert words in capsys.readouterr().err


def test_a_missing_llama_cpp_says_how_to_install_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SMOLLM3_JAX_CACHE", str(tmp_path))
    monkeypatch.setattr(bench.shutil, "which", lambda name: f"/usr/bin/{name}")
    assert bench.main(["--model", "demo", "--peer", "llama.cpp"]) == 3
    assert "npm install --prefix" in capsys.readouterr().err


def test_an_engine_that_dies_is_quoted(tmp_path):
    command = [sys.executable, "-c", "import sys; sys.exit('no weights there')"]
    with pytest.raises(BenchError, match="no weights there"):
        bench.Worker("engine", command)


@pytest.mark.parametrize("name", ["plain", "llama"])
def test_the_gguf_is_the_same_model_and_written_once(name, tmp_path, monkeypatch):
    monkeypatch.setenv("SMOLLM3_JAX_CACHE", str(tmp_path / "cache"))
    folder = tiny_checkpoint(tmp_path / "m", name)
    path = bench.gguf_of(folder, "F32")
    written = path.stat().st_mtime_ns
    assert bench.gguf_of(folder, "F32") == path and path.stat().st_mtime_ns == written
    ours, theirs = open_checkpoint(folder).tensors, open_checkpoint(path).tensors
    assert ours.keys() == theirs.keys()
    assert all((tensor.read() == theirs[name].read()).all() for name, tensor in ours.items())


@pytest.mark.slow
def test_end_to_end(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench.os, "sched_setaffinity", lambda *_: None)  # the tests go on in this process
    folder, out = tiny_checkpoint(tmp_path / "tiny", "one_layer"), tmp_path / "bench.json"
    tiny = "--dtype float32 --rounds 1 --prefill 8 600 --batch 1 --prompt 8 --new 400 --threads 1"
    itself = ["--beside", str(Path(bench.__file__).parents[1])]
    assert bench.main(["--model", str(folder), *tiny.split(), *itself, "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert [row["what"] for row in result["results"]] == ["load", "prefill 8", "decode, batch 1", "peak memory"]
    assert all(row["values"]["smollm3_jax"] > 0 for row in result["results"])
    assert result["engines"] == {"smollm3_jax": "smollm3_jax float32", "beside": "beside float32"}
    assert result["greedy_agreement"] == {"beside": "401 of 401"}
    assert result["machine"]["cores"] and result["versions"]["jax"]
    assert {sample["round"] for sample in result["samples"]} == {0, 1}
    assert "decode, batch 1" in capsys.readouterr().out
