"""What this package runs on, and how to tell that it does not."""

import importlib.metadata
import importlib.util
import os
import re
import sys
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
    except importlib.metadata.PackageNotFoundError:
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
    # PyPI has a `sharding` of its own, which anything may pull in; importing ours would fail with a riddle.
    spec = importlib.util.find_spec("sharding")
    where = Path(spec.origin).resolve() if spec and spec.origin else Path("(nowhere)")
    if where.parent.parent != Path(__file__).resolve().parent.parent:
        return f"the package `sharding` that Python finds, {where}, is not this project's: pip uninstall sharding"
    return None


def require_supported() -> None:
    """Called before anything imports jax, which an unsupported version may not survive.

    Raises:
      SupportError: saying what to install. The `smollm3` command prints that and exits instead.
    """
    if reason := unsupported():
        if Path(sys.argv[0]).stem == "smollm3":
            print(f"smollm3: {reason}", file=sys.stderr)
            sys.exit(SupportError.exit_code)
        raise SupportError(reason)


def keep_to_the_cpu_without_accelerator() -> None:
    """Where no accelerator is attached, jax leaves alone the plug-ins that are installed only to compile for some:
    started without a device they print tracebacks. Does nothing where the user says which platforms there are."""
    import jax

    chosen: str | None = jax.config.jax_platforms  # pyright: ignore[reportAttributeAccessIssue]
    if not chosen and sys.platform == "linux" and not _has_tpu() and not _has_gpu():
        jax.config.update("jax_platforms", "cpu")


def diagnose() -> dict[str, Any]:
    """Versions, devices, problems and a verdict, for `smollm3 doctor`."""
    versions = {name: version(name) for name in ("python", "smollm3-jax", *SHOWN)}
    problems = []
    newer = [f"{name} {versions[name]}" for name, limit in NEWEST.items() if _newer(versions[name] or "", limit)]
    devices: list[str] = []
    try:
        import jax

        devices = [f"{device.platform}:{device.id} {device.device_kind}" for device in jax.devices()]
        platform = jax.default_backend()
    except RuntimeError as error:
        platform = None
        text = str(error)
        problems.append(f"jax finds no device: {text.splitlines()[0]}")
        if "already in use" in text or "libtpu_lockfile" in text:
            problems.append("another process holds the TPU: end it (sudo lsof -w /dev/accel* /dev/vfio/*), or wait")
    if platform == "cpu" and os.environ.get("JAX_PLATFORMS", "") != "cpu":
        if _has_tpu():
            problems.append("this is a TPU machine, but jax runs on its CPU: pip install -U 'smollm3-jax[tpu]'")
        elif Path("/proc/driver/nvidia/version").exists():
            problems.append("there is an NVIDIA GPU, but jax runs on the CPU: pip install -U 'smollm3-jax[cuda13]'")
    verdict = "not supported" if problems else "supported"
    if newer and not problems:
        verdict = f"untested: {', '.join(newer)} is newer than what the tests run on"
    return {"verdict": verdict, "problems": problems, "versions": versions, "devices": devices}


def _has_gpu() -> bool:
    """Whether the kernel shows a GPU that some plug-in of jax may be for: NVIDIA's, also in WSL, AMD's or another."""
    devices = (path for name in ("nvidia*", "dxg", "kfd", "dri/renderD*") for path in Path("/dev").glob(name))
    return Path("/proc/driver/nvidia/version").exists() or any(True for _ in devices)


def _has_tpu() -> bool:
    """Whether the kernel shows a TPU; Google's vendor id is 0x1ae0."""
    if any(Path("/dev").glob("accel[0-9]*")) or os.environ.get("TPU_NAME"):
        return True
    vendors = Path("/sys/bus/pci/devices").glob("*/vendor")
    return any(Path("/dev").glob("vfio/[0-9]*")) and any(v.read_text().strip() == "0x1ae0" for v in vendors)
