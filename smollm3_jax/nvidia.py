"""Which NVIDIA GPU a program is for, and whether this JAX is one that the kernels for it were written with."""

import jax

from sharding.rules import Sharding

# The kernels stand on interfaces of JAX that are private (cuDNN's primitives), deprecated (Pallas' Triton) or still
# moving (Mosaic GPU): from the first of these versions on and before the second they were read, and compiled with.
# Before 0.11.2 JAX computes documents with fewer key-value heads than query heads silently wrong
# (github.com/jax-ml/jax/issues/39521).
VERSIONS = ((0, 11, 2), (0, 13))


def kernels_fit() -> bool:
    """Whether this version of JAX has the interfaces that the kernels were written for."""
    return VERSIONS[0] <= jax.__version_info__ < VERSIONS[1]


def compute_capability(sharding: Sharding | None) -> tuple[int, int]:
    """The compute capability of the device that a program is for, such as (9, 0); (0, 0) if it is not NVIDIA's."""
    device = jax.devices()[0] if sharding is None else sharding.mesh.devices.flat[0]
    major, _, minor = str(getattr(device, "compute_capability", "")).partition(".")
    # AMD's say gfx...
    return (int(major), int(minor)) if major.isdecimal() and minor.isdecimal() else (0, 0)
