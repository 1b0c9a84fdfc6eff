"""Imports run one way, also those in functions and for type checking alone; files and functions are short."""

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "smollm3_jax"

# Rooms (modules and packages directly below smollm3_jax, and sharding) from the lowest level to the highest. A module
# imports from its own level or from lower ones; rooms of one level may import each other, but not in a circle.
ORDER = (
    ("sharding",),
    ("screen_text", "errors", "job", "paths", "files", "logs"),
    ("streams", "nesting", "sizes", "reading", "file_kind", "progress"),
    ("support", "text_files", "compile_cache"),
    ("config_file", "config"),
    ("nvidia", "xla_cpu", "kernels", "rms_norm", "rope", "quantize", "lora", "tokenizer_files", "tokenizer"),
    ("kv_cache", "attention"),
    ("model",),
    ("weights", "pretrained"),
    ("generation",),
    ("chat",),
    ("serve", "evaluate", "train", "plan", "launch", "on_ray"),
    (PACKAGE,),  # the public names
    ("commands", "__main__"),
)

LINES_OF_A_FILE, LINES_OF_A_FUNCTION = 400, 60
KERNEL = "one kernel: what its loops keep in registers has no name outside of them"
LONG_FILES = {
    "smollm3_jax/model.py": "the model in one piece, and its two calls typed twice",
}
LONG_FUNCTIONS = {
    "smollm3_jax/attention/paged_gpu.py _paged_attention": KERNEL,
    "smollm3_jax/attention/paged_gpu.py step": KERNEL,
    "smollm3_jax/generation/prompt_lookup.py decode_lookup": "a loop's body; a third says what it takes and gives",
    "smollm3_jax/kernels/product_gpu.py product": KERNEL,
    "smollm3_jax/kernels/product_tpu.py product": KERNEL,
    "smollm3_jax/kernels/product_wgmma.py product": KERNEL,
}


def modules(root: Path, *packages: str) -> dict[str, Path]:
    """Dotted name -> file of all modules of these packages; a package's name stands for its __init__.py."""
    files = sorted(file for package in packages for file in (root / package).rglob("*.py"))
    names = [".".join(file.relative_to(root).with_suffix("").parts) for file in files]
    return {name.removesuffix(".__init__"): file for name, file in zip(names, files, strict=True)}


def imported(name: str, found: Mapping[str, Path]) -> Iterator[str]:
    """The names that a module imports, dotted; `from x import y` imports x.y if that is a module, else x."""
    package = name if found[name].name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(found[name].read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            yield from (of if (of := f"{base}.{alias.name}") in found else base for alias in node.names)


def graph_of(found: Mapping[str, Path]) -> dict[str, set[str]]:
    """Module -> those of the modules that it imports."""
    return {name: set(imported(name, found)) & (found.keys() - {name}) for name in found}


def room_of(module: str) -> str:
    first, _, rest = module.partition(".")
    return rest.split(".")[0] if first == PACKAGE and rest else first


def rooms_of(graph: Mapping[str, set[str]]) -> dict[str, set[str]]:
    """The same of rooms."""
    rooms: dict[str, set[str]] = {}
    for module, others in graph.items():
        own = room_of(module)
        rooms[own] = rooms.get(own, set()) | {room_of(other) for other in others} - {own}
    return rooms


def circle(graph: Mapping[str, set[str]]) -> list[str]:
    """One that imports make, from a module on to the same again; empty where there is none."""
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


def against(order: tuple[tuple[str, ...], ...], graph: Mapping[str, set[str]]) -> list[str]:
    """The imports of a higher level by a lower one, and the rooms that stand in no level."""
    level = {room: number for number, rooms in enumerate(order) for room in rooms}
    unknown = {room_of(module) for module in graph} - level.keys()
    return [f"{room} is in no level of ORDER" for room in sorted(unknown)] + [
        f"{module} imports {other}, which stands higher"
        for module, others in sorted(graph.items())
        for other in sorted(others)
        if not {room_of(module), room_of(other)} & unknown and level[room_of(other)] > level[room_of(module)]
    ]


def long_files(root: Path, files: Mapping[str, Path]) -> set[str]:
    found = {str(file.relative_to(root)): len(file.read_text().splitlines()) for file in files.values()}
    return {file for file, lines in found.items() if lines > LINES_OF_A_FILE}


def long_functions(root: Path, files: Mapping[str, Path]) -> set[str]:
    return {
        f"{file.relative_to(root)} {node.name}"
        for file in files.values()
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (node.end_lineno or 0) - node.lineno >= LINES_OF_A_FUNCTION
    }


@pytest.fixture(scope="module")
def ours() -> dict[str, set[str]]:
    return graph_of(modules(ROOT, PACKAGE, "sharding"))


def test_no_circle(ours):
    assert not circle(ours)
    assert not circle(rooms_of(ours))


def test_imports_run_one_way(ours):
    assert not against(ORDER, ours)


def test_files_and_functions_are_short_or_have_a_reason():
    """An entry whose file or function has become short, or is gone, is to be taken out of the table."""
    files = modules(ROOT, PACKAGE, "sharding", "scripts")
    assert long_files(ROOT, files) == LONG_FILES.keys()
    assert long_functions(ROOT, files) == LONG_FUNCTIONS.keys()


def test_importing_loads_nothing_heavy():
    heavy = "torch transformers orbax grain tokenizers requests httpx aiohttp starlette uvicorn huggingface_hub"
    heavy += " lm_eval datasets jax flax"
    code = f"import sys, smollm3_jax; print(*sorted(set('{heavy}'.split()) & set(sys.modules)))"
    assert loaded(code) == set()
    assert loaded(f"import smollm3_jax as s; [getattr(s, n) for n in s.__all__]; {code}") <= {"jax", "flax"}


def loaded(code: str) -> set[str]:
    done = subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True, text=True)
    return set(done.stdout.split())


