"""Model cards: the README.md of a folder that is written, with the front matter that the hub reads.

What a card says is data: of what the model was made, how, and with which of its settings. Of a path its last part is
told, of settings those that are listed; so nothing of a machine, a bucket or a key gets into one.
"""

import contextlib
import dataclasses
import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..config_file import read_json
from ..errors import HubError, OptionError, SaveError
from ..files import carry, write
from ..paths import cache_dir, user_path
from ..reading import read_file, why
from ..screen_text import plain
from ..support import version
from .address import hub_address
from .hub import DEMO_ID
from .peft import CONFIG, is_adapter

CARD = "README.md"
LICENSE = ("license", "license_name", "license_link")  # of the front matter
MAX_BYTES = 1_000_000
SIX = ("en", "fr", "es", "it", "pt", "de")
# Models that the hub's pages say this of: the beginning of an id -> (licence, languages).
KNOWN = {
    "HuggingFaceTB/SmolLM3-3B": ("apache-2.0", SIX),
    "HuggingFaceTB/SmolLM2-": ("apache-2.0", ("en",)),
}
_MARK = re.compile(r"\n<!-- smollm3-jax: (?P<digest>[0-9a-f]{16})\b[^\n]*-->\n\Z")
_TOLD = "as long as nothing here is changed, this card is written anew with the model"


@dataclasses.dataclass(frozen=True)
class Origin:
    """What another model was made from, as a card may name it.

    name: a hub id, or the last part of a path. bases: hub ids, of itself or of what its own card says it was made from.
    """

    name: str
    bases: tuple[str, ...] = ()
    license: Mapping[str, str] = dataclasses.field(default_factory=dict)
    languages: tuple[str, ...] = ()
    datasets: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Card:
    """What a card says.

    origins: none is a model trained from nothing. what: a sentence of it. commands: what was done, a line each.
    relation: the hub's word for what it is to its bases. library: what it is loaded with. sections: title -> Markdown.
    """

    what: str
    origins: Sequence[Origin] = ()
    commands: Sequence[str] = ()
    relation: str | None = None
    tags: Sequence[str] = ()
    datasets: Sequence[str] = ()
    library: str = "transformers"
    sections: Mapping[str, str] = dataclasses.field(default_factory=dict)


def shown_name(word: object) -> str:
    """A model's name for a card: a hub id or "demo" whole, of a path or an address the last part."""
    text = str(word)
    if text != "demo" and not is_there(text):
        with contextlib.suppress(HubError):
            if address := hub_address(text):
                return address[0]
    return last_part(text)


def last_part(path: str) -> str:
    """Of a path or an address, without what an address may end with; "recipe:FILE" as it is. One line."""
    path = re.sub(r"[?#].*", "", path, flags=re.DOTALL) if "://" in path else path
    return plain(re.split(r"[/\\]", path.rstrip("/\\"))[-1]).replace("`", "'") or "unnamed"


def is_there(path: str) -> bool:
    """Whether there is a file or folder of this name here."""
    try:
        return user_path(path).exists()
    except (OSError, ValueError):  # too long a name, one with NUL
        return False


def origin(path: Path) -> Origin:
    """What a card may say of a model's folder or .gguf file, by where it lies and by the card in it."""
    path = Path(path).resolve()
    own, hub_id = front_matter(path / CARD), _hub_id(path)
    if is_adapter(path):
        base = read_json(path / CONFIG).get("base_model_name_or_path")
        own = {"base_model": list(origin_of(base).bases), **own} if isinstance(base, str) and base else own
    bases = (hub_id,) if hub_id else tuple(filter(is_hub_id, _texts(own.get("base_model"))))
    return _described(hub_id or last_part(str(path)), bases, own, path)


def origin_of(word: str) -> Origin:
    """The same of a model's name, which need not be here any more."""
    if is_there(word):
        return origin(user_path(word))
    name = DEMO_ID if word == "demo" else shown_name(word)
    return _described(name, (name,) if is_hub_id(name) else (), {}, None)


