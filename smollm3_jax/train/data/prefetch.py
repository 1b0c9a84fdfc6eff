"""Batches made while the device works, and their way onto the devices."""

import queue
import threading
from collections.abc import Callable, Generator
from typing import Any

import jax
from jax.sharding import NamedSharding

from sharding.rules import Sharding

from ...errors import DataError
from ..state import Batch
from .mixture import Batches
from .packing import EndOfData

Made = tuple[int, Batch, dict[str, Any]]


def prefetch(
    batches: Batches, start: int, stop: int, timeout: float, asked: Callable[[], bool], depth: int = 2
) -> Generator[Made | None, None, None]:
    """(step, batch, the state of `batches` after it) of each step, made by a thread while the device works.

    Where it has to wait and `asked()` is true, it yields None instead.

    Args:
      start, stop: steps, as in `range`.
      timeout: seconds that a batch may take.
      asked: whether somebody wants the run to stop.
      depth: batches that are kept ready.

    Raises:
      DataError: the thread failed, or a batch did not come within `timeout` seconds: the thread is then abandoned.
    """
    made: queue.Queue[Made | BaseException | None] = queue.Queue(depth)
    left = threading.Event()

    def put(item: Made | BaseException | None) -> None:
        while not left.is_set():
            try:
                return made.put(item, timeout=0.2)
            except queue.Full:
                continue

    def work() -> None:
        try:
            for step in range(start, stop):
                if left.is_set():
                    return
                batch = batches.next(step)
                put((step, batch, batches.state()))
            put(None)
        except BaseException as error:
            put(error)

    thread = threading.Thread(target=work, name="batches", daemon=True)
    thread.start()
    try:
        look, waited = min(timeout, 0.5), 0.0
        while True:
            try:
                item = made.get(timeout=look)
            except queue.Empty:
                if asked():
                    yield None
                # Looks are counted, not a clock's seconds, which go on while the whole process is stopped.
                waited += look
                if waited >= timeout:
                    raise DataError(f"no batch came within data.timeout={timeout:g} seconds") from None
                continue
            if item is None or isinstance(item, EndOfData):
                return
            if isinstance(item, BaseException):
                raise item
            yield item
            waited = 0.0
    finally:
        left.set()


def on_mesh(batch: Batch, sharding: Sharding | None) -> Batch:
    """The batch on the devices, of which each host hands over its own rows alone; a batch of numpy arrays [B, T]."""
    if sharding is None:
        return jax.tree.map(jax.numpy.asarray, batch)
    at = NamedSharding(sharding.mesh, sharding.spec("batch", None))
    return jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, at, lambda index: x[index]), batch)
