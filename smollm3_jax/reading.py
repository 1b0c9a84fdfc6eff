"""Reads files that a user names, without waiting for ever and up to a limit."""

import errno
import os
import stat
from collections.abc import Iterator
from typing import IO


def read_file(path: str | os.PathLike[str], limit: int) -> bytes:
    """All of a file, or what comes through a pipe, such as `<(...)` of a shell and /dev/stdin.

    Args:
      limit: in bytes; not more is ever read.

    Raises:
      OSError: it cannot be opened, is a folder, a pipe that nothing writes to, or there is more; also for a name with
        a NUL in it.
    """
    path = os.fspath(path)
    if "\0" in path:
        raise OSError(errno.EINVAL, "a file's name has no NUL in it")
    # Opening a pipe would wait until somebody writes to it.
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    with open(descriptor, "rb", buffering=0) as file:
        begin = b""
        if stat.S_ISFIFO(os.fstat(descriptor).st_mode):
            begin = file.read(1)  # None where nothing has come yet, but somebody will write
            if begin == b"":
                raise OSError(errno.EPIPE, "it is a pipe that nothing writes to")
        os.set_blocking(descriptor, True)
        parts, left = [begin or b""], limit
        while left >= 0 and (part := file.read(min(left + 1, 2**24))):
            parts.append(part)
            left -= len(part)
    content = b"".join(parts)
    if len(content) > limit:
        raise OSError(errno.EFBIG, f"it is larger than {limit:,} bytes")
    return content


def lines(file: IO[bytes], limit: int) -> Iterator[bytes]:
    """The lines of an open file with their ends; of one that is longer than `limit` bytes, its first `limit` + 1."""
    while line := file.readline(limit + 1):
        yield line
        while len(line) > limit and not line.endswith(b"\n"):
            line = file.readline(limit + 1)


def why(error: Exception) -> str:
    """An error at reading, without the file's name, which a message has anyway."""
    return (isinstance(error, OSError) and error.strerror) or str(error)
