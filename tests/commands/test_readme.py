"""The commands of the README and of docs/ are understood as they are printed."""

import itertools
import re
import shlex
from pathlib import Path

import pytest

from smollm3_jax.commands.main import COMMANDS, parse, parser_of

ROOT = Path(__file__).parents[2]
PRINTED = "\n".join(page.read_text() for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))))


def printed() -> list[str]:
    """Every call of the command, in blocks and in sentences, without what follows a #."""
    inside, found = False, re.findall(r"`(smollm3 [^`]+)`", PRINTED)
    for line in PRINTED.splitlines():
        if line.startswith("```"):
            inside = not inside
        elif inside:
            found += re.findall(r"\bsmollm3 [a-z]+ [^#)]*", line.split("#")[0])
    called = (shlex.split(re.split(r"[|>]| \.\.\.$", line)[0]) for line in found)
    return sorted({shlex.join(words) for words in called if len(words) > 2 and words[1] in COMMANDS})


@pytest.mark.parametrize("line", printed())
def test_a_printed_command_is_understood(line, capsys):
    _, name, *words = shlex.split(line)
    try:
        parse(parser_of(name)[1], words)
    except SystemExit as exit:
        assert exit.code == 0, capsys.readouterr().err  # --help


def test_all_kinds_are_there():
    names = [key for key, _ in itertools.groupby(line.split()[1] for line in printed())]
    assert len(printed()) > 25 and len(set(names)) > 10, printed()
