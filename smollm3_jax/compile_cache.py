"""The persistent compilation cache, on by default, and a count of compilations.

The second start of a model on the same machine loads its programs from `compiled` in the package's cache
folder instead of compiling them. JAX has one such cache a process, so programs of the caller's own are
kept there too. Where the caller configures JAX's cache, it stays as configured: JAX_COMPILATION_CACHE_DIR
names another folder, JAX_ENABLE_COMPILATION_CACHE=false switches it off.

Nothing that is wrong with the folder stops a program: it is compiled, and the log says once what is wrong.
"""

import contextlib
import glob
import hashlib
import logging
import os
import re
import stat
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.experimental.compilation_cache.compilation_cache import reset_cache

from .files import unfinished, write
from .paths import cache_dir

log = logging.getLogger(__name__)
config: Any = jax.config  # its attributes come into being at run time

# Loading a small one takes 0.01 s; what is compiled about as fast is not worth a file. JAX's own threshold is 1 s.
MIN_COMPILE_SECONDS = 0.2
MAX_BYTES = 2 << 30
DAY = 86_400.0  # seconds after which nobody is still writing an entry

# How JAX reports that it could not use an entry. It goes on without, unless a filter makes an error of it.
TROUBLE = re.compile(r"Error (reading|writing) persistent compilation cache entry for '(.*?)': (.*)", re.IGNORECASE)

SEAL = b"smollm3-jax 1\0"  # how an entry begins

# What JAX reports when it is done, with the seconds that it took.
COMPILING = {
    "/jax/core/compile/jaxpr_trace_duration",
    "/jax/core/compile/jaxpr_to_mlir_module_duration",
    "/jax/core/compile/backend_compile_duration",
}

OFF = "set JAX_ENABLE_COMPILATION_CACHE=false to go without"

_lock = threading.Lock()
_span_lock = threading.Lock()
_folder: Path | None = None  # where this module has put the cache
_decided = _counts = _said = False
_requests = _hits = 0
_spans: list[tuple[float, float]] = []  # on time.perf_counter's clock, apart and in order


class Compilations(NamedTuple):
    """How many programs XLA compiled since `enable`, and how many were loaded from the persistent cache."""

    compiled: int
    loaded: int


def compilations() -> Compilations:
    """The count so far, of the whole process. Once everything is warm, both numbers stand still."""
    return Compilations(_requests - _hits, _hits)


def compiling_seconds() -> float:
    """How long the process has been tracing, lowering and compiling since `enable`, loading included."""
    return sum(end - begin for begin, end in _spans)


def enable() -> None:
    """Starts counting, and turns the cache on unless the caller has configured JAX's. Cheap to call again.

    In a run of several processes the cache stays off. On some platforms processes compile together: one that
    loads what another compiles would leave it waiting. Such a run may name a folder that all of them share.

    It stays off, too, where one CPU stands for several devices: a program that XLA loads (jax 0.10.2) no longer has the
    order of its collectives, and then devices wait for each other in different ones for ever.
    """
    global _decided, _folder
    with _lock:
        _count()
        if not _decided:
            _decided = True
            if not _configured() and jax.process_count() == 1 and not _simulates_devices():
                _folder = _open()
        if _folder is not None:
            _hear()


def _configured() -> bool:
    named = config.jax_compilation_cache_dir is not None or "JAX_COMPILATION_CACHE_DIR" in os.environ
    return named or not config.jax_enable_compilation_cache


def _simulates_devices() -> bool:
    return jax.default_backend() == "cpu" and jax.local_device_count() > 1


def _open() -> Path | None:
    """Points JAX at the folder; None if there can be none."""
    try:
        folder = cache_dir().absolute() / "compiled"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _check_owner(folder)
    except OSError as error:
        log.warning(
            "compiled programs cannot be kept: %s. Every start compiles them again; name a folder of your own in "
            "SMOLLM3_JAX_CACHE, or %s",
            *(error, OFF),
        )
        return None
    with contextlib.suppress(OSError):
        _tidy(folder)
    _seal_entries()
    config.update("jax_compilation_cache_dir", str(folder))
    if config.jax_persistent_cache_min_compile_time_secs == 1:
        config.update("jax_persistent_cache_min_compile_time_secs", MIN_COMPILE_SECONDS)
    reset_cache()  # programs compiled earlier may have made JAX decide that there is no cache
    return folder


def _check_owner(folder: Path) -> None:
    """Raises PermissionError if another user may write to the folder: programs in it are run."""
    found, above = folder.stat(), folder.resolve().parent.stat()
    if found.st_uid != os.geteuid():
        raise PermissionError(f"{folder}, from where programs are run, belongs to another user")
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        who = "everybody" if found.st_mode & stat.S_IWOTH else "its group"
        raise PermissionError(f"{who} may write to {folder}, from where programs are run (chmod 700 ends that)")
    if above.st_mode & stat.S_IWOTH and not above.st_mode & stat.S_ISVTX:
        raise PermissionError(f"everybody may put another folder in the place of {folder}, from where programs are run")


