"""What `make run` does: real weights, verified against transformers, and text on the screen."""

import sys

from smollm3_jax.commands.main import main
from smollm3_jax.weights.demo import pull_demo

QUESTION = "What is the capital of France?"


def run(*arguments: str) -> None:
    print(f"\n$ smollm3 {' '.join(repr(a) if ' ' in a else a for a in arguments)}", flush=True)
    if code := main(arguments):
        sys.exit(code)


if __name__ == "__main__":
    print(
        "The demo is SmolLM2-135M-Instruct, not SmolLM3: a small Llama that runs through exactly the code that\n"
        "SmolLM3-3B does, with RoPE on every layer. It is fetched once and kept in the cache."
    )
    folder = str(pull_demo())
    run("inspect", folder)
    run("verify", folder, "--against", "transformers")
    run("generate", "--model", folder, "--chat", "--prompt", QUESTION, "--temperature", "0")
    run("generate", "--model", folder, "--prompt", "The sky is blue because", "--max-new-tokens", "40")
