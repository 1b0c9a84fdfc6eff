import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rounding

from smollm3_jax.train import loss as loss_module
from smollm3_jax.train.loss import cross_entropy, next_tokens

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
