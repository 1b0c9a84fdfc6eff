"""Text as people's files have it: with a byte order mark, in UTF-16 or UTF-32, compressed."""

import bz2
import codecs
import contextlib
import gzip
import io
import lzma
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from .errors import DataError, SupportError
from .reading import read_file
from .support import how_to_install

# The longer marks first: that of UTF-32 begins as that of UTF-16 does.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
# How a compressed file begins; of bzip2 more than its two letters, with which a text may begin.
_MAGIC = (
    (re.compile(rb"\x1f\x8b\x08"), "gzip"),
    (re.compile(rb"\x28\xb5\x2f\xfd"), "zstd"),
    (re.compile(rb"\xfd7zXZ\x00"), "xz"),
    (re.compile(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)"), "bzip2"),
)
# How the names of compressed files end.
COMPRESSED = (".gz", ".gzip", ".zst", ".zstd", ".bz2", ".xz")
# So much of a file's beginning tells what it is.
HEAD = 1024
_BLOCK = 2**22
_MOST = 2**32  # bytes of a text that is read whole


def encoding_of(head: bytes) -> str:
    """The encoding of a text that begins with these bytes: what its byte order mark says, else UTF-8."""
    return next((encoding for mark, encoding in _MARKS if head.startswith(mark)), "utf-8")


def compression_of(head: bytes) -> str | None:
    """gzip, zstd, xz or bzip2; None if a file that begins so is not compressed."""
    return next((name for magic, name in _MAGIC if magic.match(head)), None)


def decode(content: bytes) -> str:
    """The text of UTF-8, with a byte order mark or not, or of UTF-16 and UTF-32 with one; the mark is no part of it.

    Raises:
      UnicodeError: it is not that; the reason.
    """
    encoding = encoding_of(content[:4])
    if encoding == "utf-8":
        refuse_utf16(content[:HEAD])
    return content.decode(encoding)


def refuse_utf16(head: bytes) -> None:
    """Raises UnicodeError if a text begins as UTF-16 or UTF-32 without a mark do: with many NUL bytes."""
    if len(head) >= 4 and encoding_of(head) == "utf-8" and head.count(0) * 5 > len(head):
        raise UnicodeError(
            "it has NUL bytes as UTF-16 has them, but no byte order mark that says so; rewrite it as UTF-8, for "
            "instance by iconv -f UTF-16LE -t UTF-8"
        )


def read(path: Path) -> bytes:
    """What is in a file of text: as UTF-8, without a mark, and no longer compressed.

    Raises:
      OSError: it cannot be read.
      DataError: it is damaged, or is text in another encoding.
      SupportError: it is compressed in a way that needs a library which is not installed.
    """
    whole = "\0" in str(path) or (path.exists() and not path.is_file())  # `open` has no OSError for NUL
    with io.BytesIO(read_file(path, _MOST)) if whole else path.open("rb") as file:
        return _all(blocks(file, path), path).removeprefix(codecs.BOM_UTF8)


def _all(pieces: Iterator[bytes], name: object) -> bytes:
    parts, left = [], _MOST
    for piece in pieces:
        parts.append(piece)
        if (left := left - len(piece)) < 0:
            raise DataError(f"{name} holds more than {_MOST:,} bytes of text; give a part of it")
    return b"".join(parts)


def blocks(file: IO[bytes], name: object) -> Iterator[bytes]:
    """What `read` gives, piece by piece, of an open file, with UTF-8's mark if it has one. Raises as `read` does."""
    with _unpacked(file, name) as stream:
        head = _read(stream, name, HEAD)
        encoding = encoding_of(head)
        try:
            refuse_utf16(head)
            if encoding not in ("utf-16", "utf-32"):
                yield head
                while block := _read(stream, name):
                    yield block
                return
            # Half a surrogate pair becomes bytes that are not UTF-8: that is for the record to say which has it.
            decoder = codecs.getincrementaldecoder(encoding)("surrogatepass")
            while head:
                yield decoder.decode(head).encode(errors="surrogatepass")
                head = _read(stream, name)
            yield decoder.decode(b"", final=True).encode(errors="surrogatepass")
        except UnicodeError as error:
            raise DataError(f"{name} is not text in UTF-8: {error}") from None


def _read(stream: IO[bytes], name: object, size: int = _BLOCK) -> bytes:
    try:
        return stream.read(size)
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise DataError(f"{name} cannot be unpacked: {error}; copy or download it again") from None
    except OSError as error:
        if error.errno is not None:
            raise
        # bz2 and pyarrow say so of damage.
        raise DataError(f"{name} cannot be unpacked: {error}; copy or download it again") from None


@contextlib.contextmanager
def _unpacked(file: IO[bytes], name: object) -> Iterator[IO[bytes]]:
    head = file.read(HEAD)
    file.seek(0)
    kind = compression_of(head)
    if kind is None:
        if head and str(name).lower().endswith(COMPRESSED):
            raise DataError(f"{name} is not compressed as its name says; rename it or copy it again")
        yield file
    elif kind == "zstd":
        try:
            import pyarrow
        except ImportError:
            raise SupportError(f"{name}: zstd needs pyarrow: {how_to_install('parquet')}") from None
        with pyarrow.CompressedInputStream(file, "zstd") as stream:
            yield stream
    else:
        openers: dict[str, Any] = {"gzip": gzip.open, "bzip2": bz2.open, "xz": lzma.open}
        with openers[kind](file, "rb") as stream:
            yield stream
