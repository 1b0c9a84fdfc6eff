"""`smollm3 serve` under clients, signals and disks as they are met with; after each fault it has to be as it was."""

import contextlib
import http.client
import json
import os
import random
import resource
import signal
import threading
import time
from pathlib import Path
from typing import Any

from .common import Fault, Soak, pause, resident, wait_for
from .server import (
    COMPILED,
    LONG,
    PROMPT,
    QUEUE,
    SLOTS,
    Server,
    as_before,
    children_of,
    is_at_rest,
    leave,
    request,
    same,
    started,
)

DISK = 1 << 20  # bytes, of which nothing is wanted
LIFE = 25  # faults of one process
# Before it listens, a signal ends it as it ends any process.
OTHER_CODES = {"SIGKILL": (-9,), "SIGTERM while it loads": (0, -15)}
# How a client is when it leaves, and how it leaves.
STATES = ("head", "body", "queued", "prompt", "decoding", "streaming", "n", "logprobs")
KINDS = ("leaves", "flood", "bad requests", "slow reader", "slow writer", "pause", "log disk full", "clock")
KINDS += ("no template process", "no descriptors", "idle connections")
ENDS = ("SIGTERM", "SIGTERM while it answers", "SIGTERM and a slow reader", "two signals", "SIGKILL")
ENDS += ("SIGTERM while it loads", "log without a reader", "log disk full, two signals")
BAD: tuple[tuple[str, str, bytes, dict[str, str], tuple[int, ...]], ...] = (
    ("POST", "/v1/completions", b"{", {}, (400,)),
    ("POST", "/v1/completions", b"[" * 200_000, {}, (400,)),
    ("POST", "/v1/completions", b'{"prompt": "' + b"x " * 2_500_000 + b'"}', {}, (413,)),
    ("POST", "/v1/completions", b'{"prompt": "' + b"w1 " * 100_000 + b'"}', {}, (400,)),
    ("POST", "/v1/completions", b'{"prompt": "w1", "max_tokens": -1}', {}, (400,)),
    ("POST", "/v1/completions", b'{"prompt": "w1", "n": 100000}', {}, (400,)),
    ("POST", "/v1/completions", b'{"prompt": [99999999]}', {}, (400,)),
    ("POST", "/v1/completions", b'{"prompt": "w1", "model": "another"}', {}, (404,)),
    ("POST", "/v1/chat/completions", b'{"messages": 5}', {}, (400,)),
    ("POST", "/v1/chat/completions", b"\xff\xfe", {}, (400,)),
    ("POST", "/v1/chat/completions", b"{}", {"Content-Type": "text/plain"}, (400,)),
    ("POST", "/v1/completions", b'{"prompt": "w1"}', {"Host": "evil.example"}, (403,)),
    ("POST", "/v1/completions", b'{"prompt": "w1"}', {"Origin": "https://evil.example"}, (403,)),
    ("GET", "/v1/completions", b"", {}, (405,)),
    ("GET", "/nowhere", b"", {}, (404,)),
    ("GET", "/health", b"", {"X-Large": "x" * 100_000}, (431,)),
)


def draw(chance: random.Random, each: int | None = None) -> list[list[Fault]]:
    """Processes, each a list of what it meets, its end last; of `each`, one with every kind, and one for each end."""
    if each:
        first = [_drawn(chance, kind) for _ in range(each) for kind in KINDS]
        return [[*first, {"kind": ENDS[0]}], *([{"kind": end}] for _ in range(each) for end in ENDS[1:])]
    return [
        [*(_drawn(chance, chance.choice(KINDS)) for _ in range(chance.randint(3, LIFE))), {"kind": chance.choice(ENDS)}]
        for _ in range(300)
    ]


def _drawn(chance: random.Random, kind: str) -> Fault:
    fault: Fault = {"kind": kind, "seconds": round(chance.uniform(0, 0.4), 3), "count": chance.randint(1, 6)}
    match kind:
        case "leaves":
            fault |= {"state": chance.choice(STATES), "reset": chance.random() < 0.5, "stream": chance.random() < 0.5}
        case "flood":
            fault["count"] = chance.randint(20, 60)
        case "bad requests":
            fault["which"] = [chance.randrange(len(BAD)) for _ in range(fault["count"])]
        case "pause":
            fault["for"] = round(chance.uniform(0.1, 5), 1)
        case "clock":
            fault["clock"] = chance.choice((-3e8, -86_400, -3600, 3600, 86_400, 3e8))
    return fault


