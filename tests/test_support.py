"""Installations that cannot work say so in their first line; `doctor`; and what an import may cost.

Versions are read from a package's metadata, so a pretended one is a folder with a METADATA file, first on the path.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny import talking_checkpoint

import smollm3_jax
from smollm3_jax import support
from smollm3_jax.commands.main import main
from smollm3_jax.support import FLOOR, NEWEST

ROOT = Path(__file__).parents[1]
# What pip makes of the entry point in pyproject.toml.
LAUNCHER = "import sys\nfrom smollm3_jax.commands.main import main\nsys.exit(main())\n"


def run(*command: str, path: Path | None = None, **environment: str | None) -> subprocess.CompletedProcess[str]:
    """Python with this checkout importable, after `path`; None takes a variable away."""
    paths = [*([str(path)] if path else []), str(ROOT)]
    variables = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(paths)} | environment
    return subprocess.run(
        [sys.executable, *command],
        env={name: value for name, value in variables.items() if value is not None},
        capture_output=True,
        text=True,
    )


@pytest.fixture
def smollm3(tmp_path):
    """Runs the command as an installed one; returns what came of it, without a traceback."""
    launcher = tmp_path / "bin" / "smollm3"
    launcher.parent.mkdir()
    launcher.write_text(LAUNCHER)

    def call(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
        done = run(str(launcher), *arguments, **options)
        assert "Traceback" not in done.stderr, done.stderr
        return done

    return call


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    return talking_checkpoint(tmp_path_factory.mktemp("support") / "talking")


def pretend(folder: Path, package: str, version: str) -> Path:
    info = folder / f"{package}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
    return folder


COMMANDS = [
    ["pull", "demo"],
    ["inspect", "nowhere"],
    ["convert", "nowhere", "out"],
    ["verify", "nowhere", "--against", "transformers"],
    ["generate", "--model", "nowhere", "--prompt", "x"],
]


@pytest.mark.parametrize("arguments", COMMANDS, ids=" ".join)
def test_every_command_refuses_an_old_jax(arguments, smollm3, tmp_path):
    done = smollm3(*arguments, path=pretend(tmp_path / "old", "jax", "0.9.0"))
    assert done.returncode == 3 and done.stdout == ""
    assert done.stderr == (
        "smollm3: jax 0.9.0 is not supported, it must be at least 0.10.2: pip install -U 'jax>=0.10.2'\n"
    )


def test_help_works_with_an_old_jax(smollm3, tmp_path):
    done = smollm3("--help", path=pretend(tmp_path / "old", "jax", "0.9.0"))
    assert done.returncode == 0 and done.stdout.startswith("usage: smollm3 ")


OTHERS = {
    "jax": ("0.9.0", "jax 0.9.0 is not supported, it must be at least 0.10.2: pip install -U 'jax>=0.10.2'"),
    "flax": ("0.11.9", "flax 0.11.9 is not supported, it must be at least 0.12.8: pip install -U 'flax>=0.12.8'"),
    "jaxlib": ("0.9.3", "and jaxlib 0.9.3 do not belong together: pip install -U jax jaxlib"),
}


@pytest.mark.parametrize("package", OTHERS)
def test_other_packages_are_looked_at_too(package, smollm3, tmp_path):
    """And the doctor says what it found, whatever that is."""
    version, message = OTHERS[package]
    path = pretend(tmp_path / "old", package, version)
    done = smollm3("pull", "demo", path=path)
    assert done.returncode == 3 and done.stdout == ""
    assert done.stderr.startswith("smollm3: ") and message in done.stderr and done.stderr.count("\n") == 1
    done = smollm3("doctor", path=path)
    lines = done.stdout.splitlines()
    assert done.returncode == 3 and done.stderr == "" and lines[-1].split() == ["verdict", "not", "supported"]
    assert f"{package:18} {version}" in lines
    assert any(line.startswith("problem") and message in line for line in lines)


def test_import_on_an_old_jax_raises(tmp_path):
    """Before jax is imported, which an old Flax may not survive."""
    code = (
        "import sys\n"
        "try:\n    import smollm3_jax\n"
        "except RuntimeError as error:\n    print(type(error).__name__, 'jax' in sys.modules, error)"
    )
    done = run("-c", code, path=pretend(tmp_path / "old", "jax", "0.9.0"))
    assert done.stdout.startswith("SupportError False jax 0.9.0 is not supported, it must be at least 0.10.2"), done


VERSIONS: list[tuple[dict[str, str | None], str | None]] = [
    ({}, None),
    ({"jax": "0.10.2", "jaxlib": "0.10.2", "flax": "0.12.8", "python": "3.11.0"}, None),
    ({"jax": "0.12.0.1", "jaxlib": "0.12.0", "flax": "0.12.12"}, None),
    ({"jax": "0.10.3.dev20260101+abc999", "jaxlib": "0.10.3"}, None),
    ({"jax": "1.0", "jaxlib": "1.0.5"}, None),
    ({"jax": "0.10.1"}, "jax 0.10.1 is not supported"),
    ({"jax": "0.4.38"}, "jax 0.4.38 is not supported"),
    ({"jax": None}, "jax (not installed) is not supported"),
    ({"flax": "0.12.7"}, "flax 0.12.7 is not supported"),
    ({"flax": None}, "flax (not installed) is not supported"),
    ({"python": "3.10.14"}, "python 3.10.14 is not supported, it must be at least 3.11: install a newer Python"),
    ({"jaxlib": None}, "jaxlib (not installed) do not belong together"),
    ({"jax": "0.12.0", "jaxlib": "0.11.2"}, "jax 0.12.0 and jaxlib 0.11.2 do not belong together"),
]


@pytest.fixture
def pretended(monkeypatch):
    def pretend(versions: dict[str, str | None]) -> None:
        monkeypatch.setattr(support, "version", lambda name, real=support.version: versions.get(name, real(name)))

    pretend({})
    return pretend


@pytest.mark.parametrize(("versions", "message"), VERSIONS)
def test_which_versions_are_supported(versions, message, pretended):
    pretended({"jax": "0.10.2", "jaxlib": "0.10.2"} | versions)
    reason = support.unsupported()
    assert reason is None if message is None else message in reason


def test_floor_is_what_pip_installs():
    """The same numbers stand in pyproject.toml, where pip reads them."""
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {f"{name}>={FLOOR[name]}" for name in ("jax", "flax")} <= set(project["dependencies"])
    assert project["requires-python"] == f">={FLOOR['python']}"


def test_doctor_here(capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    lines = dict(line.split(None, 1) for line in out.splitlines())
    assert lines["jax"] == support.version("jax") and lines["python"] == support.version("python")
    assert lines["device"] == "cpu:0 cpu" and "problem" not in lines
    assert lines["verdict"] == "supported" or lines["verdict"].startswith("untested: ")
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["problems"] == [] and report["versions"]["flax"] == support.version("flax")


NEWER: list[tuple[dict[str, str], str]] = [
    (NEWEST | {"jaxlib": "0.12.0"}, "supported"),
    ({"python": "3.12.99"}, "supported"),
    ({"python": "3.14.0"}, "untested: python 3.14.0 is newer than what the tests run on"),
    ({"jax": "0.99.0", "jaxlib": "0.99.0"}, "untested: jax 0.99.0 is newer than what the tests run on"),
    ({"flax": "0.12.13"}, "untested: flax 0.12.13 is newer than what the tests run on"),
]


@pytest.mark.parametrize(("versions", "verdict"), NEWER)
def test_newer_than_the_tests(versions, verdict, pretended, capsys):
    """Not an error, but said: exit code 0."""
    pretended({"python": "3.11.0", "jax": "0.10.2", "jaxlib": "0.10.2", "flax": "0.12.8"} | versions)
    assert main(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["verdict"] == verdict


def problems(capsys) -> str:
    """What a doctor who finds something says."""
    assert main(["doctor"]) == 3
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].split() == ["verdict", "not", "supported"]
    return "\n".join(line for line in lines if line.startswith("problem"))


@pytest.mark.slow
def test_tpu_machine_with_jax_for_cpus(smollm3):
    """In a process of its own: jax chooses its devices once."""
    environment = {"TPU_NAME": "local", "JAX_PLATFORMS": None}
    if "libtpu" in sys.modules or support.version("libtpu"):
        pytest.skip("libtpu is installed")
    done = smollm3("doctor", **environment)
    assert done.returncode == 3
    assert "this is a TPU machine, but jax runs on its CPU: pip install 'jax[tpu]" in done.stdout
    assert done.stdout.splitlines()[-1].split() == ["verdict", "not", "supported"]
    # Where the CPU is asked for, it is what one gets.
    assert smollm3("doctor", TPU_NAME="local").returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize("platforms", ["cuda", "tpu", "rocm", "tpu,cpu", "nonsense"])
@pytest.mark.parametrize(
    "arguments", [["doctor"], ["generate", "MODEL", "-p", "w5"], ["verify", "MODEL", "--against", "MODEL"]]
)
def test_platform_that_is_not_there(smollm3, platforms, arguments, model_folder):
    """A plain line, and nothing of what libtpu writes by itself."""
    if support._has_gpu() or support._has_tpu():
        pytest.skip("an accelerator is attached")
    words = [str(model_folder) if word == "MODEL" else word for word in arguments]
    done = smollm3(*words, JAX_PLATFORMS=platforms)
    assert done.returncode == 3
    said = done.stdout if arguments == ["doctor"] else done.stderr
    assert f"JAX_PLATFORMS asks for {platforms}, and jax finds no such device" in said
    assert "say JAX_PLATFORMS=cpu" in said and "another process" not in said
    assert done.stderr.count("\n") == (arguments != ["doctor"])


@pytest.mark.slow
@pytest.mark.parametrize("first", ["import jax, smollm3_jax as s3", "import smollm3_jax as s3, jax"])
def test_python_begins_clean_and_fails_in_words(first, model_folder):
    """Without JAX_PLATFORMS too, plug-ins that are here to compile only are left alone; the caller's wish is kept."""
    if support._has_gpu() or support._has_tpu():
        pytest.skip("an accelerator is attached")
    code = f"{first}\nprint(jax.devices(), s3.from_pretrained({str(model_folder)!r}).dtype)"
    done = run("-c", code, JAX_PLATFORMS=None)
    assert (done.stdout, done.stderr) == ("[CpuDevice(id=0)] float32\n", "")
    done = run("-c", f"{first}\ns3.from_pretrained({str(model_folder)!r})", JAX_PLATFORMS="cuda")
    assert "SupportError: JAX_PLATFORMS asks for cuda, and jax finds no such device" in done.stderr


