"""Saving: whole or not at all, whatever happens in between; one writer at a time; conversions there and back."""

import errno
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors
from tiny import raw_config, tiny_checkpoint

import smollm3_jax
from smollm3_jax import files
from smollm3_jax.commands.main import main
from smollm3_jax.config import GenerationConfig, ModelConfig
from smollm3_jax.errors import OptionError, SaveError, SupportError
from smollm3_jax.weights import save
from smollm3_jax.weights.key_map import hf_tensors
from smollm3_jax.weights.load import open_checkpoint
from smollm3_jax.weights.stored import NUMPY_DTYPES, StoredTensor

ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "JAX_PLATFORMS": "cpu"}
INDEX = "model.safetensors.index.json"

RAW = raw_config("one_layer")
SHAPES = {name: slot.shape for name, slot in hf_tensors(ModelConfig.from_hf(RAW)).items()}


def write_version(folder: Path, version: int, shard_size: int | str = "20KB", read: Callable | None = None) -> None:
    """A model whose every weight, and a field of config.json, say which version it is."""
    config = ModelConfig.from_hf(RAW | {"version": version})

    def fill(shape: tuple[int, ...]) -> np.ndarray:
        return np.full(shape, version, np.float32)

    tensors = [StoredTensor(n, "float32", s, "", lambda s=s: (read or fill)(s)) for n, s in SHAPES.items()]
    save.write_folder(folder, config, GenerationConfig.from_hf({}, config), tensors, {}, shard_size, force=True)


def version_of(folder: Path) -> int:
    """The version that all of the folder is."""
    checkpoint = open_checkpoint(folder)
    version = json.loads(checkpoint.config.source)["version"]
    for tensor in checkpoint.tensors.values():
        np.testing.assert_array_equal(tensor.read(), version, err_msg=tensor.name)
    return version


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def contents(folder: Path) -> dict[str, tuple[str, list[int], bytes]]:
    pairs = [pair for path in folder.glob("*.safetensors") for pair in safetensors.deserialize(path.read_bytes())]
    return {name: (e["dtype"], e["shape"], bytes(e["data"])) for name, e in pairs}


@pytest.fixture(scope="module")
def hf(tmp_path_factory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("hf") / "tiny")


# X2: killed

# Forks a writer for every line on standard input, so that two dozen of them need only one start of Python.
WRITERS = """
import os, sys
from pathlib import Path
from test_save import write_version

for line in sys.stdin:
    folder, version = line.split()
    pid = os.fork()
    if not pid:
        version = int(version)
        while True:
            write_version(Path(folder), version)
            version += 1
    print(pid, flush=True)
    os.waitpid(pid, 0)
    print("dead", flush=True)
"""


