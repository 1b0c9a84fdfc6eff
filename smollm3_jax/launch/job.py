"""What is launched: a training run, its command, and how long it may take to stop."""

import dataclasses
import math
import re
from collections.abc import Sequence
from pathlib import Path

from sharding.mesh import DEFAULT_AXES

from ..errors import OptionError
from ..reading import read_file
from ..text_files import decode
from ..train.settings import Settings
from ..train.settings_file import MOST_BYTES, read_settings, recipes

RESTART = 75  # the exit code of a run that was asked to stop and has saved (train/run/loop.py STOPPED)
# Assumed of a save: bytes a second of one host, to an object store that is slow; and of a step that no plan has timed.
SAVE_RATE, STEP_SECONDS = 100e6, 60.0
STARTS_IN = 30.0  # seconds beside step and save, for what is under way and for the processes' leave
_NAME = re.compile(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?")


@dataclasses.dataclass(frozen=True)
class TrainJob:
    """A run of `smollm3 train`.

    name: of the job. file: the text of a file of settings that goes along; empty: a recipe.
    config: the recipe, or the path of the file; words: the settings over it. grace: seconds, as of `grace`.
    """

    name: str
    settings: Settings
    config: str
    words: tuple[str, ...]
    file: str = ""
    grace: int = 0

    def command(self, config: str | None = None) -> list[str]:
        """The words of the command, which goes on with what is there; config: where the file lies by then."""
        config = self.config if config is None or not self.file else config
        return ["smollm3", "train", "--config", config, *self.words, "--resume", "auto"]


def train_job(
    config: str, words: Sequence[str], name: str | None = None, *, slices: int = 1, shared: bool = False
) -> TrainJob:
    """A run by its recipe or file, and settings over it.

    Args:
      name: default: the recipe's.
      slices: over which its data axis is to span, if it names no mesh.
      shared: whether its hosts see this machine's files.

    Raises:
      OptionError: as of `read_settings`; a name that no cluster takes; a run folder that would be gone with its host.
    """
    settings = read_settings(config, words)
    if slices > 1 and not settings.mesh.axes:
        axes = {"data": slices, **DEFAULT_AXES.get(settings.mesh.rules or "fsdp", {})}
        words = [*words, "mesh.axes=" + ",".join(f"{axis}={length}" for axis, length in axes.items())]
        settings = read_settings(config, words)
    folder = settings.run.dir
    if not shared and not folder.startswith("gs://"):
        raise OptionError(
            f"run.dir is {folder!r}, and the machines have no volume that stays: each restart would begin anew. Give "
            "run.dir=gs://BUCKET/FOLDER (s3:// is not written to by training); folders that hosts share are slurm's"
        )
    is_file = config not in recipes()
    return TrainJob(
        job_name(name, config),
        settings,
        str(Path(config).resolve()) if is_file else config,
        tuple(words),
        decode(read_file(Path(config), MOST_BYTES)) if is_file else "",
    )


def job_name(name: str | None, what: str) -> str:
    """The name that is given, or one made of that of a recipe, file or model.

    Raises:
      OptionError: no cluster takes it.
    """
    if name is None:
        words = re.sub(r"[^a-z0-9]+", "-", Path(what).stem.lower()).strip("-")
        return f"smollm3-{words.removeprefix('smollm3-')}"[:40].rstrip("-")
    if not _NAME.fullmatch(name):
        raise OptionError(
            f"--name is {name!r}; it has to be a small letter and up to 39 more of them, figures and dashes"
        )
    return name


def grace(state_bytes: int, hosts: int, step_seconds: float | None) -> int:
    """Seconds that a run may take from SIGTERM to its end: two steps, as one has just begun, and a save.

    Args:
      state_bytes: what a save writes, over all hosts.
      step_seconds: as planned; None: nobody knows.
    """
    seconds = 2 * (step_seconds or STEP_SECONDS) + state_bytes / hosts / SAVE_RATE + STARTS_IN
    return 30 * math.ceil(seconds / 30)
