"""Twenty steps of preferences beside TRL's DPOTrainer, which pads where we pack."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from proxies import FULL

import smollm3_jax as s3
from smollm3_jax.train.objectives.preference import Preference, completion_sums
from smollm3_jax.train.optimizer import adamw
from smollm3_jax.train.options import StepOptions
from smollm3_jax.train.state import Batch, init_state
from smollm3_jax.train.step import train_step
from smollm3_jax.weights.save import tensors_of

# TRL sets what this transformers calls by another name.
pytestmark = [pytest.mark.slow, pytest.mark.torch, pytest.mark.filterwarnings("ignore")]

STEPS, PAIRS, MICRO_BATCHES = 20, 8, 2
RATE, BETA = 1e-3, 0.3
END = 159  # a word that no other one begins with, as a special token is found in the midst of a word
FLOAT32 = StepOptions("float32", micro_batches=MICRO_BATCHES)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.talking_checkpoint(tmp_path_factory.mktemp("tiny") / "model", eos_token_id=END, pad_token_id=END)


@functools.cache
def records():
    """Prompts of words, and completions that end."""
    draw = np.random.RandomState(0)

    def words(least, most):
        return " ".join(f"w{x}" for x in draw.randint(3, END, draw.randint(least, most)))

    sides = ("chosen", "rejected")
    return [{"prompt": words(2, 8)} | {side: f" {words(1, 10)} w{END}" for side in sides} for _ in range(STEPS * PAIRS)]


def theirs(folder, loss, monkeypatch, tmp_path):
    """(a loss a step, rewards of chosen and rejected, the parameters after the last step), of TRL."""
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "TQDM_DISABLE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
    from trl.trainer.dpo_config import DPOConfig
    from trl.trainer.dpo_trainer import DPOTrainer

    losses = []

    class Recorded(DPOTrainer):
        def compute_loss(self, *args, **options):
            loss = super().compute_loss(*args, **options)
            losses.append(float(loss))
            return loss

    end = f"w{END}"
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), eos_token=end, pad_token=end)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    options = DPOConfig(
        output_dir=str(tmp_path / "out"),
        loss_type=[loss],
        beta=BETA,
        max_length=None,
        max_steps=STEPS,
        per_device_train_batch_size=PAIRS // MICRO_BATCHES,
        gradient_accumulation_steps=MICRO_BATCHES,
        gradient_checkpointing=False,
        train_sampling_strategy="sequential",
        learning_rate=RATE,
        lr_scheduler_type="constant",
        adam_beta2=0.95,
        adam_epsilon=1e-8,
        weight_decay=0.0,
        max_grad_norm=1.0,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
    )
    trainer = Recorded(
        model=model, args=options, train_dataset=Dataset.from_list(records()), processing_class=tokenizer
    )
    trainer.train()
    lines = [line for line in trainer.state.log_history if "rewards/chosen" in line]
    rewards = np.array([[line["rewards/chosen"], line["rewards/rejected"]] for line in lines])
    assert len(lines) == STEPS and len(losses) == STEPS * MICRO_BATCHES
    params = {name: x.detach().numpy() for name, x in trainer.model.named_parameters()}
    return np.reshape(losses, (STEPS, -1)).mean(axis=1), rewards, params


def batch_of(pairs, length=72, means=False):
    """Two pairs a row; means: what is to fail, a completion's weights are one by their number."""
    tokens, segments = np.zeros((2, len(pairs) // 2, length), np.int32)
    weights = np.zeros(tokens.shape, np.float32)
    for row in range(len(tokens)):
        at = 0
        for j, record in enumerate(pairs[2 * row : 2 * row + 2]):
            prompt = len(record["prompt"].split())
            for side, name in enumerate(("chosen", "rejected")):
                ids = [int(word[1:]) for word in f"{record['prompt']}{record[name]}".split()]
                end = at + len(ids)
                tokens[row, at:end], segments[row, at:end] = ids, 2 * j + 1 + side
                weights[row, at + prompt - 1 : end - 1] = 1 / (len(ids) - prompt) if means else 1
                at = end
    return Batch(*map(jnp.asarray, (tokens, segments, weights)))


def ours(folder, loss, **how):
    sums = jax.jit(completion_sums, static_argnums=2)
    start = s3.from_pretrained(folder, dtype="float32", stacked=True)
    optimizer = adamw(RATE, weight_decay=0)
    state = init_state(s3.from_pretrained(folder, dtype="float32", stacked=True), optimizer)
    losses, rewards = [], []
    for step in range(STEPS):
        batch = batch_of(records()[step * PAIRS : (step + 1) * PAIRS], **how)
        reference = sums(start, batch, FLOAT32).reshape(len(batch.tokens), -1)
        placed = jnp.take_along_axis(reference, jnp.maximum(batch.segment_ids - 1, 0), axis=1)
        batch = Batch(batch.tokens, batch.segment_ids, batch.weights, placed)
        state, metrics = train_step(
            state, batch, objective=Preference(loss, BETA), optimizer=optimizer, options=FLOAT32
        )
        assert metrics["pairs"] == PAIRS and metrics["bad"] == 0
        losses.append(float(metrics["loss"]))
        rewards.append([float(metrics["rewards/chosen"]), float(metrics["rewards/rejected"])])
    return np.array(losses), np.array(rewards), {x.name: x.read() for x in tensors_of(jax.device_get(state.model))}


@pytest.mark.parametrize("loss", ["apo_zero", *(pytest.param(x, marks=FULL) for x in ("apo_down", "sigmoid"))])
def test_twenty_steps_are_those_of_trl(folder, loss, monkeypatch, tmp_path):
    """trl #2469, #7014: packed preferences are gone there, so that SmolLM3's own apo.yaml no longer runs as written:
    packed, ours are what TRL's are with padding."""
    their_losses, their_rewards, their_params = theirs(folder, loss, monkeypatch, tmp_path)
    losses, rewards, params = ours(folder, loss)
    assert np.abs(losses - their_losses).max() <= 1e-5
    assert np.abs(rewards - their_rewards).max() <= 1e-4 < 1e-2 * np.abs(their_rewards).max()
    start = {x.name: x.read() for x in tensors_of(jax.device_get(s3.from_pretrained(folder, dtype="float32")))}
    for name, want in their_params.items():
        # AdamW divides a gradient by its own size, so that of a small one rounding shows, as the processor rounds.
        assert np.abs(params[name] - want).max() <= 1e-2 * np.abs(want - start[name]).max(), name
    # Sums by their length are another loss.
    others, _, _ = ours(folder, loss, means=True)
    assert np.abs(others - their_losses)[1:].max() > 1e-3
