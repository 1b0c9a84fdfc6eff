"""`smollm3 completion`."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from .subcommands import COMMANDS, parser_of

# Each asks `smollm3 __complete WORD ...`, the last word being the one at the cursor; where nothing is answered, the
# shell offers files.
SCRIPTS = {
    "bash": """\
_smollm3() {
    local IFS=$'\\n'
    COMPREPLY=($(smollm3 __complete "${COMP_WORDS[@]:1:COMP_CWORD}" 2>/dev/null))
}
complete -o default -F _smollm3 smollm3
# in ~/.bashrc: eval "$(smollm3 completion bash)"
""",
    "zsh": """\
_smollm3() {
    local -a found
    found=("${(@f)$(smollm3 __complete "${(@)words[2,CURRENT]}" 2>/dev/null)}")
    if [[ -n "$found" ]]; then compadd -- $found; else _files; fi
}
compdef _smollm3 smollm3
# in ~/.zshrc, after compinit: eval "$(smollm3 completion zsh)"
""",
    "fish": """\
complete -c smollm3 -a '(smollm3 __complete (commandline -opc)[2..] (commandline -ct) 2>/dev/null)'
# in ~/.config/fish/config.fish: smollm3 completion fish | source
""",
}


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=SCRIPTS, metavar="{bash,zsh,fish}")


def run(args: argparse.Namespace) -> int:
    print(SCRIPTS[args.shell], end="")
    return 0


def candidates(words: Sequence[str]) -> list[str]:
    """What the last word may become."""
    *before, last = words or [""]
    if not before:
        return [name for name in (*COMMANDS, "--help", "--version") if name.startswith(last)]
    if before[0] not in COMMANDS:
        return []
    parser: argparse.ArgumentParser = parser_of(before[0])[1]
    names: list[str] = []
    for word in [*before[1:], ""]:
        groups = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
        names = list(groups[0].choices) if groups else []
        if word in names:
            parser = groups[0].choices[word]
    option = parser._option_string_actions.get(before[-1])
    if option is not None and option.nargs != 0:
        names = list(option.choices or ())
        if option.dest == "config":
            recipes = Path(__file__).parents[1] / "train" / "recipes"
            names = sorted(file.stem for file in recipes.glob("*.toml"))
        if option.dest == "model":
            names = ["demo"]
    elif last.startswith("-"):
        names = [name for name in parser._option_string_actions if name.startswith("--")]
    elif not names:
        shells = [action.choices for action in parser._actions if action.dest == "shell"]
        names = list(shells[0] or ()) if shells else []
        if any(action.dest == "model_word" for action in parser._actions) and len(before) == 1:
            names = ["demo"]
    return [name for name in names if name.startswith(last)]
