"""How deep values from JSON may be nested."""

from collections.abc import Mapping

from .errors import OptionError

MAX_DEPTH = 100  # of lists and objects in each other


def check_depth(value: object, where: str) -> None:
    """Refuses what would exhaust the stack of those that walk through it.

    Raises:
      OptionError: it is nested deeper than MAX_DEPTH.
    """
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [x for x in level if isinstance(x, Mapping | list | tuple)]
        if not level:
            return
        level = [inner for x in level for inner in (x.values() if isinstance(x, Mapping) else x)]
    raise OptionError(f"{where} is nested deeper than {MAX_DEPTH} levels")