@pytest.fixture
def python() -> Iterator[Callable[..., subprocess.Popen]]:
    """Starts Python on a script that may import this file; whatever still runs at the end is killed."""
    started = []

    def start(script: str, *arguments: Any, prefix: tuple[str, ...] = ()) -> subprocess.Popen:
        started.append(
            subprocess.Popen(
                [*prefix, sys.executable, "-c", script, *map(str, arguments)],
                env=ENVIRONMENT | {"PYTHONPATH": f"{ENVIRONMENT['PYTHONPATH']}:{Path(__file__).parent}"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.slow
def test_killed_at_any_moment(tmp_path, python):
    """The folder is the old version or the new one, whole; and what a dead writer left does not matter."""
    folder = tmp_path / "model"
    write_version(folder, 0)
    (folder / "notes.txt").write_text("not the model's")
    whole = names(folder)
    assert len([name for name in whole if name.endswith(".safetensors")]) > 5
    writers = python(WRITERS)
    moments = random.Random(0)
    versions, leftovers = [0], 0
    for _ in range(25):
        print(folder, versions[-1] + 1, file=writers.stdin, flush=True)
        pid = int(writers.stdout.readline())
        # A save takes some 50 ms with a slow disk's fsyncs, and 5 without.
        delay = moments.choice([0.01, 0.05, 0.2]) * moments.random()
        with pytest.raises(subprocess.TimeoutExpired):
            writers.wait(delay)
        os.kill(pid, 9)
        assert writers.stdout.readline() == "dead\n"
        assert names(folder) == whole
        versions.append(version_of(folder))
        leftovers += len(names(tmp_path)) > 1
    assert versions == sorted(versions) and versions[-1] > 0
    assert leftovers >= 5, "hardly a kill came in the middle of a save: the test shows nothing"
    write_version(folder, 10**6)
    assert version_of(folder) == 10**6 and names(folder) == whole
    assert names(tmp_path) == {"model"}


def test_everything_is_on_the_disk_before_it_is_in_place(tmp_path, monkeypatch):
    """Against power cuts: all files and their folder are synced before the exchange, and its parent after."""
    synced: list[int] = []
    real_sync, real_swap = os.fsync, files._swap
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(os.fstat(fd).st_ino), real_sync(fd)))

    def swap(new: Path, folder: Path) -> None:
        missing = {path.name for path in [new, *new.iterdir()] if path.stat().st_ino not in synced}
        assert not missing - {"old.txt"}
        synced.clear()
        real_swap(new, folder)

    monkeypatch.setattr(files, "_swap", swap)
    for version in (1, 2):
        write_version(tmp_path / "model", version)
        assert synced == [tmp_path.stat().st_ino]
        (tmp_path / "model" / "old.txt").write_text("a hard link to what is there already")


@pytest.fixture
def no_exchange(monkeypatch):
    """A system, or a network file system, that cannot exchange two folders."""
    monkeypatch.setattr(files.ctypes, "CDLL", lambda *_, **__: object())


def test_without_exchange(tmp_path, no_exchange):
    for version in (1, 2, 3):
        write_version(tmp_path / "model", version)
        assert version_of(tmp_path / "model") == version
        assert names(tmp_path) == {"model"}


def test_killed_without_exchange(tmp_path, no_exchange, monkeypatch):
    """Between two renames: the next save finds its way back, and so does the one after that."""
    folder = tmp_path / "model"
    write_version(folder, 1)
    (folder / "notes.txt").write_text("not the model's")
    real = os.rename
    for survived in (1, 2):
        calls = iter(range(9))

        def rename(source, target, survived=survived, calls=calls):
            if next(calls) == survived:
                raise SystemExit("killed")
            real(source, target)

        with monkeypatch.context() as patch, pytest.raises(SystemExit):
            patch.setattr(os, "rename", rename)
            patch.setattr(shutil, "rmtree", lambda *_, **__: None)  # a killed process tidies nothing up
            write_version(folder, 2)
        for version in (3, 4):
            write_version(folder, version)
            assert version_of(folder) == version
            assert names(tmp_path) == {"model"} and (folder / "notes.txt").exists()


def test_failed_without_exchange(tmp_path, no_exchange, monkeypatch):
    folder = tmp_path / "model"
    write_version(folder, 1)
    real = os.rename
    calls = iter(range(9))

    def rename(source, target):
        if next(calls) == 1:
            raise OSError(errno.EIO, "Input/output error")
        real(source, target)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(SaveError, match="nothing was changed"):
        write_version(folder, 2)
    assert version_of(folder) == 1 and names(tmp_path) == {"model"}


# X3: the disk

FULL_DISK = """
import contextlib, io, json, os, resource, subprocess, sys
from pathlib import Path
from smollm3_jax.commands.main import main

source, out, limit, remount, more = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5:]
report = []
def convert():
    stderr = io.StringIO()
    with contextlib.redirect_stderr(stderr):
        code = main(["convert", source, str(out), "--force", *more])
    content = {path.name: len(path.read_bytes()) for path in out.iterdir()} if out.exists() else None
    report.append([code, stderr.getvalue(), content, sorted(path.name for path in out.parent.iterdir())])
convert()
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
if remount:
    subprocess.run(["mount", "-o", "remount,ro", str(out.parent)], check=True)
convert()
print(json.dumps(report))
"""


def check_failed_twin(report: list[list[Any]], *fragments: str) -> None:
    """The first conversion worked, the second failed, and the folder and its surroundings are as after the first."""
    (first, first_err, content, siblings), (second, err, content_after, siblings_after) = report
    assert first == 0, first_err
    assert second == 3
    assert err.startswith("smollm3: ") and err.count("\n") == 1 and "Traceback" not in err
    for fragment in ("could not be written", "nothing was changed", *fragments):
        assert fragment in err
    assert content_after == content and siblings_after == siblings


@pytest.mark.slow
@pytest.mark.parametrize("case", ["full", "read_only"])
def test_full_or_read_only_disk(case, hf, tmp_path, python):
    """A real file system: a small one in memory, in a mount namespace of its own."""
    unshare = shutil.which("unshare")
    if unshare is None or subprocess.run([unshare, "-rm", "true"], capture_output=True).returncode:
        pytest.skip("no mount namespaces here")
    disk = tmp_path / "disk"
    disk.mkdir()
    size = "900k" if case == "full" else "9m"  # the model takes 500 KB
    mount = f'mount -t tmpfs -o size={size} none "$0" && exec "$@"'
    prefix = (unshare, "-rm", "sh", "-c", mount, str(disk))
    process = python(FULL_DISK, hf, disk / "out", 0, "ro" if case == "read_only" else "", prefix=prefix)
    out, err = process.communicate()
    assert process.returncode == 0, err
    reason = "No space left on device" if case == "full" else "Read-only file system"
    check_failed_twin(json.loads(out.splitlines()[-1]), str(disk / "out"), reason)


@pytest.mark.slow
@pytest.mark.parametrize("format", ["safetensors", pytest.param("torch", marks=pytest.mark.torch)])
def test_file_size_limit(format, hf, tmp_path, python):
    """What a quota looks like to a writer."""
    if format == "torch":
        pytest.importorskip("torch")
    (tmp_path / "x").mkdir()
    # Torch's file is larger than the one that it is made of, and the limit lies between the two.
    limit = 100_000 if format == "safetensors" else (hf / "model.safetensors").stat().st_size + 2000
    process = python(FULL_DISK, hf, tmp_path / "x" / "out", limit, "", "--format", format)
    out, err = process.communicate()
    assert process.returncode == 0, err
    check_failed_twin(
        json.loads(out.splitlines()[-1]),
        str(tmp_path / "x" / "out"),
        *(["File too large"] if format != "torch" else []),
    )


class Counted:
    """Counts steps, and fails at the one that is asked for and all after it."""

    def __init__(self):
        self.steps, self.fail_at = 0, sys.maxsize

    def __call__(self) -> None:
        self.steps += 1
        if self.steps >= self.fail_at:
            raise OSError(errno.EIO, "Input/output error")


class Broken:
    """A file open for writing, on a disk that counts."""

    def __init__(self, file: Any, step: Counted):
        self.file, self.step = file, step

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def write(self, content) -> int:
        self.step()
        return self.file.write(content)


def tree(folder: Path) -> dict[Path, bytes | None]:
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.mark.parametrize("where", ["write", "sync"])
@pytest.mark.parametrize("target", ["model", "new", "deep/down/new"])
def test_io_error_at_every_step(where, target, tmp_path, monkeypatch):
    """Nothing is left behind, neither beside the old version nor where there was nothing."""
    step = Counted()
    sync = os.fsync
    if where == "write":

        def open_broken(*args, **more):
            return Broken(open(*args, **more), step)

        monkeypatch.setattr(files, "open", open_broken, raising=False)
    else:
        monkeypatch.setattr(os, "fsync", lambda fd: (step(), sync(fd)))
    base = tmp_path / "base"
    write_version(base / "model", 1)
    (base / "model" / "notes.txt").write_text("not the model's")
    before = tree(base)
    step.steps = 0
    write_version(tmp_path / "counted", 2)
    # The last sync is that of the parent, when the new version is in its place.
    total = step.steps - (where == "sync")
    assert total > 8
    for step.fail_at in range(1, total + 1):
        step.steps = 0
        message = f"{base / target} could not be written: Input/output error; nothing was changed"
        with pytest.raises(SaveError, match=message):
            write_version(base / target, 2)
        assert tree(base) == before, f"step {step.fail_at} of {total}"
    step.fail_at = sys.maxsize
    write_version(base / target, 3)
    assert version_of(base / target) == 3


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, MemoryError])
def test_interrupted(interrupt, tmp_path):
    write_version(tmp_path / "model", 1)
    reads = iter(range(99))

    def read(shape):
        if next(reads) == 5:
            raise interrupt
        return np.zeros(shape, np.float32)

    with pytest.raises(interrupt):
        write_version(tmp_path / "model", 2, read=read)
    assert version_of(tmp_path / "model") == 1 and names(tmp_path) == {"model"}


