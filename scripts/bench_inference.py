"""Inference speed and memory of this package beside its peers, on the CPU, measured in one run.

    python scripts/bench_inference.py --model DIR|demo|random-3b [--peer transformers] [--peer llama.cpp]
        [--beside TREE] [--dtype bfloat16] [--weights int8] [--rounds 3] [--one-at-a-time] [--out bench.json]

Every engine is a process of its own (bench_peers.py, bench_llama.mjs) with the same token ids on the same cores.
Each measurement is made once to warm up, compilation included, then once a round by one engine after the other, so
that a busy machine is busy for all; what counts is the median. A ratio above 1 is in favour of smollm3_jax. All
engines stay loaded; where they do not fit side by side, --one-at-a-time starts each again in every round.

- load: from the call until every weight is in memory, in a fresh process each round; imports are not counted.
- prefill: one prompt, until its next token is known.
- decode: greedy, end-of-sequence ignored; what N + 1 new tokens take beyond 1 new token, so N steps (llama.cpp:
  N steps after the prefill, into a cache that was allocated before).
- peak memory: the most that the engine's process had resident, mapped weight files included.

transformers runs with its defaults (generate, sdpa, no torch.compile), in --dtype also where --weights is int8, for
which it has nothing on a CPU. Where a processor has no bfloat16 instructions, its bfloat16 is slower than its
float32: measure both. llama.cpp runs --dtype as F32 or BF16 and int8 as Q8_0, in the prebuilt library of npm's
node-llama-cpp (the script says how to install it), with an f16 cache. TREE is another checkout of this repository,
measured by its own code. The chart needs matplotlib, which is in the
extra `bench`.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from bench_models import gguf_of, random_3b
from bench_peers import BenchError
from bench_report import OURS, agreement, machine, save, summarize, table, token_count
from rich.console import Console

from smollm3_jax.config import ModelConfig
from smollm3_jax.errors import SmolLM3Error, TokenizerError
from smollm3_jax.paths import cache_dir
from smollm3_jax.support import how_to_install
from smollm3_jax.tokenizer import load_tokenizer
from smollm3_jax.weights.demo import pull_demo

TRANSFORMERS, LLAMA, BESIDE = "transformers", "llama.cpp", "beside"
BUSY = 0.05  # the share of the machine's cores, used by others, from which figures are doubtful
NODE_VERSION = "3.22.1"
GGUF_KINDS = {"float32": "F32", "bfloat16": "BF16", "int8": "Q8_0"}
TEXT = """
A river begins as almost nothing: a wet place in a meadow, a spring under a stone, the edge of a melting field of
snow. It finds its way downhill because water can do nothing else, and on the way it gathers what other slopes have
sent. By the time it has a name it also has a history. People built their first towns along such streams, since a
boat carries more than a cart, and a mill works through the night without being paid. In 1804 an engineer counted
37 mills on one short valley's brook; fifty years later there were three, and a railway. What remains are the names
of the streets, a few low walls, and the habit of the water to rise in April. "Never trust a quiet river," the old
people say, but they still plant their gardens on its banks, for the soil is black there and the beans grow tall.
"""


class Worker:
    """One engine in its process, loaded; answers one command at a time."""

    def __init__(self, engine: str, command: Sequence[str], environment: dict[str, str] | None = None):
        self.engine = engine
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        self.pid = self._process.pid
        try:
            self.load = self.ask()
        except BaseException:
            self.__exit__()
            raise

    def ask(self, command: dict[str, Any] | None = None) -> dict[str, Any]:
        """The engine's next answer, with "others": which share of all cores other processes used meanwhile."""
        started, all_before, own_before = time.perf_counter(), busy_seconds(), busy_seconds(self.pid)
        assert self._process.stdin and self._process.stdout
        line = ""
        with contextlib.suppress(BrokenPipeError):
            if command:
                self._process.stdin.write(json.dumps(command) + "\n")
                self._process.stdin.flush()
            line = self._process.stdout.readline()
        if not line:
            raise BenchError(f"{self.engine} has stopped:\n{self._last_words()}")
        others = busy_seconds() - all_before - (busy_seconds(self.pid) - own_before)
        share = max(0.0, others) / (time.perf_counter() - started) / (os.cpu_count() or 1)
        return json.loads(line) | {"others": round(share, 4)}

    def _last_words(self) -> str:
        self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return "\n".join(lines[-8:]) or f"exit code {self._process.returncode}"

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin and self._process.stdout
        with contextlib.suppress(OSError):
            self._process.stdin.close()  # its signal to leave
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._errors.close()


