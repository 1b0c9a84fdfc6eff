"""Any text comes out of YAML and shell as it went in."""

import json
import subprocess
import sys

import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from odd_words import WORDS

from smollm3_jax.launch.text import kubernetes, manifest, shell


@settings(max_examples=200, deadline=None)
@given(st.lists(st.dictionaries(st.sampled_from("abc"), st.one_of(WORDS, st.integers(), st.booleans())), max_size=3))
def test_yaml_gives_back_what_it_was_given(documents):
    assert list(yaml.safe_load_all(manifest(documents))) == [*documents]


@given(WORDS)
def test_no_reader_takes_a_text_for_something_else(word):
    """Words stand in quotes, but those that begin with a letter, are ASCII, and mean nothing in any version of YAML."""
    written = manifest([{"a": word}]).removeprefix("a: ").removesuffix("\n")
    if not written.startswith(('"', "|")):
        assert written.isascii() and written[0].isalpha() and written.lower() not in ("yes", "no", "on", "off", "null")
    if written.startswith('"'):
        assert written.isascii() and "\n" not in written


def test_texts_of_several_lines_can_be_read():
    assert manifest([{"run": "a\n  b\n"}]) == "run: |\n  a\n    b\n"


def test_shell_gives_back_what_it_was_given(tmp_path):
    """One bash for all examples: each line that it prints is a list of words."""
    words = []

    @settings(max_examples=200, deadline=None)
    @given(st.lists(WORDS, min_size=1, max_size=4))
    def collect(some):
        words.append(some)

    collect()
    show = "import json, os, sys; print(json.dumps([os.fsencode(x).decode() for x in sys.argv[1:]]))"
    # Those of a script are read by one Python, which takes a list of lists.
    marked = [[*some, "END"] for some in words]
    script = tmp_path / "script.sh"
    script.write_text("".join(f"all+=({shell(some)})\n" for some in marked) + 'exec "$PYTHON" -c "$SHOW" "${all[@]}"\n')
    env = {"PYTHON": sys.executable, "SHOW": show}
    done = subprocess.run(["bash", script], capture_output=True, env=env, check=True)
    assert json.loads(done.stdout) == [word for some in marked for word in some]


def expanded(text: str, values: dict[str, str]) -> str:
    """What Kubernetes makes of a word of a command: $$ is a $, $(NAME) a variable that it knows."""
    made, at = "", 0
    while at < len(text):
        if text[at] == "$" and text[at + 1 : at + 2] == "$":
            made, at = made + "$", at + 2
        elif text[at] == "$" and text[at + 1 : at + 2] == "(" and (end := text.find(")", at)) > 0:
            name = text[at + 2 : end]
            made, at = made + values.get(name, f"$({name})"), end + 1
        else:
            made, at = made + text[at], at + 1
    return made


@given(st.lists(WORDS, max_size=3))
def test_kubernetes_finds_no_variable_in_a_command(words):
    assert [expanded(word, {"HOME": "/root", "": "x"}) for word in kubernetes(words)] == words
    assert expanded("$(HOME)", {"HOME": "/root"}) == "/root"  # what would happen otherwise
