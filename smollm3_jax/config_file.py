"""config.json as transformers writes it: what its fields mean, and which of them contradict each other.

It becomes the fields of `config.ModelConfig`. Both spellings are read: transformers v4 (`rope_theta`,
`rope_scaling`, `torch_dtype`) and v5 (`rope_parameters`, `dtype`). Nothing about RoPE or NoPE is ever defaulted:
a config that leaves it open is an error. What has no effect there has none here, and is named in a warning.
"""

import json
import math
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import ConfigError
from .file_kind import what_it_is

DTYPES = ("float32", "bfloat16", "float16")
DTYPE_ALIASES = {"float": "float32", "half": "float16", "fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
QUANT_METHOD = "smollm3-jax"
ARCHITECTURES = {"smollm3": "SmolLM3ForCausalLM", "llama": "LlamaForCausalLM"}
# What SmolLM3Config and LlamaConfig of transformers take where the file is silent.
TIED_BY_DEFAULT = {"smollm3": True, "llama": False}
ACTIVATIONS = ("silu", "swish")  # two names of one function

# Lists of one entry a layer are built before anything else is checked.
MAX_LAYERS = 10_000
MAX_JSON_BYTES = 100_000_000

# RoPE kind -> (required fields, optional fields), as transformers' modeling_rope_utils reads them.
ROPE_FIELDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "linear": (("factor",), ()),
    "yarn": (
        ("factor", "original_max_position_embeddings"),
        ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    ),
    "llama3": (
        ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
        (),
    ),
}
# Fields that another kind reads, or that only other programs do: transformers passes over them.
ROPE_FIELDS_WITHOUT_EFFECT = {
    *(name for fields in ROPE_FIELDS.values() for part in fields for name in part),
    *("finetuned", "attn_factor", "extrapolation_factor", "dynamic", "scale", "alpha", "max_position_embeddings"),
    *("short_factor", "long_factor", "short_mscale", "long_mscale", "mrope_section", "mrope_interleaved"),
}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that must hold an object.

    Raises:
      ConfigError: the file is missing, is not UTF-8 JSON, or holds something else.
    """
    try:
        found = os.stat(path)
        if not stat.S_ISREG(found.st_mode) or found.st_size > MAX_JSON_BYTES:
            raise ValueError(f"it is no regular file, or larger than {MAX_JSON_BYTES // 10**6} MB")
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        what = (
            (adapter_in(path.parent) or gguf_in(path.parent) or _model_below(path.parent))
            if path.name == "config.json"
            else None
        )
        if path.is_symlink():
            raise ConfigError(f"{path} is missing: a link of that name leads nowhere") from None
        raise ConfigError(f"{path} is missing; {f'the folder {what}' if what else 'a model folder needs it'}") from None
    except (OSError, ValueError, RecursionError) as error:
        reason = what_it_is(path) or str(error)
        raise ConfigError(f"{path} cannot be read as JSON: {reason}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold a JSON object, not a {type(content).__name__}")
    return content


def adapter_in(folder: Path) -> str | None:
    """What to say of a folder that holds an adapter and no model; None if it does not."""
    path = folder / "adapter_config.json"
    if not path.is_file():
        return None
    try:
        base = read_json(path).get("base_model_name_or_path")
    except ConfigError:
        base = None
    of = f" of {_short(base)}" if isinstance(base, str) else ""
    return (
        f"holds an adapter (LoRA){of}, not a model: merge it into its base model with PEFT "
        "(AutoPeftModelForCausalLM.from_pretrained(folder).merge_and_unload().save_pretrained(new_folder)), "
        "and give the new folder"
    )


def gguf_in(folder: Path) -> str | None:
    """What to say of a folder whose weights are GGUF files; None if there are none."""
    files = sorted(path for path in folder.glob("*.*") if path.suffix.lower() == ".gguf")
    files = files or sorted(path for path in folder.glob("*/*.*") if path.suffix.lower() == ".gguf")
    if not files:
        return None
    more = f", or another of the {len(files)}" if files[1:] else ""
    return f"holds GGUF files, which are models by themselves: give the file, {files[0]}{more}"


def _model_below(folder: Path) -> str | None:
    if (folder / "settings.json").exists() and (folder / "checkpoints").is_dir():
        return "is a training run's: write a model of it with `smollm3 export RUN FOLDER`, and give that"
    below = sorted(folder.glob("*/config.json")) or sorted(folder.glob("snapshots/*/config.json"))
    if not below:
        return None
    more = f", or another of the {len(below)}" if below[1:] else ""
    return f"holds models in folders of its own: give {below[0].parent}{more}"


def typed(raw: Mapping[str, Any], field: str, kind: type | tuple[type, ...], *default: Any) -> Any:
    """raw[field] checked for its type; null counts as absent, which is an error without a default.

    Raises:
      ConfigError: naming the field.
    """
    value = raw.get(field)
    if value is None:
        if not default:
            raise ConfigError(f"{field} is missing; add it, as the model's own release has it")
        return default[0]
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ConfigError(f"{field} is {_short(value)}, a {type(value).__name__}; it must be {_name(kind)}")
    if isinstance(value, int) and abs(value) >= 2**63:
        raise ConfigError(f"{field} has {len(str(value))} digits; that is too large a number")
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{field} is {value}; it must be a finite number")
    return value


def _name(kind: type | tuple[type, ...]) -> str:
    return " or ".join(k.__name__ for k in kind) if isinstance(kind, tuple) else kind.__name__


def _short(value: object) -> str:
    """A value of a file as an error shows it: of hostile ones, the beginning."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def token_ids(field: str, value: Any) -> tuple[int, ...]:
    """One id or a list of them.

    Raises:
      ConfigError: it is something else, or an id is negative or not below 2**31.
    """
    ids = value if isinstance(value, list | tuple) else [] if value is None else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) and 0 <= i < 2**31 for i in ids):
        raise ConfigError(f"{field} is {_short(value)}; it must be a token id (0 to 2**31 - 1) or a list of them")
    return tuple(ids)


