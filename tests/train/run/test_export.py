import jax
import numpy as np
import pytest
import tiny
from etils import epath
from flax import nnx
from safetensors.numpy import load_file

import smollm3_jax as s3
from smollm3_jax.errors import CheckpointFormatError, OptionError, TrainingError
from smollm3_jax.train.run.checkpoint import Checkpoints
from smollm3_jax.train.run.export import export
from smollm3_jax.weights.save import tensors_of


@pytest.fixture
def model():
    return s3.SmolLM3(s3.ModelConfig.from_hf(tiny.raw_config("one_layer")), rngs=nnx.Rngs(0))


@pytest.fixture
def run(tmp_path, model):
    """A run folder with checkpoints of steps 2, 4 and 6: the model times 1, 2 and 3."""
    folder = epath.Path(tmp_path / "run")
    (folder / "tokenizer").mkdir(parents=True)
    (folder / "tokenizer" / "tokenizer.json").write_text("{}")
    about = {"config": model.config.to_hf(), "generation_config": model.generation_config.to_hf()}
    checkpoints = Checkpoints(folder / "checkpoints")
    for factor in (1, 2, 3):
        checkpoints.save(2 * factor, {"model": jax.tree.map(lambda x, f=factor: f * x, model)}, about)
    checkpoints.close()
    return folder


def assert_times(folder, model, factor):
    found = load_file(folder / "model.safetensors")
    for tensor in tensors_of(model):
        # A checkpoint's number is rounded once, and on this side too; each checkpoint more in a mean takes three
        # roundings of what is at most 1.5 times the result.
        allowed = (2 + 2 * 3 * 1.5) * 2.0**-24
        np.testing.assert_allclose(found[tensor.name], factor * tensor.read(), rtol=allowed, err_msg=tensor.name)


@pytest.mark.parametrize(
    ("options", "steps", "factor"),
    [({}, [6], 3), ({"step": 4}, [4], 2), ({"average": 3}, [6, 4, 2], 2), ({"step": 4, "average": 2}, [4, 2], 1.5)],
)
def test_a_checkpoint_or_the_mean_of_several(run, model, tmp_path, options, steps, factor):
    assert export(run, tmp_path / "out", **options) == steps
    assert_times(tmp_path / "out", model, factor)
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"


def test_links_out_of_the_run_are_not_copied(run, tmp_path):
    (tmp_path / "secret").write_text("secret")
    texts = tmp_path / "run" / "tokenizer"
    (texts / "diary.txt").symlink_to(tmp_path / "secret")  # which is no model's
    (texts / "merges.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointFormatError, match=r"merges\.txt is a link that leads out"):
        export(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (texts / "merges.txt").unlink()
    export(run, tmp_path / "out")
    assert "secret" not in [path.read_text() for path in (tmp_path / "out").glob("*.txt")]


def test_in_another_dtype(run, model, tmp_path):
    export(run, tmp_path / "out", step=2, dtype="bfloat16")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert {x.dtype.name for x in found.values()} == {"bfloat16"}


def test_a_damaged_one_is_passed_over_unless_it_was_named(run, model, tmp_path):
    (run / "checkpoints" / "00000006" / "about" / "metadata").write_text("{}")
    assert export(run, tmp_path / "out") == [4]
    with pytest.raises(TrainingError, match="cannot be read"):
        export(run, tmp_path / "other", step=6)


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"step": 3}, OptionError, "--step 3: .* has checkpoints of 2, 4, 6"),
        ({"average": 4}, TrainingError, "has 3 sound checkpoints up to there, not 4"),
    ],
)
def test_what_is_not_there(run, tmp_path, options, error, said):
    with pytest.raises(error, match=said):
        export(run, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_run_without_checkpoints(tmp_path):
    with pytest.raises(OptionError, match="holds no checkpoint"):
        export(epath.Path(tmp_path), tmp_path / "out")
