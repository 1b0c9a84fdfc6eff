"""Words of every kind, as a command may have them: quotes, spaces, breaks, what shells and YAML look for."""

from hypothesis import strategies as st

_CHARACTERS = st.characters(exclude_categories=["Cs"], exclude_characters="\0")
_SAID = [
    *("$(HOME)", "$$(HOME)", "${HOME}", "`id`", "\n#SBATCH --nodes=9\n", "\n---\n", "{{ job }}", "{% x %}", "{# x"),
    *("on", "1e3", "0x1f", "1_000", "12:30:45", "~", "null", "!!int 3", "&a", "*a", "'", '"', "\\", "\r\n", "\x85"),
    *("\u2028", " # x", ": ", "- ", "%x", "@", "EOF", "\ufeff", "\x1b[2J", "\U0001f600"),
]
WORDS = st.one_of(st.text(_CHARACTERS, max_size=20), st.lists(st.sampled_from(_SAID), max_size=4).map("".join))
# Settings of a run whose value may be any text.
SETTINGS = WORDS.map(lambda text: f"run.name=x{text}")
