"""How long generation took: prompts and answers apart, and compilation in neither."""

import contextlib
import dataclasses
import time
from collections import Counter
from collections.abc import Iterator

from ..compile_cache import Compilations, compilations, compiling_seconds


@dataclasses.dataclass
class Stats:
    """What calls of `api.stream` have done, added up; seconds are without compilation.

    prompt_tokens: that went through prefill. A prompt's last token does not: it is the first that decoding feeds.
    prompt_seconds: for them, until they were in the cache.
    tokens, seconds: generated ones, of all sequences side by side.
    compile_seconds: spent on making programs, or on loading them from the cache; compiled, loaded: how many.
    programs: which ran, with their sizes -> how often.
    """

    prompt_tokens: int = 0
    prompt_seconds: float = 0.0
    tokens: int = 0
    seconds: float = 0.0
    compile_seconds: float = 0.0
    compiled: int = 0
    loaded: int = 0
    programs: Counter[str] = dataclasses.field(default_factory=Counter)

    @contextlib.contextmanager
    def timed(self, field: str | None = None) -> Iterator[None]:
        """Adds what the block takes to `field`, if one is given, but for compilation, which is counted as such."""
        begin, compiling, count = time.perf_counter(), compiling_seconds(), compilations()
        try:
            yield
        finally:
            spent = compiling_seconds() - compiling
            self.compile_seconds += spent
            new = Compilations(*(now - before for now, before in zip(compilations(), count, strict=True)))
            self.compiled, self.loaded = self.compiled + new.compiled, self.loaded + new.loaded
            if field is not None:
                taken = max(0.0, time.perf_counter() - begin - spent)
                setattr(self, field, getattr(self, field) + taken)

    def line(self) -> str:
        """The speeds in a line."""
        parts = []
        if self.prompt_tokens:
            parts.append(f"prompt: {_speed(self.prompt_tokens, self.prompt_seconds)}")
        parts.append(f"generated: {_speed(self.tokens, self.seconds)}")
        if self.compiled + self.loaded:
            cached = f", and {self.loaded} loaded from the cache" if self.loaded else ""
            parts.append(
                f"besides, compilation: {self.compile_seconds:.2f} s ({counted(self.compiled, 'program')}{cached})"
            )
        return "; ".join(parts)

    def listed(self) -> str:
        """The programs that ran."""
        return "programs: " + "; ".join(f"{name} ({count} x)" for name, count in self.programs.items())


def _speed(tokens: int, seconds: float) -> str:
    rate = f", {tokens / seconds:,.1f} tokens/s" if seconds > 0 else ""
    return f"{counted(tokens, 'token')} in {seconds:.2f} s{rate}"


def counted(number: int, what: str) -> str:
    """ "1 slot", "2 slots"."""
    return f"{number:,} {what}" + "s" * (number != 1)
