"""The released model's golden values: does SmolLM3-3B compute here what its authors' tests expect of it?

They are float32 results: its bfloat16 weights run in float32 at the highest matmul precision, as in parity.py. The
last of the 20 tokens of the text is left out: it differs between sound implementations.
"""

import json
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from sharding.strategies import Rules

from ..config import SMOLLM3_3B, ModelConfig
from ..errors import CheckpointFormatError, OptionError
from ..generation.api import generate
from ..generation.sampling import SamplingParams
from ..progress import busy
from ..tokenizer import load_tokenizer
from ..weights import hub
from ..weights.load import load, open_checkpoint, text_folder

# What of a config makes up the computation, context length and token ids left out.
FIELDS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "rms_norm_eps", "rope_theta", "rope_scaling", "rope_layers", "layer_types"),
    *("tie_word_embeddings", "attention_bias", "mlp_bias"),
)


def released() -> dict[str, Any]:
    """The golden values of SmolLM3-3B: logits of eight tokens, and a text; and its config."""
    text = resources.files("smollm3_jax.evaluate").joinpath("goldens.json").read_text(encoding="utf-8")
    return {"config": SMOLLM3_3B} | json.loads(text)


def verify_goldens(
    folder: str | Path,
    goldens: Mapping[str, Any] | None = None,
    *,
    mesh: Mesh | None = None,
    rules: str | Rules | None = None,
) -> dict[str, Any]:
    """Compares a checkpoint with golden values.

    Args:
      goldens: as `released` has them, which None stands for.
      mesh, rules: how the model lies on several devices, as for `from_pretrained`.

    Returns:
      What was found, `checks` (name -> passed) and `ok`; ready for json.dumps.

    Raises:
      CheckpointFormatError: the checkpoint is not of the architecture that the values are of.
      SmolLM3Error: it is unsound, or comes without a tokenizer.
    """
    goldens = released() if goldens is None else goldens
    path = hub.resolve(folder)
    checkpoint = open_checkpoint(path)
    _check_architecture(path, checkpoint.config, goldens)
    if checkpoint.config.quantization is not None:
        raise OptionError(f"the golden values are of plain weights, and those of {path} are quantized: give the plain")
    tokenizer = load_tokenizer(text_folder(path), checkpoint.config)
    prompt = tokenizer.encode(goldens["prompt"])
    with jax.default_matmul_precision("highest"):
        model = load(checkpoint, "float32", mesh, rules)
        with busy("computing"):
            logits = np.asarray(model(jnp.array([goldens["token_ids"]], jnp.int32))[0])
            params = SamplingParams(max_new_tokens=goldens["new_tokens"])
            new = generate(model, [prompt], params)[0]
    text = tokenizer.decode([*prompt, *new])[len(tokenizer.decode(prompt)) :]
    found = {"mean": logits.mean(axis=-1), "first": logits[0, : len(goldens["first"])]}
    report: dict[str, Any] = {"model": str(path), "against": goldens["model"], "source": goldens["source"]}
    checks = {"finite": bool(np.isfinite(logits).all())}
    for name, values in found.items():
        expected, tolerance = np.asarray(goldens[name]), goldens[f"{name}_tolerance"]
        # As torch.testing.assert_close has it, with one number for both of its bounds.
        checks[name] = bool((np.abs(values - expected) <= tolerance * (1 + np.abs(expected))).all())
        difference = float(np.abs(values - expected).max())
        report[f"{name}_max_abs"] = difference if np.isfinite(difference) else None  # JSON knows no NaN
    checks["text"] = text.startswith(goldens["continuation"])
    return report | {"text": text, "checks": checks, "ok": all(checks.values())}


def _check_architecture(path: Path, config: ModelConfig, goldens: Mapping[str, Any]) -> None:
    wanted = ModelConfig.from_hf(goldens["config"])
    for field in FIELDS:
        ours, theirs = getattr(config, field), getattr(wanted, field)
        if ours != theirs:
            raise CheckpointFormatError(
                f"{path} is not {goldens['model']}, of which the golden values are: its {field} is {ours}, not "
                f"{theirs}; compare it with `--against transformers`, or with another checkpoint"
            )
