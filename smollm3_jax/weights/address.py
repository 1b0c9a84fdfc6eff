"""What a model is called on a hub: ORG/NAME, ORG/NAME@REVISION, or the address of one of its pages."""

import os
import re
from urllib.parse import unquote, urlsplit

from ..errors import HubError

HOSTS = ("huggingface.co", "www.huggingface.co", "hf.co", "www.hf.co")
_HUB_ID = r"\w[\w.-]*/[\w.-]+"
EXAMPLE = "a hub id reads ORG/NAME or ORG/NAME@REVISION, as in HuggingFaceTB/SmolLM3-3B"


def hub_address(model: str) -> tuple[str, str | None] | None:
    """(hub id, revision) of a model's name; None where it is none of a hub's.

    A revision is a branch (slashes and all), a tag or a commit; None is the repository's own default.

    Raises:
      HubError: it is the address of something that is no model, with what to give instead.
    """
    if match := re.fullmatch(rf"({_HUB_ID})(?:@(\S+))?", model.removeprefix("hf://").rstrip("/"), re.ASCII):
        return match[1].removesuffix(".git"), match[2]
    hosts = "|".join(map(re.escape, (*HOSTS, *_own_host())))
    # An address to clone from may hold a name and a token: they are neither needed nor shown.
    begin = r"(?:https?://(?:[^/@\s]*@)?|git@|ssh://git@)?"
    shown = re.sub(r"://[^/\s]*@", "://***@", model)
    if match := re.fullmatch(rf"{begin}(?:{hosts})[:/](.*)", model, re.ASCII | re.IGNORECASE):
        return _of_page(shown, [unquote(part) for part in urlsplit(f"//-/{match[1]}").path.split("/") if part])
    if re.match(r"(https?|git|ssh|hf)(://|@)", model, re.IGNORECASE):
        raise HubError(f"{shown} is no address of a model on the hub; {EXAMPLE}; a folder or a .gguf file works too")
    return None


def gguf_on_hub(model: str) -> str:
    """What to add about a file that is not here, should ORG/NAME/FILE mean one on the hub."""
    match = re.fullmatch(rf"({_HUB_ID})/([\w./-]+)", model, re.ASCII)
    return f"; should it be one on the hub: {_fetch_first(match[1], match[2], None)}" if match else ""


def _own_host() -> list[str]:
    host = urlsplit(os.environ.get("HF_ENDPOINT", "")).netloc.rpartition("@")[2]
    return [host] if host else []


def _of_page(address: str, parts: list[str]) -> tuple[str, str | None]:
    """hub_address of a page, from the parts of its path."""
    if parts[:1] in (["datasets"], ["spaces"]):
        raise HubError(f"{address} is the address of one of the hub's {parts[0]}, not of a model; {EXAMPLE}")
    parts = parts[1:] if parts[:1] == ["models"] else parts
    hub_id = "/".join(parts[:2]).removesuffix(".git")
    if not re.fullmatch(_HUB_ID, hub_id, re.ASCII):
        raise HubError(f"{address} names no model; {EXAMPLE}")
    kind, rest = (parts[2], parts[3:]) if parts[2:] else ("tree", [])
    if kind in ("tree", "commit", "commits"):
        return hub_id, "/".join(rest) or None
    if kind not in ("blob", "resolve", "raw"):
        raise HubError(f"{address} is a page about a model: give {hub_id}, or {hub_id}@REVISION")
    length = 3 if rest[:1] == ["refs"] else 1
    revision, file = "/".join(rest[:length]) or None, "/".join(rest[length:])
    if file.lower().endswith(".gguf"):
        raise HubError(f"{address} is one file of a model: {_fetch_first(hub_id, file, revision)}")
    return hub_id, revision


def _fetch_first(hub_id: str, file: str, revision: str | None) -> str:
    at = f" --revision {revision}" if revision else ""
    return f"fetch it with `hf download {hub_id} {file}{at}`, and give its path"
