"""Decoding over stacked layers: what one array a layer, which inference has by default, is worth."""

from .decode import decode_cases
from .run import Run


def part(run: Run) -> None:
    decode_cases(run, [(1, 64, 128)] if run.tiny else [(1, 512, 1024)], stacked=True, note="stacked layers")
