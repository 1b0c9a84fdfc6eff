"""Checkpoints of every kind, opened without reading them, and streamed onto their devices."""

import dataclasses
import hashlib
import json
import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.sharding import Mesh, SingleDeviceSharding
from jax.sharding import Sharding as Placement

from sharding.rules import Sharding
from sharding.strategies import Rules

from .. import files
from ..config import DTYPES, GenerationConfig, ModelConfig
from ..config_file import adapter_in, gguf_in
from ..errors import CheckpointFormatError, HubError, OptionError, SaveError
from ..model import SmolLM3
from ..paths import cache_dir
from ..progress import progress
from ..support import require_devices
from ..tokenizer import load_tokenizer
from . import gguf, hub, safetensors, torch_files
from .key_map import (
    EMBED_NAME,
    HEAD_NAME,
    PARTS,
    HFTensor,
    abstract_model,
    hf_name_of_gguf,
    hf_tensors,
    locate,
    parameters,
)
from .names import canonical, is_head
from .peft import Adapter, folded, is_adapter, read_adapter
from .quantized import dequantize_tensors, quantize_tensors, with_scheme
from .stored import NUMPY_DTYPES, STORED_DTYPES, StoredTensor, cast, is_buffer, is_finite, raw_bytes, shown
from .texts import read_texts

