"""Checkpoints of runs as models to merge: against the same ones exported by hand."""

import shutil

import pytest
import tiny
from etils import epath
from flax import nnx
from huggingface_hub import ModelCard
from safetensors.numpy import load_file

import smollm3_jax as s3
from smollm3_jax.commands.main import main
from smollm3_jax.train.run import checkpoint as checkpoints
from smollm3_jax.train.run.checkpoint import Checkpoints
from smollm3_jax.train.run.export import export
from smollm3_jax.weights.card import front_matter
from smollm3_jax.weights.load import open_checkpoint

SLOW = pytest.mark.slow


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run folder with checkpoints of steps 2, 4 and 6, each of another model, and the tokenizer of a model that its
    settings say to be of the hub."""
    folder = tmp_path_factory.mktemp("saved")
    run = folder / "run"
    tiny.talking_checkpoint(run / "tokenizer")
    for name in ("config.json", "model.safetensors"):
        (run / "tokenizer" / name).unlink()
    saved = Checkpoints(epath.Path(run / "checkpoints"))
    config = s3.ModelConfig.from_hf(tiny.raw_config("plain") | {"num_hidden_layers": 2})
    for step in (2, 4, 6):
        model = s3.SmolLM3(config, rngs=nnx.Rngs(step))
        about = {"config": config.to_hf(), "generation_config": model.generation_config.to_hf()}
        about["settings"] = {"model": {"path": "HuggingFaceTB/SmolLM3-3B"}}
        saved.save(step, {"model": model}, about)
    saved.close()
    return run


def merged(out, *words):
    assert main(["merge", *map(str, words), "--out", str(out)]) == 0
    return load_file(out / "model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(x.dtype == b[name].dtype and (x == b[name]).all() for name, x in a.items())


@pytest.mark.parametrize(
    "words", [["--dtype", "bfloat16"], pytest.param([], marks=SLOW), pytest.param(["--method", "slerp"], marks=SLOW)]
)
def test_the_same_as_of_exports_by_hand(made, tmp_path, words):
    for step in (2, 6):
        export(epath.Path(made), tmp_path / f"step{step}", step=step)
    by_hand = merged(tmp_path / "by-hand", f"{tmp_path / 'step2'}=0.9", f"{tmp_path / 'step6'}=0.1", *words)
    found = merged(tmp_path / "out", f"{made}@2=0.9", f"{made}@6=0.1", *words)
    assert same(found, by_hand) and not same(found, load_file(tmp_path / "step2" / "model.safetensors"))
    assert open_checkpoint(tmp_path / "out").files == open_checkpoint(tmp_path / "step2").files
    assert not same(found, merged(tmp_path / "mixed", f"{tmp_path / 'step2'}=0.5", f"{made}@6=0.5", *words))


def test_a_run_by_itself_is_its_newest_checkpoint(made, tmp_path, monkeypatch):
    monkeypatch.chdir(made.parent)
    assert same(merged(tmp_path / "newest", "run=1"), merged(tmp_path / "step6", "run@6=1"))


def test_a_card_says_of_which_steps_and_model(made, tmp_path):
    merged(tmp_path / "out", f"{made}@2=0.9", f"{made}@4=0.1")
    text = (tmp_path / "out" / "README.md").read_text()
    assert "`run@2`, `run@4`, merged by linear" in text and "model: run@2" in text and str(made) not in text
    assert front_matter(tmp_path / "out" / "README.md")["base_model"] == ["HuggingFaceTB/SmolLM3-3B"]
    assert ModelCard(text, ignore_metadata_errors=False).data.license == "apache-2.0"


def test_each_parameter_is_read_once_and_one_of_each_checkpoint_is_held(made, tmp_path, monkeypatch):
    read, restore = [], checkpoints.restore_array

    def counted(folder, step, name):
        read.append((name, step))
        return restore(folder, step, name)

    monkeypatch.setattr(checkpoints, "restore_array", counted)
    merged(tmp_path / "out", f"{made}@2=0.9", f"{made}@6=0.1")
    arrays = checkpoints.read_about(epath.Path(made / "checkpoints"), 2)["arrays"]
    assert sorted(read) == sorted((name, step) for name in arrays for step in (2, 6))
    assert read[::2] == [(name, 2) for name, _ in read[1::2]]  # both of a parameter, then both of the next


@pytest.fixture
def damaged(made, tmp_path):
    """The same run; in step 6 a byte of the weights is another one."""
    run = tmp_path / "damaged"
    shutil.copytree(made, run)
    files = [path for path in (run / "checkpoints" / "00000006" / "state").rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 4
    largest.write_bytes(content)
    return run


def test_a_damaged_checkpoint_is_passed_over_unless_it_was_named(damaged, tmp_path, capsys, caplog):
    assert same(merged(tmp_path / "newest", f"{damaged}=1"), merged(tmp_path / "step4", f"{damaged}@4=1"))
    assert "step 4 is taken" in caplog.text
    assert main(["merge", f"{damaged}@6=1", "--out", str(tmp_path / "out")]) == 3
    assert "checkpoint 6" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("@3", "run@3: the run has checkpoints of 2, 4, 6"),
        ("@last", "after @ comes the step of a checkpoint, a number"),
        ("@", "after @ comes the step of a checkpoint, a number"),
    ],
)
def test_a_step_that_is_not_there(made, tmp_path, capsys, name, said):
    assert main(["merge", f"{made}@2=0.5", f"{made}{name}=0.5", "--out", str(tmp_path / "out")]) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_run_without_checkpoints(tmp_path, capsys):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    assert main(["merge", f"{tmp_path / 'run'}=1", "--out", str(tmp_path / "out")]) == 2
    assert "holds no checkpoint" in capsys.readouterr().err


def test_a_model_with_an_at_sign_in_its_name_is_a_model(tmp_path):
    tiny.tiny_checkpoint(tmp_path / "a@3", "one_layer")
    assert same(merged(tmp_path / "out", f"{tmp_path / 'a@3'}=1"), load_file(tmp_path / "a@3" / "model.safetensors"))
