import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rounding

from sharding.mesh import make_mesh
from sharding.rules import Sharding
from smollm3_jax.train import loss as loss_module
from smollm3_jax.train.loss import cross_entropy, next_tokens, token_logps

ROWS, LENGTH, WIDTH, WORDS = 3, 37, 16, 50


@pytest.fixture
def arrays():
    random = np.random.RandomState(0)
    x = jnp.asarray(random.normal(size=(ROWS, LENGTH, WIDTH)), jnp.float32)
    head = jnp.asarray(random.normal(size=(WORDS, WIDTH)), jnp.float32)
    labels = jnp.asarray(random.randint(0, WORDS, (ROWS, LENGTH)), jnp.int32)
    mask = jnp.asarray(random.rand(ROWS, LENGTH) < 0.8)
    return x, head, labels, mask


def flat(x, head, labels, mask):
    return x.reshape(-1, WIDTH), head, labels.reshape(-1), mask.reshape(-1)


@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
@pytest.mark.parametrize("tokens", [1, 7, 111, 1000])
@pytest.mark.parametrize("by_words", [False, True])
def test_sums_and_gradients_are_those_of_the_definition(arrays, z_loss, tokens, by_words, monkeypatch):
    monkeypatch.setattr(loss_module, "CPU_LOGIT_BYTES", 4 * WORDS * tokens)
    bounded = rounding.cross_entropy(*flat(*arrays), z_loss)

    def off(x, head, labels, mask):
        """By how much of what is allowed the sums and gradients are off."""

        def chunked(x, head):
            return cross_entropy(x, head, labels, mask, z_loss=z_loss, by_words=by_words)

        sums, gradients = jax.value_and_grad(chunked, argnums=(0, 1), has_aux=True)(x, head)
        return rounding.worst((*sums, gradients[0].reshape(-1, WIDTH), gradients[1]), bounded)

    x, head, labels, mask = arrays
    assert max(off(x, head, labels, mask)) <= 1
    without_gradients = cross_entropy(x, head, labels, mask, z_loss=z_loss, by_words=by_words)
    assert max(rounding.worst(without_gradients, bounded[:2])) <= 1
    # What is a little wrong is not: the label of one token of 111, a head of 14 bits.
    assert mask[0, 1] and min(off(x, head, labels.at[0, 1].add(1), mask)) > 1
    assert min(off(x, head * jnp.float32(1 + 2.0**-14), labels, mask)) > 1


def test_gradients_scale_with_what_comes_from_above(arrays):
    """Each is rounded once when it is multiplied by 3, on either side."""
    x, head, labels, mask = arrays
    one, three = (jax.grad(lambda x, k=k: k * cross_entropy(x, head, labels, mask)[0])(x) for k in (1, 3))
    np.testing.assert_allclose(3 * one, three, rtol=2 * rounding.FLOAT32)


@pytest.mark.parametrize("by_words", [False, True])
def test_logits_of_a_whole_batch_are_never_there(by_words):
    """Four rows of 512 tokens and 49,152 words: temporaries are at most a quarter of the logits' bytes."""
    rows, length, width, words = 4, 512, 64, 49152
    shapes = ((rows, length, width), jnp.float32), ((words, width), jnp.float32)
    arrays = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
    labels, mask = (jax.ShapeDtypeStruct((rows, length), dtype) for dtype in (jnp.int32, jnp.bool_))

    def loss(*arrays):
        return cross_entropy(*arrays, by_words=by_words)[0]

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))
    memory = gradient.lower(*arrays, labels, mask).compile().memory_analysis()
    assert memory.temp_size_in_bytes <= rows * length * words * 4 / 4


def test_a_label_is_the_next_token_of_the_same_document():
    tokens = jnp.array([[5, 6, 7, 8, 9, 0], [1, 2, 3, 4, 5, 6]])
    segments = jnp.array([[1, 1, 2, 2, 2, 0], [1, 2, 2, 2, 2, 2]])
    labels, mask = next_tokens(tokens, segments)
    assert [labels[0, i] for i in (0, 2, 3)] == [6, 8, 9]
    assert mask.tolist() == [[True, False, True, True, False, False], [False, True, True, True, True, False]]


@pytest.fixture
def cotangent():
    """One for each token, of either sign; to every fifth nothing comes back."""
    random = np.random.RandomState(1)
    return jnp.asarray(random.normal(size=(ROWS, LENGTH)) * (random.rand(ROWS, LENGTH) < 0.8), jnp.float32)