def test_target_that_cannot_be(hf, tmp_path, capsys):
    (tmp_path / "file").write_text("a file")
    before = tree(tmp_path)
    for target in (tmp_path / "file", tmp_path / "file" / "under", tmp_path / "file" / "deep" / "under"):
        assert main(["convert", str(hf), str(target)]) == 3
        err = capsys.readouterr().err
        assert str(target) in err and err.count("\n") == 1 and "Traceback" not in err
        assert "is a file" in err or "Not a directory" in err or "File exists" in err
        assert tree(tmp_path) == before


@pytest.mark.parametrize("target", [".", "..", "../..", "../../../cwd"])
def test_current_directory(target, hf, tmp_path, capsys, monkeypatch):
    """To replace it, or what it lies in, would leave the user's shell in a folder that is gone."""
    (tmp_path / "cwd" / "deep" / "deeper").mkdir(parents=True)
    (tmp_path / "cwd" / "mine.txt").write_text("mine")
    monkeypatch.chdir(tmp_path / "cwd" / "deep" / "deeper")
    before = tree(tmp_path)
    assert main(["convert", str(hf), target]) == 2
    assert "current directory" in capsys.readouterr().err
    assert tree(tmp_path) == before


# X6: two writers

HOLDER = """
import sys
from pathlib import Path
import numpy as np
from test_save import write_version

def read(shape):
    global said
    if not said:
        print("writing", flush=True)
        said = sys.stdin.readline()
    return np.full(shape, 2, np.float32)

said = ""
write_version(Path(sys.argv[1]), 2, read=read)
print("done", flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("end", ["finishes", "is killed"])
def test_second_writer_is_refused(end, hf, tmp_path, capsys, python):
    folder = tmp_path / "model"
    write_version(folder, 1)
    holder = python(HOLDER, folder)
    assert holder.stdout.readline() == "writing\n", holder.stderr.read()
    with pytest.raises(SaveError, match=f"{folder} is being written by another process"):
        write_version(folder, 3)
    assert main(["convert", str(hf), str(folder), "--force"]) == 3
    assert f"{folder} is being written by another process; wait" in capsys.readouterr().err
    assert version_of(folder) == 1
    write_version(tmp_path / "neighbour", 4)  # the lock is the folder's own
    if end == "finishes":
        print("go on", file=holder.stdin, flush=True)
        assert holder.stdout.readline() == "done\n", holder.stderr.read()
        assert version_of(folder) == 2
    else:
        holder.kill()
        holder.wait()
        assert version_of(folder) == 1
    write_version(folder, 5)
    assert version_of(folder) == 5 and names(tmp_path) == {"model", "neighbour"}


@pytest.mark.parametrize("moment", range(4))
def test_second_writer_while_the_first_tidies_up(moment, tmp_path, monkeypatch):
    """The old version is removed under the name that the next writer uses: neither may touch the other's files."""
    folder = tmp_path / "model"
    write_version(folder, 1)
    unlink, calls, refused = os.unlink, iter(range(999)), []

    def unlink_later(path, *args, dir_fd=None):
        # Of the old version, since that is what is deleted by folder and name; not of a nested save.
        if dir_fd is not None and next(calls) == moment:
            try:
                write_version(folder, 3)
            except SaveError as error:
                refused.append(str(error))
        unlink(path, *args, dir_fd=dir_fd)

    monkeypatch.setattr(os, "unlink", unlink_later)
    write_version(folder, 2)
    assert next(calls) > moment, "the removal has changed: this test shows nothing"
    assert all("is being written by another process" in message for message in refused)
    assert version_of(folder) == (2 if refused else 3)
    assert names(tmp_path) == {"model"}


