import pytest

from smollm3_jax.errors import HubError
from smollm3_jax.weights import demo, demo_wheel, hub


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("SMOLLM3_JAX_CACHE", str(tmp_path))
    return tmp_path


def raise_(error):
    raise error


def test_the_hub_comes_first(cache, monkeypatch):
    monkeypatch.setattr(hub, "pull", lambda name: cache / name)
    assert demo.pull_demo() == cache / hub.DEMO_ID


def test_without_a_hub_the_gguf_is_converted_once(cache, monkeypatch):
    calls = []

    def convert(source, folder, dtype, force):
        calls.append((source, dtype))
        folder.mkdir()
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(hub, "pull", lambda name: raise_(hub.HubUnreachable("no network")))
    monkeypatch.setattr(demo_wheel, "demo_gguf", lambda: cache / "demo.gguf")
    monkeypatch.setattr(demo, "convert", convert)
    folder = demo.pull_demo()
    assert folder == demo.pull_demo() == cache / "SmolLM2-135M-Instruct"
    assert calls == [(cache / "demo.gguf", "bfloat16")]


def test_other_errors_of_the_hub_are_not_hidden(cache, monkeypatch):
    monkeypatch.setattr(hub, "pull", lambda name: raise_(HubError("corrupt download")))
    with pytest.raises(HubError, match="corrupt"):
        demo.pull_demo()
