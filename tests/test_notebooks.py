"""The notebooks run from the first cell to the last, here on a CPU, with the demo model and few steps."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

nbformat: Any = pytest.importorskip("nbformat", reason="nbformat is not installed (the extra test has it)")

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SMALL = {"MODEL": "demo", "STEPS": "3"}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_is_sound_and_has_no_output(path):
    nbformat.validate(nbformat.read(path, as_version=4))
    content = json.loads(path.read_text())
    code = [cell for cell in content["cells"] if cell["cell_type"] == "code"]
    assert code and not [cell for cell in code if cell["outputs"] or cell["execution_count"] is not None]
    assert "smollm3-jax[tpu]" in "".join(code[0]["source"]) and content["metadata"]["accelerator"] == "TPU"


def ran(path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, devices: int = 1) -> str:
    """All that its cells print; raises nbclient's CellExecutionError where one fails."""
    from nbclient import NotebookClient

    for name, value in SMALL.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("XLA_FLAGS", f"--xla_force_host_platform_device_count={devices}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    notebook = nbformat.read(path, as_version=4)
    options = {"timeout": None, "kernel_name": "python3", "resources": {"metadata": {"path": str(folder)}}}
    NotebookClient(notebook, **options).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    return "".join(output.get("text", "") for output in outputs)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_inference(tmp_path, monkeypatch):
    # As many devices as divide the demo's nine heads.
    said = ran(ROOT / "notebooks" / "inference.ipynb", tmp_path, monkeypatch, devices=3)
    assert "3 x cpu\na matrix (1536, 576) lies there as P" in said
    assert "The capital of France is Paris." in said and said.count("\n\n") >= 3


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_fine_tuning(tmp_path, monkeypatch):
    said = ran(ROOT / "notebooks" / "fine-tuning.ipynb", tmp_path, monkeypatch)
    assert "The capital of Italy is Rome." in said and "harbour.gguf" in said
    assert "base_model:\n- HuggingFaceTB/SmolLM2-135M-Instruct\n" in said
