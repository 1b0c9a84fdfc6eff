"""The files of a model folder beside its weights and configs: tokenizer, templates, licence."""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

from ..errors import CheckpointFormatError
from ..reading import read_file, why
from ..tokenizer_files import MAX_FILE_BYTES, TEMPLATES

_TEXT = re.compile(
    r"tokenizer\.json|tokenizer_config\.json|special_tokens_map\.json|added_tokens\.json|vocab\.(json|txt)|merges\.txt"
    r"|chat_template\.(jinja|json)|(tokenizer|spiece|sentencepiece\.bpe|tiktoken)\.model(\.v\d+)?"
    r"|(LICEN[SC]E|NOTICE|COPYING|USE_POLICY)(\.\w+)?"
)
_CONFIG_OR_WEIGHTS = re.compile(
    r"(generation_)?config\.json|.*\.(safetensors|bin|pt|pth|gguf)|.*\.(safetensors|bin)\.index\.json|\..*", re.DOTALL
)


def is_text_file(name: str) -> bool:
    """Whether a file or folder of this name, at the top of a model folder, is a text file of the model's."""
    return name == TEMPLATES or _TEXT.fullmatch(name) is not None


def text_files(folder: Path) -> dict[str, Path]:
    """The text files that a model folder holds, by their names in it, "additional_chat_templates/x.jinja" too."""
    found = {path.name: path for path in folder.iterdir() if is_text_file(path.name)}
    found |= {f"{TEMPLATES}/{path.name}": path for path in (folder / TEMPLATES).glob("*.jinja")}
    return {name: found[name] for name in sorted(found) if found[name].is_file()}


def read_texts(folder: Path) -> dict[str, bytes]:
    """The content of `text_files`, by name.

    Raises:
      CheckpointFormatError: one cannot be read, or is far too large for a text.
    """
    found = {}
    for name, path in text_files(folder).items():
        try:
            found[name] = read_file(path, MAX_FILE_BYTES)
        except OSError as error:
            raise CheckpointFormatError(f"{path} cannot be read: {why(error)}") from None
    return found


def with_one_template(texts: Mapping[str, bytes], template: str) -> dict[str, bytes]:
    """A model's text files with one chat template for all conversations, and no other one anywhere: there are readers
    to which tokenizer_config.json's goes before the file.

    Raises:
      CheckpointFormatError: tokenizer_config.json is not JSON.
    """
    config, other = "tokenizer_config.json", ("chat_template.json", f"{TEMPLATES}/")
    found = {name: content for name, content in texts.items() if not name.startswith(other)}
    try:
        content = json.loads(found.get(config, b"{}"))
    except (ValueError, RecursionError):
        raise CheckpointFormatError(f"{config} cannot be read as JSON") from None
    if isinstance(content, dict) and content.pop("chat_template", None) is not None:
        found[config] = (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
    return found | {"chat_template.jinja": template.encode()}


def left_out(folder: Path) -> list[str]:
    """What a model folder holds beside all that belongs to the model; folders end with a slash."""
    names = (path.name + "/" * path.is_dir() for path in folder.iterdir())
    return sorted(x for x in names if not is_text_file(x.removesuffix("/")) and not _CONFIG_OR_WEIGHTS.fullmatch(x))


def check_links(folder: Path) -> None:
    """Refuses to copy what only looks like a model's file.

    The links of a Hugging Face cache, from snapshots/COMMIT into blobs, belong to it.

    Raises:
      CheckpointFormatError: a text file is a link that leads out of the folder, or nowhere.
    """
    for path in folder.iterdir():
        if is_text_file(path.name) and path.is_symlink() and not path.exists():
            raise CheckpointFormatError(f"{path} is a link that leads nowhere: put the file in its place, or remove it")
    inside = Path(os.path.realpath(folder))
    blobs = inside.parents[1] / "blobs" if inside.parent.name == "snapshots" else None
    for name, path in text_files(folder).items():
        at = _step(path)
        while at.is_relative_to(inside) and at.is_symlink():  # ends: it leads to a file
            at = _step(at.parent / os.readlink(at))
        # A blob may itself be a link, to a store that several caches share.
        if not at.is_relative_to(inside) and at.parent != blobs:
            raise CheckpointFormatError(
                f"{folder / name} is a link that leads out of the folder, to {at}, and would be copied: "
                "put a copy in its place if that is a file of the model's"
            )


def _step(path: Path) -> Path:
    """Where a file or link lies; its folder's links are followed, itself it is not."""
    return Path(os.path.realpath(path.parent)) / path.name