def test_first_writer_finishes_just_before_the_lock(tmp_path, monkeypatch):
    """What is locked then is the new model in its place, not an empty folder beside it."""
    folder, flock, calls = tmp_path / "model", files.fcntl.flock, iter(range(99))
    write_version(folder, 1)

    def flock_later(*arguments):
        if next(calls) == 0:
            write_version(folder, 3)
        flock(*arguments)

    monkeypatch.setattr(files.fcntl, "flock", flock_later)
    with pytest.raises(SaveError, match="is being written by another process"):
        write_version(folder, 2)
    assert version_of(folder) == 3 and names(tmp_path) == {"model"}


# What is written


def test_convert_in_place(tmp_path):
    """W21: what was mapped before stays readable, as it was."""
    folder = tiny_checkpoint(tmp_path / "model")
    mapped = {name: tensor.read() for name, tensor in open_checkpoint(folder).tensors.items()}
    wanted = contents(folder)
    assert main(["convert", str(folder), str(folder), "--force", "--max-shard-size", "100KB"]) == 0
    assert contents(folder) == wanted and "model.safetensors" not in names(folder)
    assert main(["convert", str(folder), str(folder), "--force", "--dtype", "bfloat16"]) == 0
    assert names(folder) == {"README.md", "config.json", "model.safetensors"} and names(tmp_path) == {"model"}
    for name, (tag, _, data) in contents(folder).items():
        assert mapped[name].tobytes() == wanted[name][2]
        assert (tag, data) == ("BF16", mapped[name].astype(ml_dtypes.bfloat16).tobytes())