def logps_and_gradients(x, head, labels, cotangent, sharding=None):
    logps, back = jax.vjp(lambda x, head: token_logps(x, head, labels, sharding=sharding), x, head)
    return logps, *back(cotangent)


@pytest.mark.parametrize("tokens", [1, 7, 111, 1000])
def test_log_probabilities_of_tokens_and_their_gradients_are_those_of_the_definition(
    arrays, cotangent, tokens, monkeypatch
):
    monkeypatch.setattr(loss_module, "CPU_LOGIT_BYTES", 4 * WORDS * tokens)
    x, head, labels, _ = arrays
    bounded = rounding.token_logps(x.reshape(-1, WIDTH), head, labels.reshape(-1), cotangent.reshape(-1))

    def off(x, head, labels, cotangent):
        """By how much of what is allowed log-probabilities and gradients are off."""
        logps, dx, dhead = logps_and_gradients(x, head, labels, cotangent)
        assert logps.dtype == jnp.float32
        return rounding.worst((logps.reshape(-1), dx.reshape(-1, WIDTH), dhead), bounded)

    assert max(off(x, head, labels, cotangent)) <= 1
    # What is a little wrong is not: the label of one token, a head of 14 bits, one token's cotangent.
    assert min(off(x, head, labels.at[0, 1].add(1), cotangent)) > 1
    assert min(off(x, head * jnp.float32(1 + 2.0**-14), labels, cotangent)) > 1
    assert min(off(x, head, labels, cotangent.at[0, 1].mul(1.001))[1:]) > 1


@pytest.mark.parametrize(
    ("axes", "rules"),
    [
        ({"data": 8}, "dp"),
        ({"fsdp": 8}, "fsdp"),
        ({"fsdp": 2, "tensor": 4}, "fsdp_tp"),
        ({"fsdp": 2, "context": 2, "tensor": 2}, "fsdp_tp_cp"),
    ],
)
def test_words_and_tokens_on_several_devices_give_the_same_log_probabilities(axes, rules):
    random = np.random.RandomState(2)
    x, head, g = (jnp.asarray(random.normal(size=shape), jnp.float32) for shape in ((8, 12, 16), (48, 16), (8, 12)))
    labels = jnp.asarray(random.randint(0, 48, (8, 12)), jnp.int32)
    sharding = Sharding.of(make_mesh(axes), rules)
    bounded = rounding.token_logps(x.reshape(-1, 16), head, labels.reshape(-1), g.reshape(-1))
    logps, dx, dhead = jax.jit(logps_and_gradients, static_argnums=4)(x, head, labels, g, sharding)
    assert max(rounding.worst((logps.reshape(-1), dx.reshape(-1, 16), dhead), bounded)) <= 1


def test_log_probabilities_are_those_of_the_cross_entropy_bit_for_bit(arrays):
    x, head, labels, _ = arrays
    logps = token_logps(x, head, labels)
    for row, t in ((0, 0), (2, 36)):
        one = jnp.zeros(labels.shape, bool).at[row, t].set(True)
        assert cross_entropy(x, head, labels, one)[1] == -logps[row, t]


def test_a_token_to_which_nothing_comes_back_has_no_part(arrays, cotangent):
    """Though its logits are not finite."""
    x, head, labels, _ = arrays
    at = np.argwhere(np.asarray(cotangent) == 0)[0]
    logps, *gradients = logps_and_gradients(x.at[tuple(at)].set(3e38), head, labels, cotangent)
    assert not jnp.isfinite(logps[tuple(at)])
    _, *others = logps_and_gradients(x, head, labels, cotangent)
    for got, want in zip(gradients, others, strict=True):
        assert jnp.isfinite(got).all()
        np.testing.assert_array_equal(got, want)


def test_logits_of_log_probabilities_are_never_all_there():
    rows, length, width, words = 4, 512, 64, 49152
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((rows, length, width), (words, width))]
    labels, g = (jax.ShapeDtypeStruct((rows, length), dtype) for dtype in (jnp.int32, jnp.float32))
    memory = jax.jit(logps_and_gradients).lower(*arrays, labels, g).compile().memory_analysis()
    assert memory.temp_size_in_bytes <= rows * length * words * 4 / 4
