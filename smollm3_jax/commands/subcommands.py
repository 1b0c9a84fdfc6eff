"""The table of subcommands; each is a module of its name, which is imported when it is asked for."""

import importlib
from types import ModuleType

from .parsing import Parser, leaves

# Command -> what it does, and how it is called.
COMMANDS = {
    "pull": ("fetch a model; prints its folder as the last line", "MODEL"),
    "inspect": ("config, tensors, sizes and parameter count of a checkpoint", "MODEL"),
    "generate": ("continue a text, or answer a message", "MODEL -p TEXT"),
    "chat": ("talk with a model in the terminal; /help lists what it understands", "MODEL"),
    "serve": ("answer OpenAI's clients over HTTP, and a page to chat in", "MODEL"),
    "convert": ("rewrite a checkpoint as a Hugging Face folder, or as a .gguf file", "SRC DST"),
    "quantize": ("rewrite a checkpoint with quantized weights", "SRC DST --weights SCHEME"),
    "merge": ("make one model of several, or of a model and its adapter", "MODEL=WEIGHT MODEL=WEIGHT --out DIR"),
    "verify": (
        "compare a checkpoint's computation with a reference; exit code 0 or 4",
        "MODEL (--against REFERENCE | --goldens)",
    ),
    "perplexity": ("how well a model predicts text, computed as it would generate it", "MODEL --text FILE.jsonl"),
    "eval": ("answer lm-evaluation-harness's tasks, and grade the answers", "MODEL --tasks T[,T]"),
    "train": (
        "continue pretraining, or fine-tune, in a run folder that a restart goes on from",
        "--config FILE.toml|RECIPE [section.key=value ...]",
    ),
    "export": ("write a run's checkpoint as a Hugging Face folder", "RUN DIR"),
    "tokenize": ("write a corpus as shards of tokens, once", "SRC DST -m MODEL"),
    "chat-data": (
        "show conversations as a run trains on them: tokens, lengths, what is left out",
        "FILE -m MODEL",
    ),
    "plan": ("what hardware would give: real programs, compiled for it, without it", "{train,decode,memory,scale}"),
    "launch": (
        "print what starts a run or a server on rented machines: a manifest, or a script",
        "{gke-train,gke-serve,slurm,skypilot,tpu-vm} --topology CHIP:SHAPE",
    ),
    "doctor": ("versions, devices, and whether they are supported", ""),
    "completion": ("print the lines that let a shell complete this command", "{bash,zsh,fish}"),
}


def parser_of(name: str) -> tuple[ModuleType, Parser]:
    """A command's module and what it understands."""
    command = importlib.import_module(f".{name.replace('-', '_')}", __package__)
    help, words = COMMANDS[name]
    usage = " ".join(filter(None, [f"smollm3 {name}", words, "[OPTION ...]"]))
    parser = Parser(prog=f"smollm3 {name}", usage=usage, description=help)
    command.add(parser)
    for leaf in leaves(parser):
        group = leaf.add_argument_group("what is said on the way")
        group.add_argument("-q", "--quiet", action="store_true", help="neither progress nor remarks, but warnings")
        group.add_argument("-v", "--verbose", action="count", default=0, help="more; -vv still more")
    return command, parser