def busy_seconds(pid: int | None = None) -> float:
    """CPU seconds that a process has used, with all its threads; without a pid, the whole machine."""
    if pid is None:
        user, nice, system, _, _, irq, softirq, *_ = map(int, Path("/proc/stat").read_text().split("\n")[0].split()[1:])
        return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def node_folder() -> Path:
    """Where node-llama-cpp is installed.

    Raises:
      BenchError: it is not; says how to.
    """
    folder = cache_dir() / "bench" / "node"
    if shutil.which("node") is None:
        raise BenchError("--peer llama.cpp needs Node.js 20 or newer, as `node` on the PATH")
    installed = folder / "node_modules" / "node-llama-cpp" / "package.json"
    if not installed.is_file() or json.loads(installed.read_text())["version"] != NODE_VERSION:
        machine = {"x86_64": "x64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
        raise BenchError(
            "--peer llama.cpp needs its prebuilt library (90 MB). Install it:\n"
            f"npm install --prefix {folder} --ignore-scripts --omit=optional "
            f"node-llama-cpp@{NODE_VERSION} @node-llama-cpp/linux-{machine}@{NODE_VERSION}"
        )
    return folder


def engine_command(engine: str, folder: Path, args: argparse.Namespace) -> list[str]:
    """The command line of an engine's process; writes what it needs on disk."""
    here = Path(__file__).parent
    if engine == LLAMA:
        install = node_folder()
        file = gguf_of(folder, GGUF_KINDS[args.weights or args.dtype])
        return ["node", str(here / "bench_llama.mjs"), str(install), str(file), str(args.threads)]
    settings = {"engine": engine, "folder": str(folder), "dtype": args.dtype, "threads": args.threads}
    settings["weights"] = None if engine == TRANSFORMERS else args.weights
    if engine == BESIDE:
        here, settings["engine"] = args.beside / "scripts", OURS
    return [sys.executable, str(here / "bench_peers.py"), json.dumps(settings)]


def token_ids(folder: Path, config: ModelConfig, count: int) -> list[int]:
    """Real text, repeated; random ids for a model without a tokenizer."""
    try:
        ids = load_tokenizer(folder, config).encode(TEXT, add_special_tokens=False)
    except TokenizerError:
        ids = np.random.default_rng(0).integers(0, config.vocab_size, count).tolist()
    return (ids * (count // len(ids) + 1))[:count]


def plan(args: argparse.Namespace, config: ModelConfig, ids: list[int]) -> dict[str, dict[str, Any]]:
    """What is measured -> the command for it; what does not fit into the model's context is left out."""
    prompts = [ids[i * args.prompt : (i + 1) * args.prompt] for i in range(max(args.batch))]
    prefills = {f"prefill {n}": {"do": "prefill", "prompts": [ids[:n]]} for n in args.prefill}
    decodes = {f"decode, batch {n}": {"do": "decode", "prompts": prompts[:n], "new": args.new} for n in args.batch}
    room = config.max_position_embeddings
    commands = prefills | decodes
    return {what: c for what, c in commands.items() if len(c["prompts"][0]) + c.get("new", 0) + 1 <= room}


def measure(
    start: dict[str, Callable[[], Worker]],
    commands: dict[str, dict[str, Any]],
    rounds: int,
    one_at_a_time: bool,
    say: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Every sample, in the order taken; round 0 is the warm-up."""
    samples: list[dict[str, Any]] = []

    def add(number: int, what: str, engine: str, answer: dict[str, Any]) -> None:
        samples.append({"round": number, "what": what, "engine": engine} | answer)

    def sample(number: int, what: str, worker: Worker) -> None:
        say(f"{f'round {number}' if number else 'warm-up'}: {what}: {worker.engine}")
        answer = worker.ask(commands[what])
        if number and answer["seconds"] <= 0:
            raise BenchError(f"{worker.engine}: {what} is lost in the noise; raise --new")
        add(number, what, worker.engine, answer)

    def load(number: int, engine: str) -> Worker:
        say(f"{f'round {number}' if number else 'warm-up'}: load: {engine}")
        worker = start[engine]()
        add(number, "load", engine, worker.load)
        return worker

    if one_at_a_time:
        for number in range(1, rounds + 1):
            for engine in start:
                with load(number, engine) as worker:
                    for what in commands:
                        sample(0, what, worker)
                        sample(number, what, worker)
        return samples
    with contextlib.ExitStack() as stack:
        workers = [stack.enter_context(load(0, engine)) for engine in start]
        for what in commands:
            for worker in workers:
                sample(0, what, worker)
        for number in range(1, rounds + 1):
            for engine in start:
                with load(number, engine):
                    pass
            for what in commands:
                for worker in workers:
                    sample(number, what, worker)
    return samples


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options, checked."""
    cores = len(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])

    def positive(text: str) -> int:
        if (number := int(text)) < 1:
            raise ValueError
        return number

    positive.__name__ = "positive number"
    parser.add_argument("--model", required=True, help='a Hugging Face folder, "demo" or "random-3b" (writes 6.15 GB)')
    parser.add_argument("--peer", action="append", default=[], choices=[TRANSFORMERS, LLAMA], help="may be repeated")
    parser.add_argument("--beside", type=Path, metavar="TREE", help="another checkout of this repository")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--weights", choices=["int8"], help="quantize the weights (default: they are of --dtype)")
    parser.add_argument("--rounds", type=positive, default=3)
    parser.add_argument("--prefill", type=positive, nargs="+", default=[128, 512, 2048], metavar="TOKENS")
    parser.add_argument(
        "--batch", type=positive, nargs="+", default=[1, 8], metavar="ROWS", help="decode's batch sizes"
    )
    parser.add_argument("--prompt", type=positive, default=32, help="decode's prompt (default: 32 tokens)")
    parser.add_argument("--new", type=positive, default=64, help="decode's new tokens (default: 64)")
    parser.add_argument("--threads", type=positive, default=cores, help=f"at most the {cores} cores there are")
    parser.add_argument(
        "--one-at-a-time", action="store_true", help="keep one engine in memory: for models that fill it; takes longer"
    )
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="all samples, and a chart in FILE.png")
    args = parser.parse_args(argv)
    args.peer = list(dict.fromkeys(args.peer))
    if args.beside and not (args.beside / "scripts" / "bench_peers.py").is_file():
        parser.error(f"--beside: {args.beside} is no checkout with scripts/bench_peers.py")
    if args.threads > cores:
        parser.error(f"--threads is {args.threads}, but there are {cores} cores")
    if args.out and args.out.suffix != ".json":
        parser.error(f"--out is {args.out}; it must end in .json (the chart goes to the same name in .png)")
    if args.out and not args.out.absolute().parent.is_dir():
        parser.error(f"--out: the folder {args.out.absolute().parent} does not exist")
    if args.model not in ("demo", "random-3b") and not (Path(args.model) / "config.json").is_file():
        parser.error(f'--model: {args.model} is no folder with a config.json, nor "demo" or "random-3b"')
    return args


def _environment(root: str, threads: int) -> dict[str, str]:
    """The environment of the engines' processes: the CPU alone, with this many threads."""
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": str(threads),
        "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")])),
    }