# --- one function a kind of fault -----------------------------------------------------------------------------


def _leaves(server: Server, fault: Fault) -> None:
    state, clients = fault["state"], []
    long = {"stream": fault["stream"]}
    match state:
        case "head":
            clients = [server.connect(request(LONG)[:40]) for _ in range(fault["count"])]
        case "body":
            clients = [server.connect(request(LONG)[:-5]) for _ in range(fault["count"])]
        case "queued":
            clients = [server.open(long) for _ in range(SLOTS + fault["count"] % (QUEUE + 1))]
        case "prompt":
            clients = [server.open(long | {"prompt": PROMPT * 6, "max_tokens": 100})]
        case "streaming":
            clients = [server.open({"stream": True}) for _ in range(SLOTS)]
            for client in clients:
                client.recv(200)
        case "n" | "logprobs":
            clients = [server.open(long | ({"n": 3} if state == "n" else {"logprobs": 3}))]
        case _:
            clients = [server.open(long) for _ in range(SLOTS)]
    time.sleep(fault["seconds"])
    for client in clients:
        leave(client, fault["reset"])


def _flood(server: Server, fault: Fault) -> None:
    found: list[tuple[int, bool]] = []

    def one(number: int) -> None:
        body = json.dumps({"prompt": f"w{number} w1", "max_tokens": 20, "seed": number}).encode()
        try:
            status, _, headers = server.ask("POST", "/v1/completions", body)
            found.append((status, "retry-after" in headers))
        except (OSError, http.client.HTTPException) as error:
            server.soak.found(f"a flood: {error!r}", server.log)

    threads = [threading.Thread(target=one, args=(number,)) for number in range(fault["count"])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    server.soak.check(
        {status for status, _ in found} <= {200, 429} and all(told for status, told in found if status == 429),
        f"a flood was answered with {sorted(set(found))}",
        server.log,
    )
    server.soak.check((200, False) in found, "a flood: nobody was answered", server.log)


def _bad_requests(server: Server, fault: Fault) -> None:
    for which in fault["which"]:
        method, path, body, headers, codes = BAD[which]
        try:
            status = server.ask(method, path, body, **headers)[0]
        except (OSError, http.client.HTTPException):
            # What is too large is not read to its end: the client may see that before the answer.
            status = codes[0] if codes[0] in (413, 431) else 0
        server.soak.check(
            status in codes, f"{method} {path} {body[:40]!r} {headers}: {status}, not {codes}", server.log
        )


def _slow_reader(server: Server, fault: Fault) -> None:
    """It holds up nobody else while it is there."""
    clients = [server.open({"stream": True, "logprobs": 5}, small=True) for _ in range(SLOTS)]
    time.sleep(1 + fault["seconds"])
    same(server, "with slow readers there")
    for client in clients:
        leave(client)


def _slow_writer(server: Server, fault: Fault) -> None:
    client = server.connect(b"")
    for byte in request(LONG)[: 20 * fault["count"]]:
        client.sendall(bytes([byte]))
        time.sleep(0.005)
    same(server, "with a slow writer there")
    leave(client)


def _pause(server: Server, fault: Fault) -> None:
    client = server.open({"stream": True, "max_tokens": 100})
    pause(server.process, fault["for"])
    content = b""
    while b"[DONE]" not in content and (part := client.recv(1 << 16)):
        content += part
    server.soak.check(b"[DONE]" in content, f"a stream did not end after a pause: {content[-200:]!r}", server.log)
    leave(client)


def _log_disk_full(server: Server, fault: Fault) -> None:
    with server.soak.logs.filled():
        _flood(server, fault | {"count": 10})
        same(server, "with no room for its log")


def _clock(server: Server, fault: Fault) -> None:
    client = server.open({"stream": True})
    with server.soak.condition("clock", fault["clock"]):
        same(server, "with another clock")
    leave(client)


def _no_template_process(server: Server, fault: Fault) -> None:
    """What renders chat templates is ended, as the kernel does where memory lacks."""
    for child in children_of(server.process.pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
    time.sleep(fault["seconds"])


def _no_descriptors(server: Server, fault: Fault) -> None:
    """More clients than it may have files open."""
    before = resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, (int(server.counts()["descriptors"]) + 5, before[1]))
    clients = []
    try:
        for _ in range(30):
            with contextlib.suppress(OSError):
                clients.append(server.connect(b"GET /health HTTP/1.1\r\n"))
        time.sleep(1)
    finally:
        for client in clients:
            leave(client)
        resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, before)


