"""hub.py against a hub of our own: a loopback server with one tiny model, asked from fresh processes (row E1).

A process per call, because `huggingface_hub` reads its environment when it is imported.
"""

import hashlib
import http.server
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from smollm3_jax.errors import HubError
from smollm3_jax.weights import hub

COMMIT = "c0ffee" + "0" * 34
CONFIG, WEIGHTS = b'{"model_type": "smollm3"}', bytes(range(256)) * 256
SHA256 = hashlib.sha256(WEIGHTS).hexdigest()
REPOSITORY = {
    "config.json": CONFIG,
    "model.safetensors": WEIGHTS,
    "pytorch_model.bin": b"not wanted beside safetensors",
    "onnx/config.json": b"not wanted",
    "README.md": b"not wanted",
}

# Prints what becomes of pull(*arguments). The package's own __init__ is stepped over: it would load JAX.
CALL = """
import json, signal, sys, types
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job inherits it ignored
package = sys.modules["smollm3_jax"] = types.ModuleType("smollm3_jax")
package.__path__ = ["smollm3_jax"]
from smollm3_jax.weights import hub
try:
    print(json.dumps(["ok", str(hub.resolve(*json.loads(sys.argv[1])))]))
except (hub.HubError, hub.OptionError) as error:
    print(json.dumps([type(error).__name__, str(error)]))
"""


class Server(http.server.ThreadingHTTPServer):
    """A hub with one model, org/tiny, and the faults that a test asks for."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = dict(REPOSITORY)
        self.served = {}  # by file name: the bytes that come instead of the right ones
        self.refusals = {}  # by a part of "METHOD /path": the status and the X-Error-Code to answer with
        self.silent = ()  # the same parts: requests that get no answer
        self.forged = {}  # names that come instead of the right ones: sha, commit, etag, linked, oid, path
        self.cut = None  # the next download of the weights ends after so many bytes
        self.log = []

    def handle_error(self, request, client_address):
        pass  # clients that hang up


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server  # pyright: ignore[reportIncompatibleVariableOverride]

    def do_GET(self):
        hub, path = self.server, self.path.split("?")[0]
        line = f"{self.command} {path}"
        if "org/tiny" not in path:
            return self.answer(404)
        hub.log.append((line, self.headers.get("Range"), self.headers.get("Authorization")))
        if any(part in line for part in hub.silent):
            time.sleep(30)
        for part, (status, code) in hub.refusals.items():
            if part in line:
                return self.answer(status, {"X-Error-Code": code} if code else {})
        if "/tree/" in path:
            files = [{"type": "file", "path": k, "size": len(v), "oid": name_of(v)} for k, v in hub.files.items()]
            files[-1] |= {key: value for key, value in hub.forged.items() if key in ("oid", "path", "lfs")}
            if path.endswith("/additional_chat_templates"):
                files = [file for file in files if file["path"].startswith("additional_chat_templates/")]
            elif "recursive=true" not in self.path.lower():
                further = {"type": "directory", "path": "additional_chat_templates", "oid": "0"}
                further = [further] if any(name.startswith(further["path"]) for name in hub.files) else []
                files = (
                    further
                    + [file for file in files if "/" not in file["path"]]
                    + [{"type": "directory", "path": "onnx", "oid": "0"}]
                )
            return self.answer(200, body=json.dumps(files).encode())
        if path.startswith("/api/"):
            return self.answer(200, body=json.dumps({"id": "org/tiny", "sha": hub.forged.get("sha", COMMIT)}).encode())
        name = path.split(f"/{COMMIT}/")[1]
        body = hub.served.get(name, hub.files[name])
        headers = {"X-Repo-Commit": COMMIT, "ETag": '"not-this-one"', "X-Linked-Etag": f'"{name_of(hub.files[name])}"'}
        headers |= {key: value for key, value in hub.forged.items() if key in headers}
        if span := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            start = int(span[1])
            headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
            return self.answer(206, headers, body[start:])
        cut = None
        if line.startswith("GET") and name == "model.safetensors":
            cut, hub.cut = hub.cut, None
        self.answer(200, headers, body, cut)

    do_HEAD = do_GET

    def answer(self, status, headers=(), body=b"", cut=None):
        self.send_response(status)
        for key, value in {**dict(headers), "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:cut])

    def log_message(self, format, *args):
        pass


def name_of(content: bytes) -> str:
    """What the hub names a file by: its sha256 if it is large, else git's hash."""
    if len(content) >= len(WEIGHTS):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@pytest.fixture