def _described(name: str, bases: tuple[str, ...], card: Mapping[str, Any], folder: Path | None) -> Origin:
    """With what the model's own card says, else what is known of its bases, or the files beside it tell."""
    known = next((KNOWN[begin] for base in bases for begin in KNOWN if base.startswith(begin)), None)
    license = {key: card[key] for key in LICENSE if isinstance(card.get(key), str)}
    if "license" not in license:
        license = {"license": known[0]} if known else _license(folder, bases)
    languages = _texts(card.get("language")) or (known[1] if known else ())
    return Origin(name, bases, license, languages, tuple(filter(is_hub_id, _texts(card.get("datasets")))))


def _hub_id(path: Path) -> str | None:
    """Of what lies in Hugging Face's cache, or is the demo in this package's."""
    if path.parent.name == "snapshots" and path.parents[1].name.startswith("models--"):
        return path.parents[1].name.removeprefix("models--").replace("--", "/", 1)
    own = path.parent == cache_dir().resolve() and path.name.startswith(DEMO_ID.split("/")[1])
    return DEMO_ID if own else None


def is_hub_id(name: str) -> bool:
    """Whether a name has the form ORG/NAME."""
    return re.fullmatch(r"\w[\w.-]*/[\w.-]+", name, re.ASCII) is not None


def _license(folder: Path | None, bases: Sequence[str]) -> dict[str, str]:
    """The front matter's words for that of a file beside the model, or of the base's page."""
    for file in sorted(folder.glob("LICEN[SC]E*")) if folder is not None and folder.is_dir() else ():
        with contextlib.suppress(OSError):
            text = read_file(file, MAX_BYTES).decode(errors="replace")
            if "Apache License" in text and "Version 2.0" in text:
                return {"license": "apache-2.0"}
            return {"license": "other", "license_name": "in-the-file", "license_link": file.name}
    if bases:
        return {"license": "other", "license_name": "of-the-base-model", "license_link": f"https://hf.co/{bases[0]}"}
    return {"license": "unknown"}


