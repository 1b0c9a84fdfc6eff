"""Where files are."""

from pathlib import Path

import pytest

from smollm3_jax import paths
from smollm3_jax.errors import SaveError


@pytest.mark.parametrize(
    ("own", "xdg", "expected"),
    [("/a", "/b", "/a"), ("", "/b", "/b/smollm3-jax"), ("", "", "/home/x/.cache/smollm3-jax")],
)
def test_cache_dir(monkeypatch, own, xdg, expected):
    for name, value in {"SMOLLM3_JAX_CACHE": own, "XDG_CACHE_HOME": xdg, "HOME": "/home/x"}.items():
        monkeypatch.setenv(name, value)
    assert paths.cache_dir() == Path(expected)


@pytest.mark.parametrize("variable", ["SMOLLM3_JAX_CACHE", "XDG_CACHE_HOME", "HOME"])
def test_a_user_without_a_home(monkeypatch, variable):
    """As in a container that runs as any user; no folder named ~ is made."""
    for name in ("SMOLLM3_JAX_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, "~nobody-of-that-name/x")
    with pytest.raises(SaveError, match="name a folder in the variable SMOLLM3_JAX_CACHE"):
        paths.cache_dir()
    assert paths.user_path("~nobody-of-that-name/x") == Path("~nobody-of-that-name/x")


def test_which_paths_are_of_an_object_store():
    assert paths.is_remote("gs://bucket/x") and not paths.is_remote(Path("/here/x"))
