"""ModelConfig: Hugging Face's config.json as a frozen, validated dataclass, and back.

`config_file.py` reads both spellings, transformers v4's (`rope_theta`, `rope_scaling`, `torch_dtype`) and v5's
(`rope_parameters`, `dtype`). Both are written, since v4 silently falls back to its class default when it finds only
v5's.
"""

import dataclasses
import json
import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .config_file import ARCHITECTURES, DTYPES, QUANT_METHOD, ROPE_FIELDS, read_fields, read_json
from .config_file import token_ids as _ids
from .config_file import typed as _typed
from .errors import ConfigError, OptionError

# What a folder of weights may be written as.
FORMATS = ("safetensors", "torch")
# What the matrices of a GGUF file may be written as.
GGUF_TYPES = ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_1")
# How weights may be quantized (see quantize.py) -> how many inputs share a scale, None being all of them; and
# what keys and values may be kept in besides the activations' dtype.
WEIGHT_SCHEMES = {"int8": None, "int8-g64": 64, "int8-g32": 32, "int4": 32}
CACHE_SCHEMES = ("int8",)
# The range in which a number of config.json makes sense: beyond it, float32 overflows or nothing is left of it.
FLOAT_RANGES = {
    "rms_norm_eps": (1e-30, 1.0),
    "rope_theta": (1.001, 1e30),
    "factor": (1.0, 2.0**31),
    "low_freq_factor": (1e-6, 1e6),
    "high_freq_factor": (1e-6, 1e6),
    "attention_factor": (1e-3, 1e3),
    "beta_fast": (1e-6, 1e6),
    "beta_slow": (1e-6, 1e6),
    "mscale": (0.0, 1e3),
    "mscale_all_dim": (0.0, 1e3),
}
MAX_PARAMETERS = 2**50  # of one tensor; a petabyte, which no file holds

log = logging.getLogger(__name__)

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
class QuantizationConfig:
    """What a checkpoint's weights are stored in, and what its cache should be (None: the activations' dtype)."""

    weights: str
    cache: str | None = None

    def __post_init__(self):
        if self.weights not in WEIGHT_SCHEMES:
            raise ConfigError(f"weights is {self.weights!r}; choose one of {', '.join(WEIGHT_SCHEMES)}")
        if self.cache not in (None, *CACHE_SCHEMES):
            raise ConfigError(f"cache is {self.cache!r}; choose one of {', '.join(CACHE_SCHEMES)}, or null")

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
    quantization: QuantizationConfig | None = None
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
        window = min(self.sliding_window, unlimited)
        return tuple(window if t == "sliding_attention" else unlimited for t in self.layer_types)

    @classmethod
    def from_hf(cls, source: "str | Path | Mapping[str, Any]") -> "ModelConfig":
        """Reads a folder, a config.json, or its parsed content.

        Raises:
          ConfigError: naming the file and the field.
        """
        path = None if isinstance(source, Mapping) else Path(source)
        path = path / "config.json" if path is not None and path.is_dir() else path
        try:
            config, notes = _parse(dict(source) if isinstance(source, Mapping) else read_json(Path(str(path))))
        except ConfigError as error:
            message = str(error)
            raise ConfigError(message if path is None or str(path) in message else f"{path}: {message}") from None
        for note in notes:
            log.warning("%s: %s", path or "config.json", note)
        return config

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
        # A decoder alone, without a name, or under another name for the same: what is written is the whole model.
        source.pop("architectures", None)
        for name in ("dtype", "torch_dtype"):
            if str(source.get(name)).removeprefix("torch.") != self.dtype:
                source.pop(name, None)
        if self.quantization is not None:
            out["quantization_config"] = self.quantization.to_hf()
        else:
            source.pop("quantization_config", None)
        if source and _parse(source)[0] == self:
            return out | source
        source.pop("original_max_position_embeddings", None)  # rope_scaling has it
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
            return cls._parse(source, config)
        path = Path(source) / "generation_config.json"
        raw = read_json(path) if os.path.lexists(path) else {}
        try:
            return cls._parse(raw, config)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None

    @classmethod
    def _parse(cls, raw: Mapping[str, Any], config: ModelConfig) -> "GenerationConfig":
        eos = raw["eos_token_id"] if raw.get("eos_token_id") is not None else config.eos_token_id
        number = (int, float)
        return cls(
            eos_token_id=_ids("eos_token_id", eos),
            do_sample=_typed(raw, "do_sample", bool, False),
            temperature=float(_typed(raw, "temperature", number, 1.0)),
            top_p=float(_typed(raw, "top_p", number, 1.0)),
            top_k=_typed(raw, "top_k", int, 0),
            source=json.dumps(dict(raw)),
        )

    def to_hf(self) -> dict[str, Any]:
        """generation_config.json's content; empty where the checkpoint had none."""
        return json.loads(self.source)