def read_fields(raw: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The fields of a ModelConfig from config.json's content, and what is to be said about what has no effect.

    `rope_scaling` and `quantization` come as dicts of their classes' fields, or None.

    Raises:
      ConfigError: naming the field.
    """
    notes: list[str] = []
    _refuse_foreign_quantization(raw)
    _refuse_other_architectures(raw)
    model_type = raw["model_type"]
    layers = typed(raw, "num_hidden_layers", int)
    heads = typed(raw, "num_attention_heads", int)
    hidden = typed(raw, "hidden_size", int)
    if not 1 <= layers <= MAX_LAYERS or heads < 1:
        raise ConfigError(
            f"num_hidden_layers {layers} must be 1 to {MAX_LAYERS}, and num_attention_heads {heads} positive"
        )
    if raw.get("head_dim") is None and hidden % heads:
        raise ConfigError(f"head_dim is absent and hidden_size {hidden} does not divide by {heads} heads")
    length = typed(raw, "max_position_embeddings", int)
    theta, scaling = _rope(raw, length, notes)
    smollm3 = model_type == "smollm3"
    layer_types = typed(raw, "layer_types", list, None) if smollm3 else None
    eos = raw.get("eos_token_id")
    fields = {
        "model_type": model_type,
        "vocab_size": typed(raw, "vocab_size", int),
        "hidden_size": hidden,
        "intermediate_size": typed(raw, "intermediate_size", int),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        # LlamaConfig reads an absent value as one key-value head per head; SmolLM3's must be given.
        "num_key_value_heads": typed(raw, "num_key_value_heads", int, *([] if smollm3 else [heads])),
        "head_dim": typed(raw, "head_dim", int, hidden // heads),
        "max_position_embeddings": length,
        "rms_norm_eps": float(typed(raw, "rms_norm_eps", (int, float))),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "rope_layers": _rope_layers(raw, layers) if smollm3 else (True,) * layers,
        "sliding_window": typed(raw, "sliding_window", int, None) if smollm3 else None,
        "use_sliding_window": typed(raw, "use_sliding_window", bool, False) if smollm3 else False,
        "layer_types": tuple(layer_types) if layer_types else None,
        "tie_word_embeddings": typed(raw, "tie_word_embeddings", bool, TIED_BY_DEFAULT[model_type]),
        "attention_bias": typed(raw, "attention_bias", bool, False),
        "mlp_bias": typed(raw, "mlp_bias", bool, False),
        "initializer_range": float(typed(raw, "initializer_range", (int, float), 0.02)),
        "bos_token_id": _token_id(raw, "bos_token_id"),
        "eos_token_id": token_ids("eos_token_id", eos) if isinstance(eos, list) else _token_id(raw, "eos_token_id"),
        "pad_token_id": _token_id(raw, "pad_token_id"),
        "dtype": _dtype(raw, notes),
        "quantization": _quantization(raw),
    }
    return fields, notes


def _refuse_other_architectures(raw: dict[str, Any]) -> None:
    model_type = typed(raw, "model_type", str)
    if model_type not in ARCHITECTURES:
        raise ConfigError(f"model_type is {_short(model_type)}; this package runs {' and '.join(ARCHITECTURES)}")
    architectures = typed(raw, "architectures", list, [])
    if not all(isinstance(name, str) for name in architectures):
        raise ConfigError(f"architectures is {_short(architectures)}; it must be a list of names")
    if typed(raw, "hidden_act", str, "silu") not in ACTIVATIONS:
        raise ConfigError(f"hidden_act is {_short(raw['hidden_act'])}; only silu is supported")
    if typed(raw, "partial_rotary_factor", (int, float), 1.0) != 1.0:
        raise ConfigError("partial_rotary_factor is not 1; partial rotation is not supported")


def _token_id(raw: Mapping[str, Any], field: str) -> int | None:
    value = typed(raw, field, int, None)
    # The first Llama models say -1 where they have no such token.
    return None if value in (None, -1) else token_ids(field, value)[0]


def _dtype(raw: dict[str, Any], notes: list[str]) -> str | None:
    """The dtype that the file names, as far as weights can be loaded in it; the tensors decide anyway."""
    names = {f: typed(raw, f, str).removeprefix("torch.") for f in ("dtype", "torch_dtype") if raw.get(f) is not None}
    names = {f: str(DTYPE_ALIASES.get(name, name)) for f, name in names.items()}
    if not names:
        return None
    if len(set(names.values())) > 1:
        notes.append(f"torch_dtype {raw['torch_dtype']!r} and dtype {raw['dtype']!r} disagree: the latter is taken")
    name = next(iter(names.values()))
    if name in DTYPES:
        return name
    if name != "auto":
        notes.append(f"dtype {_short(name)} is not one of {', '.join(DTYPES)}: the tensors decide")
    return None


def _refuse_foreign_quantization(raw: Mapping[str, Any]) -> None:
    """MLX, bitsandbytes, GPTQ and the like, whose weights nothing here can read."""
    own, mlx = raw.get("quantization_config"), raw.get("quantization")
    if isinstance(own, dict) and "quant_method" not in own and {"bits", "group_size"} <= own.keys():
        mlx = own
    if mlx:
        raise ConfigError(
            "it is a model that MLX has quantized (config.json has a field quantization): take the model's plain "
            "weights, which `mlx_lm.convert --dequantize` writes too, and quantize them with `smollm3 quantize`"
        )


def _quantization(raw: dict[str, Any]) -> dict[str, Any] | None:
    entry = typed(raw, "quantization_config", dict, None)
    if entry is None:
        return None
    if entry.get("quant_method") != QUANT_METHOD:
        raise ConfigError(
            f"quantization_config: quant_method is {_short(entry.get('quant_method'))}; only {QUANT_METHOD!r} is "
            "supported: take the model's plain weights, and quantize them with `smollm3 quantize`"
        )
    if unknown := sorted(set(entry) - {"quant_method", "weights", "cache"}):
        raise ConfigError(f"quantization_config does not know {', '.join(map(repr, unknown[:10]))}")
    try:
        return {"weights": typed(entry, "weights", str), "cache": typed(entry, "cache", str, None)}
    except ConfigError as error:
        raise ConfigError(f"quantization_config: {error}") from None


def _rope_layers(raw: dict[str, Any], layers: int) -> tuple[bool, ...]:
    listed = typed(raw, "no_rope_layers", list, None)
    interval = typed(raw, "no_rope_layer_interval", int, None)
    if listed is not None:
        if len(listed) != layers or not all(type(flag) in (int, bool) and flag in (0, 1) for flag in listed):
            raise ConfigError(
                f"no_rope_layers must hold {layers} values of 0 or 1 (1 = RoPE), one a layer "
                f"(num_hidden_layers); it is {_short(listed)}"
            )
        return tuple(bool(flag) for flag in listed)
    if interval is None:
        raise ConfigError(
            "no_rope_layers and no_rope_layer_interval are both absent, so which layers use RoPE is open; "
            'SmolLM3-3B has "no_rope_layer_interval": 4'
        )
    if interval < 1:
        raise ConfigError(f"no_rope_layer_interval is {interval}; it must be at least 1")
    return tuple((i + 1) % interval != 0 for i in range(layers))


def _rope(raw: dict[str, Any], length: int, notes: list[str]) -> tuple[float, dict[str, Any] | None]:
    """(theta, scaling), from whichever spellings the file has; all that are there must agree."""
    number = (int, float)
    thetas = {"rope_theta": raw["rope_theta"]} if raw.get("rope_theta") is not None else {}
    kinds = {}
    for field in ("rope_scaling", "rope_parameters"):
        entry = typed(raw, field, dict, None) or {}
        if entry.get("rope_theta") is not None:
            thetas[f"{field}.rope_theta"] = entry["rope_theta"]
        try:
            if any(value is not None for name, value in entry.items() if name != "rope_theta"):
                kinds[field] = _rope_scaling(entry, raw, length, notes)
        except ConfigError as error:
            raise ConfigError(f"{field}: {error}") from None
    values = {float(typed(thetas, name, number)) for name in thetas}
    if not values:
        raise ConfigError(
            "rope_theta is missing (as rope_theta, or in rope_parameters); SmolLM3-3B has 5000000.0, "
            "the first Llama models 10000.0"
        )
    if len(values) > 1:
        raise ConfigError(f"the RoPE theta is given twice and differs: {thetas}; delete the wrong one")
    scalings = list(kinds.values())
    if scalings[1:] and scalings[0] != scalings[1]:
        raise ConfigError(
            "rope_scaling and rope_parameters disagree: "
            f"{_short(raw['rope_scaling'])} against {_short(raw['rope_parameters'])}; delete the wrong one"
        )
    return values.pop(), scalings[0] if scalings else None


def _rope_scaling(entry: dict[str, Any], raw: dict[str, Any], length: int, notes: list[str]) -> dict[str, Any] | None:
    """The fields of a RopeScaling, those filled in that transformers derives from the context's `length`."""
    named = [typed(entry, key, str) for key in ("rope_type", "type") if entry.get(key) is not None]
    given = {k: v for k, v in entry.items() if k not in ("rope_type", "type", "rope_theta") and v is not None}
    if typed(given, "partial_rotary_factor", (int, float), 1.0) != 1.0:
        raise ConfigError("partial_rotary_factor is not 1; partial rotation is not supported")
    given.pop("partial_rotary_factor", None)
    if len(set(named)) > 1:
        raise ConfigError(f"rope_type {_short(named[0])} and type {_short(named[1])} disagree; delete one")
    kind = named[0] if named else "default"
    if not named and given.keys() - {"original_max_position_embeddings"}:
        raise ConfigError(
            f"it has {', '.join(map(repr, sorted(given)[:10]))} but no rope_type, so what they are for is open; "
            f"it may be default (which uses none of them), {', '.join(ROPE_FIELDS)}"
        )
    if kind != "default" and kind not in ROPE_FIELDS:
        raise ConfigError(f"RoPE type {_short(kind)} is not supported; these are: default, {', '.join(ROPE_FIELDS)}")
    required, optional = ROPE_FIELDS.get(kind, ((), ()))
    unused = sorted(set(given) - set(required) - set(optional))
    if unknown := [name for name in unused if name not in ROPE_FIELDS_WITHOUT_EFFECT]:
        raise ConfigError(f"RoPE type {kind!r} does not know {', '.join(map(repr, unknown[:10]))}")
    if unused:
        notes.append(f"RoPE type {kind!r} makes no use of {', '.join(unused)}: ignored, as in transformers")
    if kind == "default":
        return None
    given = {name: value for name, value in given.items() if name not in unused}
    # transformers reads a beta of 0 as the default.
    given = {name: value for name, value in given.items() if value != 0 or name not in ("beta_fast", "beta_slow")}
    if "original_max_position_embeddings" in required:
        original = [typed(where, "original_max_position_embeddings", (int, float), None) for where in (given, raw)]
        original = [int(value) if value == int(value) else value for value in original if value is not None] or [length]
        if len(set(original)) > 1:
            raise ConfigError(
                f"original_max_position_embeddings is {original[0]}, but {original[1]} outside; delete the wrong one"
            )
        given["original_max_position_embeddings"] = original[0]
        # Only where the file says null: to leave it out is an error in transformers too.
        if kind == "yarn" and "factor" in entry and entry["factor"] is None and original[0] > 0:
            given["factor"] = length / original[0]
    if missing := [name for name in required if name not in given]:
        raise ConfigError(f"RoPE type {kind!r} needs {', '.join(missing)}")
    fields: dict[str, Any] = {"rope_type": kind}
    for name in given:
        if name == "truncate":
            fields[name] = typed(given, name, bool)
        elif name == "original_max_position_embeddings":
            fields[name] = typed(given, name, int)
        else:
            fields[name] = float(typed(given, name, (int, float)))
    return fields
