"""The persistent compilation cache, on by default, and a count of compilations."""


def enable() -> None:
    """Placeholder until written."""
