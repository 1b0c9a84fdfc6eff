import logging
import math

import jax
import jax.numpy as jnp
import no_gpu
import numpy as np
import pytest
import rounding

from sharding.mesh import make_mesh
from sharding.rules import Sharding
from smollm3_jax import nvidia
from smollm3_jax.attention import attention, cudnn, dispatch, gpu

BATCH, LENGTH, HEADS, KV_HEADS, WIDTH = 2, 24, 4, 2, 8

# Rows of documents; the first has more than most bounds below, with one of a single token.
DOCUMENTS = {
    "several": [[1] * 5 + [2] + [3] * 10 + [7] * 8, [1] * 9 + [2] * 6 + [0] * 9],
    "one": [[1] * LENGTH] * 2,
    "padding between": [[0] * 3 + [1] * 4 + [0] * 2 + [4] * 15, [0] * LENGTH],
    "many": [list(range(1, LENGTH + 1)), [1 + i // 2 for i in range(LENGTH)]],
}


@pytest.fixture
def as_on_gpu(monkeypatch):
    """Kernels are chosen as on an H100, and computed by their definition."""
    monkeypatch.setattr(dispatch, "platform_of", lambda sharding: "gpu")
    monkeypatch.setattr(nvidia, "compute_capability", lambda sharding: (9, 0))
    monkeypatch.setattr(nvidia, "kernels_fit", lambda: True)
    monkeypatch.setattr(cudnn, "forward", no_gpu.forward)
    monkeypatch.setattr(cudnn, "backward", no_gpu.backward)
    return monkeypatch


def arrays(dtype, *shapes):
    return [jnp.asarray(np.random.RandomState(i).standard_normal(shape), dtype) for i, shape in enumerate(shapes)]


def qkvg(dtype=jnp.float16):
    """q, k, v and a cotangent."""
    q, k = (BATCH, LENGTH, HEADS, WIDTH), (BATCH, LENGTH, KV_HEADS, WIDTH)
    return arrays(dtype, q, k, k, q)


def anew(function, *arguments, **options):
    """As one program, of which JAX does not remember what another test traced under the same name."""
    return jax.jit(lambda *arguments: function(*arguments, **options))(*arguments)


def out_and_gradients(q, k, v, g, segments=None):
    def compute(q, k, v, g, segments):
        masks = {} if segments is None else {"segments_BT": segments}
        out, back = jax.vjp(lambda q, k, v: attention(q, k, v, **masks), q, k, v)
        return out, *back(g)

    return anew(compute, q, k, v, g, segments)


@pytest.mark.parametrize("bound", [2, 3, 64])
@pytest.mark.parametrize("name", DOCUMENTS)
def test_documents_equal_the_definition(name, bound, as_on_gpu):
    """Forward and back, also where a batch has more documents than a call of the kernel takes."""
    q, k, v, g = qkvg()
    segments = jnp.asarray(DOCUMENTS[name], jnp.int32)
    real = (segments != 0)[:, :, None, None]
    # No gradient comes from padding: it has no label.
    g = jnp.where(real, g, 0)
    as_on_gpu.setattr(gpu, "DOCUMENTS", bound)
    calls = []
    as_on_gpu.setattr(cudnn, "forward", lambda *a: calls.append(a) or no_gpu.forward(*a))
    out, *gradients = out_and_gradients(q, k, v, g, segments)
    assert calls and np.isfinite(np.asarray(out, np.float32)).all()
    got = jnp.where(real, out, 0), *gradients
    assert {x.dtype for x in got} == {q.dtype}
    assert max(rounding.worst(got, rounding.attention(q, k, v, g, rounding.seen_by(segments), "float16"))) <= 1
    # Without documents each of them is something else.
    together = rounding.attention(q, k, v, g, rounding.seen_by(np.ones_like(segments)), "float16")
    assert (min(rounding.worst(got, together)) > 1) == (name != "one")


def test_without_documents(as_on_gpu):
    q, k, v, g = qkvg()
    got = out_and_gradients(q, k, v, g)
    everything = rounding.seen_by(np.ones((BATCH, LENGTH)))
    assert max(rounding.worst(got, rounding.attention(q, k, v, g, everything, "float16"))) <= 1


def test_a_document_in_two_parts_is_refused(as_on_gpu):
    """Its row is not a number, so that a step finds it bad; the other row stays as it is."""
    q, k, v, g = qkvg()
    good = jnp.asarray(DOCUMENTS["several"], jnp.int32)
    expected = out_and_gradients(q, k, v, g, good)
    for row in ([1] * 8 + [2] * 8 + [1] * 8, [1] * 8 + [0] * 8 + [1] * 8, [2] * 8 + [1] * 16):
        got = out_and_gradients(q, k, v, g, good.at[0].set(jnp.asarray(row)))
        assert np.isnan(np.asarray(got[0][0], np.float32)).all()
        assert np.isnan(np.asarray(got[1][0], np.float32)).all()
        for x, y in zip(got, expected, strict=True):  # by the same program
            np.testing.assert_array_equal(x[1:], y[1:])


# Mesh axes, whether rows have several documents, and on how many devices each row's tokens lie.
MESHES = {
    "two devices a row": ({"context": 2, "fsdp": 2, "tensor": 2}, True),
    "four devices a row": ({"context": 4, "tensor": 2}, True),
    "every device has all key-value heads": ({"context": 2, "tensor": 4}, True),
    "one document a row": ({"context": 4, "tensor": 2}, False),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MESHES)
def test_rows_on_several_devices_equal_whole_rows(name, as_on_gpu):
    """The calls of cuDNN beside the definition on whole rows: output and gradients."""
    length = 64
    q, k, v, g = arrays(jnp.float16, *((2, length, heads, WIDTH) for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)))
    # Of the first row one document lies on many pieces, some inside of one, and the end is padding; the second's end
    # where pieces do.
    segments = np.ones((2, length), np.int32)
    segments[0, 5:], segments[0, 42:], segments[0, 44:], segments[0, 60:] = 2, 3, 6, 0
    segments[1, 8:], segments[1, 32:], segments[1, 33:] = 2, 3, 4
    axes, several = MESHES[name]
    if not several:
        segments[:] = 1
    g = jnp.where((segments != 0)[:, :, None, None], g, 0)
    documents = jnp.asarray(segments) if several else None

    def forward_and_back(q, k, v, g, segments, sharding=None):
        masks = {} if segments is None else {"segments_BT": segments}
        out, back = jax.vjp(lambda q, k, v: attention(q, k, v, **masks, sharding=sharding), q, k, v)
        return out, *back(g)

    calls = []
    as_on_gpu.setattr(cudnn, "forward", lambda *arguments: calls.append(arguments) or no_gpu.forward(*arguments))
    as_on_gpu.setattr(gpu, "DOCUMENTS", 3)
    axes = {axis: axes.get(axis, 1) for axis in ("fsdp", "context", "tensor")}
    mesh = make_mesh(axes, jax.devices()[: math.prod(axes.values())])
    sharding = Sharding.of(mesh, "fsdp_tp_cp").fitted({"kv_heads": KV_HEADS})
    order = sharding.row_order(length)
    in_order = [x[:, order] for x in (q, k, v, g)]
    found = anew(
        forward_and_back, *in_order, documents if documents is None else documents[:, order], sharding=sharding
    )
    assert calls
    out, *gradients = found
    got = np.where((segments != 0)[:, order, None, None], out, 0), *gradients
    # A query has its piece and its past; what comes back to a key is added up over all pieces.
    bounded = rounding.attention(q, k, v, g, rounding.seen_by(segments), "float16", parts=2 * axes["context"])
    reordered = tuple((exact[:, order], allowed[:, order]) for exact, allowed in bounded)
    assert max(rounding.worst(got, reordered)) <= 1
    assert min(rounding.worst(got, bounded)) > 1  # in another order it is something else


def lowered(function, *arguments):
    return (
        jax.jit(lambda *arguments: function(*arguments)).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    )


def shape(*dims, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(dims, dtype)


@pytest.fixture
def h100(monkeypatch):
    """Programs are lowered for an H100; nothing runs."""
    from jax._src.cudnn import fused_attention_stablehlo as private

    monkeypatch.setattr(dispatch, "platform_of", lambda sharding: "gpu")
    monkeypatch.setattr(nvidia, "compute_capability", lambda sharding: (9, 0))
    # What JAX's public function asks of the GPU that there is not.
    monkeypatch.setattr(private, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(private, "check_compute_capability", lambda capability: True)
    return monkeypatch


def test_rows_without_documents_are_lowered_to_cudnn(h100):
    q, k = shape(2, 64, 8, 128), shape(2, 64, 2, 128)
    assert "__cudnn$fmhaSoftmax" in lowered(attention, q, k, k)
    for other in (shape(2, 64, 8, 128, dtype=jnp.float32), shape(2, 64, 8, 160)):
        assert "cudnn" not in lowered(attention, other, other, other)
    h100.setattr(nvidia, "compute_capability", lambda sharding: (7, 5))
    assert "cudnn" not in lowered(attention, q, k, k)


@pytest.mark.skipif(not nvidia.kernels_fit(), reason="before jax 0.11.2 documents are computed wrong")
def test_documents_are_lowered_to_cudnn(h100):
    q, k, segments = shape(2, 256, 8, 128), shape(2, 256, 2, 128), shape(2, 256, dtype=jnp.int32)

    def loss(q, k, segments):
        return attention(q, k, k, segments_BT=segments).astype(jnp.float32).sum()

    text = lowered(jax.grad(loss, (0, 1)), q, k, segments)
    assert text.count("@__cudnn$fmhaSoftmaxBackward") == text.count("@__cudnn$fmhaSoftmax(") == 2
    assert text.count("PADDING_CAUSAL") == 4 and "max_seg_per_batch" in text and "256x256x" not in text


def with_documents(q, k, segments):
    return attention(q, k, k, segments_BT=segments)


@pytest.mark.parametrize(
    ("capability", "known", "word"),
    [
        ((8, 6), True, "documents on a device older than compute capability 9.0"),
        ((0, 0), True, "a device older than compute capability 8.0"),
        ((9, 0), False, f"documents in jax {jax.__version__}"),
    ],
)
def test_where_there_is_no_kernel_for_documents_that_is_said_once(capability, known, word, h100, caplog):
    dispatch.say_once.cache_clear()
    h100.setattr(nvidia, "compute_capability", lambda sharding: capability)
    h100.setattr(nvidia, "kernels_fit", lambda: known)
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            arguments = shape(2, 64, 8, 128), shape(2, 64, 2, 128), shape(2, 64, dtype=jnp.int32)
            assert "cudnn" not in lowered(with_documents, *arguments)
    assert [record.getMessage() for record in caplog.records if record.name == dispatch.__name__] == [
        f"cuDNN attention does not take {word}: plain XLA computes attention, which is slower"
    ]


def test_versions():
    """Read in these, and not before: 0.10.2 computes documents wrong."""
    assert nvidia.kernels_fit() == ((0, 11, 2) <= jax.__version_info__ < (0, 13))
