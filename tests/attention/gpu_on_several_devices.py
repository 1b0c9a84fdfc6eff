"""Attention of rows whose tokens lie on several devices, with the calls of cuDNN computed by their definition, beside
plain attention of whole rows: the largest differences of output and gradients, as JSON. Run as a program.
"""

import json

import jax
import jax.numpy as jnp
import no_gpu
import numpy as np

from sharding.mesh import make_mesh
from sharding.rules import Sharding
from smollm3_jax import nvidia
from smollm3_jax.attention import attention, cudnn, dispatch, gpu

LENGTH, HEADS, KV_HEADS, WIDTH = 64, 4, 2, 8
MESHES = {
    "two devices a row": {"context": 2, "fsdp": 2, "tensor": 2},
    "four devices a row": {"context": 4, "tensor": 2},
    "every device has all key-value heads": {"context": 2, "tensor": 4},
}


def forward_and_back(q, k, v, g, segments, sharding):
    masks = {} if segments is None else {"q_segments_BT": segments, "kv_segments_BS": segments}
    out, back = jax.vjp(lambda q, k, v: attention(q, k, v, **masks, sharding=sharding), q, k, v)
    return out, *back(g)


def main() -> None:
    jax.config.update("jax_num_cpu_devices", 8)
    random = np.random.RandomState(0)
    q, k, v, g = (
        jnp.asarray(random.standard_normal((2, LENGTH, heads, WIDTH)), jnp.float16)
        for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)
    )
    # Of the first row one document lies on many pieces, some inside of one, and the end is padding; the second's end
    # where pieces do.
    segments = np.ones((2, LENGTH), np.int32)
    segments[0, 5:], segments[0, 42:], segments[0, 44:], segments[0, 60:] = 2, 3, 6, 0
    segments[1, 8:], segments[1, 32:], segments[1, 33:] = 2, 3, 4
    segments = jnp.asarray(segments)
    g = jnp.where((segments != 0)[:, :, None, None], g, 0)
    compute = jax.jit(forward_and_back, static_argnums=5)
    plain = {name: compute(q, k, v, g, x, None) for name, x in (("documents", segments), ("none", None))}

    dispatch.platform_of = lambda sharding: "gpu"
    nvidia.compute_capability = lambda sharding: (9, 0)
    nvidia.kernels_fit = lambda: True
    calls = []
    cudnn.forward = lambda *arguments: calls.append(arguments) or no_gpu.forward(*arguments)
    cudnn.backward = no_gpu.backward
    gpu.DOCUMENTS = 3
    report = {}

    def differences(axes, documents, expected):
        axes = {name: axes.get(name, 1) for name in ("fsdp", "context", "tensor")}
        devices = jax.devices()[: np.prod(list(axes.values()))]
        sharding = Sharding.of(make_mesh(axes, devices), "fsdp_tp_cp")
        sharding = sharding.fitted({"kv_heads": KV_HEADS})
        order = sharding.row_order(LENGTH)
        in_order = [x[:, order] for x in (q, k, v, g)]
        before = len(calls)
        found = compute(*in_order, None if documents is None else documents[:, order], sharding)
        assert len(calls) > before
        real = (segments != 0)[:, order, None, None]
        pairs = zip(found, (x[:, order] for x in expected), strict=True)
        return [float(jnp.abs(jnp.where(real, x - y, 0).astype(jnp.float32)).max()) for x, y in pairs]

    for name, axes in MESHES.items():
        report[name] = differences(axes, segments, plain["documents"])
    report["one document a row"] = differences(MESHES["four devices a row"], None, plain["none"])
    print(json.dumps(report))


if __name__ == "__main__":
    main()
