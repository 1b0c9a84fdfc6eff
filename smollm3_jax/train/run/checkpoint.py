"""Checkpoints of a run: written by Orbax in the background, each array with a digest that restoring verifies.

Orbax itself does not notice a flipped bit. A digest here is a sum over an array's elements, each times a number that
only its global index determines, modulo 2**32: any mesh computes the same one, on its devices, and no change of one
element leaves it as it was.
"""

import contextlib
import hashlib
import json
import logging
import os
import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath
from jax import Array
from jax.tree_util import KeyPath
from orbax.checkpoint.utils import TMP_DIR_SUFFIX

from sharding.rules import PyTree

from ...errors import OptionError, SmolLM3Error, TrainingError
from ...files import remove
from ...job import raise_everywhere
from ...paths import is_remote

log = logging.getLogger(__name__)

T = TypeVar("T")

FORMAT = 1
_NAME = re.compile(r"[0-9]{8}|[1-9][0-9]{8,}")
_MULTIPLIERS = (0x9E3779B1, 0x85EBCA77)  # odd, of xxHash


# Status codes of failures to read that say nothing about the files.
_NO_DAMAGE = ("RESOURCE_EXHAUSTED", "PERMISSION_DENIED", "UNAUTHENTICATED", "UNAVAILABLE", "DEADLINE_EXCEEDED")


# Orbax measures how long a save takes on the machine's clock, which may jump, and gives up what took too long: no jump
# is as long as a century. Nor are folders made in the background: waiting for them has a time-out that no option sets.
_PATIENT = ocp.options.AsyncOptions(timeout_secs=100 * 365 * 86_400, create_directories_asynchronously=False)


class Damaged(SmolLM3Error):
    """A checkpoint that cannot be used. Its text is the reason."""


class Checkpoints:
    """The checkpoints of a run folder: one folder a step, whole or not there."""

    def __init__(self, folder: epath.Path, keep: int = 3, keep_every: int = 0):
        """
        Args:
          keep: how many of the newest stay.
          keep_every: older ones stay too if their step is a multiple of it (0: none).
        """
        self.folder, self._keep, self._keep_every = folder, keep, keep_every
        self.damaged: set[int] = set()  # steps that restoring found to be so: retention does not count them
        handlers = {"state": ocp.StandardCheckpointHandler(), "about": ocp.JsonCheckpointHandler()}
        options = ocp.CompositeOptions(async_options=_PATIENT)
        handler = ocp.CompositeCheckpointHandler(composite_options=options, **handlers)
        self._writer = ocp.AsyncCheckpointer(handler, async_options=_PATIENT)

    def save(self, step: int, state: PyTree, about: Mapping[str, Any]) -> None:
        """Begins to write; returns when the arrays are on the host.

        Args:
          state: a pytree of arrays.
          about: whatever else belongs to it, ready for JSON.

        Raises:
          TrainingError: this save, or the one before it, failed.
        """
        self.wait()
        arrays = named_arrays(state)
        digests, finite = digest(arrays)
        if not all(finite.values()):
            bad = ", ".join([name for name, good in finite.items() if not good][:10])
            raise TrainingError(f"step {step} is not saved: not all is finite in {bad}")
        content = {
            "format": FORMAT,
            "step": step,
            "arrays": {name: [x.dtype.name, list(x.shape), digests[name]] for name, x in arrays.items()},
            **about,
        }
        items = {"state": ocp.args.StandardSave(arrays), "about": ocp.args.JsonSave(_sealed(content))}
        self.damaged.discard(step)
        try:
            self._writer.save(self.folder / f"{step:08d}", args=ocp.args.Composite(**items), force=True)
        except Exception as error:
            raise _failed(error) from error

    def check(self) -> None:
        """Raises TrainingError if what is being written has failed."""
        try:
            self._writer.check_for_errors()
        except Exception as error:
            raise _failed(error) from error

    def wait(self) -> None:
        """Until the last save is whole, or has failed (TrainingError); removes what need not stay."""
        try:
            self._writer.wait_until_finished()
        except Exception as error:
            raise _failed(error) from error
        old = [step for step in steps(self.folder) if step not in self.damaged]
        for step in old[: -self._keep]:
            if jax.process_index() == 0 and not (self._keep_every and step % self._keep_every == 0):
                with contextlib.suppress(OSError):
                    remove(self.folder / f"{step:08d}")

    def close(self) -> None:
        try:
            self._writer.close()
        except Exception as error:
            raise _failed(error) from error


@contextlib.contextmanager
def without_late_writes() -> Iterator[None]:
    """Of errors that nobody can catch Python tells, but not of one kind: after a write has failed, and has been
    reported, the other writes of the same save end when Orbax has closed the event loop that waited for them."""
    before = sys.unraisablehook

    def hook(unraisable: "sys.UnraisableHookArgs") -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            before(unraisable)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before


