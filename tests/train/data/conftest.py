import pytest


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("SMOLLM3_JAX_CACHE", str(tmp_path_factory.mktemp("cache")))
