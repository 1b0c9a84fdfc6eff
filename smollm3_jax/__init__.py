"""SmolLM3 in JAX: run it, train it, convert it."""

from .support import require_supported

require_supported()

from .config import GenerationConfig, ModelConfig, RopeScaling  # noqa: E402
from .errors import SmolLM3Error  # noqa: E402
from .generation.api import Request, generate, stream  # noqa: E402
from .generation.sampling import SamplingParams  # noqa: E402
from .model import SmolLM3  # noqa: E402
from .weights.load import from_pretrained  # noqa: E402
from .weights.save import convert, save_pretrained  # noqa: E402

__all__ = [
    "GenerationConfig",
    "ModelConfig",
    "Request",
    "RopeScaling",
    "SamplingParams",
    "SmolLM3",
    "SmolLM3Error",
    "convert",
    "from_pretrained",
    "generate",
    "save_pretrained",
    "stream",
]