def _parse(raw: dict[str, Any]) -> tuple[ModelConfig, list[str]]:
    """The config, and what is to be said about what of the file has no effect."""
    fields, notes = read_fields(raw)
    for name, kind in (("rope_scaling", RopeScaling), ("quantization", QuantizationConfig)):
        fields[name] = fields[name] and kind(**fields[name])
    return ModelConfig(**fields, source=json.dumps(raw)), notes


def _validate(config: ModelConfig) -> None:
    _check(config.model_type in ARCHITECTURES, f"model_type is {config.model_type!r}")
    for field in (*AXIS_FIELDS.values(), "max_position_embeddings"):
        value = getattr(config, field)
        _check(type(value) is int and 0 < value < 2**31, f"{field} is {value!r}; it must be a positive integer")
    _check_floats(config, ("rms_norm_eps", "rope_theta"))
    _check(abs(config.initializer_range) <= 1e3, f"initializer_range is {config.initializer_range}")
    sizes = config.axis_sizes
    widest = max(sizes["vocab"], sizes["mlp"], sizes["heads"] * sizes["head"]) * sizes["embed"]
    _check(
        widest < MAX_PARAMETERS, f"a tensor of {widest:,} numbers is more than any file holds; config.json is damaged"
    )
    _check(config.head_dim % 2 == 0, f"head_dim is {config.head_dim}; RoPE needs an even one")
    _check(
        config.num_attention_heads % config.num_key_value_heads == 0,
        f"num_attention_heads {config.num_attention_heads} is not a multiple of "
        f"num_key_value_heads {config.num_key_value_heads}",
    )
    _check(config.dtype in (None, *DTYPES), f"dtype is {config.dtype!r}; supported are {', '.join(DTYPES)}")
    layers = config.num_hidden_layers
    _check(len(config.rope_layers) == layers, f"rope_layers has {len(config.rope_layers)} entries for {layers} layers")
    _check(
        config.model_type == "smollm3" or all(config.rope_layers),
        "model_type llama rotates on every layer; a model with NoPE layers is a smollm3",
    )
    assert config.layer_types is not None
    _check(
        len(config.layer_types) == layers
        and all(kind in ("full_attention", "sliding_attention") for kind in config.layer_types),
        f"layer_types must name full_attention or sliding_attention for each of {layers} layers",
    )
    if "sliding_attention" in config.layer_types:
        _check(
            config.use_sliding_window and config.sliding_window is not None and config.sliding_window > 0,
            "layer_types has sliding_attention, but use_sliding_window is off or sliding_window is not positive",
        )
    group = WEIGHT_SCHEMES[config.quantization.weights] if config.quantization else None
    for field in ("hidden_size", "intermediate_size", "head_dim") if group else ():
        value = getattr(config, field)
        _check(
            value % group == 0, f"{field} is {value}; quantized weights in groups of {group} need a multiple of that"
        )
    if config.rope_scaling is not None:
        _validate_scaling(config.rope_scaling)


def _validate_scaling(scaling: RopeScaling) -> None:
    _check(scaling.rope_type in ROPE_FIELDS, f"RoPE type {scaling.rope_type!r} is not supported")
    _check_floats(scaling, [field.name for field in dataclasses.fields(scaling) if field.name in FLOAT_RANGES])
    original = scaling.original_max_position_embeddings
    _check(original is None or 0 < original < 2**31, f"original_max_position_embeddings is {original}")
    if scaling.rope_type == "llama3":
        assert scaling.low_freq_factor is not None and scaling.high_freq_factor is not None
        _check(
            scaling.low_freq_factor * (1 + 1e-6) < scaling.high_freq_factor,  # in float32 too
            "llama3 RoPE needs low_freq_factor < high_freq_factor",
        )


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _check_floats(owner: object, fields: Iterable[str]) -> None:
    for field in fields:
        value, (low, high) = getattr(owner, field), FLOAT_RANGES[field]
        _check(value is None or low <= value <= high, f"{field} is {value}; it must be from {low:g} to {high:g}")
