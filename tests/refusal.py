"""How the command must refuse a bad checkpoint."""

from pathlib import Path

from smollm3_jax.commands.main import main


def refusal(capsys, folder: Path) -> str:
    """`smollm3 inspect` exits with 3 and says why in a single line, which is returned."""
    capsys.readouterr()
    assert main(["inspect", str(folder)]) == 3
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("smollm3: ")
    assert err.count("\n") == 1 and "Traceback" not in err, err
    return err
