"""All writing: files and folders that are whole or not there, locks, removal. No link is followed.

What is being written has a name that nobody can foresee, beside its place; it is on the disk before it takes that
place, and keeps mode and owner of what was there. A folder's name may lead through links, a file's own may not be one.
"""

import contextlib
import ctypes
import errno
import fcntl
import functools
import hashlib
import operator
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from .errors import SaveError
from .paths import StrPath, is_remote


def write(path: StrPath, content: bytes | str) -> None:
    """Replaces a file, or makes it; text is written as UTF-8. In an object store too.

    Raises:
      OSError: it cannot be written, or is a link or no regular file; what was there is untouched.
    """
    content = content.encode() if isinstance(content, str) else content  # what fails here leaves the disk alone
    if is_remote(path):
        from etils import epath

        epath.Path(path).write_bytes(content)  # an object is whole or not there
        return
    with new_file(path) as file:
        file.write(content)


def write_output(path: StrPath, content: bytes | str) -> None:
    """`write`, of a file that the user names. Raises SaveError, which says why it cannot be written."""
    try:
        write(path, content)
    except (OSError, ValueError) as error:  # ValueError: a name with NUL, half a character
        reason = error.strerror if isinstance(error, OSError) else error
        raise SaveError(f"{path} cannot be written: {reason}") from None


@contextlib.contextmanager
def new_file(path: StrPath) -> Iterator[IO[bytes]]:
    """A file open for writing, which takes its place when the block ends well, and vanishes when not.

    It may also be opened by its `name`, for libraries that want a path. Devices, and the pipes of /dev/stdout and
    /dev/fd, are written to as they are.

    Raises:
      OSError: as for `write`.
    """
    path = Path(path)
    if _is_stream(path):
        with open(path, "wb") as file:
            yield file
        return
    old, new = _regular(path), _beside(path, "tmp")
    # Only those who could read the old file may read the new one.
    mode = 0o666 if old is None else 0o600
    opened = open(new, "xb", opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW, mode))  # noqa: SIM115
    try:
        with opened as file:
            yield file
            file.flush()
            if old is not None:
                _inherit(file.fileno(), old)
            os.fsync(file.fileno())
        os.replace(new, path)
    except BaseException:
        with contextlib.suppress(OSError):
            new.unlink()
        raise
    sync(path.parent)


def unfinished(folder: StrPath, seconds: float = 0.0) -> list[Path]:
    """This user's files that `write` or `new_file` has begun and not ended, at least `seconds` old. A process may still
    be writing them."""
    found = [path for path in Path(folder).glob(".*.tmp") if re.fullmatch(r"\..+\.[0-9a-f]{16}\.tmp", path.name)]
    stats = [(path, path.lstat()) for path in found]
    ours = [(path, x) for path, x in stats if stat.S_ISREG(x.st_mode) and x.st_uid == os.geteuid()]
    return [path for path, x in ours if x.st_mtime <= time.time() - seconds]


def append(path: StrPath, content: bytes | str) -> None:
    """Adds to the end of a file, or makes it, in one write: all or nothing. Raises OSError, as `write` does."""
    rest = memoryview(content.encode() if isinstance(content, str) else content)
    descriptor = _open(Path(path))
    try:
        before = os.fstat(descriptor).st_size
        try:
            while rest:
                rest = rest[os.write(descriptor, rest) :]
        except OSError:
            if os.fstat(descriptor).st_size > before:
                os.ftruncate(descriptor, before)  # half a line would make the next one unreadable, too
            raise
    finally:
        os.close(descriptor)


def locked(path: StrPath, wait: bool = False) -> int:
    """A descriptor, to read and append, of a file that is made if need be; one process at a time has it.

    Closing it, or the end of the process however that comes, lets the next one in.

    Raises:
      BlockingIOError: another process has it, and `wait` is False.
      OSError: the file cannot be opened, or is a link or no regular file.
    """
    descriptor = _open(Path(path))
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