class _Sealed:
    """JAX's cache in our folder: each entry begins with a digest of its name and content.

    JAX itself loads whatever has the name, and writes in place: half an entry, or another program's, would be run.
    """

    def __init__(self, folder: Path):
        self._path = folder

    def get(self, key: str) -> bytes | None:
        try:
            entry = (self._path / f"{key}-cache").read_bytes()
        except FileNotFoundError:
            return None
        seal, content = entry[: len(SEAL) + 32], entry[len(SEAL) + 32 :]
        if seal != self._seal(key, content):
            raise ValueError("it is damaged, or another program's")  # JAX says so in a warning, and compiles
        return content

    def put(self, key: str, value: bytes) -> None:
        write(self._path / f"{key}-cache", self._seal(key, value) + value)

    def clear(self) -> None:
        """A part of JAX's interface; nothing is kept here."""

    def _seal(self, key: str, content: bytes) -> bytes:
        return SEAL + hashlib.sha256(key.encode() + b"\0" + content).digest()


def _seal_entries() -> None:
    """Puts `_Sealed` where JAX opens our folder, unless the caller bounds JAX's cache, which is then JAX's alone."""
    cache: Any = sys.modules.get("jax._src.compilation_cache")  # private: where it has gone, JAX's way serves
    theirs = getattr(cache, "get_file_cache", None)
    if theirs is None or getattr(theirs, "__module__", None) == __name__:
        return

    def get_file_cache(path: str) -> Any:
        ours = _folder is not None and path == str(_folder) and config.jax_compilation_cache_max_size == -1
        return (_Sealed(Path(path)), path) if ours else theirs(path)

    cache.get_file_cache = get_file_cache


def _tidy(folder: Path) -> None:
    """Removes what was not used for longest, as far as the folder is too large, and what was not written to its end.

    JAX can do that too (jax_compilation_cache_max_size), but then every use takes a lock, which on network
    file systems may be stale, and writes a file beside the entry's; older releases stop writing where one of
    these is missing. Who sets it all the same gets the missing ones.
    """
    for path in unfinished(folder, DAY):
        path.unlink(missing_ok=True)
    entries = [(path, path.stat()) for path in folder.glob("*-cache")]
    if config.jax_compilation_cache_max_size != -1:
        for path, _ in entries:
            path.with_name(path.name.removesuffix("-cache") + "-atime").touch()
        return
    size = sum(info.st_size for _, info in entries)
    for path, info in sorted(entries, key=lambda entry: max(entry[1].st_atime, entry[1].st_mtime)):
        if size <= MAX_BYTES:
            break
        path.unlink(missing_ok=True)
        size -= info.st_size


def _hear() -> None:
    """Sends JAX's warnings about our folder to the log, also where a filter makes errors of warnings."""
    if not warnings.filters or warnings.filters[0][1] != TROUBLE:  # changing filters makes Python forget what it said
        warnings.filterwarnings("always", TROUBLE.pattern, UserWarning)
    show = warnings.showwarning
    if getattr(show, "__module__", None) != __name__:

        def hear(message: Warning | str, *others: Any, **options: Any) -> None:
            if not _report(str(message)):
                show(message, *others, **options)

        warnings.showwarning = hear


def _report(message: str) -> bool:
    """Whether it was about our folder. A broken entry is removed, since JAX does not write over one."""
    global _said
    trouble = TROUBLE.match(message)
    if trouble is None or _folder is None or config.jax_compilation_cache_dir != str(_folder):
        return False
    action, program, reason = trouble.groups()
    if action == "reading":
        with contextlib.suppress(OSError):
            for path in _folder.glob(f"{glob.escape(program)}-*"):
                path.unlink(missing_ok=True)
    log.log(
        logging.DEBUG if _said else logging.WARNING,
        "compiled programs in %s: %s %s failed (%s). It is compiled again; if this recurs, delete the folder, or %s",
        *(_folder, action, program, reason[:200], OFF),
    )
    _said = True
    return True


def _count() -> None:
    global _counts
    if not _counts:
        _counts = True
        jax.monitoring.register_event_duration_secs_listener(_on_duration)
        jax.monitoring.register_event_listener(_on_event)


def _on_duration(event: str, duration_secs: float, **_: object) -> None:
    global _requests
    if event in COMPILING:
        _add_span(time.perf_counter() - duration_secs, time.perf_counter())
    if event == "/jax/core/compile/backend_compile_duration":  # loading included
        _requests += 1


def _add_span(begin: float, end: float) -> None:
    """Tracing a program may trace and compile others: a second counts once."""
    with _span_lock:
        while _spans and _spans[-1][1] >= begin:
            begin = min(begin, _spans.pop()[0])
        _spans.append((begin, end))
        if len(_spans) > 1000:
            _spans[:2] = [(_spans[0][0], _spans[0][0] + sum(span[1] - span[0] for span in _spans[:2]))]


def _on_event(event: str, **_: object) -> None:
    global _hits
    if event == "/jax/compilation_cache/cache_hits":
        _hits += 1
