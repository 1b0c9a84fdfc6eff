"""Installs a wheel into an empty environment and does with it, in an empty folder, what its first user does.

    python scripts/smoke_wheel.py dist/smollm3_jax-0.1.0-py3-none-any.whl

chat by pipe, serve and an answer over HTTP, train --config quick and export, all with the demo model, which the package
fetches itself. Needs nothing but Python, and nothing of this repository is on the path of what it starts.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import urllib.request
import venv
from pathlib import Path
from typing import Any

QUESTION = "What is the capital of France?"
# They would let an installed package find this repository, or this environment's packages.
NOT_PASSED_ON = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--steps", type=int, default=26, metavar="N", help="of train --config quick (26)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="smoke-") as scratch:
        command = install(args.wheel.resolve(), Path(scratch))
        away = Path(scratch, "away")
        away.mkdir()
        about = said([command, "-V"], away)
        print(about.strip())
        answered = said([command, "chat", "demo", "--temperature", "0"], away, text=f"{QUESTION}\n")
        assert "Paris" in answered, answered
        assert "Paris" in served(command, away)
        steps = [f"run.steps={args.steps}", "optimizer.warmup_steps=1"]
        said([command, "train", "--config", "quick", "run.dir=run", *steps], away)
        losses = [json.loads(line)["loss"] for line in (away / "run" / "metrics.jsonl").read_text().splitlines()]
        assert len(losses) == args.steps and losses[-1] < losses[0], losses
        said([command, "export", "run", "model"], away)
        assert (away / "model" / "config.json").is_file()
        said([command, "generate", "model", "-p", "When I do count", "--max-tokens", "4"], away)
    print(f"{args.wheel.name}: installed, talked, served, trained and exported")
    return 0


def install(wheel: Path, scratch: Path) -> Path:
    """The command of a fresh environment with the wheel and what `serve` needs; nothing else is in it."""
    venv.create(scratch / "environment", with_pip=True)
    bin = scratch / "environment" / "bin"
    said([bin / "pip", "install", "--quiet", "--disable-pip-version-check", f"{wheel}[serve]"], scratch)
    where = said([bin / "python", "-c", "import sharding, smollm3_jax; print(smollm3_jax.__file__)"], scratch)
    assert Path(where.strip()).is_relative_to(scratch), where
    return bin / "smollm3"


def served(command: Path, folder: Path) -> str:
    """What the server answers to the question; it has to end well when it is told to."""
    words = [command, "serve", "demo", "--port", "0", "--context", "512"]
    with subprocess.Popen(words, cwd=folder, env=variables(), stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            ready = re.match(r"ready (http://\S+)", process.stdout.readline())
            assert ready, "the server did not start"
            body = {"messages": [{"role": "user", "content": QUESTION}], "temperature": 0, "max_tokens": 16}
            header = {"Content-Type": "application/json"}
            request = urllib.request.Request(f"{ready[1]}/v1/chat/completions", json.dumps(body).encode(), header)
            with urllib.request.urlopen(request, timeout=300) as answer:
                said = json.load(answer)["choices"][0]["message"]["content"]
            with urllib.request.urlopen(f"{ready[1]}/", timeout=60) as page:
                assert b"<html" in page.read()
            process.terminate()
            assert process.wait(timeout=60) == 0
        finally:
            process.kill()
    return said


def said(words: list[Any], folder: Path, text: str = "") -> str:
    """What a command that must succeed prints."""
    print("$", *(Path(word).name if isinstance(word, Path) else word for word in words), flush=True)
    options = {"cwd": folder, "env": variables(), "input": text, "text": True, "stdout": subprocess.PIPE}
    done = subprocess.run([str(word) for word in words], **options)
    if done.returncode:
        sys.exit(f"{done.stdout}\nexit code {done.returncode}")
    return done.stdout


def variables() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in NOT_PASSED_ON}


if __name__ == "__main__":
    sys.exit(main())
