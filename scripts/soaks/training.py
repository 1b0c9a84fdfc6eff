"""Runs of `smollm3 train` that faults end again and again, each compared with one that nothing disturbs."""

import itertools
import json
import random
import signal
import subprocess
import time
from typing import Any

from smollm3_jax.files import remove, write

from .common import Fault, Soak, log_file, no_reader, pause, wait_for
from .run import KEEP, PATIENCE, STEPS, TIMEOUT, Leg, Run, names_of, outcome, size_of

DISK = 300 << 20  # bytes: more than the checkpoints of a run
SIGNALS = ("SIGTERM", "SIGINT")
# Of `when`: at the start, after some steps, while a checkpoint is written, while an old one is removed.
MOMENTS = ("start", "steps", "steps", "saving", "removing")
KINDS = ("kill", "signal", "two signals", "pause", "disk full", "disk full at the start", "disk full for a while")
KINDS += ("slow data", "data too slow", "no data", "clock", "damage", "log disk full", "log without a reader")
KINDS += ("second run",)


def draw(chance: random.Random, each: int | None = None) -> list[list[Fault]]:
    """Runs, each a list of its faults; of `each`, as many of every kind, three a run: after more it is at its end."""
    if each:
        faults = [_drawn(chance, kind) for _ in range(each) for kind in KINDS]
        return [faults[i : i + 3] for i in range(0, len(faults), 3)]
    # Kills come more often than the rest: there are most moments for them.
    kinds = (*KINDS, "kill", "kill", "kill")
    return [[_drawn(chance, chance.choice(kinds)) for _ in range(chance.randint(3, 7))] for _ in range(500)]


def _drawn(chance: random.Random, kind: str) -> Fault:
    fault: Fault = {"kind": kind, "when": chance.choice(MOMENTS), "seconds": round(chance.uniform(0, 0.6), 3)}
    fault["steps"] = chance.randint(1, 9)
    if fault["when"] == "start":
        fault["seconds"] = round(chance.uniform(0, 8), 2)
    match kind:
        case "signal" | "two signals":
            fault["signal"] = chance.choice(SIGNALS)
        case "pause":
            fault |= {"for": round(chance.uniform(0.1, 6), 1), "slow": chance.choice((0.0, 0.5))}
        case "disk full" | "disk full at the start":
            fault["but"] = chance.choice((0, 0, 4 << 10, 200 << 10, 5 << 20, 20 << 20))
        case "disk full for a while":
            fault |= {"but": chance.choice((0, 0, 4 << 10, 5 << 20)), "for": round(chance.uniform(0.05, 1), 2)}
        case "slow data":
            fault["slow"] = round(chance.uniform(0.02, 0.3), 2)
        case "clock":
            fault["clock"] = chance.choice((-3e8, -86_400, -3600, 3600, 86_400, 3e8))
        case "damage":
            fault |= {"how": chance.choice(("flip", "cut", "empty", "remove")), "part": round(chance.random(), 3)}
    return fault


# --- one function a kind of fault ------------------------------------------------------------------------------


def suffer(run: Run, fault: Fault) -> Leg | None:
    """Does a fault to a run, and checks how the command ended."""
    soak = run.soak
    kind = fault["kind"].replace(" ", "_")
    ended = globals()[f"_{kind}"](run, fault)
    if not isinstance(ended, tuple):
        return ended
    leg, codes = ended
    codes = {*codes, *(() if leg.reached else (0,))}
    soak.check(leg.code in codes, f"exit code {leg.code}, not of {sorted(codes)}: {json.dumps(fault)}", run.log)
    if leg.code == 75:
        last = int(run.checkpoints[-1].name) if run.checkpoints else 0
        soak.check(last == run.step, f"exit code 75 with step {run.step}, saved {last}", run.log)
    return leg


def _kill(run: Run, fault: Fault) -> tuple[Leg, list[int]]:
    return run.leg(lambda process, there: process.kill(), fault), [-9]


def _signal(run: Run, fault: Fault) -> tuple[Leg, list[int]]:
    number = signal.Signals[fault["signal"]]
    # Before the run folder is open there is nothing to save.
    early = [-number, 130] if fault["when"] == "start" else []
    leg = run.leg(lambda process, there: process.send_signal(number), fault)
    return leg, [75, 0, *early]


