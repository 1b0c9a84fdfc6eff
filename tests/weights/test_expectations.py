"""What other programs expect of folders that are written here, where the programs themselves are not run.

vLLM makes SmolLM3 by transformers' class from the config alone, and loads tensors into it by name
(vllm/model_executor/models/transformers/base.py); adapters by what its vllm/lora/peft_helper.py reads.
"""

import json
from pathlib import Path

import pytest
import tiny
from safetensors import safe_open

import smollm3_jax
from smollm3_jax.weights.peft import adapter_config

pytestmark = pytest.mark.torch


@pytest.mark.parametrize("name", ["release_like", "untied", "nope_pattern", "sliding", "yarn", "llama"])
def test_a_model_made_from_the_config_has_the_tensors_of_the_folder(name, tmp_path):
    import torch
    import transformers

    smollm3_jax.convert(tiny.tiny_checkpoint(tmp_path / "hf", name), tmp_path / "out")
    raw = json.loads((tmp_path / "out" / "config.json").read_text())
    config = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    own = getattr(transformers, raw["architectures"][0])
    with torch.device("meta"):
        inner = transformers.AutoModel.from_config(config)
        assert isinstance(inner, own(config).base_model.__class__)
    wanted = {f"model.{key}": tuple(x.shape) for key, x in inner.state_dict().items()}
    if not config.tie_word_embeddings:
        wanted["lm_head.weight"] = (config.vocab_size, config.hidden_size)
    with safe_open(tmp_path / "out" / "model.safetensors", "np") as file:
        assert {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()} == wanted  # noqa: SIM118
    assert getattr(config, "quantization_config", None) is None
    mine = smollm3_jax.from_pretrained(tmp_path / "out").config
    if raw["model_type"] == "smollm3":
        assert tuple(map(bool, config.no_rope_layers)) == mine.rope_layers
        windows = [config.sliding_window if kind == "sliding_attention" else None for kind in config.layer_types]
        assert [None if w >= 2**31 - 1 else w for w in mine.windows or [2**31] * len(windows)] == windows
    assert config.rope_parameters["rope_theta"] == mine.rope_theta


def test_an_adapter_has_what_vllm_asks_of_it(tmp_path):
    config = adapter_config("base", ("q_proj", "down_proj"), 8, 16.0, use_rslora=True)
    assert {type(config[key]) for key in ("r", "lora_alpha")} == {int} and isinstance(config["target_modules"], list)
    assert config["bias"] == "none" and config["modules_to_save"] is None and not config["use_dora"]
    folder: Path = tiny.tiny_adapter(tmp_path / "adapter", tiny.tiny_checkpoint(tmp_path / "hf"))
    with safe_open(folder / "adapter_model.safetensors", "np") as file:
        assert all(key.startswith("base_model.model.model.layers.") for key in file.keys())  # noqa: SIM118
