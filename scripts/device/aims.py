"""What is to be reached on one H100."""

FLOOR, MFU = "floor", "mfu"
_DECODE, _TRAINING = "decode 1 x 512", "training 1 x 4,096"

# A row of the table, its case and engine -> how much at least of what: of the floor's time, of the chip's rate, or,
# of a row, how many times its tokens a second we have.
AIMS: dict[tuple[str, str], tuple[float, str | tuple[str, str]]] = {
    (_DECODE, "ours"): (0.7, FLOOR),
    (_DECODE, "gpt-fast's way"): (1.0, (_DECODE, "gpt-fast's way")),
    ("decode 64 x 960", "ours"): (0.6, FLOOR),
    ("decode 64 x 7,936", "ours"): (0.7, FLOOR),
    ("int8 decode 1 x 512", "ours"): (1.6, (_DECODE, "ours")),
    ("int4 decode 1 x 512", "ours"): (2.2, (_DECODE, "ours")),
    ("prefill 8,192", "ours"): (0.5, FLOOR),
    (_TRAINING, "ours"): (0.4, MFU),
    (_TRAINING, "transformers"): (1.0, (_TRAINING, "transformers")),
}