# --- what the tests above would see -----------------------------------------------------------------------


def tree(root: Path, files: Mapping[str, str]) -> dict[str, Path]:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return modules(root, PACKAGE, "sharding")


LOW = {"sharding/rules.py": "import jax\n", f"{PACKAGE}/config.py": "import json\n"}


@pytest.mark.parametrize(
    "text",
    [
        "from .model import x",
        "from . import model",
        "import smollm3_jax.model",
        "from smollm3_jax import model",
        "def f():\n    from .model import x",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .model import x",
    ],
)
def test_a_wrong_import_is_seen_wherever_it_stands(tmp_path, text):
    files = {**LOW, f"{PACKAGE}/model.py": "x = 1\n", f"{PACKAGE}/quantize.py": text}
    graph = graph_of(tree(tmp_path, files))
    assert against(ORDER, graph) == ["smollm3_jax.quantize imports smollm3_jax.model, which stands higher"]
    assert not circle(graph)
    back = graph_of(tree(tmp_path, {f"{PACKAGE}/model.py": "from .quantize import y\n"}))
    assert {"smollm3_jax.quantize", "smollm3_jax.model"} == set(circle(back))


def test_a_circle_of_rooms_alone_is_seen(tmp_path):
    files = {
        "plan/a.py": "from ..train import d",
        "plan/b.py": "",
        "train/c.py": "from ..plan import b",
        "train/d.py": "",
    }
    graph = graph_of(tree(tmp_path, {f"{PACKAGE}/{name}": text for name, text in files.items()}))
    assert not circle(graph) and not against(ORDER, graph)
    assert set(circle(rooms_of(graph))) == {"plan", "train"}


def test_a_room_without_a_level_is_seen(tmp_path):
    found = graph_of(tree(tmp_path, {**LOW, f"{PACKAGE}/cellar/wine.py": "from ..config import x"}))
    assert against(ORDER, found) == ["cellar is in no level of ORDER"]
    assert against(ORDER, graph_of(tree(tmp_path, {"sharding/rules.py": "from smollm3_jax.errors import x"})))


def test_what_is_long_is_seen(tmp_path):
    body = "def short():\n" + "    1\n" * 59 + "\n\ndef long():\n" + "    1\n" * 60
    found = tree(tmp_path, {f"{PACKAGE}/a.py": body, f"{PACKAGE}/b.py": "1\n" * 400, f"{PACKAGE}/c.py": "1\n" * 401})
    assert long_functions(tmp_path, found) == {"smollm3_jax/a.py long"}
    assert long_files(tmp_path, found) == {"smollm3_jax/c.py"}
