"""Decoding with int8 and int4 weights: what they gain on bfloat16, in the same run."""

from .decode import decode_cases
from .run import Run


def part(run: Run) -> None:
    decode_cases(run, [(1, 64, 128)] if run.tiny else [(1, 512, 1024)], "int8")
    decode_cases(run, [(1, 64, 128)] if run.tiny else [(1, 512, 1024)], "int4")
    decode_cases(run, [(4, 64, 128)] if run.tiny else [(64, 7936, 8192)], "int8", "int8", note="int8 cache")