def server():
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def pull(server, tmp_path):
    """Calls hub.pull in a new process; returns "ok" and the folder, or the error's type and message."""

    def start(*arguments, port=server.server_port, **environment):
        server.log.clear()
        clean = {k: v for k, v in os.environ.items() if not re.match("(?i)HF_|TRANSFORMERS_|.*_PROXY", k)}
        homes = {"HF_HOME": str(tmp_path / "hf"), "SMOLLM3_JAX_CACHE": str(tmp_path / "own")}
        return subprocess.Popen(
            [sys.executable, "-W", "error", "-c", CALL, json.dumps(arguments or ["org/tiny"])],
            cwd=Path(__file__).parents[2],
            env={**clean, **homes, "HF_ENDPOINT": f"http://127.0.0.1:{port}", **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def pull(*arguments, **settings):
        with start(*arguments, **settings) as process:
            out, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
        outcome, text = json.loads(out)  # so nothing else is on standard output
        return outcome, Path(text) if outcome == "ok" else text

    pull.start = start  # pyright: ignore[reportFunctionMemberAccess]
    return pull


@pytest.fixture
def closed_port():
    with socket.socket() as bound:  # bound and not listening: connections are refused, and nobody takes the port
        bound.bind(("127.0.0.1", 0))
        yield bound.getsockname()[1]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def requests(server: Server, part: str) -> list[str]:
    return [line for line, *_ in server.log if part in line]


def test_pull_then_cached_then_offline(server, pull, tmp_path, closed_port):
    outcome, folder = pull("org/tiny", None, "hf_secret\n")
    assert outcome == "ok" and contents(folder) == {"config.json": CONFIG, "model.safetensors": WEIGHTS}
    assert {authorization for *_, authorization in server.log} == {"Bearer hf_secret"}
    assert (tmp_path / "own" / "verified" / SHA256).exists()

    assert pull(HF_TOKEN="hf_other") == ("ok", folder)
    assert not requests(server, "/resolve/")
    assert {authorization for *_, authorization in server.log} == {"Bearer hf_other"}

    assert pull(HF_HUB_OFFLINE="1") == ("ok", folder) and not server.log
    assert pull(port=closed_port) == ("ok", folder)


@pytest.mark.parametrize(
    ("part", "status", "code", "error", "hint"),
    [
        ("/api/", 401, "GatedRepo", "HubError", "accept the licence on the model's page and pass --token"),
        ("/api/", 401, None, "HubError", "pass --token or set HF_TOKEN"),
        ("HEAD", 401, "GatedRepo", "HubError", "accept the licence"),
        ("HEAD", 403, None, "HubError", "accept the licence"),
        ("/api/", 404, "RepoNotFound", "HubError", "no model org/tiny on the hub"),
        ("/api/", 404, None, "HubError", "no model org/tiny on the hub"),
        ("/revision/v9", 404, "RevisionNotFound", "HubError", "org/tiny has no revision v9"),
        ("/api/", 200, None, "HubUnreachable", "no hub answers for org/tiny at http://127.0.0.1"),
        ("/api/", 503, None, "HubUnreachable", "set HF_ENDPOINT to a mirror"),
        ("GET /org/", 404, "EntryNotFound", "HubError", "the download of org/tiny failed"),
    ],
)
def test_refusals(server, pull, part, status, code, error, hint):
    server.refusals[part] = status, code
    outcome, message = pull("org/tiny", "v9")
    assert (outcome, hint in message) == (error, True), message
    assert "\n" not in message


def test_a_revision_in_the_name(server, pull):
    """A branch with a slash reaches the hub as one, however it is named."""
    for given in ("org/tiny@feature/x", f"http://127.0.0.1:{server.server_port}/org/tiny/tree/feature/x"):
        outcome, folder = pull(given)
        assert outcome == "ok" and folder.name == COMMIT
        assert requests(server, "/revision/feature%2Fx")
    outcome, message = pull("org/tiny@one", "two")
    assert outcome == "OptionError" and "revision one, and two" in message
    server.refusals["/revision/v9"] = 404, "RevisionNotFound"
    outcome, message = pull("org/tiny@v9")
    assert outcome == "HubError" and "org/tiny has no revision v9" in message


@pytest.mark.parametrize(
    ("environment", "hint"), [({}, "check the connection"), ({"HF_HUB_OFFLINE": "1"}, "unset HF_HUB_OFFLINE")]
)
def test_no_hub_and_nothing_cached(pull, closed_port, environment, hint):
    start = time.monotonic()
    outcome, message = pull(port=closed_port, **environment)
    assert outcome == "HubUnreachable" and hint in message
    assert time.monotonic() - start < 10


@pytest.mark.slow
@pytest.mark.parametrize("part", ["/api/", "/tree/"])
def test_a_silent_hub_is_given_up(server, pull, part):
    server.silent = (part,)
    start = time.monotonic()
    outcome, message = pull(HF_HUB_ETAG_TIMEOUT="1")
    assert outcome == "HubUnreachable" and "no hub answers" in message
    assert time.monotonic() - start < 10


def test_not_a_hub_id(pull):
    for name, words in (("org/ti..ny", "is no hub id"), ("org/ti ny", "(a hub id reads ORG/NAME or ORG/NAME@REVISION")):
        outcome, message = pull(name)
        assert outcome == "HubError" and f"{name} {words}" in message


def test_a_broken_transfer_is_resumed(server, pull):
    weights = server.files["model.safetensors"] = WEIGHTS * 176  # 11 MiB: the library counts in pieces of 10
    server.cut = len(weights) - 1000
    outcome, folder = pull()
    if outcome != "ok":  # releases of the library before 2.0 leave it to the next call
        outcome, folder = pull()
    assert outcome == "ok" and (folder / "model.safetensors").read_bytes() == weights
    assert "bytes=10485760-" in [span for _, span, _ in server.log]


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_a_snapshot_without_all_shards_is_none(server, pull, tmp_path, suffix):
    server.files = {"config.json": CONFIG, f"a.{suffix}": b"first shard", f"b.{suffix}": b"second shard"}
    server.refusals[f"GET /org/tiny/resolve/{COMMIT}/b."] = 500, None
    outcome, message = pull()
    assert outcome == "HubError" and "run the command again" in message
    assert {path.name for path in tmp_path.rglob("snapshots/*/*")} == {"config.json", f"a.{suffix}"}

    outcome, message = pull(HF_HUB_OFFLINE="1")
    assert outcome == "HubUnreachable" and "not complete in the cache" in message

    server.refusals = {}
    outcome, folder = pull()
    assert outcome == "ok" and contents(folder) == server.files
    assert requests(server, "GET /org/") == [f"GET /org/tiny/resolve/{COMMIT}/b.{suffix}"]


def test_ctrl_c_ends_a_transfer_at_once(server, pull, tmp_path):
    server.silent = (f"GET /org/tiny/resolve/{COMMIT}/model",)
    with pull.start() as process:
        while process.poll() is None and not list(tmp_path.rglob(f"{SHA256}*.incomplete")):
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
    assert "KeyboardInterrupt" in err and not list(tmp_path.rglob("model.safetensors"))


def test_a_corrupt_transfer_is_deleted_and_fetched_again(server, pull, tmp_path):
    server.served["model.safetensors"] = WEIGHTS[::-1]
    outcome, message = pull()
    assert outcome == "HubError" and "corrupt download of model.safetensors" in message
    assert not list(tmp_path.rglob(SHA256)) and not list(tmp_path.rglob("model.safetensors"))

    server.served = {}
    outcome, folder = pull()
    assert outcome == "ok" and (folder / "model.safetensors").read_bytes() == WEIGHTS

    (folder / "model.safetensors").write_bytes(WEIGHTS[::-1])  # through the link: a mark does not hide a new blob
    outcome, message = pull(HF_HUB_OFFLINE="1")
    assert outcome == "HubError" and "corrupt" in message


CLIMB = "../../../../victim"
FORGED = [
    *({"sha": sha} for sha in (CLIMB, "main", "a" * 40 + "\n", None)),
    {"X-Repo-Commit": CLIMB},
    *({"X-Linked-Etag": tag} for tag in (f'"{CLIMB}"', '".."', 'W/"a/b"', '"a\\b"', '""')),
    {"oid": CLIMB},
    *({"path": path} for path in (CLIMB, "/etc/x", "a/../../x", "a\\..\\x", "x\0")),
    {"lfs": {"oid": CLIMB, "size": 3, "pointerSize": 3}},
]


def one_of_a_kind_is_fast(forged):
    kinds = [*(set(other) for other in FORGED)]
    first = FORGED.index(forged) == kinds.index(set(forged))
    return pytest.param(forged, marks=[] if first else pytest.mark.slow, id=str(forged))


@pytest.mark.parametrize("forged", [one_of_a_kind_is_fast(forged) for forged in FORGED])
def test_names_that_a_hub_makes_up(forged, server, pull, tmp_path):
    """A commit, a hash and a file's name become paths here: what is none of these is refused, and nothing written."""
    server.forged = forged
    (tmp_path / "victim").write_text("mine")
    outcome, message = pull()
    assert outcome == "HubError" and "the hub's answer is unsound" in message and "\n" not in message
    outside = {path for path in tmp_path.rglob("*") if not path.is_relative_to(tmp_path / "hf")}
    assert outside == {tmp_path / "victim"} and (tmp_path / "victim").read_text() == "mine"


@pytest.mark.parametrize("revision", ["../../../victim", "/etc/x", "refs/../../x", "a\\b", "a\0b"])
def test_revisions_that_would_leave_the_cache(revision):
    """The library keeps a file of a revision's name."""
    with pytest.raises(HubError, match="org/tiny has no revision"):
        hub.pull("org/tiny", revision)


@pytest.mark.parametrize("token", ["hf_secret\nX-Evil: 1", "hf_secret two", "hf_secr\u00e4t", "hf_secret\x00"])
def test_a_token_is_never_printed(token, pull):
    with pytest.raises(HubError, match="the token holds ") as caught:
        hub.pull("org/tiny", None, token)
    assert "secr" not in str(caught.value)
    if "\0" not in token:  # which no environment holds
        assert "secr" not in str(pull(HF_TOKEN=token)[1])


@pytest.mark.parametrize("address", ["127.0.0.1:{port}", "127.0.0.1:{port}/x", "[::1]:{port}"])
def test_a_password_in_the_address_is_never_printed(address, pull, closed_port):
    endpoint = "http://anna:pass%40word@" + address.format(port=closed_port)
    outcome, message = pull(HF_ENDPOINT=endpoint)
    assert outcome == "HubUnreachable" and "word" not in message and "anna" not in message
    assert f"://***@{address.format(port=closed_port)}" in message


def test_secrets_are_taken_out_of_whatever_a_library_says():
    said = {
        "Illegal header value b'Bearer hf_abc\\nX'": "Illegal header value b'Bearer ***'",
        "https://me:pw@host/x?y and http://a:b:c@host": "https://***@host/x?y and http://***@host",
        "no access with hf_abcDEF1": "no access with hf_***",
        "mail me@host": "mail me@host",
    }
    assert {text: hub.without_secrets(text) for text in said} == said


@pytest.mark.parametrize("at", ["blob", "snapshot"])
def test_what_a_link_leads_to_is_not_deleted(at, pull, tmp_path):
    """A blob, or what a snapshot links to, may be a link to a file of the user's that no cache knows of."""
    victim = tmp_path / "victim" / SHA256
    repository = tmp_path / "hf" / "hub" / "models--org--tiny"
    snapshot = repository / "snapshots" / COMMIT
    for folder in (victim.parent, repository / "blobs", repository / "refs", snapshot):
        folder.mkdir(parents=True)
    victim.write_text("not the weights")
    (repository / "refs" / "main").write_text(COMMIT)
    (repository / "blobs" / SHA256).symlink_to(victim)
    link = Path("../../blobs") / SHA256 if at == "blob" else victim
    (snapshot / "model.safetensors").symlink_to(link)
    outcome, message = pull(HF_HUB_OFFLINE="1")
    assert outcome == "HubError" and "corrupt" in message
    assert victim.read_text() == "not the weights" and not (snapshot / "model.safetensors").is_symlink()


@pytest.mark.parametrize("content", [WEIGHTS, WEIGHTS[::-1]])
def test_blobs_in_a_shared_store_are_checked_by_their_own_name(pull, tmp_path, content):
    cache = tmp_path / "hf" / "hub"
    store, repository = cache / "blobs" / "ab" / ("ab" * 32), cache / "models--org--tiny"
    snapshot = repository / "snapshots" / COMMIT
    for folder in (store.parent, repository / "blobs", repository / "refs", snapshot):
        folder.mkdir(parents=True)
    store.write_bytes(content)
    (repository / "refs" / "main").write_text(COMMIT)
    (repository / "blobs" / SHA256).symlink_to(Path("../../blobs/ab") / store.name)
    (snapshot / "model.safetensors").symlink_to(Path("../../blobs") / SHA256)
    outcome, _ = pull(HF_HUB_OFFLINE="1")
    assert outcome == ("ok" if content == WEIGHTS else "HubError")
    assert store.read_bytes() == content  # what a blob leads to may be anybody's file
    assert (repository / "blobs" / SHA256).is_symlink() == (content == WEIGHTS)


def test_all_that_a_tokenizer_needs_comes_along(server, pull):
    """A sentencepiece model and chat templates beyond one among it."""
    more = {"tokenizer.model": b"\x00", "additional_chat_templates/tool_use.jinja": b"{{ tools }}"}
    server.files = more | server.files
    outcome, folder = pull()
    assert outcome == "ok"
    assert contents(folder) == more | {name: REPOSITORY[name] for name in ("config.json", "model.safetensors")}
    assert pull(HF_HUB_OFFLINE="1") == ("ok", folder)


@pytest.mark.parametrize("torch_file", [True, False])
def test_a_repository_without_safetensors(server, pull, torch_file):
    del server.files["model.safetensors"]
    if not torch_file:
        del server.files["pytorch_model.bin"]
    outcome, result = pull()
    if torch_file:
        assert outcome == "ok" and set(contents(result)) == {"config.json", "pytorch_model.bin"}
    else:
        assert outcome == "HubError" and "holds no weights" in result


# ----- names -----


def test_paths_are_returned_as_they_are(tmp_path):
    (tmp_path / "model.gguf").touch()
    assert hub.resolve(tmp_path) == tmp_path
    assert hub.resolve(str(tmp_path / "model.gguf")) == tmp_path / "model.gguf"
    other = tmp_path / "Model.GGUF"
    other.touch()
    assert hub.resolve(other) == other
    named = tmp_path / "org" / "tiny@v1"
    named.mkdir(parents=True)
    assert hub.resolve(named) == named


def test_a_file_of_weights_stands_for_its_folder(tmp_path):
    for name in ("model.safetensors", "model.safetensors.json", "config", "pytorch_model.bin"):
        (tmp_path / name).touch()
        with pytest.raises(HubError, match="is no model: give a folder that holds"):
            hub.resolve(tmp_path / name)
    (tmp_path / "config.json").touch()
    assert hub.resolve(tmp_path / "model.safetensors") == tmp_path
    with pytest.raises(HubError, match=r"pytorch_model\.bin is not what is read of .*, but model\.safetensors is"):
        hub.resolve(tmp_path / "pytorch_model.bin")
    (tmp_path / "adapter.safetensors").touch()
    with pytest.raises(HubError, match=r"adapter\.safetensors is not what is read"):
        hub.resolve(tmp_path / "adapter.safetensors")
    for path in tmp_path.glob("*.safetensors"):
        path.unlink()
    assert hub.resolve(tmp_path / "pytorch_model.bin") == tmp_path
    with pytest.raises(HubError, match=r"no such file: org/tiny/x.gguf.*`hf download org/tiny x.gguf`"):
        hub.resolve("org/tiny/x.gguf")


@pytest.mark.parametrize(
    "name", ["./org/tiny", "/org/tiny", "~/tiny", "../tiny", "a/b/c", "org\\tiny", "tiny", "demo", "", "a/b.gguf"]
)
def test_what_looks_like_a_path_is_never_asked_for(monkeypatch, tmp_path, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "pull", lambda *_: pytest.fail("asked a hub"))
    with pytest.raises(HubError, match=r"no such (folder|file)"):
        hub.resolve(name)


def test_names_of_models(monkeypatch, tmp_path):
    calls = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "pull", lambda *arguments: calls.append(arguments) or tmp_path)
    assert hub.resolve("org/ti.ny-3", "v1", "secret") == tmp_path
    assert calls == [("org/ti.ny-3", "v1", "secret")]