# What libtpu says when a second process opens the chips.
IN_USE = (
    "Unable to initialize backend 'tpu': UNKNOWN: TPU initialization failed: open(/dev/accel0): Operation not "
    "permitted. The TPU is already in use by process with pid 4711. Not attempting to load libtpu.so in this process."
)


def broken_jax(monkeypatch, folder: Path, code: str) -> None:
    """A jax that is not well, for the process that the doctor starts."""
    (folder / "jax").mkdir(parents=True)
    (folder / "jax" / "__init__.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", f"{folder}{os.pathsep}{ROOT}")


def test_tpu_in_use_by_another_process(capsys, monkeypatch, tmp_path):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    error = f"{IN_USE} (set JAX_PLATFORMS='' to automatically choose an available backend)"
    broken_jax(monkeypatch, tmp_path, f"def devices():\n    raise RuntimeError({error!r})")
    said = problems(capsys)
    assert "jax finds no device" in said and "pid 4711" in said and "set JAX_PLATFORMS=''" not in said
    assert "another process holds the TPU: end it" in said


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("raise ImportError('libfoo.so: cannot open shared object')", "jax cannot be started: ImportError: libfoo.so"),
        ("import os, signal\nos.kill(os.getpid(), signal.SIGILL)", "jax was ended by SIGILL while it looked"),
        ("import os\nos.abort()", "jax was ended by SIGABRT while it looked"),
        ("raise SystemExit('no')", "jax cannot be started: no"),
        ("import time\ntime.sleep(60)", "jax has not found its devices in 2 seconds"),
        ("def devices(): assert False", "jax finds no such device"),
        ("def devices(): raise RuntimeError('\x1b[31mred')", "jax finds no such device (\\x1b[31mred)"),
    ],
)
def test_the_doctor_survives(code, words, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(support, "_PROBE_SECONDS", 2)
    broken_jax(monkeypatch, tmp_path, code)
    assert words in problems(capsys)


def test_the_doctor_misses_a_package(pretended, capsys):
    pretended({"safetensors": None})
    assert "safetensors is not installed: pip install 'safetensors" in problems(capsys)


def test_the_doctor_names_variables(monkeypatch, capsys):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=2")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("SMOLLM3_API_KEY", "secret")
    monkeypatch.setenv("TPU_PROXY", "http://me:secret@proxy")
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "variable           XLA_FLAGS=--xla_force_host_platform_device_count=2\n" in out
    assert "device             cpu:1 cpu\n" in out and "secret" not in out
    assert "SMOLLM3_API_KEY=(set, not shown)\n" in out and "TPU_PROXY=http://***@proxy\n" in out


def test_extras_are_named_as_they_can_be_installed():
    """The package itself need not be on an index for that."""
    assert support.how_to_install("plan").startswith("pip install 'jax[tpu]")
    assert support.how_to_install("torch").startswith(
        "pip install 'torch"
    ) and "'transformers" in support.how_to_install("torch")
    rented = ROOT / "smollm3_jax/launch/scripts.py"  # what machines install that have nothing, unless --setup says how
    for file in {*(ROOT / "smollm3_jax").rglob("*.py"), *(ROOT / "scripts").rglob("*.py")} - {rented}:
        assert "smollm3-jax[" not in file.read_text(), file


def test_gpu_machine_with_jax_for_cpus(capsys, monkeypatch):
    real = Path.exists
    monkeypatch.delenv("TPU_NAME", raising=False)
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setattr(support, "_has_tpu", lambda: False)
    monkeypatch.setattr(Path, "exists", lambda path: str(path) == "/proc/driver/nvidia/version" or real(path))
    assert "NVIDIA GPU, but jax runs on the CPU: pip install 'jax[cuda13]" in problems(capsys)


@pytest.mark.parametrize("content", ["", '"""Sharding rules of somebody else."""\nclass Rules: ...\n'])
def test_foreign_sharding_package(content, smollm3, tmp_path):
    """PyPI has one of that name; what is first on the path wins, and the message must come before the import."""
    foreign = tmp_path / "foreign" / "sharding"
    foreign.mkdir(parents=True)
    (foreign / "__init__.py").write_text("")
    if content:
        (foreign / "rules.py").write_text(content)
    for arguments in (["doctor"], ["plan", "memory"]):
        done = smollm3(*arguments, path=foreign.parent)
        assert done.returncode == 3
        said = done.stdout + done.stderr
        assert "`sharding`" in said and str(foreign) in said and "pip uninstall sharding" in said


def test_a_sharding_package_over_this_one(monkeypatch):
    """pip lets another package overwrite files of this one; taking it away then leaves holes."""

    class Other:
        def locate_file(self, name):
            return ROOT / name

    real = support.importlib.metadata.distribution
    fake = lambda name: Other() if name == "sharding" else real(name)  # noqa: E731
    monkeypatch.setattr(support.importlib.metadata, "distribution", fake)
    assert "pip uninstall -y sharding smollm3-jax" in (support.unsupported() or "")
    monkeypatch.setattr(support.importlib.util, "find_spec", lambda name: None)
    assert "install smollm3-jax again" in (support.unsupported() or "")


# What an import costs

HEAVY = {
    "torch",
    "transformers",
    "gguf",
    "orbax",
    "tokenizers",
    "jinja2",
    "huggingface_hub",
    "grain",
    "httpx",
    "requests",
}
IMPORT = """
import json, sys, time
import jax, flax
start = time.perf_counter()
{code}
seconds = time.perf_counter() - start
from flax import nnx
print(json.dumps([seconds, [name.split(".")[0] for name in sys.modules]]))
"""


def imported(code: str) -> tuple[float, set[str]]:
    """Seconds for `code` after jax and flax, and the packages that are loaded then (with Flax's NNX)."""
    done = run("-c", IMPORT.format(code=code))
    assert done.returncode == 0, done.stderr
    seconds, names = json.loads(done.stdout)
    return seconds, set(names)


@pytest.mark.slow
def test_what_an_import_loads_and_takes():
    """Nothing heavy but what Flax loads anyway, and under a second beyond jax and flax.

    In one of five attempts, since others use this machine too.
    """
    _, allowed = imported("")
    seconds, ours = imported("import smollm3_jax")
    for names in (ours, imported("import smollm3_jax.commands.main")[1]):
        assert "smollm3_jax" in names
        assert not (names - allowed) & HEAVY
    assert seconds < 1.0 or any(imported("import smollm3_jax")[0] < 1.0 for _ in range(4))


def test_public_names():
    """Every name of the package is there, has a docstring, and is not a module's leftover."""
    assert len(smollm3_jax.__all__) == len(set(smollm3_jax.__all__)) >= 10
    for name in smollm3_jax.__all__:
        assert getattr(smollm3_jax, name).__doc__, name