def _failed(error: Exception) -> TrainingError:
    return TrainingError(f"a checkpoint could not be written: {str(error).splitlines()[0][:300]}")


def steps(folder: epath.Path) -> list[int]:
    """The steps of the whole checkpoints of a folder, in order; unfinished ones are skipped."""
    if not folder.is_dir():
        return []
    return sorted(int(x.name) for x in folder.iterdir() if _NAME.fullmatch(x.name) and _is_whole(x))


def steps_of(run: epath.Path, step: int | None, asked: str) -> list[int]:
    """The steps of a run's checkpoints, in order.

    Args:
      step: has to be one of them; None asks for none. asked: how an error begins, "--step 5: the run".

    Raises:
      OptionError: there is no checkpoint, or not that one.
    """
    there = steps(run / "checkpoints")
    if not there:
        raise OptionError(f"{run} holds no checkpoint")
    if step is not None and step not in there:
        raise OptionError(f"{asked} has checkpoints of {', '.join(map(str, there))}")
    return there


def _is_whole(step: epath.Path) -> bool:
    return all((step / part).is_dir() for part in ("state", "about")) and ocp.utils.is_checkpoint_finalized(step)


def left_overs(folder: epath.Path) -> list[epath.Path]:
    """What interrupted saves left in a folder of checkpoints, and whatever else there is no checkpoint.

    Raises:
      OptionError: the folder is a link: what lies where it leads to may be anybody's.
    """
    if not is_remote(folder) and os.path.islink(folder):
        raise OptionError(
            f"{folder} is a link, to {os.readlink(folder)}, where nothing is removed: tidy up there by hand"
        )
    whole = {f"{step:08d}" for step in steps(folder)}
    return sorted(x for x in folder.iterdir() if x.name not in whole) if folder.is_dir() else []


def broken_off(folder: epath.Path) -> list[epath.Path]:
    """What saves and removals that were ended in their midst left in a folder of checkpoints: what Orbax had not given
    its name yet, and older steps than the newest of which a part is gone. Nothing where the folder is a link."""
    if (not is_remote(folder) and os.path.islink(folder)) or not folder.is_dir():
        return []
    whole = steps(folder)
    parts = [x for x in folder.iterdir() if _NAME.fullmatch(x.name) and whole and int(x.name) < whole[-1]]
    return sorted([*(x for x in parts if int(x.name) not in whole), *folder.glob(f"*[0-9]{TMP_DIR_SUFFIX}*")])


def read_about(folder: epath.Path, step: int) -> dict[str, Any]:
    """What a checkpoint says of itself. Raises Damaged."""
    file = folder / f"{step:08d}" / "about" / "metadata"
    try:
        content = json.loads(file.read_bytes())
        seal = content.pop("seal")
        sound = seal == _sealed(content)["seal"]
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise Damaged(f"{file} cannot be read: {error!r}"[:300]) from None
    if not sound:
        raise Damaged(f"{file} has changed since it was written")
    if content.get("step") != step:
        raise Damaged(f"{file} is of step {content.get('step')}, not of the one that its folder's name says")
    if content.get("format") != FORMAT:
        raise TrainingError(
            f"{file.parents[1]} is of format {content.get('format')}; this version reads {FORMAT}: "
            "restore it with the version that wrote it"
        )
    return content


def restore(folder: epath.Path, step: int, like: T, under: str = "") -> T:
    """The arrays of a checkpoint, verified.

    Args:
      like: a pytree of what they are to be: arrays or shapes, with shardings; a mesh of any kind.
      under: restore only what lies under this name in the state.

    Raises:
      Damaged: something is missing, or has changed since it was written; in a job, for one process at least.
      TrainingError: they are other arrays than `like`'s, not all is finite, or there is no memory or permission.
    """
    about = read_about(folder, step)
    prefix = under and under + "."
    wanted = {prefix + name: x for name, x in named_arrays(like).items()}
    entries = {name: entry for name, entry in about["arrays"].items() if name.startswith(prefix)}
    saved = {name: (dtype, tuple(shape)) for name, (dtype, shape, _) in entries.items()}
    kinds = {name: (x.dtype.name, x.shape) for name, x in wanted.items()}
    differ = [
        f"{name}: {saved.get(name, 'nothing')} saved, {kinds.get(name, 'nothing')} wanted"
        for name in {**saved, **kinds}
        if saved.get(name) != kinds.get(name)
    ]
    if differ:
        raise TrainingError(f"checkpoint {step} holds other arrays than this run: {'; '.join(differ[:10])}")
    shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for name, x in wanted.items()}
    found = _read(folder, step, entries, shapes, partial=bool(under))
    return jax.tree.unflatten(jax.tree.structure(like), [found[name] for name in wanted])


