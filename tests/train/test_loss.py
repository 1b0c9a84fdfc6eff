import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smollm3_jax.train import loss as loss_module
from smollm3_jax.train.loss import cross_entropy, next_tokens

ROWS, LENGTH, WIDTH, WORDS = 3, 37, 16, 50
# Two float32 sums of as many terms, of one sign and each within a rounding, in any order: a logit's products, a row's
# exponentials, all tokens. Terms of several signs are within the same share of the largest.
ROUNDING = 2 * (WIDTH + WORDS + ROWS * LENGTH) * 2.0**-24


@pytest.fixture
def arrays():
    random = np.random.RandomState(0)
    x = jnp.asarray(random.normal(size=(ROWS, LENGTH, WIDTH)), jnp.float32)
    head = jnp.asarray(random.normal(size=(WORDS, WIDTH)), jnp.float32)
    labels = jnp.asarray(random.randint(0, WORDS, (ROWS, LENGTH)), jnp.int32)
    mask = jnp.asarray(random.rand(ROWS, LENGTH) < 0.8)
    return x, head, labels, mask


def plain(x, head, labels, mask, z_loss):
    """The definition, with all logits at once."""
    logits = jnp.einsum("BTD,VD->BTV", x, head, precision="highest")
    normalizer = jax.nn.logsumexp(logits, axis=-1)
    nll = normalizer - jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    return jnp.where(mask, nll + z_loss * normalizer**2, 0).sum(), jnp.where(mask, nll, 0).sum()


@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
@pytest.mark.parametrize("tokens", [1, 7, 111, 1000])
@pytest.mark.parametrize("by_words", [False, True])
def test_sums_and_gradients_are_those_of_the_definition(arrays, z_loss, tokens, by_words, monkeypatch):
    monkeypatch.setattr(loss_module, "CPU_LOGIT_BYTES", 4 * WORDS * tokens)
    x, head, labels, mask = arrays

    def chunked(x, head):
        return cross_entropy(x, head, labels, mask, z_loss=z_loss, by_words=by_words)

    (total, nll), gradients = jax.value_and_grad(chunked, argnums=(0, 1), has_aux=True)(x, head)
    (expected, expected_nll), wanted = jax.value_and_grad(
        lambda x, head: plain(x, head, labels, mask, z_loss), argnums=(0, 1), has_aux=True
    )(x, head)
    np.testing.assert_allclose([total, nll], [expected, expected_nll], rtol=ROUNDING)
    np.testing.assert_allclose(chunked(x, head), (total, nll), rtol=ROUNDING)
    for got, want in zip(gradients, wanted, strict=True):
        np.testing.assert_allclose(got, want, atol=ROUNDING * float(jnp.abs(want).max()), rtol=0)


def test_gradients_scale_with_what_comes_from_above(arrays):
    x, head, labels, mask = arrays
    one, three = (jax.grad(lambda x, k=k: k * cross_entropy(x, head, labels, mask)[0])(x) for k in (1, 3))
    np.testing.assert_allclose(3 * one, three, atol=ROUNDING * float(jnp.abs(three).max()), rtol=0)


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
