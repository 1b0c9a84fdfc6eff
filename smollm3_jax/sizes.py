"""Powers of two: shapes are rounded to them, so that few programs are compiled."""


def power_of_two_from(size: int) -> int:
    """The smallest power of two that is at least `size`, which is above 0."""
    return 1 << (size - 1).bit_length()


def power_of_two_up_to(size: int) -> int:
    """The largest power of two that is at most `size`, which is above 0."""
    return 1 << size.bit_length() - 1
