from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from said import server_of

from smollm3_jax.errors import OptionError
from smollm3_jax.serve.job import Server


@pytest.fixture(scope="session")
def server(full_release: Path) -> Server:
    """The released model, but for its weights."""
    return server_of(full_release)


@pytest.fixture
def grammars(monkeypatch: pytest.MonkeyPatch) -> None:
    """Grammars that say what they were made of."""
    _make_grammars(monkeypatch)


@pytest.fixture(scope="module")
def grammars_always() -> Iterator[None]:
    """The same for tests of many examples."""
    with pytest.MonkeyPatch.context() as patch:
        _make_grammars(patch)
        yield


def _make_grammars(patch: pytest.MonkeyPatch) -> None:
    import smollm3_jax.generation

    def json_schema(schema: Any) -> str:
        if schema == {"type": "impossible"}:
            raise OptionError("the schema cannot be kept: impossible")
        return f"schema {schema}"

    def tool_calls(tools: list[Any], *, names: list[str] | None, parallel: bool, style: str) -> str:
        assert style == "xml"
        return f"calls of {names}, parallel {parallel}, of {' '.join(tool['function']['name'] for tool in tools)}"

    made = SimpleNamespace(json_schema=json_schema, json_object=lambda: "object", tool_calls=tool_calls)
    patch.setattr(smollm3_jax.generation, "grammar", made, raising=False)
