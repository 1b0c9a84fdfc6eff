"""Real weights: the demo model against transformers, on real text."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rounding
from parity import reference_logits, reference_model
from proxies import FULL

import smollm3_jax as s3
from smollm3_jax.commands.main import main
from smollm3_jax.tokenizer import load_tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("programs_as_users_run_them")]
ROUNDINGS = 40  # the root of 1,536, the most terms that a sum of the demo's layers has
PROMPT = "The capital of France is"


@pytest.fixture(scope="module")
def tokens(demo_folder, corpus) -> np.ndarray:
    """int32 [1, 512]: the beginnings of documents in six languages."""
    tokenizer = load_tokenizer(demo_folder, s3.ModelConfig.from_hf(demo_folder))
    ids = []
    for language in ("en", "fr", "es", "de", "it", "pt"):
        with (corpus / f"{language}.jsonl").open() as lines:
            ids += tokenizer.encode(json.loads(next(lines))["text"])[:86]
    assert len(ids) >= 512
    return np.array([ids[:512]], np.int32)


@pytest.mark.torch
def test_logits_on_512_real_tokens(demo_folder, tokens):
    model = s3.from_pretrained(demo_folder, "float32")
    with jax.default_matmul_precision("highest"):
        (bounded,) = rounding.shaken(lambda model: model(jnp.asarray(tokens)), model, ROUNDINGS)
    expected = reference_logits(reference_model(demo_folder), tokens)
    assert rounding.within(expected, bounded) <= 1
    # Where two tokens are further apart than rounding moves them, both find the same one.
    got, allowed = bounded
    second, first = np.partition(got, -2, axis=-1)[..., -2:].transpose(2, 0, 1)
    sure = first - second > 2 * allowed.max(axis=-1)
    assert sure.mean() > 0.9
    assert (got.argmax(-1) == expected.argmax(-1))[sure].all()


@pytest.mark.torch
def test_bfloat16_is_as_good_as_transformers_own(demo_folder, tokens):
    tokens = tokens[:, :128]  # torch takes its time for bfloat16
    exact = reference_logits(reference_model(demo_folder), tokens)
    theirs = np.abs(reference_logits(reference_model(demo_folder, "bfloat16"), tokens) - exact)
    ours = np.abs(np.asarray(s3.from_pretrained(demo_folder)(jnp.asarray(tokens))) - exact)
    # Both round the same products and sums to 8 bits, and a processor changes but the last bits of the float32 before
    # that: half as much again is for chance.
    assert ours.max() <= 1.5 * theirs.max()
    assert ours.mean() <= 1.5 * theirs.mean()


@pytest.mark.torch
def test_greedy_text_equals_transformers(demo_folder, tokens):
    import torch

    reference, ours = reference_model(demo_folder), s3.from_pretrained(demo_folder, "float32")
    prompts = [tokens[0, start : start + length].tolist() for start, length in ((0, 5), (300, 60))]
    batched = s3.generate(ours, prompts, s3.SamplingParams(max_new_tokens=24))
    for prompt, new in zip(prompts, batched, strict=True):
        ids = torch.tensor([prompt])
        expected = reference.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=24)
        assert new == expected[0, len(prompt) :].tolist()


@FULL
def test_it_knows_the_capital_of_france(demo_folder, capsys):
    arguments = ["generate", "--model", str(demo_folder), "--dtype", "float32", "--temperature", "0", "--json"]
    assert main([*arguments, "--prompt", PROMPT, "--max-new-tokens", "4"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer.keys() == {"text", "token_ids", "prompt_token_ids", "finish_reason"}
    assert answer["text"].startswith(" Paris")
    assert (answer["finish_reason"], len(answer["token_ids"])) == ("length", 4)
    assert main([*arguments, "--chat", "--prompt", "What is the capital of France?"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert "Paris" in answer["text"] and answer["finish_reason"] == "stop"


@FULL
def test_cached_decoding_equals_the_whole_forward(demo_folder, tokens):
    from smollm3_jax.kv_cache import empty_cache

    model = s3.from_pretrained(demo_folder, "float32")
    row = jnp.asarray(tokens[:, :24])
    (bounded,) = rounding.shaken(lambda model: model(row), model, ROUNDINGS)
    cache, pieces = empty_cache(model.config, 1, 24, jnp.float32), []
    for start, end in [(0, 16), *((i, i + 1) for i in range(16, 24))]:
        logits, cache = model(row[:, start:end], cache=cache)
        pieces.append(np.asarray(logits))
    assert rounding.within(np.concatenate(pieces, axis=1), bounded) <= 1
