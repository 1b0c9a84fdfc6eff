"""The models that bench_inference.py measures: a random SmolLM3-3B, and GGUF files, in the package's cache."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
from bench_peers import BenchError

from smollm3_jax.config import SMOLLM3_3B, ModelConfig
from smollm3_jax.files import new_folder, write
from smollm3_jax.paths import cache_dir
from smollm3_jax.progress import progress
from smollm3_jax.weights.key_map import hf_tensors
from smollm3_jax.weights.safetensors import SINGLE, write_file
from smollm3_jax.weights.save import convert
from smollm3_jax.weights.stored import NUMPY_DTYPES, StoredTensor

GIB = 2**30


def _need_space(folder: Path, size: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(folder).free) < 1.05 * size:
        raise BenchError(
            f"{folder} has {free / GIB:.1f} GiB free, {size / GIB:.1f} are needed; SMOLLM3_JAX_CACHE moves it"
        )


def random_3b() -> Path:
    """A random SmolLM3-3B in bfloat16, written once (6.15 GB), one tensor in memory at a time."""
    folder = cache_dir() / "bench" / "random-3b"
    if folder.is_dir():
        return folder
    block = (0.02 * np.random.default_rng(0).standard_normal(1 << 24, np.float32)).astype(NUMPY_DTYPES["bfloat16"])
    tensors = []
    for number, (name, hf) in enumerate(hf_tensors(ModelConfig.from_hf(SMOLLM3_3B)).items()):

        def read(shape=hf.shape, number=number) -> np.ndarray:
            if len(shape) == 1:  # a norm
                return np.ones(shape, block.dtype)
            return np.resize(np.roll(block, 7919 * number), shape)  # no tensor equals its neighbour

        tensors.append(StoredTensor(name=name, dtype="bfloat16", shape=hf.shape, file="", read=read))
    size = sum(tensor.nbytes for tensor in tensors)
    _need_space(folder.parent, size)
    with new_folder(folder) as part, progress(f"writing {folder}", size) as done:
        write(part / "config.json", json.dumps(SMOLLM3_3B, indent=2) + "\n")
        write_file(part / SINGLE, tensors, done)
    return folder


def gguf_of(folder: Path, kind: str) -> Path:
    """The model as a GGUF file, written once for these weights."""
    files = [file for file in sorted(folder.iterdir()) if file.is_file()]
    state = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    key = hashlib.sha256(json.dumps(state).encode()).hexdigest()[:12]
    path = cache_dir() / "bench" / f"{folder.resolve().name}-{key}.{kind}.gguf"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        convert(folder, path, gguf_type=kind.lower())
    return path