PIECE = 1 << 20  # numbers that are compared at once
_LORA = (
    "; the lora_ tensors are those of an adapter that is not merged: merge it (PEFT's merge_and_unload), and save the "
    "model"
)

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that has been found sound, but not read: headers only.

    `tensors` are in Hugging Face's order; `files` are the tokenizer's and template's, name -> content; `stacked`:
    reading a tensor of one layer reads those of all layers, so read them one after the other.
    """

    config: ModelConfig
    generation_config: GenerationConfig
    tensors: dict[str, StoredTensor]
    files: dict[str, bytes]
    stacked: bool = False


def is_gguf(path: Path) -> bool:
    """Whether a model is a GGUF file and not a folder."""
    return path.suffix.lower() == ".gguf" and not path.is_dir()


def text_folder(path: Path) -> Path:
    """The folder with config.json and the tokenizer of a model: its own, an adapter's base's, or for a .gguf file one
    in the cache.

    Raises:
      CheckpointFormatError: the .gguf file is unsound.
      SaveError: nothing can be written in the cache.
    """
    if is_adapter(path):
        return text_folder(_base_of(read_adapter(path)))
    if not is_gguf(path):
        return path
    stat = path.stat()
    of = f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}"
    folder = cache_dir() / "gguf" / hashlib.sha256(os.fsencode(of)).hexdigest()[:16]
    if not (folder / "config.json").exists():  # it is written last
        file = gguf.open_gguf(path, hf_name_of_gguf)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for name, text in (file.tokenizer_files | {"config.json": json.dumps(file.config)}).items():
                files.write(folder / name, text)
        except OSError as error:
            raise SaveError(
                f"what {path.name} says of its tokenizer cannot be kept in {folder} ({error.strerror or error}); "
                "SMOLLM3_JAX_CACHE names another folder"
            ) from None
    return folder


def open_checkpoint(path: Path) -> Checkpoint:
    """Opens a Hugging Face folder (safetensors or PyTorch files), a .gguf file, or an adapter's folder with its base.

    Raises:
      ConfigError: config.json is missing, garbled or unsupported.
      CheckpointFormatError: weights are missing or damaged, or are not those that the config asks for.
      TokenizerError: there is a tokenizer, but it is unreadable or another model's.
    """
    if is_adapter(path):
        adapter = read_adapter(path)
        return with_adapters(open_checkpoint(_base_of(adapter)), [(adapter, 1.0)])
    if is_gguf(path):
        file = gguf.open_gguf(path, hf_name_of_gguf)
        config = ModelConfig.from_hf(file.config)
        generation = GenerationConfig.from_hf(file.generation_config, config)
        found = {tensor.name: tensor for tensor in file.tensors}
        texts = {name: text.encode() for name, text in file.tokenizer_files.items()}
    else:
        config = ModelConfig.from_hf(path)
        generation = GenerationConfig.from_hf(path, config)
        # Other files of the format may lie beside PyTorch's weights: an adapter, say.
        safe = any((path / name).exists() for name in (safetensors.INDEX, safetensors.SINGLE))
        if safe or (any(path.glob("*.safetensors")) and not torch_files.find(path)):
            tied = config.tie_word_embeddings
            if not safe and (what := adapter_in(path)):
                raise CheckpointFormatError(f"{path} {what}")
            found = safetensors.open_folder(
                path, config.quantization is not None, lambda name: is_buffer(name) or (tied and is_head(name))
            )
        else:
            found = _open_torch(path)
        texts = read_texts(path)
        if "tokenizer.json" in texts:
            load_tokenizer(path, config)  # only to see that it belongs to this model
    return Checkpoint(config, generation, check_tensors(path, config, found), texts)


def with_adapters(checkpoint: Checkpoint, adapters: Sequence[tuple[Adapter, float]]) -> Checkpoint:
    """The checkpoint with adapters, each times a number, folded in; a quantized one becomes a plain one."""
    if checkpoint.config.quantization is not None:
        config, plain = dequantize_tensors(checkpoint.config, checkpoint.tensors)
        dtype = common_dtype(checkpoint.tensors)
        tensors = {name: cast(tensor, dtype) for name, tensor in folded(plain, adapters).items()}
        return dataclasses.replace(checkpoint, config=config, tensors=tensors)
    return dataclasses.replace(checkpoint, tensors=folded(checkpoint.tensors, adapters))


def _base_of(adapter: Adapter) -> Path:
    """The folder of the model that an adapter is of."""
    if adapter.base is None:
        raise CheckpointFormatError(
            f"{adapter.folder} does not say what model it is of: MODEL --adapter {adapter.folder}"
        )
    try:
        return hub.resolve(adapter.base)
    except HubError as error:
        raise HubError(
            f"{adapter.folder} is an adapter of {adapter.base}: {error}; MODEL --adapter DIR names another"
        ) from None


def _open_torch(folder: Path) -> dict[str, StoredTensor]:
    paths = torch_files.find(folder)
    if not paths:
        what = adapter_in(folder) or gguf_in(folder) or _others_in(folder)
        raise CheckpointFormatError(
            f"{folder} holds no weights: neither {safetensors.INDEX}, {safetensors.SINGLE}, {torch_files.SINGLE} "
            f"nor a .pt file{f'; it {what}' if what else ''}"
        )
    tensors: dict[str, StoredTensor] = {}
    for tensor in [tensor for path in paths for tensor in torch_files.open_file(path)]:
        if tensor.name in tensors:
            raise CheckpointFormatError(
                f"tensor {shown(tensor.name)} is in {tensors[tensor.name].file} and {tensor.file}"
            )
        tensors[tensor.name] = tensor
    return tensors


def _others_in(folder: Path) -> str | None:
    """What to say of weights in a format of other programs."""
    kinds = (".onnx", ".msgpack", ".h5", ".pth", ".ckpt", ".npz", ".tflite", ".engine")
    names = [shown(path.name) for path in sorted(folder.iterdir()) if path.suffix in kinds]
    return f"has {', '.join(names[:5])}, which cannot be read: take the model's safetensors files" if names else None


def check_tensors(path: Path, config: ModelConfig, found: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The tensors that the config asks for, in Hugging Face's order.

    Raises:
      CheckpointFormatError: some are missing, too many, or of another shape than the config says; or a
        tied model comes with an output head that is not its embedding.
    """
    wanted, found = hf_tensors(config), canonical(path, found)
    if config.tie_word_embeddings and (head := found.pop(HEAD_NAME, None)):
        embed = found.setdefault(EMBED_NAME, dataclasses.replace(head, name=EMBED_NAME))
        if not _same_numbers(head, embed):
            raise CheckpointFormatError(
                f"{path}: {HEAD_NAME} differs from {EMBED_NAME}, but tie_word_embeddings is true; "
                "set it to false in config.json, or remove the tensor"
            )
    extra = [name for name in found if name not in wanted]
    missing = [name for name in wanted if name not in found]
    if missing or extra:
        raise CheckpointFormatError(
            f"{path}: the tensors are not those that config.json asks for"
            + _some("missing", missing)
            + _some("unknown", extra)
            + _LORA * any("lora_" in name for name in extra)
        )
    for name, hf in wanted.items():
        if found[name].shape != hf.shape:
            raise CheckpointFormatError(f"{path}: {_shape_mismatch(found[name], hf)}")
        if found[name].dtype != hf.dtype if hf.dtype else found[name].dtype not in NUMPY_DTYPES:
            raise CheckpointFormatError(
                f"{path}: tensor {name} is {found[name].dtype} where config.json asks for {hf.dtype or 'floats'}"
            )
    return {name: found[name] for name in wanted}


