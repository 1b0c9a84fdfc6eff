"""Whether a training step's gradients are right: float32's against the CPU's, bfloat16's against float32's."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from smollm3_jax.model import SmolLM3
from smollm3_jax.train.objectives.pretrain import Pretrain
from smollm3_jax.train.options import StepOptions
from smollm3_jax.train.state import Batch
from smollm3_jax.weights.key_map import parameters

from . import shape
from .run import Run, relative

LAYERS = 4
LENGTH, TINY_LENGTH, CPU_LENGTH = 2048, 64, 128
# Documents of a row, but for those that come out empty: of the many 184 are left, and 93 in a tiny row. A call
# of cuDNN's kernel takes 64 (attention.gpu.DOCUMENTS): further calls follow the first.
FEW, MANY = 5, 200
TINY_MANY = 128  # the length of a tiny row that has room for them
# Of the parameter with the largest error.
FLOAT32, BFLOAT16 = 3e-4, 4e-2


def part(run: Run) -> None:
    model = shape.random_model(shape.config(run.tiny, LAYERS), "float32", stacked=True)
    run.attempt("float32", float32, run, model)
    run.attempt("bfloat16", bfloat16, run, model, "documents", FEW, TINY_LENGTH)
    run.attempt("many documents", bfloat16, run, model, "more documents than a kernel takes at once", MANY, TINY_MANY)


def batch_of(model: SmolLM3, length: int, documents: int = FEW) -> Batch:
    """A packed row with documents, some of which may be empty, and padding."""
    return Batch(shape.random_tokens(model.config, 1, length), shape.packed_segments(1, length, documents, padding=7))


@functools.partial(jax.jit, static_argnames="options")
def gradients(model: SmolLM3, batch: Batch, options: StepOptions) -> SmolLM3:
    """Of the summed cross-entropy."""
    return jax.grad(lambda m: Pretrain()(m, batch, options)[0])(model)


def exact_gradients(model: SmolLM3, batch: Batch) -> SmolLM3:
    with jax.default_matmul_precision("highest"):
        return gradients(model, batch, StepOptions(dtype="float32"))


def float32(run: Run, model: SmolLM3) -> None:
    batch, cpu = batch_of(model, TINY_LENGTH if run.tiny else CPU_LENGTH), jax.devices("cpu")[0]
    here = exact_gradients(model, batch)
    with jax.default_device(cpu):
        there = exact_gradients(*jax.device_put((model, batch), cpu))
    worst, name = worst_of(here, jax.tree.map(np.asarray, there))
    run.check("float32 gradients, documents: device against CPU", worst, FLOAT32, parameter=name)


def bfloat16(run: Run, model: SmolLM3, case: str, documents: int, tiny_length: int) -> None:
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), model)
    batch = batch_of(model, tiny_length if run.tiny else LENGTH, documents)
    worst, name = worst_of(gradients(rounded, batch, StepOptions()), exact_gradients(rounded, batch))
    count = len(np.unique(np.asarray(batch.segment_ids))) - 1
    run.check(f"bfloat16 gradients, {case}: against float32", worst, BFLOAT16, parameter=name, documents=count)


def worst_of(found: SmolLM3, expected: SmolLM3) -> tuple[float, str]:
    """The largest error of a parameter's gradient, NaN above all, and which parameter it is."""
    pairs = {name: (param[...], parameters(expected)[name][...]) for name, param in parameters(found).items()}
    errors = {name: relative(*pair) for name, pair in pairs.items()}
    name = max(errors, key=lambda name: (errors[name] != errors[name], errors[name]))
    return errors[name], name
