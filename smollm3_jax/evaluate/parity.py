"""Parity reports: does a checkpoint compute here what it computes elsewhere?

Both sides run in float32 at the highest matmul precision, so what differs is the weights or the
mathematics, not the rounding of activations.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from sharding.strategies import Rules

from ..errors import CheckpointFormatError, OptionError, SupportError
from ..generation.api import generate
from ..generation.sampling import SamplingParams
from ..model import SmolLM3
from ..progress import busy
from ..support import how_to_install
from ..tokenizer import load_tokenizer
from ..weights.demo import model_folder
from ..weights.load import Checkpoint, common_dtype, is_gguf, load, open_checkpoint, text_folder
from ..weights.quantized import dequantize_tensors
from ..weights.stored import NUMPY_DTYPES, StoredTensor, is_finite, raw_bytes

TEXT = (
    "The sky is blue because air scatters short wavelengths more than long ones. "
    "Le vent se lève, il faut tenter de vivre. 3.14159 * 2 = 6.28318. "
    "def add(a, b):\n    return a + b\n"
    "Der Mond ist aufgegangen, die goldnen Sternlein prangen. El perro come; la luna sale."
)
NEW_TOKENS = 32


@dataclasses.dataclass(frozen=True)
class Tolerance:
    """Bounds for one stored dtype; `source` says where they come from.

    max_abs = relative * max |logit| + absolute; mean_abs likewise holds for the mean; state bounds
    max |difference| / max |value| of a layer's output.
    """

    relative: float
    absolute: float
    mean_abs: float
    top1: float
    state: float
    source: str


TOLERANCES = {
    "float32": Tolerance(
        relative=2e-5,
        absolute=1e-5,
        mean_abs=1e-3,
        top1=1.0,
        state=1e-4,
        source="the bound that this project's parity tests hold against transformers",
    ),
    # Between two sound implementations in bfloat16: nanotron against transformers (nanotron PR #393).
    "bfloat16": Tolerance(
        relative=0.0,
        absolute=1.375,
        mean_abs=0.080,
        top1=0.933,
        state=0.1,
        source="nanotron against transformers in bfloat16, nanotron PR #393: mean 0.080, max 1.375, argmax 93.3 %",
    ),
    "float16": Tolerance(
        relative=0.0,
        absolute=1.375 / 8,
        mean_abs=0.080 / 8,
        top1=0.99,
        state=0.1 / 8,
        source="an eighth of bfloat16's: three more bits of mantissa",
    ),
}


@dataclasses.dataclass(frozen=True)
class _Results:
    """What one side computed: logits [T, V], states [L + 1, T, D] before the final norm, new token ids."""

    logits: np.ndarray
    states: np.ndarray
    new_tokens: list[int]


def verify(
    folder: str | Path,
    against: str | Path,
    prompt: str | None = None,
    *,
    mesh: Mesh | None = None,
    rules: str | Rules | None = None,
) -> dict[str, Any]:
    """Compares a checkpoint with transformers on the same files, or with another checkpoint.

    Args:
      against: "transformers", or a folder, .gguf file or hub id.
      prompt: the text to compute on; None is a built-in one, or fixed ids for a folder without tokenizer.
      mesh, rules: how our models lie on several devices, as for `from_pretrained`.

    Returns:
      The measures, the tolerance, `checks` (name -> passed) and `ok`; ready for json.dumps.

    Raises:
      SmolLM3Error: a checkpoint is unsound, or the two are not of one architecture.
      SupportError: transformers is asked for, but not installed.
    """
    path = model_folder(str(folder))
    ours = open_checkpoint(path)
    tokens = _tokens(path, ours, prompt)
    if against == "transformers":
        if is_gguf(path):
            raise OptionError(f"transformers is compared with on a folder: `smollm3 convert {path} FOLDER` first")
        if ours.config.quantization is not None:
            raise OptionError(
                "transformers cannot read quantized weights of this package; compare with the folder they came from"
            )
        theirs, dtype = None, "float32"
    else:
        theirs = open_checkpoint(model_folder(str(against)))
        _check_same_architecture(ours, theirs)
        # Weights that were rounded on one side only are judged by the coarser dtype.
        dtypes = {common_dtype(ours.tensors), common_dtype(theirs.tensors)}
        dtype = "float32" if len(dtypes) == 1 else next(d for d in ("bfloat16", "float16") if d in dtypes)
    count = min(NEW_TOKENS, ours.config.max_position_embeddings - len(tokens))
    # One model at a time: at 3B parameters two in float32 would not fit on a small machine.
    own = _run_ours(ours, tokens, count, mesh, rules)
    if theirs is None:
        with busy("computing with transformers"):
            reference = _run_transformers(path, tokens, count)
    else:
        reference = _run_ours(theirs, tokens, count, mesh, rules)
    report = {"model": str(path), "against": str(against), "tokens": len(tokens), "weights": None}
    report |= _compare(own, reference, TOLERANCES[dtype])
    report["tolerance"] = {"dtype": dtype, **dataclasses.asdict(TOLERANCES[dtype])}
    if theirs is not None:
        different = _different_weights(_plain(ours), _plain(theirs))
        report["weights"] = {"tensors": len(_plain(ours)), "different": len(different), "first": different[:10]}
        report["checks"]["weights"] = not different
    # A row of the embedding that these tokens do not touch can be NaN without a trace in the logits.
    report["checks"]["finite"] &= all(is_finite(tensor.read()) for tensor in _plain(ours).values())
    report["ok"] = all(report["checks"].values())
    return report


def _tokens(path: Path, checkpoint: Checkpoint, prompt: str | None) -> list[int]:
    if prompt is None and "tokenizer.json" not in checkpoint.files:
        length = min(64, checkpoint.config.max_position_embeddings // 2)
        return np.random.RandomState(0).randint(0, checkpoint.config.vocab_size, length).tolist()
    tokens = load_tokenizer(text_folder(path), checkpoint.config).encode(TEXT if prompt is None else prompt)
    context = checkpoint.config.max_position_embeddings
    if not 0 < len(tokens) < context:
        raise OptionError(
            f"the prompt has {len(tokens)} tokens; give at least 1 and fewer than the context's {context}"
        )
    return tokens


def _check_same_architecture(a: Checkpoint, b: Checkpoint) -> None:
    for field in ("num_hidden_layers", "hidden_size", "vocab_size"):
        x, y = getattr(a.config, field), getattr(b.config, field)
        if x != y:
            raise CheckpointFormatError(f"the two models cannot be compared: {field} is {x} in one, {y} in the other")


def _run_ours(
    checkpoint: Checkpoint, tokens: list[int], count: int, mesh: Mesh | None, rules: str | Rules | None
) -> _Results:
    with jax.default_matmul_precision("highest"):
        model: SmolLM3 = load(checkpoint, "float32", mesh, rules)
        ids = jnp.array([tokens], jnp.int32)
        with busy("computing"):
            return _Results(
                logits=np.asarray(model(ids)[0]),
                states=np.asarray(model.layer_states(ids)[:, 0]),
                new_tokens=generate(model, [tokens], SamplingParams(max_new_tokens=count))[0],
            )


def _run_transformers(path: Path, tokens: list[int], count: int) -> _Results:
    try:
        import torch
        import transformers
    except ImportError:
        raise SupportError(f"transformers is not installed: {how_to_install('torch')}") from None
    transformers.utils.logging.disable_progress_bar()  # ours says what is going on
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    ids = torch.tensor([tokens])
    states = []
    layers = model.model.layers
    hooks = [layers[0].register_forward_pre_hook(lambda _, inputs: states.append(inputs[0]))]
    hooks += [layer.register_forward_hook(lambda _, __, out: states.append(out)) for layer in layers]
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits[0].numpy()
        for hook in hooks:
            hook.remove()
        new = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=count)
    return _Results(logits, np.stack([state[0].numpy() for state in states]), new[0, len(tokens) :].tolist())


@np.errstate(invalid="ignore", over="ignore")  # numbers that are not finite are reported, not warned of
def _compare(own: _Results, reference: _Results, tolerance: Tolerance) -> dict[str, Any]:
    difference = np.abs(own.logits - reference.logits)
    p, q = (jax.nn.log_softmax(run.logits.astype(np.float64)) for run in (reference, own))
    top = [np.argsort(-run.logits, axis=-1)[:, :5] for run in (own, reference)]
    spread = np.abs(own.states - reference.states).max(axis=(1, 2)) / np.abs(reference.states).max(axis=(1, 2))
    diverging = np.flatnonzero(~(spread <= tolerance.state))
    same = [a == b for a, b in zip(own.new_tokens, reference.new_tokens, strict=False)]
    finite = bool(np.isfinite(own.logits).all() and np.isfinite(reference.logits).all())
    measures: dict[str, Any] = {
        "max_abs": float(difference.max()),
        "mean_abs": float(difference.mean()),
        "max_logit": float(np.abs(reference.logits).max()),
        "kl": float((np.exp(p) * (p - q)).sum(axis=-1).mean()),
        "top1": float((top[0][:, 0] == top[1][:, 0]).mean()),
        "top5": float(np.mean([len(set(a) & set(b)) / 5 for a, b in zip(*top, strict=True)])),
        "greedy_tokens": len(reference.new_tokens),
        "greedy_agreement": same.index(False) if False in same else len(same),
        # Layers count from 0; -1 is the embedding.
        "first_diverging_layer": int(diverging[0]) - 1 if len(diverging) else None,
    }
    bound = tolerance.relative * measures["max_logit"] + tolerance.absolute
    checks = {
        "finite": finite,
        "max_abs": measures["max_abs"] <= bound,
        "mean_abs": measures["mean_abs"] <= tolerance.mean_abs,
        "top1": measures["top1"] >= tolerance.top1,
    }
    # JSON knows no NaN.
    clean = {k: None if isinstance(v, float) and not np.isfinite(v) else v for k, v in measures.items()}
    return clean | {"max_abs_bound": bound if finite else None, "checks": checks}


def _plain(checkpoint: Checkpoint) -> dict[str, StoredTensor]:
    """Its tensors, quantized ones as what they stand for."""
    quantized = checkpoint.config.quantization is not None
    return dequantize_tensors(checkpoint.config, checkpoint.tensors)[1] if quantized else checkpoint.tensors


def _different_weights(a: Mapping[str, StoredTensor], b: Mapping[str, StoredTensor]) -> list[str]:
    """Names of tensors that are not bit-identical, after rounding the finer one to the coarser's dtype."""
    different = []
    for name, tensor in a.items():
        pair = [tensor, b[name]] if name in b else []
        if not pair:
            different.append(name)
            continue
        coarse = next(d for d in ("bfloat16", "float16", "float32") if d in [t.dtype for t in pair])
        arrays = [t.read().astype(NUMPY_DTYPES[coarse], copy=False) for t in pair]
        if arrays[0].shape != arrays[1].shape or raw_bytes(arrays[0]) != raw_bytes(arrays[1]):
            different.append(name)
    return different
