"""`python -m smollm3_jax` is the `smollm3` command."""

import sys

from .commands.main import main

if __name__ == "__main__":
    sys.exit(main())
