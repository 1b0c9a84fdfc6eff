"""The wheel and the source archive: what is in them, and that they do without this repository."""

import email
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from proxies import FULL

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# Extras of which this Python has none: jax for CUDA is newer than what runs on 3.11.
OF_312 = ("cuda12", "cuda13", "plan-cuda")


def tracked(*below: str) -> set[str]:
    listed = subprocess.run(["git", "ls-files", "-z", *below], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("this is no checkout of git's")
    return {name for name in listed.stdout.split("\0") if (ROOT / name).is_file()}


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[Path, Path]:
    """(wheel, source archive) of a copy of what git has: the wheel is built from the archive, as a release's."""
    copy, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in tracked():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, copy / name)
    command = [sys.executable, "-m", "build", "--outdir", str(out), str(copy)]
    done = subprocess.run(command, cwd=out, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    [wheel], [archive] = out.glob("*.whl"), out.glob("*.tar.gz")
    return wheel, archive


@pytest.mark.slow
def test_the_wheel_has_what_git_has_of_the_packages(built):
    with zipfile.ZipFile(built[0]) as wheel:
        names = set(wheel.namelist())
        [metadata] = [name for name in names if name.endswith(".dist-info/METADATA")]
        about = email.message_from_bytes(wheel.read(metadata))
    assert {name for name in names if ".dist-info/" not in name} == tracked("smollm3_jax", "sharding")
    assert about["Version"] == PROJECT["version"] and about["License-Expression"] == "Apache-2.0"
    assert set(about.get_all("Provides-Extra", [])) == set(PROJECT["optional-dependencies"])
    with tarfile.open(built[1]) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    assert {"CHANGELOG.md", "LICENSE", "README.md", "pyproject.toml"} <= inside
    assert not [name for name in inside if name.startswith(("tests/", "docs/", "benchmarks/"))]


@FULL
def test_the_wheel_works_in_an_empty_environment(built):
    command = [sys.executable, str(ROOT / "scripts" / "smoke_wheel.py"), str(built[0]), "--steps", "3"]
    done = subprocess.run(command, cwd=built[0].parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("installed, talked, served, trained and exported\n")


@FULL
@pytest.mark.parametrize("extra", PROJECT["optional-dependencies"])
def test_an_extra_can_be_installed(built, extra, tmp_path):
    """All that it asks for is there, and of versions that go together; nothing is installed."""
    if extra in OF_312 and sys.version_info < (3, 12):
        pytest.skip(f"{extra} needs Python 3.12")
    report = tmp_path / "report.json"
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--report", str(report), f"{built[0]}[{extra}]"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and report.exists(), done.stderr
    assert not re.search(r"does not provide the extra", done.stdout + done.stderr)
