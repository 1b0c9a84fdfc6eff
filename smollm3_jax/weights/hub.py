"""Where a model comes from: a path on this machine, an object store or a model hub.

Nothing half-fetched is ever handed out: `huggingface_hub` downloads under temporary names and links only
complete files into a snapshot folder. It does not compare their bytes with their sha256: that is done here.
"""

import contextlib
import functools
import hashlib
import os
import re
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from ..errors import HubError, OptionError
from ..files import write
from ..paths import cache_dir, is_remote, user_path
from ..progress import progress
from .address import EXAMPLE, gguf_on_hub, hub_address
from .bucket import copy_of

DEMO_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"

# What a checkpoint is read from, all of it at the top of the repository (but for chat templates beyond one); torch's
# files only where there are no others.
TEMPLATES = "additional_chat_templates"  # as in tokenizer.py, which this need not load
FILES = (".json", ".jinja", ".safetensors", "tokenizer.model")
TORCH_FILES = (".bin", ".pt")


# How hubs name commits, and files in the cache: by git's hash or the sha256.
COMMIT = "[0-9a-f]{40}"
HASH = "[0-9a-f]{40}([0-9a-f]{24})?"


class HubUnreachable(HubError):
    """No hub answers (or HF_HUB_OFFLINE forbids to ask), and the cache does not hold the whole model."""


def resolve(model: str | Path, revision: str | None = None, token: str | None = None) -> Path:
    """The folder or .gguf file that `model` stands for, fetched if need be.

    Args:
      model: a folder (gs:// and s3:// too), one of its files of weights, a .gguf file, or a model on the hub:
        ORG/NAME, ORG/NAME@REVISION, or the address of its page.
      revision: branch, tag or commit on the hub.
      token: for gated and private models; without it HF_TOKEN or the stored login.

    Raises:
      HubError: nothing of that name is here, or it could not be fetched.
      OptionError: two revisions are named.
    """
    name, path = str(model), user_path(model)
    try:
        is_folder, is_file, is_there = path.is_dir(), path.is_file(), path.exists()
    except OSError as error:  # a name that is too long, a folder that one may not look into
        raise HubError(f"{name[:200]} cannot be a model: {error.strerror}") from None
    if not name:  # or it would be the folder that one is in
        is_folder = is_there = False
    if is_folder:
        _refuse_pipes_and_devices(path)
    if is_folder or (is_file and path.suffix.lower() == ".gguf"):
        return path
    if is_file:
        return _folder_of(path)
    if is_there:
        raise HubError(f"{path} is a pipe or a device, and no model")
    if path.suffix.lower() == ".gguf" and not is_remote(name):
        raise HubError(f"no such file: {name}{gguf_on_hub(name)}")
    if (address := hub_address(name)) is not None:
        hub_id, own = address
        if own and revision and own != revision:
            raise OptionError(f"{name} names the revision {own}, and {revision} is asked for besides; give one of them")
        return pull(hub_id, own or revision, token)
    if is_remote(name):
        return copy_of(name, cache_dir() / "buckets", (*FILES, *TORCH_FILES))
    raise HubError(f"no such folder: {name} ({EXAMPLE}; `smollm3 pull demo` fetches a small model to try)")


def _refuse_pipes_and_devices(folder: Path) -> None:
    """Whoever reads one may wait for ever, or read for ever."""
    for path in sorted(folder.iterdir()):
        if path.exists() and not path.is_file() and not path.is_dir():
            raise HubError(f"{path} is a pipe or a device, and no file of a model: take it away")


def _folder_of(file: Path) -> Path:
    """The model folder that is meant by one of its files of weights."""
    folder, kind = file.parent, file.suffix.lower()
    if kind not in (".safetensors", *TORCH_FILES) or not (folder / "config.json").exists():
        raise HubError(
            f"{file} is no model: give a folder that holds config.json and weights (.safetensors, .bin or .pt), one of "
            "its files of weights, or a .gguf file"
        )
    safe = [path.name for path in folder.glob("*.safetensors")]
    if safe and (kind != ".safetensors" or ("model.safetensors" in safe and file.name != "model.safetensors")):
        raise HubError(f"{file} is not what is read of {folder}, but {min(safe)} is: give a folder with one of them")
    return folder