def _two_signals(run: Run, fault: Fault) -> tuple[Leg, list[int]]:
    number = signal.Signals[fault["signal"]]

    def inject(process: subprocess.Popen, there: bool) -> None:
        process.send_signal(number)
        time.sleep(fault["seconds"] / 10)
        process.send_signal(number)

    return run.leg(inject, fault), [128 + number, 75, 0, -number, 130]


def _pause(run: Run, fault: Fault) -> tuple[Leg, list[int]]:
    """Longer than a batch may take, too: a process that does not run waits for nothing."""
    with run.soak.condition("slow", fault["slow"]):
        leg = run.leg(lambda process, there: (pause(process, fault["for"]), time.sleep(1), process.terminate()), fault)
    return leg, [75, 0, *([-15] if fault["when"] == "start" else [])]


def _disk_full(run: Run, fault: Fault) -> tuple[Leg, list[int]] | None:
    if not run.soak.disk.size:
        return None

    def inject(process: subprocess.Popen, there: bool) -> None:
        with run.soak.disk.filled(fault["but"]):
            wait_for(lambda: process.poll() is not None, PATIENCE)

    return run.leg(inject, fault), [3, 0]


def _disk_full_at_the_start(run: Run, fault: Fault) -> tuple[Leg, list[int]] | None:
    if not run.soak.disk.size:
        return None
    with run.soak.disk.filled(fault["but"]):
        return run.leg(lambda process, there: None), [3, 0]


def _disk_full_for_a_while(run: Run, fault: Fault) -> tuple[Leg, list[int]] | None:
    if not run.soak.disk.size:
        return None

    def inject(process: subprocess.Popen, there: bool) -> None:
        with run.soak.disk.filled(fault["but"]):
            time.sleep(fault["for"])

    return run.leg(inject, fault), [3, 0]


def _slow_data(run: Run, fault: Fault) -> tuple[Leg, list[int]]:
    with run.soak.condition("slow", fault["slow"]):
        return run.leg(lambda process, there: process.terminate(), fault), [75, 0, -15]


def _data_too_slow(run: Run, fault: Fault) -> tuple[Leg, list[int]]:
    """They hang, once it trains."""

    def inject(process: subprocess.Popen, there: bool) -> None:
        with run.soak.condition("slow", 3 * TIMEOUT):
            wait_for(lambda: process.poll() is not None, PATIENCE)

    leg = run.leg(inject, fault | {"when": "steps"})
    run.soak.check(leg.code != 3 or "data.timeout" in leg.said, "exit code 3 does not name data.timeout", run.log)
    return leg, [3, 0]


def _no_data(run: Run, fault: Fault) -> tuple[Leg, list[int]]:
    """The corpus is not there for a while."""
    away = run.corpus.with_suffix(".away")

    def inject(process: subprocess.Popen, there: bool) -> None:
        run.corpus.rename(away)
        wait_for(lambda: process.poll() is not None, PATIENCE)
        away.rename(run.corpus)

    return run.leg(inject, fault), [3, 0]


def _clock(run: Run, fault: Fault) -> tuple[Leg, list[int]]:
    def inject(process: subprocess.Popen, there: bool) -> None:
        with run.soak.condition("clock", fault["clock"]):
            run.reach(process, {"when": "steps", "steps": 3, "seconds": 0.0})
        process.terminate()

    return run.leg(inject, fault), [75, 0, *([-15] if fault["when"] == "start" else [])]


def _damage(run: Run, fault: Fault) -> None:
    """To a file of the newest checkpoint, while nothing runs; the next start has to notice, or to begin anew."""
    if not run.checkpoints:
        return
    files = sorted(x for x in run.checkpoints[-1].rglob("*") if x.is_file() and x.stat().st_size)
    # By size, so that the arrays are hit as often as they are large.
    at = int(fault["part"] * sum(x.stat().st_size for x in files))
    sizes = itertools.accumulate(x.stat().st_size for x in files)
    file, end = next((file, end) for file, end in zip(files, sizes, strict=True) if at < end)
    run.damaged.add((run.checkpoints[-1].name, run.checkpoints[-1].stat().st_ino))
    data = bytearray(file.read_bytes())
    at -= end - len(data)
    match fault["how"]:
        case "flip":
            data[at] ^= 1 << at % 8
            write(file, bytes(data))
        case "cut" | "empty":
            write(file, bytes(data)[: at if fault["how"] == "cut" else 0])
        case _:
            file.unlink()


