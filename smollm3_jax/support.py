"""What this package runs on, and how to tell that it does not."""

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import SupportError

# Oldest pair that the tests run on, and the newest; in between works, beyond is untested.
FLOOR = {"python": "3.11", "jax": "0.10.2", "flax": "0.12.8"}
NEWEST = {"python": "3.12", "jax": "0.12.0.1", "flax": "0.12.12"}
SHOWN = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "safetensors", "tokenizers", "gguf", "libtpu")
SHOWN += ("torch", "transformers")


def version(package: str) -> str | None:
    """Installed version of a package, of "python" too; None if it is not installed."""
    if package == "python":
        return ".".join(map(str, sys.version_info[:3]))
    try:
        return importlib.metadata.version(package)
    except (importlib.metadata.PackageNotFoundError, KeyError, ValueError):  # not there, or its metadata is damaged
        return None


def _number(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text.split("+")[0])[:4])


def _newer(found: str, limit: str) -> bool:
    """Python 3.12.7 is not newer than 3.12: only as many parts count as the limit has."""
    return _number(found)[: len(_number(limit))] > _number(limit)


def unsupported() -> str | None:
    """Why this installation cannot work; None if it can."""
    for package, floor in FLOOR.items():
        found = version(package)
        if found is None or _number(found) < _number(floor):
            remedy = "install a newer Python" if package == "python" else f"pip install -U '{package}>={floor}'"
            return f"{package} {found or '(not installed)'} is not supported, it must be at least {floor}: {remedy}"
    jax, jaxlib = version("jax"), version("jaxlib")
    if jaxlib is None or _number(jaxlib)[:2] != _number(jax or "")[:2]:
        return f"jax {jax} and jaxlib {jaxlib or '(not installed)'} do not belong together: pip install -U jax jaxlib"
    return _other_sharding()


def _other_sharding() -> str | None:
    """PyPI has a `sharding` of its own, which anything may pull in; importing ours would fail with a riddle."""
    spec = importlib.util.find_spec("sharding")
    if spec is None or spec.origin is None:
        return "this project's package `sharding` is missing, or its __init__.py is: install smollm3-jax again"
    where = Path(spec.origin).resolve()
    if where.parent.parent != Path(__file__).resolve().parent.parent:
        return f"the package `sharding` that Python finds, {where}, is not this project's: pip uninstall sharding"
    # pip lets two packages write into one folder; who takes one away takes files of the other along.
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        other = importlib.metadata.distribution("sharding").locate_file("sharding/__init__.py")
        if Path(str(other)).resolve() == where:
            again = "pip uninstall -y sharding smollm3-jax, and install smollm3-jax again"
            return f"another package was installed into this project's `sharding`, {where.parent}: {again}"
    return None


def require_supported() -> None:
    """Called before anything imports jax, which an unsupported version may not survive.

    Raises:
      SupportError: saying what to install.
    """
    if reason := unsupported():
        raise SupportError(reason)


def is_the_command() -> bool:
    """Whether this process is `smollm3`, or `python -m smollm3_jax`."""
    return Path(sys.argv[0]).stem == "smollm3" or sys.orig_argv[1:3] == ["-m", "smollm3_jax"]


def how_to_install(name: str) -> str:
    """How to install one of the package's extras, in pip's words: what it holds, since that can be had anywhere."""
    try:
        lines = importlib.metadata.requires("smollm3-jax") or []
    except importlib.metadata.PackageNotFoundError:
        lines = []
    found = [line.split(";")[0].strip() for line in lines if re.search(rf"""extra\s*==\s*["']{name}["']""", line)]
    return f"pip install {' '.join(map(repr, found or [f'.[{name}]']))}"


def keep_to_the_cpu_without_accelerator() -> None:
    """Where no accelerator is attached, jax leaves alone the plug-ins that are installed only to compile for some:
    started without a device they print tracebacks. Does nothing where the user says which platforms there are."""
    if "jax" not in sys.modules:  # it reads the variable when it is imported
        if not os.environ.get("JAX_PLATFORMS") and _nothing_attached():
            os.environ["JAX_PLATFORMS"] = "cpu"
        return
    import jax

    chosen: str | None = jax.config.jax_platforms  # pyright: ignore[reportAttributeAccessIssue]
    if not chosen and _nothing_attached():
        jax.config.update("jax_platforms", "cpu")