def test_save_over_what_was_loaded(tmp_path):
    folder = tiny_checkpoint(tmp_path / "model", dtype="bfloat16")
    wanted = contents(folder)
    model = smollm3_jax.from_pretrained(folder)
    for size in ("100KB", "5GB"):
        smollm3_jax.save_pretrained(model, folder, size)
        assert contents(folder) == wanted


@pytest.mark.torch
@pytest.mark.parametrize("dtype", NUMPY_DTYPES)
def test_to_torch_and_back(dtype, tmp_path):
    torch = pytest.importorskip("torch")
    original = tiny_checkpoint(tmp_path / "hf", "untied", dtype=dtype)
    wanted = contents(original)
    for size, wanted_files in (("5GB", {"pytorch_model.bin"}), ("70KB", None)):
        folder = tmp_path / f"torch-{size}"
        arguments = ["--format", "torch", "--max-shard-size", size]
        assert main(["convert", str(original), str(folder), *arguments]) == 0
        if wanted_files is None:
            index = json.loads((folder / "pytorch_model.bin.index.json").read_bytes())
            wanted_files = set(index["weight_map"].values()) | {"pytorch_model.bin.index.json"}
            assert len(wanted_files) > 3 and index["weight_map"].keys() == wanted.keys()
            assert index["metadata"]["total_size"] == sum(len(data) for _, _, data in wanted.values())
        assert names(folder) == wanted_files | {"README.md", "config.json"}
        state = {}
        for path in folder.glob("*.bin"):
            state |= torch.load(path, weights_only=True)
        assert {name: str(tensor.dtype) for name, tensor in state.items()} == dict.fromkeys(wanted, f"torch.{dtype}")
        assert main(["convert", str(folder), str(tmp_path / f"back-{size}")]) == 0
        assert contents(tmp_path / f"back-{size}") == wanted
    # In place there and back: what belongs to the other format goes.
    for format, suffix in (("torch", ".bin"), ("safetensors", ".safetensors")):
        arguments = ["--force", "--format", format, "--max-shard-size", "70KB"]
        assert main(["convert", str(original), str(original), *arguments]) == 0
        assert {path.suffix for path in original.iterdir()} == {".json", ".md", suffix}
    assert contents(original) == wanted


@pytest.mark.torch
def test_save_pretrained_as_torch(hf, tmp_path):
    torch = pytest.importorskip("torch")
    smollm3_jax.save_pretrained(smollm3_jax.from_pretrained(hf), tmp_path / "out", format="torch")
    state = torch.load(tmp_path / "out" / "pytorch_model.bin", weights_only=True)
    assert {name: tensor.numpy().tobytes() for name, tensor in state.items()} == {
        name: data for name, (_, _, data) in contents(hf).items()
    }


