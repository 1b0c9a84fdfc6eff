"""The reference's sums of a run of preferences: computed once, before the first step, and kept in the run's folder.

They are computed by the program that trains: the same dtype, remat, rows and packing, so that the first step finds what
it is compared with, but for rounding. What is kept is a float32 a completion with its key (data/pairs.py):

reference/about.json     what the sums are of: digests of the model, tokenizer and template, length of rows and dtype
reference/00000000.sums  a piece: a SHA-256 of about.json and the rest, the keys, the sums
reference/done.json      once there is all that the run needs: of which data

A piece is whole or not there, so a pass that was killed goes on after the last one.

Shapes: B rows, T tokens of a row, P pairs of a row at most.
"""

import hashlib
import json
import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from ..errors import TrainingError
from ..files import remove, write
from .state import Batch

log = logging.getLogger(__name__)

FORMAT = 1
_DIGEST = hashlib.sha256().digest_size


class Sums:
    """The sums of a reference by key, and the folder that keeps them."""

    def __init__(self, folder: epath.Path, about: Mapping[str, Any], writes: bool = True):
        """
        Args:
          folder: it need not be there.
          about: what the sums are of, ready for JSON, but for the "model", which `belong_to` adds or compares.
          writes: whether this process of a job is the one that writes.

        Raises:
          TrainingError: the folder has sums of something else.
        """
        self.folder, self.known = folder, dict[int, np.float32]()
        self._about = {"format": FORMAT, **about}
        self._pieces, self._writes = 0, writes
        if (folder / "about.json").exists():
            kept = _json(folder / "about.json")
            self._compare(kept, self._about)
            self._about = kept
            self._read()

    def belong_to(self, model: Mapping[str, str]) -> None:
        """model: the digests of its arrays. Raises TrainingError if the sums of the folder are another model's."""
        if "model" in self._about:
            self._compare(self._about, {"model": dict(model)})
            return
        self._about["model"] = dict(model)
        if self._writes:
            self.folder.mkdir(parents=True, exist_ok=True)
            write(self.folder / "about.json", json.dumps(self._about, indent=1))

    def add(self, keys: np.ndarray, sums: np.ndarray) -> None:
        """A piece: int64 and float32 [n]."""
        self.known.update(zip(keys.tolist(), sums.astype(np.float32), strict=True))
        if self._writes:
            payload = keys.astype("<i8").tobytes() + sums.astype("<f4").tobytes()
            write(self.folder / f"{self._pieces:08d}.sums", self._seal(payload) + payload)
        self._pieces += 1

    def is_done(self, needed: object) -> bool:
        """Whether a pass over this data, ready for JSON, has ended, and nothing of it was lost since."""
        done = self.folder / "done.json"
        return done.exists() and _json(done) == {"of": json.loads(json.dumps(needed)), "count": len(self.known)}

    def done(self, needed: object) -> None:
        """A pass over this data has ended."""
        if self._writes:
            write(self.folder / "done.json", json.dumps({"of": needed, "count": len(self.known)}))

    def digest(self) -> str:
        """Of all keys and sums."""
        keys = np.array(sorted(self.known), "<i8")
        sums = np.array([self.known[key] for key in keys.tolist()], "<f4")
        return hashlib.sha256(keys.tobytes() + sums.tobytes()).hexdigest()

    def filled(self, batch: Batch) -> Batch:
        """A batch whose `reference` are keys, int64 [B, T], with the sums in their place; keys of 0 become 0.

        Raises:
          TrainingError: a sum is missing.
        """
        keys, places = np.unique(batch.reference, return_inverse=True)
        try:
            sums = np.array([self.known[key] if key else 0 for key in keys.tolist()], np.float32)
        except KeyError:
            raise TrainingError(
                f"the reference's sums in {self.folder} lack a completion of this batch, as the data has changed: "
                "--resume auto --allow-changes computes what is missing"
            ) from None
        return Batch(batch.tokens, batch.segment_ids, batch.weights, sums[places].reshape(batch.reference.shape))

    def _read(self) -> None:
        for path in sorted(self.folder.glob("*.sums")):
            try:
                content = path.read_bytes()
            except FileNotFoundError:  # another process of the job found it damaged
                continue
            seal, payload = content[:_DIGEST], content[_DIGEST:]
            if seal != self._seal(payload):
                log.warning("%s is damaged, and is computed again", path)
                if self._writes:
                    remove(path)
                continue
            count = len(payload) // 12
            keys, sums = np.frombuffer(payload[: 8 * count], "<i8"), np.frombuffer(payload[8 * count :], "<f4")
            self.known.update(zip(keys.tolist(), sums.astype(np.float32), strict=True))
            self._pieces = max(self._pieces, int(path.stem) + 1)

    def _seal(self, payload: bytes) -> bytes:
        return hashlib.sha256(json.dumps(self._about, sort_keys=True).encode() + payload).digest()

    def _compare(self, kept: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
        differ = [name for name in wanted if kept.get(name) != wanted[name]]
        if differ:
            raise TrainingError(
                f"the sums in {self.folder} are of another reference: {', '.join(differ)} then {_short(kept, differ)}, "
                f"now {_short(wanted, differ)}. Another run.dir begins anew; or remove that folder, if the run has "
                "taken no step"
            )


def keys_of(batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    """(keys int64 [n], of which segments they are: int [n, 2], row and segment id - 1) of a batch whose `reference` are
    keys."""
    segments = np.asarray(batch.segment_ids)
    last = (segments != 0) & (segments != np.pad(segments, ((0, 0), (0, 1)))[:, 1:])
    rows, places = np.nonzero(last)
    return np.asarray(batch.reference)[rows, places], np.stack([rows, segments[rows, places] - 1], axis=1)


def _json(path: epath.Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise TrainingError(
            f"{path} cannot be read: {error}; remove the folder, which is then computed again"
        ) from None


def _short(about: Mapping[str, Any], names: list[str]) -> str:
    return ", ".join(str(about.get(name))[:80] for name in names)
