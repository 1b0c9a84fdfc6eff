"""Gradients and twenty steps of AdamW beside torch's, on transformers' model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import smollm3_jax as s3
from smollm3_jax.train.objectives.pretrain import Pretrain
from smollm3_jax.train.optimizer import adamw, schedule
from smollm3_jax.train.options import StepOptions
from smollm3_jax.train.state import Batch, init_state
from smollm3_jax.train.step import train_step
from smollm3_jax.weights.save import tensors_of

STEPS = 20
# Both sides round float32 in their own order: errors against float64 are of one size, the largest of many within a few
# times of each other.
TIMES = 4


@pytest.mark.slow
@pytest.mark.torch
def test_twenty_steps_are_those_of_torch(tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    folder = tiny.tiny_checkpoint(tmp_path)
    tokens = np.random.RandomState(0).randint(3, 160, (STEPS, 4, 24))
    rate = schedule("cosine", 1e-3, STEPS, warmup_steps=4)

    def theirs(dtype):
        """The losses, and the parameters after the last step."""
        reference = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager")
        embeds = [p for name, p in reference.named_parameters() if "embed" in name]
        others = [p for name, p in reference.named_parameters() if "embed" not in name]
        groups = [{"params": others, "weight_decay": 0.1}, {"params": embeds, "weight_decay": 0.0}]
        torch_adamw = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), eps=1e-8)
        losses = []
        for step in range(STEPS):
            ids = torch.tensor(tokens[step])
            for group in torch_adamw.param_groups:
                group["lr"] = float(np.asarray(rate(step)))
            loss = reference(input_ids=ids, labels=ids).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
            torch_adamw.step()
            torch_adamw.zero_grad()
            losses.append(loss.item())
        return np.array(losses), {name: x.detach().numpy() for name, x in reference.named_parameters()}

    def ours():
        optimizer = adamw(rate)
        state = init_state(s3.from_pretrained(folder, dtype="float32", stacked=True), optimizer)
        losses = []
        for step in range(STEPS):
            batch = Batch(jnp.asarray(tokens[step], jnp.int32), jnp.ones((4, 24), jnp.int32))
            state, metrics = train_step(state, batch, optimizer=optimizer, options=StepOptions(dtype="float32"))
            losses.append(float(metrics["loss"]))
        return np.array(losses), {x.name: x.read() for x in tensors_of(jax.device_get(state.model))}

    exact, exact_params = theirs(torch.float64)
    single, single_params = theirs(torch.float32)
    losses, params = ours()
    assert np.abs(losses - exact).max() <= TIMES * np.abs(single - exact).max()
    before = {x.name: x.read() for x in tensors_of(jax.device_get(s3.from_pretrained(folder, dtype="float32")))}
    for name, want in exact_params.items():
        allowed = TIMES * np.abs(single_params[name] - want).max()
        assert np.abs(params[name] - want).max() <= allowed < 0.01 * np.abs(want - before[name]).max(), name


@pytest.mark.slow
@pytest.mark.torch
def test_bfloat16_gradients_are_as_good_as_torch_autocasts(tmp_path):
    """Each parameter's error against float32, relative to the gradient's size, is at most 1.5 times autocast's."""
    import torch
    from transformers import AutoModelForCausalLM

    folder = tiny.tiny_checkpoint(tmp_path)
    tokens = np.random.RandomState(0).randint(3, 160, (4, 24))
    ids = torch.tensor(tokens)

    def theirs(autocast):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        return {name: x.grad.numpy() for name, x in model.named_parameters()}

    def ours():
        batch = Batch(jnp.asarray(tokens, jnp.int32), jnp.ones(tokens.shape, jnp.int32))
        model = s3.from_pretrained(folder, dtype="float32", stacked=True)
        gradient = jax.jit(jax.grad(Pretrain(), has_aux=True), static_argnums=2)
        gradients, sums = gradient(model, batch, StepOptions(dtype="bfloat16"))
        return {x.name: x.read() / float(sums["tokens"]) for x in tensors_of(jax.device_get(gradients))}

    exact, autocast, found = theirs(False), theirs(True), ours()

    def error(gradients, names):
        return np.sqrt(sum(np.square(gradients[name] - exact[name]).sum() for name in names))

    for name in exact:
        assert error(found, [name]) <= 1.5 * error(autocast, [name]), name
    assert 0 < error(found, exact) <= 1.2 * error(autocast, exact)