@pytest.mark.torch
def test_odd_weight_names_do_not_survive_beside_torch_files(tmp_path):
    """Shards may be called anything in an index; left behind, they would pass for the weights of the folder."""
    pytest.importorskip("torch")
    folder = tiny_checkpoint(tmp_path / "model")
    wanted = contents(folder)
    (folder / "model.safetensors").rename(folder / "weights-a.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(wanted, "weights-a.safetensors")}))
    assert main(["convert", str(folder), str(folder), "--format", "torch", "--force"]) == 0
    assert names(folder) == {"README.md", "config.json", "pytorch_model.bin"}
    assert main(["convert", str(folder), str(tmp_path / "back")]) == 0
    assert contents(tmp_path / "back") == wanted


def test_torch_format_without_torch(hf, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert main(["convert", str(hf), str(tmp_path / "out"), "--format", "torch"]) == 3
    assert "PyTorch files need torch: pip install" in capsys.readouterr().err
    with pytest.raises(SupportError, match="PyTorch files need torch"):
        smollm3_jax.save_pretrained(smollm3_jax.from_pretrained(hf), tmp_path / "out", format="torch")
    assert names(tmp_path) == set()


@pytest.mark.parametrize("source", NUMPY_DTYPES)
@pytest.mark.parametrize("target", NUMPY_DTYPES)
def test_dtype_casts(source, target, tmp_path):
    """Rounded to nearest, as torch does; and config.json says the dtype in both spellings."""
    original = tiny_checkpoint(tmp_path / "hf", "one_layer", dtype=source)
    assert main(["convert", str(original), str(tmp_path / "out"), "--dtype", target]) == 0
    before = open_checkpoint(original).tensors
    for name, tensor in open_checkpoint(tmp_path / "out").tensors.items():
        wanted = before[name].read().astype(NUMPY_DTYPES[target])
        assert tensor.dtype == target and tensor.read().tobytes() == wanted.tobytes()
    config = json.loads((tmp_path / "out" / "config.json").read_bytes())
    assert config["torch_dtype"] == config["dtype"] == target


BAD_SIZES = ["0", "-1", "", "GB", "5 parsecs", "1e9", "1.5.2GB", "0.1B", "nan", "inf", "5GB5", "0x10", "9" * 400]


@pytest.mark.parametrize("size", BAD_SIZES)
def test_bad_shard_sizes(size, hf, tmp_path, capsys):
    assert main(["convert", str(hf), str(tmp_path / "out"), f"--max-shard-size={size}"]) == 2
    err = capsys.readouterr().err
    assert "is not a shard size" in err and "5GB" in err and err.count("\n") == 1
    assert names(tmp_path) == set()


def test_sizes():
    sizes = {"5GB": 5 * 10**9, "500MB": 5 * 10**8, "2GiB": 2**31, "1.5 kb": 1500, " 7 ": 7, "3TiB": 3 * 2**40, 12: 12}
    assert {size: save.parse_size(size) for size in sizes} == sizes


def test_bad_options(hf, tmp_path, capsys):
    for options in (["--format", "gguf"], ["--dtype", "int8"]):
        with pytest.raises(SystemExit) as caught:
            main(["convert", str(hf), str(tmp_path / "out"), *options])
        assert caught.value.code == 2 and options[1] in capsys.readouterr().err
    model = smollm3_jax.from_pretrained(hf)
    with pytest.raises(OptionError, match="format is 'gguf'; choose one of safetensors, torch"):
        smollm3_jax.save_pretrained(model, tmp_path / "out", format="gguf")
    with pytest.raises(OptionError, match="dtype 'int8' is not supported"):
        smollm3_jax.convert(hf, tmp_path / "out", dtype="int8")
    assert names(tmp_path) == set()


def test_other_files_are_kept(hf, tmp_path):
    """Also folders, links and a tokenizer; the old model's own files go."""
    folder = tmp_path / "model"
    smollm3_jax.convert(hf, folder, max_shard_size="100KB")
    assert INDEX in names(folder)
    others = {"README.md": "read me", "tokenizer.json": "{}", "eval/deep/results.txt": "42", ".gitattributes": "x"}
    for name, text in others.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    (folder / "link").symlink_to("eval/deep")
    (folder / "dangling").symlink_to("../nowhere")
    (folder / "generation_config.json").write_text('{"top_k": 3}')
    smollm3_jax.save_pretrained(smollm3_jax.from_pretrained(hf), folder)
    kept = {name.split("/")[0] for name in others} | {"link", "dangling"}
    assert names(folder) == kept | {"config.json", "model.safetensors"}
    assert {name: (folder / name).read_text() for name in others} == others
    assert os.readlink(folder / "dangling") == "../nowhere" and (folder / "link" / "results.txt").read_text() == "42"


def test_conversion_takes_the_text_files_along(hf, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(hf, source)
    texts = {"tokenizer_config.json": '{"a": "ä"}', "chat_template.jinja": "{{ messages }}\r\n", "merges.txt": "a b"}
    for name, text in texts.items():
        (source / name).write_bytes(text.encode())
    (source / "generation_config.json").write_text('{"top_k": 3, "eos_token_id": [2, 5], "unknown": null}')
    (source / "training_log.txt").write_text("not part of a model")
    smollm3_jax.convert(source, tmp_path / "out")
    own = {"README.md", "config.json", "generation_config.json", "model.safetensors"}
    assert names(tmp_path / "out") == {*texts, *own}
    assert {name: (tmp_path / "out" / name).read_bytes().decode() for name in texts} == texts
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_bytes())
    assert generation == {"top_k": 3, "eos_token_id": [2, 5], "unknown": None}


TEXTS = {
    "tokenizer.model": b"\x00sentencepiece",
    "vocab.txt": b"a",
    "chat_template.jinja": b"{{ messages }}\r\n",
    "additional_chat_templates/tool_use.jinja": b"{{ tools }}",
    "LICENSE": b"Apache-2.0",
    "NOTICE.txt": b"...",
}


def with_texts(folder: Path, hf: Path, texts: dict[str, bytes] = TEXTS) -> Path:
    shutil.copytree(hf, folder)
    for name, content in texts.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def test_what_does_not_come_along_is_named(hf, tmp_path, caplog):
    """Tokenizers of other kinds, further templates and licences do; the rest is the user's to copy."""
    source = with_texts(
        tmp_path / "source", hf, TEXTS | {"README.md": b"x", "eval/x.txt": b"x", ".gitattributes": b"x"}
    )
    caplog.set_level("INFO", "smollm3_jax")
    smollm3_jax.convert(source, tmp_path / "out")
    assert {str(path.relative_to(tmp_path / "out")): content for path, content in tree(tmp_path / "out").items()} == {
        **TEXTS,
        "additional_chat_templates": None,
        **{name: (tmp_path / "out" / name).read_bytes() for name in ("README.md", "config.json", "model.safetensors")},
    }
    assert [record.getMessage() for record in caplog.records if "not copied" in record.getMessage()] == [
        f"{source}: no part of the model, so not copied: README.md, eval/"
    ]
    smollm3_jax.convert(source, source, force=True)  # here nothing is left behind
    assert {"README.md", "eval", ".gitattributes", *(name.split("/")[0] for name in TEXTS)} <= names(source)
    assert len([record for record in caplog.records if "not copied" in record.getMessage()]) == 1


def test_the_old_model_goes_wholly(hf, tmp_path):
    """A template of its that the new one has not would win over the new one's; the user's own files stay."""
    folder = with_texts(tmp_path / "out", hf, TEXTS | {"README.md": b"mine", "generation_config.json": b"{}"})
    (folder / "model.safetensors").rename(folder / "odd-name.safetensors")
    index = dict.fromkeys(contents(folder), "odd-name.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": index}))
    assert main(["convert", str(hf), str(folder), "--force"]) == 0
    assert names(folder) == {"config.json", "model.safetensors", "README.md"}
    assert (folder / "README.md").read_bytes() == b"mine"


