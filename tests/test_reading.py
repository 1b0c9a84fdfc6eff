"""Files that never end, and pipes that nobody writes to."""

import io
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from tiny import talking_checkpoint

from smollm3_jax.commands.main import main
from smollm3_jax.reading import lines, read_file


@pytest.fixture(scope="module")
def talking(tmp_path_factory) -> Path:
    return talking_checkpoint(tmp_path_factory.mktemp("reading") / "talking")


@pytest.fixture
def pipe(tmp_path) -> Path:
    os.mkfifo(tmp_path / "pipe")
    return tmp_path / "pipe"


def test_a_limit(tmp_path):
    (tmp_path / "file").write_bytes(b"12345")
    assert read_file(tmp_path / "file", 5) == b"12345"
    (tmp_path / "empty").touch()
    assert read_file(tmp_path / "empty", 0) == b""
    for path, limit in ((tmp_path / "file", 4), (Path("/dev/zero"), 2**20)):
        with pytest.raises(OSError, match=f"larger than {limit:,} bytes"):
            read_file(path, limit)


def test_lines_of_any_length():
    read = lambda content: list(lines(io.BytesIO(content), 4))  # noqa: E731
    assert read(b"") == [] and read(b"\n") == [b"\n"]
    assert read(b"1234\n12345\n123456789012\nab") == [b"1234\n", b"12345", b"12345", b"ab"]
    assert read(b"123456789") == [b"12345"] and read(b"1234") == [b"1234"]


@pytest.mark.parametrize("name", ["", "gone", "nul\0", "x" * 300, "y/" * 5000])
def test_what_cannot_be_opened(tmp_path, name):
    with pytest.raises(OSError):
        read_file(f"{tmp_path}/{name}", 10)


def test_a_pipe_that_nothing_writes_to(pipe):
    with pytest.raises(OSError, match="a pipe that nothing writes to"):
        read_file(pipe, 10)


def test_a_pipe_with_somebody_slow():
    """As `<(sleep 1; echo text)`."""
    reading, writing = os.pipe()
    timer = threading.Timer(0.2, lambda: (os.write(writing, b"w5 w6\n"), os.close(writing)))
    timer.start()
    try:
        assert read_file(f"/dev/fd/{reading}", 2**26) == b"w5 w6\n"
    finally:
        timer.join()
        os.close(reading)


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "MODEL", "--prompt-file", "FILE"],
        ["chat", "MODEL", "--load", "FILE"],
        ["inspect", "FILE"],
        ["plan", "memory", "FILE"],
    ],
    ids=lambda arguments: arguments[0],
)
@pytest.mark.parametrize("file", ["pipe", "/dev/zero", "nul\0", "x" * 300])
def test_commands_end_in_a_line(arguments, file, talking, pipe, capsys):
    words = {"MODEL": str(talking), "FILE": str(pipe.parent / file)}
    assert main([str(words.get(word, word)) for word in arguments]) in (2, 3)
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("smollm3: ") and err.count("\n") == 1 and "\0" not in err


@pytest.mark.parametrize("kind", ["pipe", "/dev/zero"])
@pytest.mark.parametrize(
    "name",
    [
        *("config.json", "generation_config.json", "model.safetensors", "model.safetensors.index.json"),
        *("pytorch_model.bin", "x.pt", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
    ],
)
def test_a_model_folder_with_something_that_is_no_file(name, kind, talking, tmp_path, capsys, pipe):
    model = tmp_path / "model"
    shutil.copytree(talking, model)
    (model / name).unlink(missing_ok=True)
    (model / name).symlink_to(pipe if kind == "pipe" else kind)
    assert main(["inspect", str(model)]) == 3
    out, err = capsys.readouterr()
    assert out == "" and f"{model / name} is a pipe or a device" in err and err.count("\n") == 1


def test_a_config_that_never_ends(tmp_path):
    """Read directly, by who does not name a model."""
    from smollm3_jax.config import ModelConfig
    from smollm3_jax.errors import ConfigError

    for target in ("/dev/zero", tmp_path / "pipe"):
        (tmp_path / "config.json").unlink(missing_ok=True)
        (tmp_path / "config.json").symlink_to(target)
        if not (tmp_path / "pipe").exists():
            os.mkfifo(tmp_path / "pipe")
        with pytest.raises(ConfigError, match="cannot be read as JSON"):
            ModelConfig.from_hf(tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_process_substitution(talking):
    command = f"{sys.executable} -m smollm3_jax generate {talking} --temp 0 --max-tokens 3"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    said = {
        subprocess.run(["bash", "-c", f"{command} {words}"], env=environment, capture_output=True).stdout
        for words in ("-p 'w5 w6'", "--prompt-file <(sleep 0.5; echo w5 w6)", "-p - <<< 'w5 w6'")
    }
    assert len(said) == 1 and said.pop().startswith(b" w")
