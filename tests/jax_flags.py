"""Everything that runs on a device, on tiny models; as a script, it prints what came out as JSON.

What a user's environment says about JAX may change neither that anything runs nor what comes out.
"""

import json
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tiny

import smollm3_jax as s3
from smollm3_jax.evaluate.parity import verify
from smollm3_jax.evaluate.perplexity import perplexity
from smollm3_jax.generation.api import complete
from smollm3_jax.generation.requests import Request
from smollm3_jax.train.objectives.pretrain import Pretrain
from smollm3_jax.train.optimizer import adamw, schedule
from smollm3_jax.train.options import StepOptions
from smollm3_jax.train.state import Batch, init_state
from smollm3_jax.train.step import train_step
from smollm3_jax.weights.load import load, open_checkpoint


def write_models(folder: Path) -> None:
    tiny.talking_checkpoint(folder / "talking", num_hidden_layers=1, no_rope_layers=[1])
    raw = tiny.raw_config("all_biases") | {"head_dim": 32, "num_hidden_layers": 1, "use_sliding_window": True}
    raw["sliding_window"] = 9
    tiny.write_checkpoint(folder / "biased", raw, tiny.random_tensors(raw))


def texts(model: s3.SmolLM3, drawn: bool = True, **options: Any) -> list[Any]:
    requests = [Request([5, 6, 7] * 7, s3.SamplingParams(max_new_tokens=6))]
    if drawn:
        params: dict[str, Any] = {
            "temperature": 0.9,
            "repetition_penalty": 1.3,
            "presence_penalty": 0.2,
            "frequency_penalty": 0.1,
        }
        params |= {"top_k": 20, "top_p": 0.9, "min_p": 0.01, "logit_bias": {7: 1.5}, "n": 2, "seed": 5}
        requests.append(
            Request([3, 4], s3.SamplingParams(max_new_tokens=4, logprobs=2, prompt_logprobs=True, **params))
        )
    found = complete(model, requests, **options)
    return [[one.token_ids, [round(entry.logprob, 2) for entry in one.logprobs or []]] for one in found]


def losses(folder: Path, options: StepOptions, z_loss: float = 0.0) -> list[list[float]]:
    model = load(open_checkpoint(folder), "float32", stacked=True)
    optimizer = adamw(schedule("wsd", 1e-2, 10, 2, 3))
    state = init_state(model, optimizer)
    tokens: Any = np.arange(64, dtype=np.int32).reshape(4, 16) % 150 + 3
    segments: Any = np.repeat(np.array([[1] * 9 + [2] * 5 + [0] * 2], np.int32), 4, axis=0)
    batch = Batch(tokens, segments)
    out = []
    for _ in range(2):
        state, metrics = train_step(state, batch, objective=Pretrain(z_loss), optimizer=optimizer, options=options)
        out.append([round(float(metrics[name]), 2) for name in ("loss", "tokens", "bad", "updates")])
    assert {x.dtype.name for x in jax.tree.leaves(state.model)} == {"float32"}
    return out


def everything(folder: Path) -> dict[str, Any]:
    plain = s3.from_pretrained(folder / "talking")
    biased = s3.from_pretrained(folder / "biased")
    tokens: Any = np.array([[5, 6, 7, 8], [9, 8, 7, 6]])  # of numpy's own dtype
    segments: Any = np.array([[1, 1, 2, 2], [1, 1, 1, 0]])
    return {
        "generate": texts(plain),
        "lookup": texts(plain, drawn=False, lookup=3, cache_dtype="int8"),
        "int8": texts(load(open_checkpoint(folder / "talking"), weights="int8"), drawn=False),
        "int4": texts(load(open_checkpoint(folder / "biased"), weights="int4"), drawn=False),
        "logits": np.round(np.asarray(biased(tokens, segment_ids=segments))[:, :3, :3], 2),
        "perplexity": round(perplexity(plain, {"": [[1, 2, 3, 4], [5, 6]]})["perplexity"] or 0, 1),
        "verify": verify(folder / "talking", folder / "talking", "w1 w2 w3")["ok"],
        "train": losses(folder / "talking", StepOptions(dtype="float32")),
        "train in parts": losses(folder / "biased", StepOptions(micro_batches=2, remat="full"), z_loss=1e-4),
    }


if __name__ == "__main__":
    if "x64" in sys.argv:
        jax.config.update("jax_enable_x64", True)  # as the caller of the library may
    print(json.dumps(everything(Path(sys.argv[1])), default=np.ndarray.tolist))