def _idle_connections(server: Server, fault: Fault) -> None:
    clients = [server.connect(b"") for _ in range(200)]
    same(server, "with 200 idle connections")
    for client in clients:
        leave(client)


# --- how a process ends ---------------------------------------------------------------------------------------


def end(server: Server, kind: str) -> None:
    """Ends it, and checks how; its own log says why where it does not end so."""
    soak, process, clients = server.soak, server.process, []
    codes = (0,)
    with contextlib.ExitStack() as stack:
        match kind:
            case (
                "SIGTERM while it answers" | "SIGTERM and a slow reader" | "two signals" | "log disk full, two signals"
            ):
                clients = [server.open({"stream": True, "logprobs": 5}, small=True)]
                clients[0].recv(200)
        if kind.startswith("log disk full"):
            stack.enter_context(soak.logs.filled())
        process.send_signal(signal.SIGKILL if kind == "SIGKILL" else signal.SIGTERM)
        if "two signals" in kind:
            time.sleep(0.5)
            # It may be on its way out just then, with nothing left to drain: then it ends as a signal ends any process.
            codes = (143, -signal.SIGTERM, 0) if process.poll() is None else (0,)
            process.send_signal(signal.SIGTERM)
        if kind in OTHER_CODES:
            codes = OTHER_CODES[kind]
        if kind == "SIGTERM while it answers":
            content = b""
            while b"[DONE]" not in content and (part := clients[0].recv(1 << 16)):
                content += part
            soak.check(b"[DONE]" in content, f"SIGTERM has cut a stream: {content[-200:]!r}", server.log)
        # What reads nothing has until --drain-timeout, of 5 s here, and 5 s more to be told.
        most = 20.0 if clients and "two signals" not in kind else 8.0
        if not wait_for(lambda: process.poll() is not None, most):
            soak.found(f"{kind}: it has not ended after {most:.0f} s", server.log)
            process.kill()
    soak.check(process.wait() in codes, f"{kind}: exit code {process.returncode}, not of {codes}", server.log)
    for client in clients:
        client.close()


# --- the soak -------------------------------------------------------------------------------------------------


def run(soak: Soak, schedule: list[list[Fault]]) -> None:
    wanted: dict[int, list[Any]] = {}
    grown = [0.0]
    for number, (*faults, last) in enumerate(schedule):
        if soak.is_over:
            break
        if last["kind"] == "SIGTERM while it loads":
            with soak.fault(last), started(soak, number, last["kind"], wait=False) as server:
                time.sleep(2 + number % 5)
                end(server, last["kind"])
            continue
        with started(soak, number, last["kind"]) as server:
            if not server.port:
                continue
            begin = time.monotonic()
            with soak.fault({"kind": "start"}):
                server.wanted = wanted.setdefault(number % 2, server.probe())
                _warm(server)
            soak.until += time.monotonic() - begin  # the minutes are those of faults
            for fault in faults:
                if soak.is_over:
                    break
                with soak.fault(fault):
                    globals()[f"_{fault['kind'].replace(' ', '_')}"](server, fault)
                    as_before(server, json.dumps(fault))
                if server.process.poll() is not None:
                    break
            if server.process.poll() is not None:
                continue
            grown.append(resident(server.process.pid) - server.base["MB"])
            with soak.fault(last):
                _end_of_children(server, last["kind"])
    soak.measured |= {"servers": len(grown) - 1, "MB grown at most": round(max(grown))}


def _end_of_children(server: Server, kind: str) -> None:
    children = children_of(server.process.pid)
    end(server, kind)
    gone = wait_for(lambda: not any(Path(f"/proc/{child}").exists() for child in children), 15)
    server.soak.check(gone, f"{kind}: processes that the server started outlive it", server.log)


def _warm(server: Server) -> None:
    """All pools have their threads, and a connection of each kind has been there."""
    for _ in range(3):
        server.probe()
        _flood(server, {"count": 12})
        _slow_reader(server, {"seconds": 0.0})
    is_at_rest(server)
    server.base = {**server.counts(), "MB": resident(server.process.pid), "compilations": server.metric(COMPILED)}
