import json
from typing import cast

import pytest
import tiny

import smollm3_jax as s3
from smollm3_jax.errors import TokenizerError
from smollm3_jax.tokenizer import Tokenizer, load_tokenizer
from smollm3_jax.train.data.encode import encoder
from smollm3_jax.train.data.records import BadRecord


def test_what_cannot_be_tokenized_is_a_bad_record():
    """T8."""

    class Fussy:
        def encode(self, text, **_):
            if text == "abc":
                raise TokenizerError("a text of 3 characters cannot be tokenized")
            return [1]

    config = s3.ModelConfig.from_hf(tiny.raw_config("plain"))
    with pytest.raises(BadRecord, match="cannot be tokenized"):
        encoder(cast(Tokenizer, Fussy()), config)("abc")


@pytest.mark.parametrize(
    ("files", "eos", "ids"),
    [
        ({}, 257, [71, 72, 257]),
        ({"appends": "</s>"}, 257, [71, 72, 257]),
        ({"appends": "</s>"}, [256, 257], [71, 72, 257]),
        ({"appends": "<s>"}, 257, [71, 72, 256, 257]),
        ({"appends": "<s>", "eos_token": "<s>"}, 257, [71, 72, 256]),
        ({"begins": "<s>"}, 257, [256, 71, 72, 257]),
    ],
)
def test_a_document_has_one_end(tmp_path, files, eos, ids):
    """Also where the tokenizer writes one itself; a token of another meaning is none."""
    import tokenizers
    from tokenizers import models, pre_tokenizers, processors

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.add_special_tokens(["<s>", "</s>"])
    if files:
        token = files.get("appends") or files["begins"]
        single = f"$A {token}" if "appends" in files else f"{token} $A"
        special = [(token, backend.token_to_id(token))]
        backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=special)
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in files.items() if k == "eos_token"}))
    config = s3.ModelConfig.from_hf(tiny.raw_config("plain") | {"vocab_size": 258, "eos_token_id": eos})
    encode = encoder(load_tokenizer(tmp_path, config), config)
    assert encode("hi").tolist() == ids
    assert encode("hi</s>").tolist()[-2:] == ([257, ids[-1]] if ids[-2] == 72 else [256, 257])
