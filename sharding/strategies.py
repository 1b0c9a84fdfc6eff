"""The named strategies as tables, and the axes of their meshes: what can be told without jax."""

from collections.abc import Mapping

# From the slowest network to the fastest: `data` may span slices, `tensor` wants neighbours.
AXES = ("data", "fsdp", "context", "tensor")

# Stand for axes of the mesh, whatever their names: for all, and for all but `data`, which is the one that
# may span slices: across their slow network gradients travel, once a step, and parameters never.
ALL_AXES = "*"
ALL_BUT_DATA = "* but data"

Rules = Mapping[str, str | tuple[str, ...] | None]

_TENSOR = {axis: "tensor" for axis in ("heads", "kv_heads", "cache_heads", "mlp", "vocab")}

# Strategy -> logical axis -> mesh axis. A logical axis that is not listed is replicated.
STRATEGIES: dict[str, Rules] = {
    "single": {},
    # Every device has the whole model, and its own rows of the batch.
    "dp": {"batch": ALL_AXES},
    # ZeRO-3: parameters are split along the model width, which every one of them has.
    "fsdp": {"embed": ALL_BUT_DATA, "batch": ALL_AXES},
    # Every head, feed-forward column and vocabulary row lives on one device of a group; groups share the rows.
    "tp": {**_TENSOR, "batch": "data"},
    "fsdp_tp": {**_TENSOR, "embed": "fsdp", "batch": ("data", "fsdp")},
    # Long rows are split as well: each device has a part of every row, and of every parameter.
    "fsdp_tp_cp": {**_TENSOR, "embed": ("fsdp", "context"), "batch": ("data", "fsdp"), "length": "context"},
    # Serving: as `tp`.
    "serve_tp": {**_TENSOR, "batch": "data"},
    # Serving one long sequence: weights as above, the cache split along the context over every device.
    "serve_tp_long": {**{k: v for k, v in _TENSOR.items() if k != "cache_heads"}, "context": ALL_AXES},
    # Serving long prompts: pieces of them are split along their length too, and so is the cache, which by its few heads
    # alone a few devices could share.
    "serve_cp": {**_TENSOR, "length": "context", "context": "context"},
}


class ShardingError(ValueError):
    """A rule that does not fit the mesh or the array."""
