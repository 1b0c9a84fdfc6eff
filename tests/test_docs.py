"""The commands of the README and of docs/, run as they are printed.

A block after `<!-- run -->` is run by bash, or by Python if it says so, in one folder for each page and in the page's
order; the block without a language after it is what comes out. "..." stands for anything, and so does every number in
a block after `<!-- like -->`, which was measured on another machine. Every other block of commands says why it is not
run: `slow` (minutes; FULL=1 runs it), `network`, `accelerator`, `own` (files, a terminal or programs of the reader's
own), or `shown` (it is no command).
"""

import itertools
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from smollm3_jax.weights.demo import pull_demo

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MARKS = ("run", "slow", "network", "accelerator", "own", "shown")
RUN = ("run", "slow") if os.environ.get("FULL") else ("run",)
FENCED = re.compile(r"(?:<!-- (\w+) -->\n)?^```(\w*|\{[\w-]+\})\n(.*?)^```$", re.MULTILINE | re.DOTALL)
RULES = str.maketrans(dict.fromkeys("┏━┳┓┡╇┩└─┴┘┃│", " "))  # a table's lines are as wide as the terminal lets them


class Block(NamedTuple):
    language: str
    code: str
    printed: str | None
    measured: bool


def blocks(page: Path) -> list[Block]:
    found = FENCED.findall(page.read_text())
    runs = []
    for (mark, language, code), (after, then, text) in itertools.pairwise([*found, ("", "end", "")]):
        if mark in RUN:
            shown = text if not then and after not in MARKS and _follows(page, code, text) else None
            runs.append(Block(language, code, shown, after == "like"))
    return runs


def unmarked(page: Path) -> list[str]:
    """Blocks that neither say whether they are run nor are what the block before them prints."""
    found = FENCED.findall(page.read_text())
    told = []
    for (_, _, before), (mark, language, code) in itertools.pairwise([("", "", ""), *found]):
        printed = mark in ("", "like") and not language and _follows(page, before, code)
        if not (mark in MARKS or printed or language.startswith("{")):
            told.append(code)
    return told


def _follows(page: Path, code: str, text: str) -> bool:
    """Whether nothing but a mark stands between two blocks."""
    between = page.read_text().split(code, 1)[1].split(text, 1)[0] if code and text else "x"
    return re.fullmatch(r"```\n(<!-- like -->\n)?```\n", between) is not None


def pattern(printed: str, measured: bool) -> str:
    lines = [" ".join(line.translate(RULES).split()) for line in printed.splitlines()]
    lines = [re.escape(line) for line in lines if line]
    lines = [r"(.*\n)*" if line == r"\.\.\." else line.replace(r"\.\.\.", ".*") + "\n" for line in lines]
    text = "".join(lines)
    return re.sub(r"\d[\d,]*(\\\.\d+)?(e\\-\d+)?", r"[\\d.,e-]+", text) if measured else text


def as_lines(output: str) -> str:
    lines = [" ".join(line.translate(RULES).split()) for line in output.splitlines()]
    return "".join(f"{line}\n" for line in lines if line)


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.stem)
def test_commands_print_what_the_page_says(page, tmp_path):
    demo = pull_demo()
    for name in ("scripts", "sharding", "smollm3_jax"):
        (tmp_path / name).symlink_to(ROOT / name)
    names = ("HOME", "TMPDIR", "SMOLLM3_JAX_CACHE", "JAX_COMPILATION_CACHE_DIR")
    kept = {name: os.environ[name] for name in names if name in os.environ}
    # Twice as wide as usual, so that no table is broken; what the tests themselves set is not passed on.
    kept |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "COLUMNS": "160", "DEMO": str(demo)}
    for block in blocks(page):
        command = [sys.executable, "-c", block.code] if block.language == "python" else ["bash", "-ec", block.code]
        options = {"cwd": tmp_path, "env": kept, "timeout": 900}
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, **options)
        assert done.returncode == 0, (block.code, done.stdout, done.stderr)
        if block.printed is not None:
            expected = pattern(block.printed, block.measured)
            assert re.search(f"^{expected}", as_lines(done.stdout), re.MULTILINE), (block.code, expected, done.stdout)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_block_says_whether_it_is_run(page):
    assert unmarked(page) == []


def test_a_block_without_a_mark_is_seen(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("<!-- run -->\n```\necho a\n```\n```\na\n```\ntext\n```\necho b\n```\n")
    assert unmarked(page) == ["echo b\n"]
    assert [block.printed for block in blocks(page)] == ["a\n"]


def test_what_does_not_match_is_seen():
    shown = "│ max_abs │ 0        │\n...\nverified\n"
    assert re.search(pattern(shown, False), as_lines("│ max_abs │ 0 │\n│ x │ 1 │\nverified\n"))
    assert not re.search(pattern(shown, False), as_lines("│ max_abs │ 1 │\nverified\n"))
    assert re.search(pattern("loss 3.08, 100 tokens/s\n", True), "loss 2.1, 1,234 tokens/s\n")
    assert not re.search(pattern("loss 3.08\n", True), "gain 3.08\n")


def test_pages_that_are_linked_are_there():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+\.(?:md|png))(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).is_file(), f"{page}: {target}"
