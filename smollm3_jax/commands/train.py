"""`smollm3 train`."""

import argparse
import json
import logging
import shlex
import sys
from typing import Any, NoReturn

from ..screen_text import plain as plain_text
from ..streams import end_now
from .shared import HEARTBEAT, WAIT, add_job, console, join, print_json, show

log = logging.getLogger(__name__)


class _List(argparse.Action):
    """Prints every setting, and ends, as --help does."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        from rich.table import Table

        from ..train.settings import listed

        table = Table("setting", "default", "means")
        for setting in listed():
            default = "" if setting["type"] == "table" else json.dumps(setting["default"])
            table.add_row(setting["name"], default, setting["meaning"])
        console().print(table)
        parser.exit()


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config", required=True, metavar="FILE.toml|RECIPE", help="settings; see smollm3_jax/train/recipes"
    )
    parser.add_argument("settings", nargs="*", metavar="section.key=value", help="over those of the file")
    parser.add_argument("--list", action=_List, nargs=0, help="print every setting, its default and what it means")
    parser.add_argument("--resume", choices=("auto",), help="go on from the newest sound checkpoint, if there is one")
    parser.add_argument("--allow-restart", action="store_true", help="start over if all checkpoints are damaged")
    parser.add_argument("--allow-changes", action="store_true", help="go on with settings or data that have changed")
    parser.add_argument(
        "--clean", action="store_true", help="remove whatever is no checkpoint where the run keeps those"
    )
    parser.add_argument("--dry-run", action="store_true", help="print steps, tokens, stages, mixture and memory")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    add_job(parser)


def run(args: argparse.Namespace) -> int:
    import jax

    from ..support import require_devices
    from ..train.settings_file import read_settings

    settings = read_settings(args.config, args.settings)
    if args.dry_run:
        from ..train.run.dry_run import describe, tables

        report = describe(settings)
        show(args, report, tables)
        return 0
    join(args)
    require_devices()
    if getattr(args, "verbose", 0) < 2:
        logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax's tracebacks: what fails there is an error here
    from ..train.run.loop import STOPPED, train
    from ..train.run.metrics import plain

    result = train(
        settings,
        resume=args.resume == "auto",
        allow_restart=args.allow_restart,
        allow_changes=args.allow_changes,
        clean=args.clean,
    )
    try:
        _tell(plain(result), settings.run.dir, args.json)
    except OSError as error:  # a full disk, a reader that has left: the run is what it is
        log.warning("what the run came to could not be written: %s", error)
    if result["stopped"]:
        print(f"smollm3: to go on: {plain_text(resuming(args))}", file=sys.stderr)
    if jax.distributed.is_initialized():
        jax.distributed.shutdown()  # waits for the others
    leave(STOPPED if result["stopped"] else 0)


def _tell(result: dict[str, Any], folder: str, as_json: bool) -> None:
    if as_json:
        print_json(result)
        return
    how = "stopped" if result["stopped"] else "done"
    loss = "none yet" if result["loss"] is None else f"{result['loss']:.4f}"
    print(f"{how} at step {result['step']}, loss {loss}, checkpoints in {plain_text(folder)}/checkpoints")


def resuming(args: argparse.Namespace) -> str:
    """The command that goes on with this run, for a shell."""
    words = ["smollm3", "train", "--config", args.config, *args.settings, "--resume", "auto"]
    words += ["--allow-changes"] * args.allow_changes
    for name in ("coordinator", "processes", "process", "wait", "heartbeat"):
        value = getattr(args, name)
        if value is not None and (name, value) not in (("wait", WAIT), ("heartbeat", HEARTBEAT)):
            words += [f"--{name}", str(value)]
    return shlex.join(words)


# A normal exit waits for threads (data, a failed save) or breaks off in their midst.
leave = end_now
