"""ModelConfig: Hugging Face's config.json as a frozen, validated dataclass, and back.

Both spellings are read: transformers v4 (`rope_theta`, `rope_scaling`, `torch_dtype`) and v5
(`rope_parameters`, `dtype`). Both are written, since v4 silently falls back to its class default
when it finds only v5's. Nothing about RoPE or NoPE is ever defaulted: a config that leaves it open
is an error.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import ConfigError, OptionError

DTYPES = ("float32", "bfloat16", "float16")
# What a folder of weights may be written as.
FORMATS = ("safetensors", "torch")
# How weights may be quantized (see quantize.py) -> how many inputs share a scale, None being all of them; and
# what keys and values may be kept in besides the activations' dtype.
WEIGHT_SCHEMES = {"int8": None, "int8-g64": 64, "int8-g32": 32, "int4": 32}
CACHE_SCHEMES = ("int8",)
QUANT_METHOD = "smollm3-jax"
ARCHITECTURES = {"smollm3": "SmolLM3ForCausalLM", "llama": "LlamaForCausalLM"}
# What SmolLM3Config and LlamaConfig of transformers take where the file is silent.
TIED_BY_DEFAULT = {"smollm3": True, "llama": False}

# Lists of one entry a layer are built before anything else is checked.
MAX_LAYERS = 10_000

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

# SmolLM3's hub id, and what matters of its config.json.
RELEASE = "HuggingFaceTB/SmolLM3-3B"
SMOLLM3_3B: dict[str, Any] = {
    "architectures": ["SmolLM3ForCausalLM"],
    "model_type": "smollm3",
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "hidden_act": "silu",
    "max_position_embeddings": 65536,
    "rms_norm_eps": 1e-06,
    "rope_theta": 5000000.0,
    "rope_scaling": None,
    "no_rope_layer_interval": 4,
    "no_rope_layers": [1, 1, 1, 0] * 9,
    "tie_word_embeddings": True,
    "bos_token_id": 128000,
    "eos_token_id": 128012,
    "pad_token_id": 128004,
    "torch_dtype": "bfloat16",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How RoPE's frequencies are stretched; see `rope.inverse_frequencies` for the formulas."""

    rope_type: str
    factor: float
    original_max_position_embeddings: int | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    attention_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool | None = None

    def to_hf(self) -> dict[str, Any]:
        """The `rope_scaling` object of config.json, without the fields that were left open."""
        return {k: v for k, v in dataclasses.asdict(self).items() if v is not None}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quantization:
    """What a checkpoint's weights are stored in, and what its cache should be (None: the activations' dtype)."""

    weights: str
    cache: str | None = None

    def __post_init__(self):
        if self.weights not in WEIGHT_SCHEMES:
            raise ConfigError(f"weights {self.weights!r} are no scheme; there are {', '.join(WEIGHT_SCHEMES)}")
        if self.cache not in (None, *CACHE_SCHEMES):
            raise ConfigError(f"cache {self.cache!r} is no scheme; there is {', '.join(CACHE_SCHEMES)}")

    def to_hf(self) -> dict[str, Any]:
        """The `quantization_config` object of config.json."""
        return {"quant_method": QUANT_METHOD, "weights": self.weights, "cache": self.cache}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The architecture of a SmolLM3 or Llama checkpoint.

    Fields are named as in config.json, except `rope_layers`: one bool a layer, True where queries
    and keys are rotated (config.json calls the same thing `no_rope_layers`, with 1 for True).

    Raises:
      ConfigError: a value is missing, of the wrong type, or contradicts another.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    rope_layers: tuple[bool, ...]
    rope_scaling: RopeScaling | None = None
    sliding_window: int | None = None
    use_sliding_window: bool = False
    layer_types: tuple[str, ...] | None = None
    tie_word_embeddings: bool = True
    attention_bias: bool = False
    mlp_bias: bool = False
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None
    dtype: str | None = None
    quantization: Quantization | None = None
    # The file as it was read (JSON), so that fields this package has no use for survive a round trip.
    source: str = dataclasses.field(default="{}", compare=False, repr=False)

    def __post_init__(self):
        if self.layer_types is None:
            slides = self.use_sliding_window and self.sliding_window is not None
            types = tuple("sliding_attention" if slides and not rope else "full_attention" for rope in self.rope_layers)
            object.__setattr__(self, "layer_types", types)
        _validate(self)

    @property
    def axis_sizes(self) -> dict[str, int]:
        """Logical axis name -> length; every parameter's shape is spelled with these names."""
        return {axis: getattr(self, field) for axis, field in AXIS_FIELDS.items()}

    @property
    def windows(self) -> tuple[int, ...] | None:
        """How many tokens back each layer sees, itself included; None where no layer is limited."""
        assert self.layer_types is not None
        if "sliding_attention" not in self.layer_types:
            return None
        assert self.sliding_window is not None
        unlimited = 2**31 - 1
        return tuple(self.sliding_window if t == "sliding_attention" else unlimited for t in self.layer_types)

    @classmethod
    def from_hf(cls, source: "str | Path | Mapping[str, Any]") -> "ModelConfig":
        """Reads a folder, a config.json, or its parsed content.

        Raises:
          ConfigError: naming the file and the field.
        """
        if isinstance(source, Mapping):
            return _parse(dict(source))
        path = Path(source)
        path = path / "config.json" if path.is_dir() else path
        try:
            return _parse(read_json(path))
        except ConfigError as error:
            message = str(error)
            raise ConfigError(message if str(path) in message else f"{path}: {message}") from None

    def to_hf(self) -> dict[str, Any]:
        """config.json's content: every field that was read, plus what the file left out.

        What was read and has not been changed since is written exactly as it was spelled.
        """
        assert self.layer_types is not None
        scaling = self.rope_scaling.to_hf() if self.rope_scaling else None
        eos = list(self.eos_token_id) if isinstance(self.eos_token_id, tuple) else self.eos_token_id
        out: dict[str, Any] = {"architectures": [ARCHITECTURES[self.model_type]]}
        own = [f.name for f in dataclasses.fields(self) if f.name not in ("source", "rope_layers", "quantization")]
        out |= {name: getattr(self, name) for name in own}
        out |= {
            "rope_scaling": scaling,
            "rope_parameters": {"rope_type": "default", "rope_theta": self.rope_theta} | (scaling or {}),
            "torch_dtype": self.dtype,
            "eos_token_id": eos,
        }
        if self.model_type == "smollm3":
            out["no_rope_layers"] = [int(rope) for rope in self.rope_layers]
            out["layer_types"] = list(self.layer_types)
        else:
            for name in ("sliding_window", "use_sliding_window", "layer_types"):
                del out[name]
        source = json.loads(self.source)
        if self.quantization is not None:
            out["quantization_config"] = self.quantization.to_hf()
        else:
            source.pop("quantization_config", None)
        if source and _parse(source) == self:
            return out | source
        return {k: v for k, v in source.items() if k not in out} | out