def front_matter(path: Path) -> dict[str, Any]:
    """The YAML that a card begins with; {} where there is none, or it cannot be read."""
    import yaml

    try:
        match = re.match(r"---\r?\n(.*?)\r?\n---(\r?\n|$)", read_file(path, MAX_BYTES).decode(), re.DOTALL)
        found = yaml.safe_load(match[1]) if match else None
    except (OSError, UnicodeError, yaml.YAMLError, RecursionError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _texts(value: object) -> tuple[str, ...]:
    entries = value if isinstance(value, list) else [value]
    return tuple(entry for entry in entries if isinstance(entry, str) and len(entry) < 200)


def render(card: Card, name: str, model_type: str) -> str:
    """The whole README.md of a folder of that name."""
    import yaml

    origins = card.origins
    several = [x.license for x in origins] or [{"license": "unknown"}]
    license = several[0] if several.count(several[0]) == len(several) else {"license": "other"}
    if license == {"license": "other"}:
        license = {"license": "other", "license_name": "of-its-models", "license_link": CARD}
    data = {
        "base_model": list(dict.fromkeys(base for x in origins for base in x.bases)),
        "base_model_relation": card.relation if any(x.bases for x in origins) else None,
        "datasets": list(dict.fromkeys([*card.datasets, *(entry for x in origins for entry in x.datasets)])),
        "language": list(dict.fromkeys(language for x in origins for language in x.languages)),
        "library_name": card.library,
        **license,
        "pipeline_tag": "text-generation",
        "tags": [model_type, "jax", "smollm3-jax", *card.tags],
    }
    head = yaml.safe_dump({key: value for key, value in data.items() if value}, sort_keys=False, allow_unicode=True)
    name = shown_name(name)
    parts = [f"---\n{head}---\n", f"# {name}\n", f"{card.what}\n"]
    versions = f"smollm3-jax {version('smollm3-jax')}, jax {version('jax')}"
    made = "\n".join(["```", *card.commands, "```"]) if card.commands else ""
    sections = {"How it was made": f"By {versions}:\n\n{made}", **card.sections}
    sections |= {"Use": _use(card.library, name, origins), "Licence": _licence_text(license, origins)}
    parts += [f"## {title}\n\n{text.strip()}\n" for title, text in sections.items() if text]
    return signed("\n".join(parts))


def _use(library: str, name: str, origins: Sequence[Origin]) -> str:
    command = f"smollm3 chat {name}"
    if library == "peft":
        base = origins[0].name if origins else "BASE"
        command = f"smollm3 chat {base} --adapter {name}"
        python = (
            f'from peft import AutoPeftModelForCausalLM\n\nmodel = AutoPeftModelForCausalLM.from_pretrained("{name}")'
        )
    elif library == "transformers":
        python = (
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            f'model = AutoModelForCausalLM.from_pretrained("{name}")\n'
            f'tokenizer = AutoTokenizer.from_pretrained("{name}")'
        )
    else:
        python = f'import smollm3_jax as s3\n\nmodel = s3.from_pretrained("{name}")'
    return f"```\n{command}\n```\n\n```python\n{python}\n```"


def _licence_text(license: Mapping[str, str], origins: Sequence[Origin]) -> str:
    if license["license"] == "unknown":
        return "Nothing is known of it here: say under which licence this model may be used."
    of = f", that of {' and '.join(f'`{x.name}`' for x in origins)}" if origins else ""
    if license["license"] != "other":
        return f"`{license['license']}`{of}."
    if license["license_name"] == "of-its-models":
        return "\n".join(f"- `{x.name}`: {x.license.get('license_link', x.license['license'])}" for x in origins)
    return f"That of [{license['license_link']}]({license['license_link']})."


def signed(text: str) -> str:
    """The text with the line by which `is_ours` knows it again."""
    return f"{text}\n<!-- smollm3-jax: {_digest(text)}; {_TOLD} -->\n"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def is_ours(path: Path) -> bool:
    """Whether a card is as this package wrote it; whatever else stands there is the user's."""
    try:
        text = read_file(path, MAX_BYTES).decode()
    except (OSError, UnicodeError):
        return False
    mark = _MARK.search(text)
    return mark is not None and mark["digest"] == _digest(text[: mark.start()])


def put(card: Card | None, folder: Path, new: Path, model_type: str) -> None:
    """Writes a card into `new`, which takes the place of `folder`; if that has one of the user's own, it stays.

    Raises:
      OSError: it cannot be written.
    """
    there = folder / CARD
    if os.path.lexists(there) and not is_ours(there):
        carry(there, new / CARD)
    elif card is not None:
        write(new / CARD, render(card, folder.name, model_type))


def add_section(folder: Path, title: str, text: str) -> None:
    """Puts a section into a folder's card, before the one about use, or in the place of its own of that title.

    Raises:
      OptionError: there is no card, or it is the user's own by now.
      SaveError: it cannot be written.
    """
    path = folder / CARD
    if not is_ours(path):
        why_not = "is not as smollm3-jax wrote it" if path.exists() else "is not there"
        raise OptionError(f"{path} {why_not}, and is left alone; what would go into it:\n\n## {title}\n\n{text}")
    content = path.read_text()
    content = content[: next(_MARK.finditer(content)).start()]
    head, *sections = content.split("\n## ")
    sections = [section for section in sections if not section.startswith(f"{title}\n")]
    at = next((i for i, section in enumerate(sections) if section.startswith("Use\n")), len(sections))
    sections.insert(at, f"{title}\n\n{text.strip()}\n")
    try:
        write(path, signed("\n## ".join([head, *sections])))
    except OSError as error:
        raise SaveError(f"{path} could not be written: {why(error)}") from None