@pytest.mark.parametrize("mode", [0o700, 0o2770])
def test_modes_are_kept(mode, hf, tmp_path):
    folder = tmp_path / "out"
    shutil.copytree(hf, folder)
    (folder / "README.md").write_text("mine")
    for path in folder.iterdir():
        path.chmod(0o600)
    folder.chmod(mode)
    assert main(["convert", str(hf), str(folder), "--force", "--max-shard-size", "100KB"]) == 0
    assert folder.stat().st_mode & 0o7777 == mode
    assert {path.stat().st_mode & 0o7777 for path in folder.iterdir()} == {0o600} and len(names(folder)) > 5


COMMANDS = [["convert"], ["quantize", "--weights", "int8"]]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda words: words[0])
@pytest.mark.parametrize("target", ["itself", "by a link", "another model", "a folder with a file", "a link to one"])
def test_what_is_there_is_not_overwritten(command, target, hf, tmp_path, capsys):
    """The only copy of a model among it; --force does, and keeps what is not a model's."""
    source, folder = tmp_path / "model", tmp_path / "folder"
    shutil.copytree(hf, source)
    (source / "notes.txt").write_text("mine")
    match target:
        case "itself":
            folder = source
        case "by a link":
            folder.symlink_to("model")
        case "another model":
            shutil.copytree(source, folder)
        case "a folder with a file":
            folder.mkdir()
            (folder / "notes.txt").write_text("mine")
        case "a link to one":
            (tmp_path / "other").mkdir()
            (tmp_path / "other" / "notes.txt").write_text("mine")
            folder.symlink_to("other")
    before = tree(tmp_path)
    assert main([*command, str(source), str(folder)]) == 2
    err = capsys.readouterr().err
    assert "is there already" in err and "--force" in err and err.count("\n") == 1
    assert tree(tmp_path) == before
    assert main([*command, str(source), str(folder), "--force"]) == 0
    assert names(folder) == {"README.md", "config.json", "model.safetensors", "notes.txt"}


def test_an_empty_folder_may_be_there(hf, tmp_path):
    (tmp_path / "out").mkdir(mode=0o700)
    assert main(["convert", str(hf), str(tmp_path / "out")]) == 0
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o700


