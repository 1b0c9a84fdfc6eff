"""Several processes run one engine: process 0 says what comes, and the others do the same.

Each has a part of every array, so that all must run the same programs in the same order. Without `leading`, a program
whose processes all make the same calls is such a one by itself.
"""

import contextlib
import contextvars
import json
from collections.abc import Iterator
from typing import Any, TypeVar

import jax
import numpy as np
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec

from sharding.rules import Sharding

from ..sizes import power_of_two_from

T = TypeVar("T")


def is_follower() -> bool:
    """Whether this process does what another one says."""
    return jax.process_index() != 0


def broadcast(content: Any) -> Any:
    """What process 0 gives, ready for JSON, on every process; all have to call it."""
    if jax.process_count() == 1:
        return content
    from jax.experimental import multihost_utils

    data = b"" if is_follower() else json.dumps(content).encode()
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
    # A power of two of bytes: few sizes are few programs.
    padded = np.zeros(power_of_two_from(size), np.uint8)
    padded[: len(data)] = np.frombuffer(data, np.uint8)
    return json.loads(np.asarray(multihost_utils.broadcast_one_to_all(padded))[:size].tobytes())


_LEADS = contextvars.ContextVar("leads", default=False)


def leads() -> bool:
    """Whether engines that are made now tell other processes what they do."""
    return _LEADS.get()


@contextlib.contextmanager
def leading() -> Iterator[None]:
    """On process 0, around its engines, where the others `follow`: tells them at the end that there are no more.

    After an error in the midst of a step it tells nothing: the others wait there for arrays, not for words. They end
    when this process does.
    """
    before = _LEADS.set(jax.process_count() > 1)
    try:
        yield
    finally:
        _LEADS.reset(before)
        if not broken():
            broadcast({"kind": "end"})


_broken = False


def broken() -> bool:
    """Whether a step has failed, so that the processes of a job are no longer at the same place."""
    return _broken


@contextlib.contextmanager
def in_step() -> Iterator[None]:
    """Around what all processes have to do together."""
    global _broken
    try:
        yield
    except BaseException:
        _broken = jax.process_count() > 1
        raise


def spans_hosts(sharding: Sharding | None) -> bool:
    """Whether the devices of a mesh belong to several processes."""
    return sharding is not None and len({device.process_index for device in sharding.mesh.devices.flat}) > 1


def on_every_host(tree: T, sharding: Sharding | None) -> T:
    """Inside a program: arrays that the processes are to read, whole on each of them where there are several."""
    if sharding is None or not spans_hosts(sharding):
        return tree

    def whole(x: Array) -> Array:
        return jax.lax.with_sharding_constraint(x, NamedSharding(sharding.mesh, PartitionSpec()))

    return jax.tree.map(whole, tree)