def pull(hub_id: str, revision: str | None = None, token: str | None = None) -> Path:
    """The snapshot folder of a hub's model in the Hugging Face cache; what is missing there is fetched.

    HF_TOKEN, HF_HUB_OFFLINE, HF_ENDPOINT and HF_HOME mean what they mean to `huggingface_hub`. Where no hub
    answers, the cached snapshot serves. The library resumes a transfer that breaks off if the hub is back
    within seconds; after an error, the next call fetches those files that are not complete.

    Raises:
      HubUnreachable: no hub answers, and the cache does not hold the whole model.
      HubError: the hub refuses, does not know the model or the revision, or a transfer failed.
    """
    from huggingface_hub import HfApi, constants, hf_hub_download

    token = (token or "").strip() or None
    _check_arguments(hub_id, revision, token)
    _check_all_names()
    seconds = constants.HF_HUB_ETAG_TIMEOUT
    names: list[str] = []

    def ask() -> None:
        # These are what snapshot_download asks first, but it would wait for ever, or try again for minutes.
        api = HfApi(token=token)
        commit = api.model_info(hub_id, revision=revision, timeout=seconds).sha
        names.extend(entry.path for entry in api.list_repo_tree(hub_id, revision=commit))
        if TEMPLATES in names:
            names.extend(entry.path for entry in api.list_repo_tree(hub_id, TEMPLATES, revision=commit))

    unreachable = None
    try:
        _within(seconds + 4, ask)
    except Exception as error:  # of httpx, of a JSON parser, ...: whatever a network can bring
        unreachable = _explain(error, hub_id, revision)
        if not isinstance(unreachable, HubUnreachable):
            raise unreachable from error
    snapshot = functools.partial(_snapshot, hub_id, revision, token, unreachable is not None)
    try:
        if unreachable:
            folder = snapshot(*FILES)
            if not any(folder.glob("*.safetensors")):
                folder = snapshot(*FILES, *TORCH_FILES)
        else:
            folder = snapshot("config.json")
            suffixes = FILES if any(name.endswith(".safetensors") for name in names) else FILES + TORCH_FILES
            for name in names:  # one by one, in this thread: the library's pool does not heed Ctrl-C
                if name.endswith(suffixes):
                    hf_hub_download(hub_id, name, revision=folder.name, token=token)
        if not any(path.suffix in (".safetensors", *TORCH_FILES) for path in folder.glob("*")):
            files = [name for name in names if name.endswith(".gguf")]
            gguf = f": fetch it with `hf download {hub_id} {min(files)}`" if files else ""
            raise unreachable or HubError(
                f"{hub_id} holds no weights that can be read (*.safetensors, *.bin, *.pt); "
                f"a .gguf file is given by its path{gguf}"
            )
        _verify(folder)
    except HubError:
        raise
    except Exception as error:  # the same, and of the disk
        raise unreachable or _explain(error, hub_id, revision, transferring=True) from error
    return folder


def _check_arguments(hub_id: str, revision: str | None, token: str | None) -> None:
    if token and not re.fullmatch(r"[!-~]+", token):
        raise HubError("the token holds a blank, a line break or a letter that is not ASCII: no hub's token does")
    if revision and (".." in revision or revision.startswith("/") or set(revision) & set("\\\0")):
        raise HubError(f"{hub_id} has no revision {revision}: no branch, tag or commit has such a name")


def _check_all_names() -> None:
    """Has every answer of a hub looked through before the library makes paths of the names in it."""
    from huggingface_hub import set_client_factory
    from huggingface_hub.utils import _http

    make: Any = _http._GLOBAL_CLIENT_FACTORY  # the caller may have set one

    def factory() -> Any:
        client = make()
        hooks = client.event_hooks
        client.event_hooks = {**hooks, "response": [*hooks.get("response", []), _check_names]}
        return client

    if getattr(make, "__qualname__", "") != factory.__qualname__:
        set_client_factory(factory)


def _check_names(response: Any) -> None:
    """Raises HubError if a name in a hub's answer, which the library puts into paths, is none."""
    headers = response.headers

    def check(name: str, value: object, pattern: str) -> None:
        if not isinstance(value, str) or not re.fullmatch(pattern, value, re.ASCII):
            raise HubError(f"the hub's answer is unsound: its {name} is {value!r:.80}; nothing of it was used")

    if (commit := headers.get("X-Repo-Commit")) is not None:
        check("commit", commit, COMMIT)
    for header in ("ETag", "X-Linked-Etag"):
        if (tag := headers.get(header)) is not None:
            check(header, tag, r'(W/)?"?[\w+=:-][\w.+=:-]*"?')
    if "/api/models/" not in response.url.path or response.status_code != 200:
        return
    response.read()
    try:
        answer = response.json()
    except (ValueError, RecursionError):
        return  # the library says what is wrong with it
    if isinstance(answer, dict) and "sha" in answer:
        check("commit", answer["sha"], COMMIT)
    for entry in answer if isinstance(answer, list) else []:
        if isinstance(entry, dict) and entry.get("type") == "file":
            check("hash of a file", entry.get("oid"), HASH)
            check("name of a file", entry.get("path"), r"(?!.*(^|/)\.{0,2}(/|$))[^\\\0]+")
            if isinstance(entry.get("lfs"), dict):
                check("hash of a file", entry["lfs"].get("oid", entry["lfs"].get("sha256")), HASH)