@contextlib.contextmanager
def new_folder(folder: StrPath) -> Iterator[Path]:
    """An empty folder that takes the place of `folder` when the block ends well, and vanishes when not.

    At any moment, power cuts included, `folder` is the old or the new one, whole. Only its owner can look into the new
    one before; then it has the mode and owner of the old one, its files those of the old ones of the same name, or at
    least no wider a mode than those of the same ending. Parents that are missing are made.

    Raises:
      BlockingIOError: another process is writing this folder.
      OSError: it cannot be written, or is a link or no folder; what was there is untouched.
    """
    folder = Path(os.path.abspath(folder))
    with contextlib.ExitStack() as undo, contextlib.ExitStack() as lock:
        for parent in [parent for parent in reversed(folder.parents) if not parent.exists()]:
            parent.mkdir(exist_ok=True)
            undo.callback(_remove_empty, parent)
        _folder(folder)
        lock.enter_context(_lock_beside(folder))
        _recover(folder)
        new = _beside(folder, "partial")
        new.mkdir()
        try:
            if (old := _folder(folder)) is not None:
                _inherit(new, old)
            mode = stat.S_IMODE(new.stat().st_mode)
            new.chmod(mode & ~0o077 | 0o700)  # setgid stays: files get their group by it
            yield new
            if old is not None:
                _inherit_modes(folder, new)
            new.chmod(mode)
            _sync_tree(new)
            _swap(new, folder)
        finally:
            with contextlib.suppress(OSError):  # after the swap this is the old folder, perhaps a read-only one
                new.chmod(0o700)
                remove(new)
        undo.pop_all()
        sync(folder.parent)


def carry(source: Path, target: Path) -> None:
    """Puts a file, folder or link into a new folder, too: files as hard links where the disk has these.

    Raises:
      OSError: it cannot be read or written.
    """
    if source.is_symlink() or not source.is_dir():
        _link(source, target)
        return
    shutil.copytree(source, target, symlinks=True, copy_function=_link)
    for at, _, _ in os.walk(target):
        _inherit(at, (source / os.path.relpath(at, target)).stat())


def remove(path: StrPath) -> None:
    """Removes a file, a link (not what it leads to) or a folder with all that is in it. Raises OSError."""
    if is_remote(path):
        from etils import epath

        there = epath.Path(path)
        there.rmtree() if there.is_dir() else there.unlink()
    elif stat.S_ISDIR(os.lstat(path).st_mode):
        shutil.rmtree(path)
    else:
        os.unlink(path)


