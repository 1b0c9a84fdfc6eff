"""Docstrings of tests name rows of the project's list of faults, S1 to S24 (here, in tests/generation, tests/chat and
tests/commands), and what users of other servers complain of:

C1   the engine's thread dies or hangs, and requests hang with it    C8   reasoning under one of its two names alone
C2   /health waits for templates and tokenizers                      C9   stop texts leak, or take what is before them
C3   a queue without a bound                                         C10  characters are cut in two; wrong usage
C4   answers go on whose clients have left                           C11  the first request compiles
C5   arguments of streamed calls get lost                            C12  too long, but not context_length_exceeded
C6   a tool_choice that forces is ignored, or fails with thinking    C13  prefixes shared between users tell of prompts
C7   thinking is off, and the answer is called reasoning             C14  SmolLM3's prompts: dates, reasoning, <code>
"""

from pathlib import Path

import pytest
from said import server_of

from smollm3_jax.serve.job import Server


@pytest.fixture(scope="session")
def server(full_release: Path) -> Server:
    """The released model, but for its weights."""
    return server_of(full_release)