def _snapshot(hub_id: str, revision: str | None, token: str | None, offline: bool, *suffixes: str) -> Path:
    """The snapshot folder, with all of its top-level files of these suffixes, or an error.

    What it asks the hub goes into the cache: the commit and the repository's list of files. They tell a later
    call without a hub which snapshot it wants, and whether that is complete.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import tqdm

    bars = []

    class Bar(tqdm):  # silent in a pipe, gone when full, and closed: the library leaves that to garbage collection
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **{"leave": False, "disable": None, **kwargs})
            bars.append(self)

    try:
        return Path(
            snapshot_download(
                hub_id,
                revision=revision,
                token=token,
                local_files_only=offline,
                allow_patterns=[f"*{suffix}" for suffix in suffixes],
                ignore_patterns=["*/*"],
                tqdm_class=Bar,
            )
        )
    finally:
        for bar in bars:
            bar.close()


def _within(seconds: float, call: Callable[[], None]) -> None:
    """Runs `call`; TimeoutError when it takes longer (a name look-up knows no time limit of its own)."""
    outcome: Future[None] = Future()

    def run() -> None:
        try:
            outcome.set_result(call())
        except Exception as error:
            outcome.set_exception(error)

    threading.Thread(target=run, daemon=True).start()  # an executor's threads would hold up the exit
    try:
        outcome.result(seconds)
    except TimeoutError as error:
        raise TimeoutError(str(error) or f"silent for {seconds} seconds") from None


def _explain(error: BaseException, hub_id: str, revision: str | None, transferring: bool = False) -> HubError:
    """The error to raise for what the library raised: what went wrong, and the way out."""
    from huggingface_hub import constants, errors

    while isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__:
        error = error.__cause__
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, HubError):
        return error
    detail = without_secrets((str(error).strip().splitlines() or [type(error).__name__])[0])
    if isinstance(error, errors.HFValidationError):
        return HubError(f"{hub_id} is no hub id: {detail}")
    if isinstance(error, errors.RevisionNotFoundError):
        return HubError(f"{hub_id} has no revision {revision or 'main'}: check the name of the branch, tag or commit")
    if isinstance(error, errors.GatedRepoError) or status in (401, 403):
        return HubError(
            f"the hub refuses {hub_id} (status {status}): if it is gated or private, accept the licence on the "
            "model's page and pass --token or set HF_TOKEN; if not, check its spelling"
        )
    if isinstance(error, errors.RepositoryNotFoundError) or (status == 404 and not transferring):
        return HubError(f"no model {hub_id} on the hub, nor a folder of that name here: check the spelling")
    if transferring:
        return HubError(
            f"the download of {hub_id} failed ({detail}): run the command again, what was completed is kept"
        )
    if isinstance(error, errors.OfflineModeIsEnabled):
        return HubUnreachable(
            f"{hub_id} is not complete in the cache, and HF_HUB_OFFLINE is set: unset HF_HUB_OFFLINE or run once online"
        )
    endpoint = without_secrets(constants.ENDPOINT)
    return HubUnreachable(
        f"no hub answers for {hub_id} at {endpoint} ({detail}): check the connection or set HF_ENDPOINT "
        "to a mirror; a folder of the model works without a hub"
    )


def without_secrets(text: str) -> str:
    """What a library says, for the screen: without tokens, and without a password in an address."""
    text = re.sub(r"(?i)(bearer|basic)\s+[^'\"]+", r"\1 ***", text)
    text = re.sub(r"\bhf_\w+", "hf_***", text)
    return re.sub(r"://[^/\s]*@", "://***@", text)


def _verify(folder: Path) -> None:
    """Compares the snapshot's large files, whose blobs are named by their sha256, with that name.

    Raises:
      HubError: some differ; they are deleted from the cache, and what a blob that is a link leads to is not.
    """
    place = os.path.realpath(folder.parent.parent / "blobs")
    # One step along the link and no further: a blob may itself link to a store that names files by another hash.
    blobs = {link: folder / os.readlink(link) for link in sorted(folder.iterdir()) if link.is_symlink()}
    blobs = {link: blob for link, blob in blobs.items() if re.fullmatch("[0-9a-f]{64}", blob.name)}
    corrupt = [link for link, blob in blobs.items() if not is_intact(blob, blob.name, link.name)]
    for link in corrupt:
        if os.path.realpath(blobs[link].parent) == place:  # a link that somebody else made may lead anywhere
            blobs[link].unlink(missing_ok=True)
        link.unlink(missing_ok=True)
    if corrupt:
        names = ", ".join(link.name for link in corrupt)
        raise HubError(f"corrupt download of {names}, now deleted from {folder}: run the command again")


def is_intact(path: Path, sha256: str, name: str) -> bool:
    """Whether the file has that sha256; what passed is marked with its size and time, and not hashed again."""
    mark, stat = cache_dir() / "verified" / sha256, path.stat()
    state = f"{stat.st_size} {stat.st_mtime_ns}".encode()
    with contextlib.suppress(OSError):
        if mark.read_bytes() == state:
            return True
    if sha256_of(path, name) != sha256:
        return False
    with contextlib.suppress(OSError):  # where nothing can be written, the price is another hash next time
        mark.parent.mkdir(parents=True, exist_ok=True)
        write(mark, state)
    return True


def sha256_of(path: Path, name: str) -> str:
    digest = hashlib.sha256()
    with progress(f"checking {name}", path.stat().st_size) as done, path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
            done(len(chunk))
    return digest.hexdigest()