def sync(path: StrPath) -> None:
    """What was written to a file or folder is on the disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _open(path: Path) -> int:
    _regular(path)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is not a regular file")
    return descriptor


def _regular(path: Path) -> os.stat_result | None:
    """What is known of the file, None if there is none; OSError if it is anything else."""
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return None
    if stat.S_ISLNK(found.st_mode):
        raise OSError(errno.ELOOP, f"it is a link, to {os.readlink(path)}; name the file itself", str(path))
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))
    return found


def _folder(path: Path) -> os.stat_result | None:
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return None
    if stat.S_ISLNK(found.st_mode):
        raise OSError(errno.ELOOP, f"it is a link, to {os.readlink(path)}; name the folder itself", str(path))
    if not stat.S_ISDIR(found.st_mode):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))
    return found


def _is_stream(path: Path) -> bool:
    """Whether the user means what it leads to: /dev/stdout, /dev/fd/63, /dev/null; none of these can be replaced."""
    return os.path.dirname(os.path.abspath(path)) in ("/dev", "/dev/fd", "/proc/self/fd")


def _stem(path: Path) -> str:
    """How the names beside a file or folder begin; short enough whatever its own name is."""
    name = path.name if len(os.fsencode(path.name)) <= 200 else hashlib.sha256(os.fsencode(path.name)).hexdigest()
    return f".{name}."


def _beside(path: Path, end: str) -> Path:
    return path.with_name(f"{_stem(path)}{secrets.token_hex(8)}.{end}")


def _inherit(new: int | StrPath, old: os.stat_result) -> None:
    """Gives a file or folder the owner and mode of what it replaces, as far as the system lets this user."""
    mode, now = stat.S_IMODE(old.st_mode), os.stat(new)
    if (now.st_uid, now.st_gid) != (old.st_uid, old.st_gid):
        try:
            os.chown(new, old.st_uid, old.st_gid)
        except PermissionError:
            try:
                os.chown(new, -1, old.st_gid)
                mode &= ~stat.S_ISUID
            except PermissionError:
                # Another group than the old one's gets what everybody has.
                mode = (mode & ~(stat.S_ISUID | stat.S_ISGID | stat.S_IRWXG)) | (mode & stat.S_IRWXO) << 3
    os.chmod(new, mode)


def _inherit_modes(old: Path, new: Path) -> None:
    before = {path.name: path.lstat() for path in old.iterdir()}
    before = {name: found for name, found in before.items() if stat.S_ISREG(found.st_mode)}
    for path in new.iterdir():
        now = path.lstat()
        if not stat.S_ISREG(now.st_mode) or now.st_nlink > 1:  # what was carried over is as it was
            continue
        if path.name in before:
            _inherit(path, before[path.name])
            continue
        alike = [found.st_mode for name, found in before.items() if Path(name).suffix == path.suffix]
        path.chmod(functools.reduce(operator.and_, alike, now.st_mode) & 0o777)


@contextlib.contextmanager
def _lock_beside(folder: Path) -> Iterator[None]:
    """Keeps other writers away. The lock's file goes again, so who opened it has to look whether it is still there."""
    file = folder.with_name(f"{_stem(folder)}lock")
    descriptor = locked(file)
    try:
        try:
            ours = os.path.samestat(os.fstat(descriptor), os.lstat(file))
        except FileNotFoundError:
            ours = False
        if not ours:
            raise BlockingIOError(errno.EWOULDBLOCK, "another process is writing it")
        try:
            yield
        finally:
            if os.fstat(descriptor).st_size == 0:  # else it was a file of the user's
                with contextlib.suppress(OSError):
                    file.unlink()
    finally:
        os.close(descriptor)


def _recover(folder: Path) -> None:
    """Tidies up after writers that were killed; there is no other, since this process has the lock."""
    ours = re.compile(re.escape(_stem(folder)) + r"[0-9a-f]{16}\.(partial|previous)")
    for path in list(folder.parent.iterdir()):
        end = ours.fullmatch(path.name)
        found = path.lstat() if end else None
        if found is None or not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
            continue
        if end and end[1] == "previous" and not folder.exists():  # killed inside _swap
            os.rename(path, folder)
        else:
            remove(path)


def _sync_tree(folder: Path) -> None:
    for at, _, names in os.walk(folder):
        for name in names:
            found = os.lstat(path := os.path.join(at, name))
            if stat.S_ISREG(found.st_mode) and found.st_nlink == 1:  # others were there before
                sync(path)
        sync(at)


def _remove_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()


def _swap(new: Path, folder: Path) -> None:
    """Puts new in folder's place; what was there, if anything, is then called `new`."""
    if not folder.exists():
        os.rename(new, folder)
        return
    # renameat2(RENAME_EXCHANGE): Linux's way to exchange two folders in one step.
    at_cwd, exchange = -100, 2
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is not None and rename(at_cwd, os.fsencode(new), at_cwd, os.fsencode(folder), exchange) == 0:
        return
    reason = ctypes.get_errno() if rename is not None else errno.ENOSYS
    if reason not in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        raise OSError(reason, os.strerror(reason))
    # Where the system cannot exchange, two renames: between them only the old folder's new name exists.
    old = _beside(folder, "previous")
    os.rename(folder, old)
    try:
        os.rename(new, folder)
    except OSError:
        os.rename(old, folder)
        raise
    os.rename(old, new)


def _link(source: StrPath, target: StrPath) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:  # file systems without hard links, files of others
        if not stat.S_ISLNK(os.lstat(source).st_mode) and not stat.S_ISREG(os.lstat(source).st_mode):
            raise
        shutil.copy2(source, target, follow_symlinks=False)
        if not os.path.islink(target):
            _inherit(target, os.stat(source))
