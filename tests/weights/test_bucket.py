import fsspec
import numpy as np
import pytest
import tiny

from smollm3_jax.errors import HubError
from smollm3_jax.weights.hub import resolve
from smollm3_jax.weights.load import open_checkpoint


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """A model in fsspec's store of this process's memory."""
    monkeypatch.setenv("SMOLLM3_JAX_CACHE", str(tmp_path / "cache"))
    store = fsspec.filesystem("memory")
    put(store, tiny.talking_checkpoint(tmp_path / "model"))
    yield store
    store.rm("/models", recursive=True)


def put(store, folder):
    for file in folder.iterdir():
        store.pipe_file(f"/models/m/{file.name}", file.read_bytes())


def test_a_model_comes_here_once(bucket, tmp_path, monkeypatch):
    folder = resolve("memory://models/m")
    for name, tensor in open_checkpoint(tmp_path / "model").tensors.items():
        np.testing.assert_array_equal(open_checkpoint(folder).tensors[name].read(), tensor.read())
    monkeypatch.setattr(type(bucket), "open", None)  # nothing is read again
    assert resolve("memory://models/m/") == folder


def test_what_changes_there_changes_here(bucket, tmp_path):
    folder = resolve("memory://models/m")
    before = (folder / "model.safetensors").read_bytes()
    put(bucket, tiny.tiny_checkpoint(tmp_path / "other", seed=1))
    bucket.rm("/models/m/tokenizer.json")
    after = (resolve("memory://models/m") / "model.safetensors").read_bytes()
    assert len(after) == len(before) and after != before
    assert not (folder / "tokenizer.json").exists()


def test_a_copy_that_broke_off_is_made_again(bucket, monkeypatch):
    def broken(self, *args, **options):
        raise OSError("the network is gone")

    with monkeypatch.context() as patch:
        patch.setattr(type(bucket), "open", broken)
        with pytest.raises(HubError, match="cannot be read: the network is gone"):
            resolve("memory://models/m")
    assert open_checkpoint(resolve("memory://models/m"))


@pytest.mark.parametrize("note", [b"", b"[1]", b"\xff", b"[" * 100_000])
def test_a_note_that_says_nothing(bucket, note):
    folder = resolve("memory://models/m")
    (folder / ".copied").write_bytes(note)
    assert open_checkpoint(resolve("memory://models/m"))


@pytest.mark.parametrize("folder", ["memory://models/none", "memory://models", "nonsense://a/b"])
def test_what_is_no_model_is_said(bucket, folder):
    with pytest.raises(HubError, match=r"holds no config.json|cannot be read"):
        resolve(folder)
