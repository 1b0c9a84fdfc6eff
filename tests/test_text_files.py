"""Text in the encodings and compressions that people's files have."""

import bz2
import gzip
import lzma
from pathlib import Path

import pytest

from smollm3_jax import text_files
from smollm3_jax.errors import DataError
from smollm3_jax.text_files import decode, read

TEXT = "w5 höher 三\nw6\r\n" * 50


def zstd(content: bytes) -> bytes:
    return pytest.importorskip("pyarrow").compress(content, codec="zstd", asbytes=True)


COMPRESS = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": zstd}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_marks_say_the_encoding_and_are_no_text(encoding):
    assert decode(TEXT.encode(encoding)) == TEXT
    assert decode("".encode(encoding)) == ""


@pytest.mark.parametrize(
    "content", [b"\xff", b"w5 \xe9", "w5".encode("utf-16-le"), "w5 w6".encode("utf-16-be"), "w5 w6".encode("utf-32-le")]
)
def test_what_is_not_utf8_is_said(content):
    with pytest.raises(UnicodeError):
        decode(content)


@pytest.mark.parametrize("ending", COMPRESS)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_compressed_files(tmp_path, ending, encoding):
    """Of two members too, as `cat a.gz b.gz` makes them, and under a name that does not say it."""
    packed = COMPRESS[ending](TEXT.encode(encoding)) + COMPRESS[ending](b"")
    for name in (f"a.{ending}", "a.txt"):
        (tmp_path / name).write_bytes(packed)
        assert read(tmp_path / name) == TEXT.encode()


@pytest.mark.parametrize("ending", COMPRESS)
def test_damage_in_compressed_files_is_said(tmp_path, ending):
    file = tmp_path / f"a.{ending}"
    packed = bytearray(COMPRESS[ending](bytes(range(256)) * 40))
    file.write_bytes(packed[:-9])
    with pytest.raises(DataError, match="cannot be unpacked"):
        read(file)
    file.write_bytes(b"<html>not found</html>")
    with pytest.raises(DataError, match="not compressed as its name says"):
        read(file)
    file.write_bytes(b"")
    assert read(file) == b""


def test_text_that_begins_as_an_archive_might(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"BZh9 is how bzip2 begins")
    assert read(tmp_path / "a.txt") == b"BZh9 is how bzip2 begins"


def test_a_text_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "_MOST", 1000)
    (tmp_path / "a.gz").write_bytes(gzip.compress(b"a" * 5000))
    with pytest.raises(DataError, match="more than 1,000 bytes of text"):
        text_files.read(tmp_path / "a.gz")
    with pytest.raises(OSError, match="larger than 1,000 bytes"):
        text_files.read(Path("/dev/urandom"))


def test_a_name_with_nul(tmp_path):
    with pytest.raises(OSError, match="has no NUL"):
        read(tmp_path / "a\0b")
