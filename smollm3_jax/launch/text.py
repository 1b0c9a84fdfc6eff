"""Values as YAML and shell write them, so that any text comes out as it went in."""

import re
import shlex
from collections.abc import Iterable, Sequence
from typing import Any

import yaml

# Words that every YAML reader takes for a text, whichever version of YAML it reads; all others stand in quotes.
_PLAIN = re.compile(
    r"(?!(?:y|n|yes|no|on|off|true|false|null)$)[A-Za-z][A-Za-z0-9_-]*(?:[./][A-Za-z0-9_-]+)*", re.IGNORECASE
)
# What may stand as it is in a text of several lines: readers take more than \n for a line's end.
_LINES = re.compile(r"[ -~\n]*\n")


class _Dumper(yaml.SafeDumper):
    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)  # lists stand further in than what they belong to

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    style = "|" if _LINES.fullmatch(text) else None if _PLAIN.fullmatch(text) else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)


def manifest(documents: Iterable[dict[str, Any]]) -> str:
    """YAML of one document or several."""
    return "---\n".join(
        yaml.dump(document, Dumper=_Dumper, sort_keys=False, allow_unicode=False, width=2**20) for document in documents
    )


def shell(words: Sequence[str]) -> str:
    """A command, with a line for each option: what has a break in it stands in quotes."""
    lines = [[]]
    for word in words:
        if word.startswith("--") or ("=" in word and not word.startswith("-")):
            lines.append([])
        lines[-1].append(shlex.quote(word))
    return " \\\n  ".join(" ".join(line) for line in lines if line)


def kubernetes(words: Iterable[str]) -> list[str]:
    """A container's command: Kubernetes takes $(NAME) in it for a variable, and $$ for a $."""
    return [word.replace("$", "$$") for word in words]
