from corpora import read, write_jsonl
from etils import epath

from smollm3_jax.train.data import files, sources
from smollm3_jax.train.data.sources import Documents


def test_a_folder_in_the_order_of_names(tmp_path):
    for name, text in (("b", "second"), ("a", "first")):
        write_jsonl(tmp_path / f"{name}.jsonl", [text])
    (tmp_path / "notes.pdf").write_bytes(b"")
    assert read(tmp_path) == ["first", "second"]


def test_an_edit_anywhere_in_a_long_file_is_seen(tmp_path, monkeypatch):
    """Of a corpus beyond the limit, only what lies in the pieces that are compared."""
    content = bytearray(b"x" * (4 * files.HASHED))
    path = epath.Path(tmp_path / "a.txt")
    path.write_bytes(bytes(content))
    of = lambda: Documents([(1, str)], ["a.txt"], [path]).files  # noqa: E731
    whole, pieces = of(), Documents([(1, str)], ["a.txt"], [path]).pieces
    content[3 * files.HASHED // 2] = ord("y")
    path.write_bytes(bytes(content))
    assert of() != whole and Documents([(1, str)], ["a.txt"], [path]).pieces == pieces
    monkeypatch.setattr(sources, "WHOLE", 100)
    assert of() == pieces