def _nothing_attached() -> bool:
    return sys.platform == "linux" and not _has_tpu() and not _has_gpu()


def require_devices() -> None:
    """Called before anything is computed.

    Raises:
      SupportError: jax finds none of the platforms that JAX_PLATFORMS asks for, or cannot start the one there is.
    """
    import jax

    chosen: str | None = jax.config.jax_platforms  # pyright: ignore[reportAttributeAccessIssue]
    # A plug-in that finds no device says so at length by itself, before it raises.
    with _silent_stderr() if chosen not in (None, "", "cpu") and _nothing_attached() else contextlib.nullcontext():
        try:
            jax.devices()
            return
        except Exception as error:  # RuntimeError, or an AssertionError without a word
            reason = _reason(error)
    raise SupportError(_no_device(chosen, reason))


def refused_by_jax(error: BaseException) -> SupportError | None:
    """What to say of an error that comes of what the environment says of jax; None if it comes of something else."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    where = trace.tb_frame.f_globals.get("__name__") if trace else None
    if isinstance(error, ValueError) and where == "jax._src.config":  # a value that jax does not know
        name = next(iter(re.findall(r"\bjax_\w+", str(error), re.IGNORECASE)), "JAX_...").upper()
        return SupportError(f"jax does not take the variable {name}: {error}; mend or unset it")
    if isinstance(error, RuntimeError) and re.search(r"Disallowed \S+-to-\S+ transfer", str(error)):
        return SupportError(f"JAX_TRANSFER_GUARD forbids what this command does: {_reason(error)}; unset it")
    return None


def _reason(error: object) -> str:
    return (str(error).splitlines() or [""])[0].split(" (set JAX_PLATFORMS=")[0]


def _no_device(chosen: str | None, reason: str) -> str:
    asked = f"JAX_PLATFORMS asks for {chosen}, and jax finds no such device" if chosen else "jax finds no device"
    way_out = "unset it, or say JAX_PLATFORMS=cpu" if chosen else "JAX_PLATFORMS=cpu leaves it alone"
    return f"{asked}{f' ({reason})' if reason else ''}; {way_out}"


@contextlib.contextmanager
def _silent_stderr() -> Iterator[None]:
    """Silences standard error, for C++ libraries too, which write to the descriptor."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


# Run in a process of its own, since what is broken may end it, or wait for ever.
_PROBE = """
import json, sys
import jax
devices = [f"{device.platform}:{device.id} {device.device_kind}" for device in jax.devices()]
print(json.dumps([jax.default_backend(), devices]))
"""
_PROBE_SECONDS = 180


def _probe() -> tuple[str | None, list[str], str]:
    """jax's default platform and devices as another process finds them; why there are none."""
    environment = dict(os.environ)
    if not environment.get("JAX_PLATFORMS") and _nothing_attached():
        environment["JAX_PLATFORMS"] = "cpu"
    command = [sys.executable, "-P", "-c", _PROBE]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, timeout=_PROBE_SECONDS)
    except subprocess.TimeoutExpired:
        return None, [], f"jax has not found its devices in {_PROBE_SECONDS} seconds"
    except OSError as error:
        return None, [], f"Python cannot be started: {error}"
    try:
        platform, devices = json.loads(done.stdout.splitlines()[-1])
        return platform, devices, ""
    except (ValueError, IndexError):
        pass
    said = [line.strip() for line in done.stderr.decode(errors="replace").splitlines() if line.strip()]
    last = next((line for line in reversed(said) if re.match(r"\w+(\.\w+)*(Error|Exception)\b", line)), "")
    reason = last.removeprefix("RuntimeError: ") if last else (said[-1] if said else "")
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        return None, [], f"jax was ended by {name} while it looked for devices" + (f": {reason}" if reason else "")
    if last.startswith(("RuntimeError", "AssertionError")):
        chosen = os.environ.get("JAX_PLATFORMS")
        return None, [], _no_device(chosen, _reason(reason).removeprefix("AssertionError").strip(": "))
    return None, [], f"jax cannot be started: {reason}"


