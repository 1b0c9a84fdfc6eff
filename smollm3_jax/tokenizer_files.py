"""What the files beside tokenizer.json say: special tokens, added tokens and chat templates, by transformers' rules."""

import io
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import TokenizerError
from .file_kind import lfs_pointer, what_it_is

# The names under which transformers hands special tokens to a chat template.
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

# Far above any tokenizer there is; a larger file is refused before it is read.
MAX_FILE_BYTES = 1 << 28
# What is read beside tokenizer.json, and the folder of further templates, a .jinja file each.
NAMES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")
TEMPLATES = "additional_chat_templates"


def read_file(path: Path) -> bytes:
    try:
        if path.is_symlink() and not path.exists():
            raise OSError("it is a link that leads nowhere; copy the file again from the model's release")
        if not path.is_file():
            raise OSError("it is no regular file")
        if (size := path.stat().st_size) > MAX_FILE_BYTES:
            raise OSError(f"it has {size:,} bytes; at most {MAX_FILE_BYTES:,} are read")
        return path.read_bytes()
    except OSError as error:
        kind = "a tokenizer" if path.name == "tokenizer.json" else "text"
        raise TokenizerError(f"{path} cannot be read as {kind}: {error.strerror or error}") from None


def _object(files: Mapping[str, bytes], folder: Path, name: str) -> dict[str, Any]:
    """The JSON object in a file; empty where there is no such file."""
    if name not in files:
        return {}
    try:
        content = json.loads(files[name])
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{folder / name} cannot be read as JSON: {what_it_is(folder / name) or error}") from None
    if not isinstance(content, dict):
        raise TokenizerError(f"{folder / name} must hold a JSON object, not a {type(content).__name__}")
    return content


def chat_templates(files: Mapping[str, bytes], folder: Path) -> dict[str, str]:
    """By name: the folder's own files if there are any, as transformers does, or else tokenizer_config.json's entry."""
    own: dict[str, str] = {}
    for name, content in files.items():
        if name == "chat_template.jinja" or (name.startswith(f"{TEMPLATES}/") and name.endswith(".jinja")):
            if pointer := lfs_pointer(content[:512]):  # which is a sound template, of a text that nobody meant
                raise TokenizerError(f"{folder / name} is no chat template: {pointer}")
            try:
                text = io.TextIOWrapper(io.BytesIO(content), encoding="utf-8").read()  # with \n for every line break
            except ValueError as error:
                raise TokenizerError(f"{folder / name} cannot be read as text: {error}") from None
            own["default" if name == "chat_template.jinja" else Path(name).stem] = text
    if own:
        return own
    entry = _object(files, folder, "tokenizer_config.json").get("chat_template")
    found: Any
    try:
        found = {t["name"]: t["template"] for t in entry} if isinstance(entry, list) else entry
    except (KeyError, TypeError):
        found = {"": None}
    found = found if isinstance(found, dict) else {} if found is None else {"default": found}
    if not all(isinstance(name, str) and isinstance(text, str) for name, text in found.items()):
        raise TokenizerError(
            f"{folder / 'tokenizer_config.json'}: chat_template must be a string, or a list of objects with "
            "name and template"
        )
    return found


def special_tokens_of(
    files: Mapping[str, bytes], folder: Path
) -> tuple[dict[str, str], list[str], list[dict[str, Any]]]:
    """The special tokens by name, those without one, and the tokens that were added to the vocabulary, in order.

    What counts if several files say something is transformers' rule: special_tokens_map.json goes before
    tokenizer_config.json, but where that has added_tokens_decoder, neither it nor added_tokens.json is read.
    Null ones stay out, so that a template finds them undefined.
    """
    raw = _object(files, folder, "tokenizer_config.json")
    named, extra = _named(raw, folder / "tokenizer_config.json")
    added = raw.get("added_tokens_decoder")
    where = folder / "tokenizer_config.json"
    if added is None:
        over = _object(files, folder, "special_tokens_map.json")
        names, others = _named(over, folder / "special_tokens_map.json")
        named |= names
        extra += [token for token in others if token not in extra]
    texts = {name: text for name, token in named.items() if (text := _content(token))}
    others = [str(_content(token)) for token in extra]
    if added is None:
        where, listed = folder / "added_tokens.json", _object(files, folder, "added_tokens.json")
        special = {*texts.values(), *others}
        entries = [{"content": text, "id": number, "special": text in special} for text, number in listed.items()]
    else:
        is_object = isinstance(added, dict) and all(isinstance(token, dict) for token in added.values())
        entries = [{**token, "id": number} for number, token in added.items()] if is_object else [{}]
    for entry in entries:
        if _content(entry) is None or not re.fullmatch(r"\d{1,18}", str(entry["id"]), re.ASCII):
            raise TokenizerError(f"{where}: every added token must have a text and a number")
        entry["id"] = int(entry["id"])
    return texts, others, sorted(entries, key=lambda entry: entry["id"])


def _named(raw: Mapping[str, Any], where: Path) -> tuple[dict[str, Any], list[Any]]:
    """A file's special tokens that have a name, those that the model named ("image_token") included, and the others."""
    found = {name: token for name, token in raw.items() if name in SPECIAL_TOKENS and token is not None}
    if wrong := [name for name, token in found.items() if _content(token) is None]:
        raise TokenizerError(
            f"{where}: {wrong[0]} is {raw[wrong[0]]!r:.80}; it must be a text, or an object with content"
        )
    found |= {name: token for name, token in raw.items() if name in SPECIAL_TOKENS or _is_token(name, token)}
    extra = raw.get("extra_special_tokens") or raw.get("additional_special_tokens") or []
    tokens = extra.values() if isinstance(extra, dict) else extra
    if not isinstance(extra, list | dict) or any(_content(token) is None for token in tokens):
        raise TokenizerError(f"{where}: extra_special_tokens must be a list of tokens, or an object of them by name")
    more = raw.get("model_specific_special_tokens") or {}  # as transformers itself writes them
    if not isinstance(more, dict) or any(_content(token) is None for token in more.values()):
        raise TokenizerError(f"{where}: model_specific_special_tokens must be an object of tokens by name")
    return (found | more | extra, []) if isinstance(extra, dict) else (found | more, list(extra))


def _is_token(name: str, token: object) -> bool:
    return name.endswith("_token") and _content(token) is not None


def _content(token: object) -> str | None:
    """The text of a token in either spelling; None for what is none, as half a surrogate pair."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) and not re.search(r"[\ud800-\udfff]", token) else None
