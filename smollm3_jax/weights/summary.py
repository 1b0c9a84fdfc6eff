"""What a checkpoint holds, from its headers alone."""

import dataclasses
import math
from pathlib import Path
from typing import Any

from .demo import model_folder
from .key_map import hf_tensors
from .load import open_checkpoint


def summarize(source: str | Path) -> dict[str, Any]:
    """Config, parameter count, bytes, and every tensor; no weight is read or allocated.

    Raises:
      SmolLM3Error: the checkpoint is unsound.
    """
    path = model_folder(str(source))
    checkpoint = open_checkpoint(path)
    tensors = checkpoint.tensors
    plain = dataclasses.replace(checkpoint.config, quantization=None)
    return {
        "path": str(path),
        "parameters": sum(math.prod(hf.shape) for hf in hf_tensors(plain).values()),
        "bytes": sum(tensor.nbytes for tensor in tensors.values()),
        "config": checkpoint.config.to_hf(),
        "generation_config": checkpoint.generation_config.to_hf(),
        "text_files": sorted(checkpoint.files),
        "tensors": [
            {
                "name": name,
                "parameter": hf.param,
                "layer": hf.layer,
                "dtype": tensors[name].dtype,
                "shape": list(hf.shape),
                "bytes": tensors[name].nbytes,
                "file": Path(tensors[name].file).name,
            }
            for name, hf in hf_tensors(checkpoint.config).items()
        ],
    }
