import sys
from types import SimpleNamespace

import pytest
from etils import epath

from smollm3_jax.train.run import backends
from smollm3_jax.train.settings_file import parse


def test_none_is_opened_that_was_not_asked_for(tmp_path):
    settings = parse({})
    assert backends.tensorboard(epath.Path(tmp_path), settings) is None and backends.wandb(settings) is None


def test_a_missing_library_is_said_and_nothing_more(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    assert backends.tensorboard(epath.Path(tmp_path), parse({"log": {"tensorboard": True}})) is None
    assert "log.tensorboard:" in caplog.text and "metrics.jsonl has it all" in caplog.text


@pytest.mark.parametrize("works", [True, False])
def test_weights_and_biases(monkeypatch, caplog, works):
    logged = []

    def init(**options):
        if not works:
            raise ConnectionError("no login\nand more")
        assert options["project"] == "p" and options["config"]["log"]["wandb"] == "p"
        return SimpleNamespace(log=lambda values, step: logged.append((step, values)))

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    backend = backends.wandb(parse({"log": {"wandb": "p"}}))
    if works:
        assert backend is not None
        backend(3, {"loss": 1.0})
        assert logged == [(3, {"loss": 1.0})]
    else:
        assert backend is None and "log.wandb: no login; metrics.jsonl has it all" in caplog.text