def _log_disk_full(run: Run, fault: Fault) -> tuple[Leg, list[int]] | None:
    """What standard error goes to: training goes on without."""
    logs = run.soak.logs
    if not logs.size:
        return None
    with logs.filled(0), log_file(logs.folder / "stderr") as log:
        leg = run.leg(lambda process, there: process.terminate(), fault, stderr=log)
    return leg, [75, 0, *([-15] if fault["when"] == "start" else [])]


def _log_without_a_reader(run: Run, fault: Fault) -> tuple[Leg, list[int]]:
    """As of `smollm3 train ... 2>&1 | tee log` whose tee has been ended."""
    with no_reader() as log:
        leg = run.leg(lambda process, there: process.terminate(), fault, stderr=log)
    return leg, [75, 0, *([-15] if fault["when"] == "start" else [])]


def _second_run(run: Run, fault: Fault) -> tuple[Leg, list[int]]:
    def inject(process: subprocess.Popen, there: bool) -> None:
        if there:
            second = run.soak.start(*run.words, stderr=subprocess.PIPE)
            said = second.communicate()[1].decode(errors="replace")
            told = second.returncode == 2 and "another process trains" in said
            alive = process.poll() is None
            run.soak.check(told or not alive, f"a second run ended with {second.returncode}: {said[-300:]}")
        process.terminate()

    return run.leg(inject, fault | {"when": "steps", "steps": 1}), [75, 0]


# --- the soak -------------------------------------------------------------------------------------------------


def run(soak: Soak, schedule: list[list[Fault]]) -> None:
    whole = Run(soak, "whole")
    begin = time.monotonic()
    leg = whole.leg(lambda process, there: None)
    if leg.code:
        soak.found(f"the run that nothing disturbs has ended with {leg.code}: {leg.said[-500:]}")
        return
    soak.until += time.monotonic() - begin  # the minutes are those of faults
    wanted, names = outcome(whole.folder), names_of(whole.folder)
    size, usual, highest = size_of(whole.folder), leg.highest, 0.0
    soak.say(f"undisturbed: {STEPS} steps in {time.monotonic() - begin:.1f} s, {usual:.0f} MB")
    runs = 0
    for number, faults in enumerate(schedule):
        if soak.is_over:
            break
        one = Run(soak, f"run{number}")
        for fault in faults:
            if soak.is_over:
                break
            with soak.fault(fault):
                leg = suffer(one, fault)
                highest = max(highest, leg.highest if leg else 0.0)
                room = size + 2 * size / KEEP  # a checkpoint that is written, and one on its way out
                soak.check(size_of(one.folder) <= room, f"{size_of(one.folder)} bytes, {size} undisturbed", one.folder)
        with soak.fault({"kind": "to the end"}):
            _to_the_end(one, wanted, names)
        runs += 1
        remove(one.folder)
    soak.measured |= {"runs": runs, "MB undisturbed": round(usual), "MB at most": round(highest)}
    soak.check(highest < 1.3 * usual + 50, f"training took {highest:.0f} MB, undisturbed {usual:.0f}")


def _to_the_end(one: Run, wanted: dict[str, Any], names: set[str]) -> None:
    soak = one.soak
    leg = one.leg(lambda process, there: None)
    soak.check(leg.code == 0, f"the end of a run: exit code {leg.code}: {leg.said[-300:]}", one.log, one.folder)
    found = outcome(one.folder)
    for what in wanted:
        soak.check(found[what] == wanted[what], f"{one.folder.name}: other {what} than undisturbed", one.folder)
    again = one.leg(lambda process, there: None)
    soak.check(again.code == 0, f"a run that is done, started again: exit code {again.code}", one.log)
    soak.check(outcome(one.folder) == found, "a run that is done is another after one more start", one.folder)
    left = sorted(names_of(one.folder) - names - {"events.jsonl", "skipped.jsonl"})
    soak.check(not left, f"{one.folder.name}: left over: {', '.join(left[:10])}")