def with_yarn(config: ModelConfig, factor: float) -> ModelConfig:
    """The config of a model whose context YaRN stretches `factor` times, as SmolLM3's card has it for 2.

    Raises:
      OptionError: the factor is not above 1 or far too large, or the model's RoPE is scaled already.
    """
    original = config.max_position_embeddings
    if not 1 < factor < 2**31 / original:  # nan is not either
        raise OptionError(
            f"the YaRN factor is {factor}; it must be above 1, and {factor} times the context of {original} tokens "
            "less than 2**31"
        )
    if config.rope_scaling is not None:
        kind, by = config.rope_scaling.rope_type, config.rope_scaling.factor
        raise OptionError(
            f"a YaRN factor of {factor} was asked for, but this model's config.json scales RoPE already ({kind}, "
            f"factor {by}); its context is {original} tokens as it is"
        )
    scaling = RopeScaling(rope_type="yarn", factor=float(factor), original_max_position_embeddings=original)
    return dataclasses.replace(config, rope_scaling=scaling, max_position_embeddings=int(original * factor))


# Logical axis -> the config field that gives its length.
AXIS_FIELDS = {
    "layers": "num_hidden_layers",
    "vocab": "vocab_size",
    "embed": "hidden_size",
    "mlp": "intermediate_size",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "cache_heads": "num_key_value_heads",
    "head": "head_dim",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """What generation_config.json says about stopping and sampling."""

    eos_token_id: tuple[int, ...] = ()
    do_sample: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    source: str = dataclasses.field(default="{}", compare=False, repr=False)

    @classmethod
    def from_hf(cls, source: "str | Path | Mapping[str, Any]", config: ModelConfig) -> "GenerationConfig":
        """Reads a folder's generation_config.json (or its content); config.json's EOS where there is none."""
        if isinstance(source, Mapping):
            raw = dict(source)
        else:
            path = Path(source) / "generation_config.json"
            raw = read_json(path) if path.exists() else {}
        eos = raw["eos_token_id"] if raw.get("eos_token_id") is not None else config.eos_token_id
        number = (int, float)
        return cls(
            eos_token_id=_ids("eos_token_id", eos),
            do_sample=_typed(raw, "do_sample", bool, False),
            temperature=float(_typed(raw, "temperature", number, 1.0)),
            top_p=float(_typed(raw, "top_p", number, 1.0)),
            top_k=_typed(raw, "top_k", int, 0),
            source=json.dumps(raw),
        )

    def to_hf(self) -> dict[str, Any]:
        """generation_config.json's content; empty where the checkpoint had none."""
        return json.loads(self.source)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that must hold an object.

    Raises:
      ConfigError: the file is missing, is not UTF-8 JSON, or holds something else.
    """
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ConfigError(f"{path} is missing; a model folder needs it") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold a JSON object, not a {type(content).__name__}")
    return content


def _typed(raw: Mapping[str, Any], field: str, kind: Any, default: Any = dataclasses.MISSING) -> Any:
    """raw[field] checked for its type; null counts as absent."""
    value = raw.get(field)
    if value is None:
        if default is dataclasses.MISSING:
            raise ConfigError(f"{field} is missing; add it, as the model's own release has it")
        return default
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ConfigError(f"{field} is {value!r}, a {type(value).__name__}; it must be {_name(kind)}")
    if isinstance(value, int) and abs(value) >= 2**63:
        raise ConfigError(f"{field} has {len(str(value))} digits; that is too large a number")
    return value


def _name(kind: Any) -> str:
    return " or ".join(k.__name__ for k in kind) if isinstance(kind, tuple) else kind.__name__


def _ids(field: str, value: Any) -> tuple[int, ...]:
    ids = value if isinstance(value, list | tuple) else [] if value is None else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
        raise ConfigError(f"{field} is {value!r}; it must be a token id or a list of them")
    return tuple(ids)


def _parse(raw: dict[str, Any]) -> ModelConfig:
    number = (int, float)
    model_type = _typed(raw, "model_type", str)
    if model_type not in ARCHITECTURES:
        raise ConfigError(f"model_type is {model_type!r}; this package runs {' and '.join(ARCHITECTURES)}")
    if _typed(raw, "hidden_act", str, "silu") != "silu":
        raise ConfigError(f"hidden_act is {raw['hidden_act']!r}; only silu is supported")
    if _typed(raw, "partial_rotary_factor", number, 1.0) != 1.0:
        raise ConfigError("partial_rotary_factor is not 1; partial rotation is not supported")
    layers = _typed(raw, "num_hidden_layers", int)
    heads = _typed(raw, "num_attention_heads", int)
    hidden = _typed(raw, "hidden_size", int)
    if not 1 <= layers <= MAX_LAYERS or heads < 1:
        raise ConfigError(
            f"num_hidden_layers {layers} must be 1 to {MAX_LAYERS}, and num_attention_heads {heads} positive"
        )
    if raw.get("head_dim") is None and hidden % heads:
        raise ConfigError(f"head_dim is absent and hidden_size {hidden} does not divide by {heads} heads")
    theta, scaling = _parse_rope(raw)
    smollm3 = model_type == "smollm3"
    layer_types = _typed(raw, "layer_types", list, None) if smollm3 else None
    eos = raw.get("eos_token_id")
    return ModelConfig(
        model_type=model_type,
        vocab_size=_typed(raw, "vocab_size", int),
        hidden_size=hidden,
        intermediate_size=_typed(raw, "intermediate_size", int),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        # LlamaConfig reads an absent value as one key-value head per head; SmolLM3's must be given.
        num_key_value_heads=_typed(raw, "num_key_value_heads", int, *([] if smollm3 else [heads])),
        head_dim=_typed(raw, "head_dim", int, hidden // heads),
        max_position_embeddings=_typed(raw, "max_position_embeddings", int),
        rms_norm_eps=float(_typed(raw, "rms_norm_eps", number)),
        rope_theta=theta,
        rope_scaling=scaling,
        rope_layers=_parse_rope_layers(raw, layers) if smollm3 else (True,) * layers,
        sliding_window=_typed(raw, "sliding_window", int, None) if smollm3 else None,
        use_sliding_window=_typed(raw, "use_sliding_window", bool, False) if smollm3 else False,
        layer_types=tuple(layer_types) if layer_types else None,
        tie_word_embeddings=_typed(raw, "tie_word_embeddings", bool, TIED_BY_DEFAULT[model_type]),
        attention_bias=_typed(raw, "attention_bias", bool, False),
        mlp_bias=_typed(raw, "mlp_bias", bool, False),
        initializer_range=float(_typed(raw, "initializer_range", number, 0.02)),
        bos_token_id=_typed(raw, "bos_token_id", int, None),
        eos_token_id=_ids("eos_token_id", eos) if isinstance(eos, list) else _typed(raw, "eos_token_id", int, None),
        pad_token_id=_typed(raw, "pad_token_id", int, None),
        dtype=_parse_dtype(raw),
        quantization=_parse_quantization(raw),
        source=json.dumps(raw),
    )


def _parse_dtype(raw: dict[str, Any]) -> str | None:
    names = {_typed(raw, f, str).removeprefix("torch.") for f in ("torch_dtype", "dtype") if raw.get(f) is not None}
    if len(names) > 1:
        raise ConfigError(f"torch_dtype {raw['torch_dtype']!r} and dtype {raw['dtype']!r} disagree; delete one")
    return names.pop() if names else None


def _parse_quantization(raw: dict[str, Any]) -> Quantization | None:
    entry = _typed(raw, "quantization_config", dict, None)
    if entry is None:
        return None
    if entry.get("quant_method") != QUANT_METHOD:
        raise ConfigError(
            f"quantization_config: quant_method is {entry.get('quant_method')!r}; only {QUANT_METHOD!r} is supported: "
            "take the model's plain weights, and quantize them with `smollm3 quantize`"
        )
    if unknown := sorted(set(entry) - {"quant_method", "weights", "cache"}):
        raise ConfigError(f"quantization_config does not know {', '.join(unknown)}")
    try:
        return Quantization(weights=_typed(entry, "weights", str), cache=_typed(entry, "cache", str, None))
    except ConfigError as error:
        raise ConfigError(f"quantization_config: {error}") from None


def _parse_rope_layers(raw: dict[str, Any], layers: int) -> tuple[bool, ...]:
    listed = _typed(raw, "no_rope_layers", list, None)
    interval = _typed(raw, "no_rope_layer_interval", int, None)
    if listed is not None:
        if len(listed) != layers or not all(type(flag) in (int, bool) and flag in (0, 1) for flag in listed):
            raise ConfigError(
                f"no_rope_layers must hold {layers} values of 0 or 1 (1 = RoPE), one a layer "
                f"(num_hidden_layers); it is {listed!r}"
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


def _parse_rope(raw: dict[str, Any]) -> tuple[float, RopeScaling | None]:
    """(theta, scaling), from whichever spellings the file has; all that are there must agree."""
    number = (int, float)
    thetas = {"rope_theta": raw["rope_theta"]} if raw.get("rope_theta") is not None else {}
    kinds = {}
    for field in ("rope_scaling", "rope_parameters"):
        entry = _typed(raw, field, dict, None)
        if entry is not None and entry.get("rope_theta") is not None:
            thetas[f"{field}.rope_theta"] = entry["rope_theta"]
        if entry is not None or field in raw:
            kinds[field] = _parse_rope_scaling(field, entry or {})
    values = {float(_typed(thetas, name, number)) for name in thetas}
    if not values:
        raise ConfigError(
            "rope_theta is missing (as rope_theta, or in rope_parameters); SmolLM3-3B has 5000000.0, "
            "the first Llama models 10000.0"
        )
    if len(values) > 1:
        raise ConfigError(f"the RoPE theta is given twice and differs: {thetas}; delete the wrong one")
    if len(set(kinds.values())) > 1:
        raise ConfigError(
            "rope_scaling and rope_parameters disagree: "
            f"{raw['rope_scaling']} against {raw['rope_parameters']}; delete the wrong one"
        )
    return values.pop(), next(iter(kinds.values()), None)


def _parse_rope_scaling(field: str, entry: dict[str, Any]) -> RopeScaling | None:
    kinds = {entry[key] for key in ("rope_type", "type") if isinstance(entry.get(key), str)}
    given = {k: v for k, v in entry.items() if k not in ("rope_type", "type", "rope_theta") and v is not None}
    if _typed(given, "partial_rotary_factor", (int, float), 1.0) != 1.0:
        raise ConfigError(f"{field}: partial_rotary_factor is not 1; partial rotation is not supported")
    given.pop("partial_rotary_factor", None)
    if len(kinds) > 1:
        raise ConfigError(f"{field}: rope_type {entry['rope_type']!r} and type {entry['type']!r} disagree; delete one")
    kind = kinds.pop() if kinds else "default"
    if kind == "default":
        if given:
            raise ConfigError(f"{field} has {sorted(given)} but no rope_type (or 'default'), which uses none of them")
        return None
    if kind not in ROPE_FIELDS:
        raise ConfigError(f"{field}: RoPE type {kind!r} is not supported; these are: default, {', '.join(ROPE_FIELDS)}")
    required, optional = ROPE_FIELDS[kind]
    if missing := [f for f in required if f not in given]:
        raise ConfigError(f"{field}: RoPE type {kind!r} needs {', '.join(missing)}")
    if unknown := sorted(set(given) - set(required) - set(optional)):
        raise ConfigError(f"{field}: RoPE type {kind!r} does not know {', '.join(unknown)}")
    fields: dict[str, Any] = {}
    for name in given:
        if name == "truncate":
            fields[name] = _typed(given, name, bool)
        elif name == "original_max_position_embeddings":
            fields[name] = _typed(given, name, int)
        else:
            fields[name] = float(_typed(given, name, (int, float)))
    return RopeScaling(rope_type=kind, **fields)


def _validate(config: ModelConfig) -> None:
    def check(condition: bool, message: str) -> None:
        if not condition:
            raise ConfigError(message)

    check(config.model_type in ARCHITECTURES, f"model_type is {config.model_type!r}")
    for field in (*AXIS_FIELDS.values(), "max_position_embeddings"):
        value = getattr(config, field)
        check(type(value) is int and 0 < value < 2**31, f"{field} is {value!r}; it must be a positive integer")
    for field in ("rms_norm_eps", "rope_theta"):
        value = getattr(config, field)
        check(0 < value < math.inf, f"{field} is {value}; it must be a positive number")
    check(config.head_dim % 2 == 0, f"head_dim is {config.head_dim}; RoPE needs an even one")
    check(
        config.num_attention_heads % config.num_key_value_heads == 0,
        f"num_attention_heads {config.num_attention_heads} is not a multiple of "
        f"num_key_value_heads {config.num_key_value_heads}",
    )
    check(config.dtype in (None, *DTYPES), f"dtype is {config.dtype!r}; supported are {', '.join(DTYPES)}")
    layers = config.num_hidden_layers
    check(len(config.rope_layers) == layers, f"rope_layers has {len(config.rope_layers)} entries for {layers} layers")
    check(
        config.model_type == "smollm3" or all(config.rope_layers),
        "model_type llama rotates on every layer; a model with NoPE layers is a smollm3",
    )
    assert config.layer_types is not None
    check(
        len(config.layer_types) == layers
        and all(kind in ("full_attention", "sliding_attention") for kind in config.layer_types),
        f"layer_types must name full_attention or sliding_attention for each of {layers} layers",
    )
    if "sliding_attention" in config.layer_types:
        check(
            config.use_sliding_window and config.sliding_window is not None and config.sliding_window > 0,
            "layer_types has sliding_attention, but use_sliding_window is off or sliding_window is not positive",
        )
    group = WEIGHT_SCHEMES[config.quantization.weights] if config.quantization else None
    for field in ("hidden_size", "intermediate_size", "head_dim") if group else ():
        value = getattr(config, field)
        check(value % group == 0, f"{field} is {value}; quantized weights in groups of {group} need a multiple of that")
    if config.rope_scaling is not None:
        scaling = config.rope_scaling
        check(scaling.rope_type in ROPE_FIELDS, f"RoPE type {scaling.rope_type!r} is not supported")
        check(1 <= scaling.factor < math.inf, f"the RoPE factor is {scaling.factor}; it must be at least 1")
        original = scaling.original_max_position_embeddings
        check(original is None or original > 0, f"original_max_position_embeddings is {original}")
        if scaling.rope_type == "llama3":
            assert scaling.low_freq_factor is not None and scaling.high_freq_factor is not None
            check(
                0 < scaling.low_freq_factor < scaling.high_freq_factor,
                "llama3 RoPE needs 0 < low_freq_factor < high_freq_factor",
            )