def restore_array(folder: epath.Path, step: int, name: str) -> Array:
    """One array of a checkpoint by its name ("model.layers.q"), verified; in the host's memory unless JAX_PLATFORMS
    leaves out the CPU. Raises Damaged or TrainingError, as `restore` does."""
    entries = read_about(folder, step)["arrays"]
    if name not in entries:
        raise TrainingError(f"checkpoint {step} holds no {name}")
    dtype, shape, _ = entries[name]
    at = jax.sharding.SingleDeviceSharding(host_device())
    like = jax.ShapeDtypeStruct(tuple(shape), jnp.dtype(dtype), sharding=at)
    return _read(folder, step, entries, {name: like}, partial=True)[name]


def host_device() -> Any:  # a jax.Device, which type checkers do not know
    """The CPU, unless JAX_PLATFORMS leaves it out."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return jax.local_devices()[0]


def _read(
    folder: epath.Path,
    step: int,
    entries: Mapping[str, Any],
    shapes: Mapping[str, jax.ShapeDtypeStruct],
    partial: bool,
) -> dict[str, Array]:
    """The arrays of these names and shapes, verified.

    Args:
      entries: of the checkpoint's "arrays". partial: they are not all that the checkpoint holds.
    """
    how = {name: ocp.ArrayRestoreArgs(sharding=x.sharding, strict=True) for name, x in shapes.items()}
    arguments = ocp.args.PyTreeRestore(dict(shapes), restore_args=how, partial_restore=partial)
    with raise_everywhere():
        try:
            found = ocp.PyTreeCheckpointHandler().restore(folder / f"{step:08d}" / "state", args=arguments)
        except Exception as error:
            reason = f"checkpoint {step} cannot be read: {(str(error) or repr(error)).splitlines()[0][:300]}"
            if isinstance(error, (MemoryError, PermissionError)) or any(word in reason for word in _NO_DAMAGE):
                raise TrainingError(reason) from None
            raise Damaged(reason) from None
    digests, finite = digest(found)
    changed = [name for name, value in digests.items() if value != entries[name][2]]
    if changed:
        raise Damaged(f"checkpoint {step}: changed since it was written: {', '.join(changed[:10])}")
    bad = [name for name, good in finite.items() if not good]
    if bad:
        raise TrainingError(f"checkpoint {step}: not all is finite in {', '.join(bad[:10])}")
    return found


def named_arrays(tree: PyTree) -> dict[str, Array]:
    """The leaves of a tree by their paths in it ("model.layers.q"), in its order."""
    return {_name(path): x for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]}


def _name(path: KeyPath) -> str:
    words = [str(getattr(key, "name", getattr(key, "key", getattr(key, "idx", key)))) for key in path]
    return ".".join(word for word in words if word != "value")


def digest(arrays: Mapping[str, Array]) -> tuple[dict[str, str], dict[str, bool]]:
    """(a digest, whether all is finite) of each array, the same on any mesh."""
    sums, finite = jax.device_get(_digests(dict(arrays)))
    words = {name: "".join(f"{int(x):08x}" for x in sums[name]) for name in arrays}
    return words, {name: bool(finite[name]) for name in arrays}


def digest_of(tree: PyTree) -> str:
    """One digest of all arrays of a tree, the same on any mesh."""
    digests, _ = digest(named_arrays(tree))
    return hashlib.sha256("".join(name + digests[name] for name in sorted(digests)).encode()).hexdigest()


@jax.jit
def _digests(arrays: dict[str, Array]) -> tuple[dict[str, Array], dict[str, Array]]:
    finite = {name: jnp.isfinite(x).all() for name, x in arrays.items()}
    return {name: _digest(x) for name, x in arrays.items()}, finite


def _digest(x: Array) -> Array:
    """uint32 [2]."""
    bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}")).astype(jnp.uint32)
    index = jnp.zeros(x.shape, jnp.uint32)
    stride = 1
    for axis in reversed(range(x.ndim)):
        index += jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * jnp.uint32(stride % 2**32)
        stride *= x.shape[axis]
    sums = []
    for multiplier in _MULTIPLIERS:
        mixed = (index + 1) * jnp.uint32(multiplier)
        mixed = (mixed ^ (mixed >> 15)) * jnp.uint32(multiplier)
        # Odd, so that no difference in one element vanishes modulo 2**32.
        sums.append(jnp.sum(bits * (mixed | 1), dtype=jnp.uint32))
    return jnp.stack(sums)


def _sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    text = json.dumps(content, sort_keys=True)
    return {**json.loads(text), "seal": hashlib.sha256(text.encode()).hexdigest()}