def _some(what: str, names: Sequence[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return f"; {len(names)} {what}: {', '.join(map(shown, names[:10]))}{more}"


def _shape_mismatch(tensor: StoredTensor, hf: HFTensor) -> str:
    wrong = [
        f"{field} (config.json: {wanted}, tensor: {length})"
        for field, wanted, length in zip(hf.dims, hf.shape, tensor.shape, strict=False)
        if wanted != length
    ]
    return (
        f"tensor {tensor.name} has shape {list(tensor.shape)} where config.json asks for {list(hf.shape)}; "
        f"they differ in {', '.join(wrong) or 'the number of dimensions'}"
    )


def _same_numbers(a: StoredTensor, b: StoredTensor) -> bool:
    """Whether two tensors hold the same numbers, 0 and -0 being one; compared in float32, which holds all of them."""
    if a.shape != b.shape:
        return False
    if a.read is b.read:
        return True
    x, y = a.read(), b.read()
    if a.dtype == b.dtype and raw_bytes(x) == raw_bytes(y):
        return True
    x, y = x.reshape(-1), y.reshape(-1)
    pieces = [slice(start, start + PIECE) for start in range(0, x.size, PIECE)]
    return all(np.array_equal(np.float32(x[piece]), np.float32(y[piece]), equal_nan=True) for piece in pieces)


def plain_tensors(tensors: Mapping[str, StoredTensor]) -> list[StoredTensor]:
    """Those that are no part of a quantized weight."""
    parts = {name + ending for name in tensors if name + ".scale" in tensors for ending in PARTS.values()}
    return [tensor for name, tensor in tensors.items() if name not in parts]


def common_dtype(tensors: Mapping[str, StoredTensor]) -> str:
    """The dtype that most bytes of the checkpoint's plain tensors have."""
    sizes = dict.fromkeys(NUMPY_DTYPES, 0)
    for tensor in plain_tensors(tensors):
        sizes[tensor.dtype] += tensor.nbytes
    return max(sizes, key=lambda dtype: sizes[dtype])


def check_dtype(dtype: object) -> str:
    """The name of a supported dtype, given as a name or as numpy's, jax's or torch's object.

    Raises:
      OptionError: it is not supported.
    """
    name = str(dtype).removeprefix("torch.") if not isinstance(dtype, type) else jnp.dtype(dtype).name
    if name not in DTYPES:
        raise OptionError(f"dtype {name!r} is not supported; choose one of {', '.join(DTYPES)}")
    return name


def load(
    checkpoint: Checkpoint,
    dtype: Any = None,
    mesh: Mesh | None = None,
    rules: str | Rules | None = None,
    *,
    weights: str | None = None,
    stacked: bool = False,
) -> SmolLM3:
    """Loads an open checkpoint, tensor by tensor, straight to where each one stays; as `pretrained.from_pretrained`."""
    require_devices()
    config, tensors = checkpoint.config, checkpoint.tensors
    plain = plain_tensors(tensors)
    if weights is not None:
        config = with_scheme(config, weights)
        tensors = tensors if checkpoint.config.quantization else quantize_tensors(config, tensors)
    sharding = None if mesh is None else Sharding.of(mesh, rules or "fsdp").fitted(config.axis_sizes)
    if mesh is None and rules not in (None, "single"):
        raise OptionError(f"rules {rules!r} need a mesh; give one, or leave rules out")
    own = common_dtype(checkpoint.tensors)
    if dtype is None:
        odd = [f"{tensor.name} ({tensor.dtype})" for tensor in plain if tensor.dtype != own]
        if odd:
            raise CheckpointFormatError(
                f"most tensors are {own}, but not all{_some('others', odd)}; say which dtype to cast all to: "
                'dtype="float32" (--dtype float32)'
            )
        if config.dtype not in (None, own):
            log.warning("config.json says %s, but the tensors are %s: loading them as they are", config.dtype, own)
    target = own if dtype is None else check_dtype(dtype)
    if others := sorted({tensor.dtype for tensor in plain} - {target}):
        log.info("casting %s tensors to %s", " and ".join(others), target)
    config = dataclasses.replace(config, dtype=target) if target != (config.dtype or own) else config
    model = abstract_model(config, target, checkpoint.generation_config, stacked, sharding)
    if not_finite := fill(model, hf_tensors(config), tensors):
        cast = ", or its numbers are too large for float16" if target == "float16" != own else ""
        log.warning("not all finite%s: the checkpoint is damaged or diverged%s", _some("tensors", not_finite), cast)
    return model


def fill(model: SmolLM3, where: Mapping[str, HFTensor], tensors: Mapping[str, StoredTensor]) -> list[str]:
    """Gives an abstract model its arrays, each where the model's sharding has it; returns the names of the tensors that
    are not finite.

    Args:
      where: Hugging Face name -> where it lives, of all that the model holds.
    """
    params, sharding = parameters(model), model.sharding
    by_param: dict[str, list[StoredTensor]] = {}
    for name, hf in where.items():
        by_param.setdefault(locate(hf, params)[0], []).append(tensors[name])
    not_finite: dict[str, None] = {}  # names in order, each once
    with progress("loading", sum(tensors[name].nbytes for name in where)) as done:
        for path, param in params.items():
            if sharding is None:
                at = SingleDeviceSharding(jax.local_devices()[0])
            else:
                at = sharding.named(path, param.get_metadata("axes"), param.shape)
            param.set_value(_read_param(by_param[path], param, at, not_finite, done))
    return list(not_finite)


def _read_param(
    tensors: list[StoredTensor],
    param: nnx.Param,
    at: Placement,
    not_finite: dict[str, None],
    done: Callable[[int], None],
) -> Array:
    """One parameter, stacked over its layers if there are several, read shard by shard."""
    stacked = param.get_metadata("axes")[0] == "layers"
    dtype = STORED_DTYPES[param.dtype.name]

    def shard(index: Any) -> np.ndarray:  # a tuple of slices
        lengths = [len(range(*part.indices(length))) for part, length in zip(index, param.shape, strict=True)]
        out = _aligned_empty(lengths, dtype)
        layers, rest = (index[0], index[1:]) if stacked else (slice(None), index)
        # Copied even where the dtype is right: on CPU an array of the mapped file would change with the file.
        for row, tensor in zip(out if stacked else [out], tensors[layers], strict=True):
            with np.errstate(over="ignore"):  # of a cast: the numbers are looked at next
                row[...] = tensor.read().reshape(param.shape[-len(rest) :])[rest]
            if dtype in NUMPY_DTYPES.values() and not is_finite(row):
                not_finite[tensor.name] = None
            done(row.nbytes)
        return out

    return jax.make_array_from_callback(param.shape, at, shard)


def _aligned_empty(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """An uninitialised array that XLA's CPU client takes over without copying it: that needs 64-byte alignment."""
    size = math.prod(shape) * dtype.itemsize
    buffer = np.empty(size + 64, np.uint8)
    start = -buffer.ctypes.data % 64
    return buffer[start : start + size].view(dtype).reshape(shape)
