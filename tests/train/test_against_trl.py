"""Twenty steps of fine-tuning beside TRL's trainer, on transformers' model: the same records, packed by each side."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from talks import DATE, talks, transformers_on, write_talks

import smollm3_jax as s3
from smollm3_jax.config import ModelConfig
from smollm3_jax.tokenizer import load_tokenizer
from smollm3_jax.train.data.mixture import Batches
from smollm3_jax.train.data.windows import sft_items
from smollm3_jax.train.objectives.sft import Sft
from smollm3_jax.train.optimizer import adamw
from smollm3_jax.train.options import StepOptions
from smollm3_jax.train.settings_file import parse
from smollm3_jax.train.state import init_state
from smollm3_jax.train.step import train_step
from smollm3_jax.weights.save import tensors_of

STEPS, LENGTH, RATE = 20, 512, 1e-3


def theirs(folder, records, rows, out):
    """The losses, and the parameters after the last step. A step is an epoch: neither order nor bins matter."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    losses = []

    class Trainer(SFTTrainer):
        def training_step(self, *args, **kwargs):
            losses.append(float(found := super().training_step(*args, **kwargs)))
            return found

    args = SFTConfig(
        output_dir=str(out),
        report_to="none",
        use_cpu=True,
        bf16=False,
        activation_checkpointing=False,
        save_strategy="no",
        disable_tqdm=True,
        num_train_epochs=STEPS,
        per_device_train_batch_size=rows // 2,
        gradient_accumulation_steps=2,
        train_sampling_strategy="sequential",
        shuffle_dataset=False,
        assistant_only_loss=True,
        packing=True,
        max_length=LENGTH,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        adam_beta2=0.95,
        adam_epsilon=1e-8,
        max_grad_norm=1.0,
    )
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    with transformers_on(DATE):
        data, tokenizer = Dataset.from_list(records), AutoTokenizer.from_pretrained(folder)
        trainer = Trainer(model, args=args, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    assert trainer.state.global_step == STEPS and sum(1 for _ in trainer.train_dataset or ()) == rows
    return np.array(losses).reshape(STEPS, 2).sum(1), {k: x.detach().numpy() for k, x in model.named_parameters()}


def ours(folder, file, rows):
    config = ModelConfig.from_hf(folder)
    data = {"path": str(file), "length": LENGTH, "rows": rows, "date": DATE}
    settings = parse({"data": data, "objective": {"kind": "sft"}})
    batches = Batches(settings, sft_items(load_tokenizer(folder, config), config, settings))
    rule = adamw(RATE, weight_decay=0.0)
    state = init_state(s3.from_pretrained(folder, dtype="float32", stacked=True), rule)
    options = StepOptions(dtype="float32", micro_batches=2)
    losses = []
    for step in range(STEPS):
        batch = jax.tree.map(jnp.asarray, batches.next(step))
        state, metrics = train_step(state, batch, objective=Sft(), optimizer=rule, options=options)
        losses.append(float(metrics["loss"]))
    assert batches.state()["rows"]["data"]["window"] == STEPS - 1 and batches.state()["rows"]["data"]["row"] == rows
    return np.array(losses), {x.name: x.read() for x in tensors_of(jax.device_get(state.model))}


@pytest.mark.slow
@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")
def test_twenty_steps_are_those_of_trl(release, tmp_path):
    """Assistant's tokens alone, packed, two micro-batches that differ in how many of them they have."""
    folder = tiny.chat_checkpoint(tmp_path / "model", release / "chat_template.jinja")
    records = talks(40)
    file, rows = write_talks(tmp_path / "talks.jsonl", records), 12
    want, want_params = theirs(folder, records, rows, tmp_path / "out")
    losses, params = ours(folder, file, rows)
    assert losses[0] > 1.2 * losses[-1]
    np.testing.assert_allclose(losses, want, atol=1e-5, rtol=0)
    for name, x in want_params.items():
        assert np.abs(params[name] - x).max() <= 1e-4 * np.abs(x).max(), name