FILES = [(command, name) for command in COMMANDS for name in ("m.safetensors", "pytorch_model.bin", "m.pt", "m.pth")]
FILES += [(COMMANDS[1], name) for name in ("out.gguf", "out.GGUF")]  # `convert` writes these


@pytest.mark.parametrize(("command", "name"), FILES, ids=lambda of: of if isinstance(of, str) else of[0])
def test_names_of_files(command, name, hf, tmp_path, capsys):
    """A folder of that name is not what was meant; where there is one already, it is."""
    assert main([*command, str(hf), str(tmp_path / name)]) == 2
    err = capsys.readouterr().err
    assert f"{name} is the name of a file, and a folder is written" in err and err.count("\n") == 1
    assert names(tmp_path) == set()
    (tmp_path / name).mkdir()
    assert main([*command, str(hf), str(tmp_path / name)]) == 0


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "loop"])
def test_names_that_no_folder_has(name, hf, tmp_path, capsys):
    (tmp_path / "loop").symlink_to("loop")
    assert main(["convert", str(hf), str(tmp_path / name)]) == 3
    err = capsys.readouterr().err
    assert "cannot be written" in err and err.count("\n") == 1 and "Traceback" not in err
    assert names(tmp_path) == {"loop"}


@pytest.mark.parametrize("planted", [".out.partial", ".out.previous", f".out.{'0' * 16}.partial", ".out.lock"])
def test_links_beside_the_target(planted, hf, tmp_path):
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "diary.txt").write_text("dear diary")
    (tmp_path / planted).symlink_to(victim)
    for code in (0, 2) if planted != ".out.lock" else (3, 3):
        assert main(["convert", str(hf), str(tmp_path / "out")]) == code
    assert names(victim) == {"diary.txt"} and (tmp_path / planted).is_symlink()


@pytest.mark.parametrize("name", ["merges.txt", "chat_template.jinja", "additional_chat_templates", "LICENSE"])
@pytest.mark.parametrize("command", COMMANDS, ids=lambda words: words[0])
@pytest.mark.parametrize("steps", [1, 2])
def test_links_out_of_the_source_are_not_copied(steps, command, name, hf, tmp_path, capsys):
    """A folder from elsewhere could have a file of the user's published under a model's name."""
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "secret.jinja").write_text("secret")
    source = tmp_path / "source"
    shutil.copytree(hf, source)
    (source / "step").symlink_to("../home" if name == "additional_chat_templates" else "../home/secret.jinja")
    (source / name).symlink_to("step" if steps == 2 else os.readlink(source / "step"))
    assert main([*command, str(source), str(tmp_path / "out")]) == 3
    err = capsys.readouterr().err
    assert name in err and "is a link that leads out of the folder" in err and err.count("\n") == 1
    assert names(tmp_path) == {"home", "source"}


def test_links_that_belong_to_a_model(hf, tmp_path):
    """Those within its folder, and those of a hub's cache, where a blob may be a link once more."""
    snapshot, blobs = tmp_path / "hub" / "snapshots" / ("a" * 40), tmp_path / "hub" / "blobs"
    for folder in (snapshot / "additional_chat_templates", blobs, tmp_path / "store"):
        folder.mkdir(parents=True)
    for path in hf.iterdir():
        shutil.copy(path, blobs / f"blob-of-{path.name}")
        (snapshot / path.name).symlink_to(f"../../blobs/blob-of-{path.name}")
    (tmp_path / "store" / "b").write_text("template")
    (blobs / "b").symlink_to("../../store/b")
    (snapshot / "additional_chat_templates" / "x.jinja").symlink_to("../../../blobs/b")
    (snapshot / "chat_template.jinja").symlink_to("additional_chat_templates/x.jinja")
    (tmp_path / "by-a-link").symlink_to(snapshot)
    for number, source in enumerate((snapshot, tmp_path / "by-a-link")):
        out = tmp_path / f"out-{number}"
        assert main(["convert", str(source), str(out)]) == 0
        for name in ("additional_chat_templates/x.jinja", "chat_template.jinja"):
            assert (out / name).read_text() == "template" and not (out / name).is_symlink()


def test_linked_target(hf, tmp_path):
    """A link to a folder, say on a larger disk, stays a link."""
    (tmp_path / "disk" / "model").mkdir(parents=True)
    (tmp_path / "link").symlink_to("disk/model")
    smollm3_jax.convert(hf, tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and contents(tmp_path / "disk" / "model") == contents(hf)
