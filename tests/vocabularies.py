"""Small byte-level tokenizers of the kinds that llama.cpp has names for, and what its converter writes of one."""

import json

from tokenizers import AddedToken, Tokenizer, decoders, models, trainers
from tokenizers.pre_tokenizers import ByteLevel

TEXTS = [
    "I'm HERE, they're 12345 strong; we'LL see 3.14!",
    "a\t5 \n\n 8.1  two  spaces\r\n\r\nend  ",
    "Größe, naïve café — 東京 ½ ٣٤ 🙂",
    "def f(x):\n    return x**2  # $5,000.00\n",
    "",
]


def vocabulary_keys(tokens, types, merges, pre, **more):
    keys = {"model": "gpt2", "pre": pre, "tokens": tokens, "token_type": types, "merges": merges} | more
    return {f"tokenizer.ggml.{name}": value for name, value in keys.items() if value is not None}


def pre_tokenizer_of(spec):
    """A pre-tokenizer as tokenizer.json spells it."""
    document = json.loads(Tokenizer(models.BPE()).to_str()) | {"pre_tokenizer": spec}
    return Tokenizer.from_str(json.dumps(document)).pre_tokenizer


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
LLAMA3 = {
    "type": "Sequence",
    "pretokenizers": [
        {
            "type": "Split",
            "pattern": {
                "Regex": "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}|"
                " ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
            },
            "behavior": "Isolated",
            "invert": False,
        },
        BYTES | {"use_regex": False},
    ],
}
PRE = {
    "llama-bpe": LLAMA3,
    "smaug-bpe": LLAMA3,
    "gpt-2": BYTES | {"use_regex": True},
    "smollm": {
        "type": "Sequence",
        "pretokenizers": [{"type": "Digits", "individual_digits": True}, BYTES | {"use_regex": True}],
    },
}


def trained(pre, specials_first):
    """A tokenizer of 320 ordinary tokens; its five added ones come first, as in SmolLM2, or last, as in SmolLM3."""
    added = [AddedToken(f"<|{name}|>", special=True, normalized=False) for name in ("begin", "end", "pad")]
    added += [AddedToken(name, special=False, normalized=False) for name in ("<think>", "</think>")]
    tokenizer = Tokenizer(models.BPE(ignore_merges=pre in ("llama-bpe", "smaug-bpe")))
    tokenizer.pre_tokenizer = pre_tokenizer_of(PRE[pre])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        initial_alphabet=ByteLevel.alphabet(),
        special_tokens=added if specials_first else [],
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    tokenizer.add_tokens(added)
    return tokenizer


def gguf_keys_of(tokenizer, pre, **more):
    """What llama.cpp's converter writes for it (get_vocab_base)."""
    count = tokenizer.get_vocab_size()
    tokens = [tokenizer.id_to_token(i) for i in range(count)]
    added = tokenizer.get_added_tokens_decoder()
    types = [1 if i not in added else 3 if added[i].special else 4 for i in range(count)]
    merges = [" ".join(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
    return vocabulary_keys(tokens, types, merges, pre, **more)
