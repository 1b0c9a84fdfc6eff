"""Peak memory and time of loading and saving a 6.15 GB checkpoint in SmolLM3-3B's exact layout.

    python scripts/bench_load.py INDEX_FOLDER [--peer transformers] [--json FILE]

INDEX_FOLDER holds config.json and model.safetensors.index.json of the release; the shards are made
up of random numbers in a temporary folder. Each measurement is a process of its own that samples
its anonymous resident memory (RssAnon of /proc/self/status: pages of mapped files do not count).
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from smollm3_jax.config import ModelConfig
from smollm3_jax.files import write
from smollm3_jax.weights.key_map import EMBED_NAME, hf_tensors
from smollm3_jax.weights.safetensors import INDEX, read_weight_map, write_file
from smollm3_jax.weights.stored import NUMPY_DTYPES, StoredTensor

GIB = 2**30


def write_random_release(index_folder: Path, folder: Path) -> None:
    """Random bfloat16 weights under the keys and in the shards of the folder's index; 6 GB in 10 s."""
    config = ModelConfig.from_hf(index_folder)
    weight_map = read_weight_map(index_folder / INDEX)
    wanted = hf_tensors(config)
    assert weight_map.keys() == wanted.keys(), "the index is not that of its config"
    block = np.random.default_rng(0).integers(0, 2**15, 1 << 24, np.uint16) % (0x3C00) + 0x3000  # 2^-32 .. 1
    for shard in sorted(set(weight_map.values())):
        tensors = []
        for number, (name, hf) in enumerate(wanted.items()):
            if weight_map[name] != shard:
                continue

            def read(shape=hf.shape, number=number) -> np.ndarray:
                # Another rotation of the block for every tensor, so that none equals its neighbour.
                bits = np.resize(np.roll(block, 7919 * number), shape).astype(np.uint16)
                return bits.view(NUMPY_DTYPES["bfloat16"])

            tensors.append(StoredTensor(name=name, dtype="bfloat16", shape=hf.shape, file="", read=read))
        write_file(folder / shard, tensors)
    for name in ("config.json", INDEX):
        write(folder / name, (index_folder / name).read_bytes())


def _anonymous_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("/proc/self/status has no RssAnon: this benchmark needs Linux")


class Peak:
    """The highest anonymous memory while the block runs, sampled every 5 ms."""

    def __enter__(self) -> "Peak":
        self.bytes, self._stop = 0, threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()
        self.started = time.perf_counter()
        return self

    def _sample(self) -> None:
        while not self._stop.wait(0.005):
            self.bytes = max(self.bytes, _anonymous_bytes())

    def __exit__(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self.started
        self._stop.set()
        self._thread.join()


def measure(what: str, folder: Path) -> dict[str, Any]:
    """One measurement, in this process."""
    if what == "transformers":
        from transformers import AutoModelForCausalLM

        with Peak() as peak:
            model = AutoModelForCausalLM.from_pretrained(folder, dtype="bfloat16")
            # Its load is lazy: touch every weight, as the first forward does.
            total = sum(float(p.detach().sum()) for p in model.parameters())
        return {"what": f"{what}: load", "seconds": peak.seconds, "peak_bytes": peak.bytes, "checksum": total}
    import jax

    import smollm3_jax as s3

    with Peak() as peak:
        model = s3.from_pretrained(folder)
        jax.block_until_ready(model)
    result = {"what": f"{what}: load", "seconds": peak.seconds, "peak_bytes": peak.bytes}
    if what == "smollm3_jax: save":
        with tempfile.TemporaryDirectory(dir=folder.parent) as target, Peak() as peak:
            s3.save_pretrained(model, Path(target) / "out")
        result = {"what": what, "seconds": peak.seconds, "peak_bytes": peak.bytes}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("index_folder", type=Path)
    parser.add_argument("--peer", choices=["transformers"])
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--measure", nargs=2, metavar=("WHAT", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure[0], Path(args.measure[1]))))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "release"
        folder.mkdir()
        with Console(stderr=True).status("writing a random checkpoint in the release's layout"):
            write_random_release(args.index_folder, folder)
        wanted = hf_tensors(ModelConfig.from_hf(folder))
        stays = sum(2 * int(np.prod(hf.shape)) for hf in wanted.values())
        bound = stays + 2 * 2 * int(np.prod(wanted[EMBED_NAME].shape)) + int(0.6 * GIB)
        kinds = ["smollm3_jax", "smollm3_jax: save"] + ([args.peer] if args.peer else [])
        runs: dict[str, list[dict[str, Any]]] = {}
        for _ in range(args.rounds):  # interleaved, so that a busy machine is busy for all
            for kind in kinds:
                command = [sys.executable, __file__, str(args.index_folder), "--measure", kind, str(folder)]
                with Console(stderr=True).status(f"measuring {kind}"):
                    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                run = json.loads(done.stdout.splitlines()[-1])
                runs.setdefault(run["what"], []).append(run)
    table = Table("what", "seconds (median)", "peak GiB", "bound GiB")
    for what, rounds in runs.items():
        seconds = float(np.median([run["seconds"] for run in rounds]))
        peak = max(run["peak_bytes"] for run in rounds) / GIB
        table.add_row(what, f"{seconds:.1f}", f"{peak:.2f}", f"{bound / GIB:.2f}" if "smollm3" in what else "")
    Console().print(table)
    if args.json:
        write(args.json, json.dumps({"bound_bytes": bound, "stays_bytes": stays, "runs": runs}, indent=2) + "\n")


if __name__ == "__main__":
    main()
