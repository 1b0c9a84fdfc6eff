"""The `smollm3` command, a file a subcommand: `add(parser)` declares its arguments, `run(args)` returns its exit code.

Nothing here imports jax, flax or numpy before `run` is called, so that help and usage errors come at once.
"""