def run(args: argparse.Namespace) -> None:
    """Measures, prints and writes."""
    console = Console(stderr=True)

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    engines = [OURS, *args.peer, *([BESIDE] if args.beside else [])]
    if LLAMA in engines:
        node_folder()
    if args.out and importlib.util.find_spec("matplotlib") is None:
        say(f"no chart: matplotlib is missing; {how_to_install('bench')}")
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])  # the engines inherit it
    root = str(Path(__file__).resolve().parents[1])
    environment = _environment(root, args.threads)
    folder = {"demo": pull_demo, "random-3b": random_3b}.get(args.model, lambda: Path(args.model))()
    config = ModelConfig.from_hf(folder)
    ids = token_ids(folder, config, max(*args.prefill, max(args.batch) * args.prompt))
    commands = plan(args, config, ids)
    start = {}
    for engine in engines:
        command = engine_command(engine, folder, args)
        own = _environment(str(args.beside.resolve()), args.threads) if engine == BESIDE else environment
        start[engine] = lambda engine=engine, command=command, own=own: Worker(engine, command, own)
    samples = measure(start, commands, args.rounds, args.one_at_a_time, say)

    weights = {
        OURS: args.weights or args.dtype,
        BESIDE: args.weights or args.dtype,
        TRANSFORMERS: args.dtype,
        LLAMA: GGUF_KINDS[args.weights or args.dtype],
    }
    labels = {engine: f"{engine} {weights[engine]}" for engine in engines}
    rows = summarize(samples, commands)
    Console().print(table(rows, labels))
    same = agreement(samples)
    for peer, count in same.items():
        say(f"greedy tokens that {peer} has in common with {OURS} before they part: {count}")
    others = statistics.median(sample["others"] for sample in samples if sample["round"])
    if others > BUSY:
        say(f"other processes used {others:.0%} of the cores meanwhile (median): measure again on a quiet machine")
    if args.out:
        commit = subprocess.run(["git", "-C", root, "describe", "--always", "--dirty"], capture_output=True, text=True)
        versions = {name: number for sample in samples for name, number in sample.get("versions", {}).items()}
        result = {
            "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "model": folder.resolve().name,
            "engines": labels,
            "machine": machine(args.threads),
            "versions": {OURS: commit.stdout.strip(), **versions},
            "tokens": {what: token_count(command) for what, command in commands.items()},
            "results": rows,
            "greedy_agreement": same,
            "others": others,
            "samples": [{k: v for k, v in sample.items() if k not in ("tokens", "versions")} for sample in samples],
        }
        save(result, args.out)


def main(argv: Sequence[str] | None = None) -> int:
    if sys.platform != "linux":
        print("bench_inference.py needs Linux: it reads /proc", file=sys.stderr)
        return 3
    args = parse(argv)
    try:
        run(args)
    except (BenchError, SmolLM3Error) as error:
        print(f"bench_inference.py: {error}", file=sys.stderr)
        return getattr(error, "exit_code", 3)
    except KeyboardInterrupt:
        print("bench_inference.py: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
