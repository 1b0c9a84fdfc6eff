"""How `make docs` builds these pages: Sphinx, Markdown through MyST, warnings as errors."""

import importlib.metadata

project = "smollm3-jax"
release = importlib.metadata.version("smollm3-jax")
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"{project} {release}"
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints = "none"


def setup(app) -> None:
    app.connect("autodoc-process-docstring", _fields)
    app.connect("source-read", _settings)


def _settings(app, name, source) -> None:
    """training.md's table of every setting, where it asks for it."""
    import json

    from smollm3_jax.train.settings import listed

    def cell(text: str) -> str:
        return text.replace("|", "\\|")

    rows = ["| setting | default | means |", "|---|---|---|"]
    for setting in listed():
        default = "" if setting["type"] == "table" else f"`{json.dumps(setting['default'])}`"
        rows.append(f"| `{setting['name']}` | {default} | {cell(setting['meaning'])} |")
    source[0] = source[0].replace("<!-- settings -->", "\n".join(rows))


def _fields(app, what, name, obj, options, lines) -> None:
    """A dataclass says "field: what it is" in its docstring, a line each: what Sphinx calls parameters."""
    import dataclasses
    import re

    if not (what == "class" and dataclasses.is_dataclass(obj)):
        return
    known = {field.name for field in dataclasses.fields(obj)}
    begun = False
    for i, line in enumerate(list(lines)):
        match = re.match(r"(\w+): ", line)
        if match and match[1] in known:
            lines[i] = f":param {match[1]}: {line[match.end() :]}"
            if not begun and i and lines[i - 1]:
                lines[i] = "\n" + lines[i]
            begun = True
        elif begun and line and not line.startswith(" "):
            begun = False
    lines[:] = "\n".join(lines).split("\n")
