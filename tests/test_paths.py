"""Where files are."""

from pathlib import Path

import pytest

from smollm3_jax import paths


@pytest.mark.parametrize(
    ("own", "xdg", "expected"),
    [("/a", "/b", "/a"), ("", "/b", "/b/smollm3-jax"), ("", "", "/home/x/.cache/smollm3-jax")],
)
def test_cache_dir(monkeypatch, own, xdg, expected):
    for name, value in {"SMOLLM3_JAX_CACHE": own, "XDG_CACHE_HOME": xdg, "HOME": "/home/x"}.items():
        monkeypatch.setenv(name, value)
    assert paths.cache_dir() == Path(expected)


def test_which_paths_are_of_an_object_store():
    assert paths.is_remote("gs://bucket/x") and not paths.is_remote(Path("/here/x"))
