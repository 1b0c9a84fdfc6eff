"""What the soaks of training and of the server share: processes, small disks, a clock that jumps, what was found."""

import contextlib
import dataclasses
import http.client
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import smollm3_jax
from smollm3_jax.files import carry, locked, write

RECIPES = Path(smollm3_jax.__path__[0]) / "train" / "recipes"
ROOT = Path(__file__).resolve().parents[2]
Fault = dict[str, Any]  # "kind", and what was drawn for it
# What runs in each process before all else. The clock and the speed of the data are those of two files, if they are
# there: seconds that the clock is off by, and seconds that a read of the corpus takes.
CONDITIONS = """
import builtins, os, time

folder, own_open, own_time, own_time_ns = os.environ["SMOLLM3_SOAK_CONDITIONS"], open, time.time, time.time_ns

def told(name):
    try:
        with own_open(folder + "/" + name) as file:
            return float(file.read() or 0)
    except (OSError, ValueError):
        return 0.0

def slow_open(file, *args, **options):
    if str(file).endswith("soaked.jsonl") and (seconds := told("slow")):
        time.sleep(seconds)
    return own_open(file, *args, **options)

builtins.open = slow_open
time.time = lambda: own_time() + told("clock")
time.time_ns = lambda: own_time_ns() + int(told("clock")) * 10**9
"""
CONFIG = {
    "model_type": "smollm3",
    "architectures": ["SmolLM3ForCausalLM"],
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "no_rope_layer_interval": 4,
}


@dataclasses.dataclass
class Disk:
    """A folder on a disk of its own, which can be filled; size 0: where all else lies, and is not filled."""

    folder: Path
    size: int  # bytes

    @classmethod
    def mounted(cls, folder: Path, size: int) -> "Disk":
        folder.mkdir(exist_ok=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", folder], check=True)
        return cls(folder, size)

    def __post_init__(self) -> None:
        self.folder.mkdir(exist_ok=True)

    @property
    def free(self) -> int:
        found = os.statvfs(self.folder)
        return found.f_bavail * found.f_frsize

    @contextlib.contextmanager
    def filled(self, but: int = 0) -> Iterator[None]:
        """Full, but for `but` bytes."""
        try:
            if self.size and (room := self.free - but) > 0:
                with log_file(self.folder / "filler") as file:
                    os.posix_fallocate(file, 0, room)
            yield
        finally:
            (self.folder / "filler").unlink(missing_ok=True)


@dataclasses.dataclass
class Soak:
    """One soak: where it runs, and what was done and found so far.

    until: on time.monotonic's clock. done: a fault each, with "kind", "seconds" and how many "findings". measured: name
    -> what is worth a line in the report.
    """

    out: Path
    model: str
    disk: Disk
    logs: Disk
    until: float
    say: Callable[[str], None]
    done: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    findings: list[str] = dataclasses.field(default_factory=list)
    measured: dict[str, Any] = dataclasses.field(default_factory=dict)
    _started: list[subprocess.Popen] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        self.conditions = self.out / "conditions"
        self.conditions.mkdir(exist_ok=True)
        write(self.conditions / "sitecustomize.py", CONDITIONS)

    @property
    def is_over(self) -> bool:
        return time.monotonic() > self.until

    def start(self, *words: str | Path, stdout: Any = subprocess.DEVNULL, stderr: Any) -> subprocess.Popen:
        """The command `smollm3` as a process of its own."""
        path = os.pathsep.join([str(self.conditions), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        variables = {
            "PYTHONPATH": path,
            "SMOLLM3_SOAK_CONDITIONS": str(self.conditions),
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        command = [sys.executable, "-m", "smollm3_jax", *map(str, words)]
        process = subprocess.Popen(command, env=os.environ | variables, stdout=stdout, stderr=stderr)
        self._started = [x for x in self._started if x.poll() is None] + [process]
        return process

    @contextlib.contextmanager
    def condition(self, name: str, seconds: float) -> Iterator[None]:
        """Meanwhile the clock is off ("clock"), or each read of the corpus takes longer ("slow"), by `seconds`."""
        write(self.conditions / name, str(seconds))
        try:
            yield
        finally:
            (self.conditions / name).unlink()

    @contextlib.contextmanager
    def fault(self, fault: dict[str, Any]) -> Iterator[None]:
        """Counts it, with what is found meanwhile."""
        begin, before = time.monotonic(), len(self.findings)
        try:
            yield
        except (OSError, http.client.HTTPException, ValueError) as error:  # of a server that does not answer
            self.found(f"{json.dumps(fault)}: {error!r}")
        finally:
            seconds, found = time.monotonic() - begin, len(self.findings) - before
            self.done.append({**fault, "seconds": round(seconds, 2), "findings": found})
            left = max(0.0, self.until - time.monotonic()) / 60
            what = json.dumps(fault)
            self.say(f"{len(self.done)}: {what}: {seconds:.1f} s, {found} findings; {left:.1f} minutes left")

    def found(self, what: str, *files: Path) -> None:
        """Notes what does not hold, with the files that show it."""
        number = len(self.findings)
        self.findings.append(what)
        self.say(f"FINDING {number}: {what}")
        for file in files:
            with contextlib.suppress(OSError):
                target = self.out / "findings" / str(number) / file.name
                target.parent.mkdir(parents=True, exist_ok=True)
                carry(file, target)

    def check(self, holds: bool, what: str, *files: Path) -> None:
        if not holds:
            self.found(what, *files)

    def end(self) -> None:
        """Ends what still runs."""
        for process in self._started:
            if process.poll() is None:
                process.send_signal(signal.SIGCONT)
                process.kill()
                process.wait()


@contextlib.contextmanager
def log_file(path: Path) -> Iterator[int]:
    """A descriptor of a new file."""
    path.unlink(missing_ok=True)
    descriptor = locked(path)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def wait_for(holds: Callable[[], Any], seconds: float, every: float = 0.005) -> bool:
    """Whether it holds within `seconds`. Looks are counted, not a clock's seconds: a frozen machine has not waited."""
    for _ in range(int(seconds / every)):
        if holds():
            return True
        time.sleep(every)
    return bool(holds())


def pause(process: subprocess.Popen, seconds: float) -> None:
    process.send_signal(signal.SIGSTOP)
    time.sleep(seconds)
    process.send_signal(signal.SIGCONT)


def no_reader() -> IO[bytes]:
    """The writing end of a pipe whose reader has left."""
    reader, writer = os.pipe()
    os.close(reader)
    return os.fdopen(writer, "wb")


def resident(pid: int) -> float:
    """MB of a process, 0 where it is gone."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096 / 1e6
    except (OSError, IndexError):
        return 0.0


def processor() -> str:
    found = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in found if line.startswith("model name")]
    return f"{len(names)} x {names[0] if names else 'unknown'}"


def small_model(folder: Path) -> Path:
    """A SmolLM3 of four layers, with random weights, and a tokenizer of bytes and the tags of chats."""
    from flax import nnx
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    from smollm3_jax import SmolLM3, save_pretrained
    from smollm3_jax.config import ModelConfig

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|im_end|>", "<|im_start|>"])
    own = CONFIG | {"vocab_size": len(letters) + 2, "eos_token_id": len(letters), "pad_token_id": len(letters)}
    save_pretrained(SmolLM3(ModelConfig.from_hf(own), rngs=nnx.Rngs(0)), folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    write(folder / "tokenizer_config.json", json.dumps({"eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}))
    write(folder / "chat_template.jinja", (RECIPES / "chatml.jinja").read_bytes())
    return folder