def diagnose() -> dict[str, Any]:
    """Versions, devices, problems and a verdict, for `smollm3 doctor`, in whatever state this environment is."""
    versions = {name: version(name) for name in ("python", "smollm3-jax", *SHOWN)}
    variables = {name: _shown(name, os.environ[name]) for name in sorted(os.environ) if name.startswith(_VARIABLES)}
    problems = [reason] if (reason := unsupported()) else []
    newer = [f"{name} {versions[name]}" for name, limit in NEWEST.items() if _newer(versions[name] or "", limit)]
    platform, devices, why_none = _probe()
    if why_none:
        problems.append(why_none)
    if "already in use" in why_none or ("libtpu_lockfile" in why_none and _has_tpu()):
        problems.append("another process holds the TPU: end it (sudo lsof -w /dev/accel* /dev/vfio/*), or wait")
    problems += [f"{name} is not installed: pip install '{line}'" for name, line in _missing()]
    if platform == "cpu" and os.environ.get("JAX_PLATFORMS", "") != "cpu":
        if _has_tpu():
            problems.append(f"this is a TPU machine, but jax runs on its CPU: {how_to_install('tpu')}")
        elif Path("/proc/driver/nvidia/version").exists():
            problems.append(f"there is an NVIDIA GPU, but jax runs on the CPU: {how_to_install('cuda13')}")
    verdict = "not supported" if problems else "supported"
    if newer and not problems:
        verdict = f"untested: {', '.join(newer)} is newer than what the tests run on"
    return {
        "verdict": verdict,
        "problems": problems,
        "versions": versions,
        "variables": variables,
        "devices": devices,
    }


# What may be the reason for what one sees.
_VARIABLES = ("JAX_", "XLA_", "LIBTPU_", "TPU_", "CUDA_VISIBLE_DEVICES", "SMOLLM3_", "HF_HOME", "HF_HUB_OFFLINE")


def _shown(name: str, value: str) -> str:
    """A variable's value without what is nobody else's: reports are pasted where all can read them."""
    if re.search(r"KEY|TOKEN|SECRET|PASSW", name):
        return "(set, not shown)" if value else ""
    return re.sub(r"://[^/\s]*@", "://***@", value)


def _missing() -> list[tuple[str, str]]:
    """What this package cannot do without and does not find: its name, and what to install."""
    try:
        lines = importlib.metadata.requires("smollm3-jax") or []
    except importlib.metadata.PackageNotFoundError:
        return []
    needed = [line for line in lines if "extra ==" not in line]
    names = [re.split(r"[\[><=!~; ]", line)[0] for line in needed]
    checked = ("jax", "flax")  # by `unsupported`
    return [(name, line) for name, line in zip(names, needed, strict=True) if name not in checked and not version(name)]


def _has_gpu() -> bool:
    """Whether the kernel shows a GPU that some plug-in of jax may be for: NVIDIA's, also in WSL, AMD's or another."""
    devices = (path for name in ("nvidia*", "dxg", "kfd", "dri/renderD*") for path in Path("/dev").glob(name))
    return Path("/proc/driver/nvidia/version").exists() or any(True for _ in devices)


def _has_tpu() -> bool:
    """Whether the kernel shows a TPU; Google's vendor id is 0x1ae0."""
    if any(Path("/dev").glob("accel[0-9]*")) or os.environ.get("TPU_NAME"):
        return True
    vendors = Path("/sys/bus/pci/devices").glob("*/vendor")
    try:
        return any(Path("/dev").glob("vfio/[0-9]*")) and any(v.read_text().strip() == "0x1ae0" for v in vendors)
    except OSError:  # a container that shows only half of the machine
        return False
