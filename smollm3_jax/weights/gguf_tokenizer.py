"""The tokenizer that a GGUF file carries, rebuilt as Hugging Face's tokenizer.json; and the way back.

Source of the pre-tokenizers and of what a missing key means: llama.cpp's src/llama-vocab.cpp.
"""

import json
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import TokenizerError
from ..tokenizer import Tokenizer, typed
from .gguf_header import metadata_value

if TYPE_CHECKING:
    from tokenizers.pre_tokenizers import PreTokenizer

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # types of a token
# tokenizer.ggml.pre -> the regexes that cut a text, one after the other; "default" is llama.cpp's own.
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
SPLITS = {
    "llama-bpe": (LLAMA3_SPLIT,),
    "smaug-bpe": (LLAMA3_SPLIT,),
    "default": (r"[\p{P}\$\+<=>\^~\|]+", GPT2_SPLIT, r"\p{N}+", r"[0-9][0-9][0-9]"),
    "gpt-2": (),  # this one and the next are written as their tokenizer.json has them
    "smollm": (),
}
# llama.cpp's other names for the same.
OTHER_NAMES = {
    "llama-bpe": ("llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"),
    "gpt-2": ("phi-2", "jina-es", "jina-de", "jina-v2-es", "jina-v2-de", "gigachat", "a.x-4.0", "mellum"),
}
ALIASES = {name: pre for pre, names in OTHER_NAMES.items() for name in names}


@typed("its tokenizer is not sound")
def tokenizer_files(metadata: dict[str, Any], ids: dict[str, int]) -> dict[str, str]:
    """tokenizer.json and tokenizer_config.json, rebuilt; empty if the file carries no tokenizer.

    Raises:
      TokenizerError: it is of a kind that this package does not know, or contradicts itself.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, processors

    model, pre = (metadata_value(metadata, f"tokenizer.ggml.{key}", str, None) for key in ("model", "pre"))
    if model in (None, "none", "no_vocab"):
        return {}
    pre = ALIASES.get(pre, pre) if pre else None
    if model != "gpt2" or pre not in SPLITS:
        raise TokenizerError(
            f"tokenizer.ggml.model is {model!r} and tokenizer.ggml.pre {pre!r}; gpt2 with {', '.join(SPLITS)} are known"
        )
    if missing := [key for key in ("tokens", "merges", "token_type") if f"tokenizer.ggml.{key}" not in metadata]:
        raise TokenizerError(f"the file has no tokenizer.ggml.{missing[0]}")
    tokens, merges = (metadata_value(metadata, f"tokenizer.ggml.{key}", list) for key in ("tokens", "merges"))
    types = metadata_value(metadata, "tokenizer.ggml.token_type", np.ndarray)
    # Rows of the embedding that no token has come last, as UNUSED. What stands between them and the last ordinary
    # token was added to the vocabulary; added tokens that lie below (SmolLM2's first 17) are part of it as well.
    count = next((i + 1 for i in reversed(range(len(types))) if types[i] != UNUSED), 0)
    base = next((i + 1 for i in reversed(range(count)) if types[i] not in (CONTROL, USER_DEFINED)), 0)
    if len(types) != len(tokens) or any(not 0 <= token_id < count for token_id in ids.values()):
        raise TokenizerError(f"{len(tokens)} tokens, {len(types)} token types and the ids {ids} do not go together")
    try:
        vocabulary = {token: i for i, token in enumerate(tokens[:base])}
        pairs = [(left, right) for left, right in (merge.split(" ") for merge in merges)]
        # Llama 3's vocabulary has whole words that its merges do not build.
        tokenizer = Tokenizer(models.BPE(vocabulary, pairs, ignore_merges=pre in ("llama-bpe", "smaug-bpe")))
    except Exception as error:  # `tokenizers` raises bare ones
        raise TokenizerError(f"its merges are not sound: {error}") from error
    added = [i for i in range(count) if types[i] in (CONTROL, USER_DEFINED)]
    tokenizer.add_tokens([AddedToken(tokens[i], special=bool(types[i] == CONTROL), normalized=False) for i in added])
    if wrong := [i for i in range(count) if tokenizer.id_to_token(i) != tokens[i]]:
        raise TokenizerError(f"token {wrong[0]} ({tokens[wrong[0]]!r}) cannot keep its id; it occurs twice or is empty")
    tokenizer.pre_tokenizer = _pre_tokenizer(pre)
    tokenizer.decoder = decoders.ByteLevel()
    # llama.cpp begins every text with BOS for llama-bpe unless the file says otherwise.
    if metadata_value(metadata, "tokenizer.ggml.add_bos_token", bool, pre == "llama-bpe"):
        if "bos_token_id" not in ids:
            raise TokenizerError("it begins every text with BOS, but has no bos_token_id")
        bos = tokens[ids["bos_token_id"]]
        tokenizer.post_processor = processors.TemplateProcessing(
            [bos, "$A"], [bos, "$A", f"{bos}:1", "$B:1"], [(bos, ids["bos_token_id"])]
        )
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    config |= {name.removesuffix("_id"): tokens[token_id] for name, token_id in ids.items()}
    if templates := _chat_templates(metadata):
        config["chat_template"] = templates
    return {"tokenizer.json": tokenizer.to_str(), "tokenizer_config.json": json.dumps(config, indent=2)}


def _chat_templates(metadata: dict[str, Any]) -> str | list[dict[str, str]] | None:
    """The entry of tokenizer_config.json: one text, or several by name ("default", "tool_use")."""
    key = "tokenizer.chat_template"
    named = {name.removeprefix(key + "."): name for name in metadata if name.startswith(key + ".")}
    named = {"default": key} | named if key in metadata else named
    texts = {name: metadata_value(metadata, key, str) for name, key in named.items()}
    if texts.keys() <= {"default"}:
        return texts.get("default")
    return [{"name": name, "template": text} for name, text in texts.items()]


def _pre_tokenizer(pre: str) -> "PreTokenizer":
    from tokenizers import Regex, pre_tokenizers

    if SPLITS[pre]:
        cuts = [pre_tokenizers.Split(Regex(regex), "isolated") for regex in SPLITS[pre]]
        return pre_tokenizers.Sequence([*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = pre_tokenizers.Digits(individual_digits=True)
    return pre_tokenizers.Sequence([digits, byte_level]) if pre == "smollm" else byte_level


def tokenizer_metadata(tokenizer: Tokenizer, rows: int, ids: dict[str, int]) -> dict[str, Any]:
    """The keys that carry a tokenizer and its chat templates, from which `tokenizer_files` rebuilds it.

    Args:
      rows: of the embedding; those that no token has get names of their own.
      ids: special tokens' by their names in config.json.

    Raises:
      TokenizerError: what it does is not what llama.cpp would do by these keys.
    """
    spec = json.loads(tokenizer.backend.to_str())
    if spec["model"]["type"] != "BPE":
        raise TokenizerError(f"a GGUF file is written with a BPE tokenizer; this one is {spec['model']['type']}")
    # llama-bpe is the first that fits SmolLM3. llama.cpp's own converter calls it smaug-bpe, since it adds no BOS, but
    # then merges cut the words that tokenizer.json takes whole (ignore_merges).
    pre = next((name for name in SPLITS if _spelled(_pre_tokenizer(name)) == spec["pre_tokenizer"]), None)
    if pre is None:
        raise TokenizerError(
            "llama.cpp's name for this tokenizer's pre_tokenizer is not known here (known are "
            f"{', '.join(SPLITS)}): llama.cpp's convert_hf_to_gguf.py may know it"
        )
    texts = [tokenizer.backend.id_to_token(i) for i in range(rows)]
    added = tokenizer.backend.get_added_tokens_decoder()
    types = [UNUSED if text is None else NORMAL for text in texts]
    for i, token in added.items():
        if i < rows:
            types[i] = CONTROL if token.special else USER_DEFINED
    bos = tokenizer.backend.encode("a").ids != tokenizer.backend.encode("a", add_special_tokens=False).ids
    keys = {"model": "gpt2", "pre": pre, "tokens": [f"[PAD{i}]" if t is None else t for i, t in enumerate(texts)]}
    keys |= {"token_type": types, "merges": [" ".join(pair) for pair in spec["model"]["merges"]], "add_bos_token": bos}
    metadata = {f"tokenizer.ggml.{name}": value for name, value in keys.items()}
    arrays = {"tokenizer.ggml.token_type": np.array(types, np.int32)}
    rebuilt = tokenizer_files(metadata | arrays, ids)["tokenizer.json"]
    own, other = (_essence(backend, rows) for backend in (tokenizer.backend, type(tokenizer.backend).from_str(rebuilt)))
    if different := [name for name in own if own[name] != other[name]]:
        raise TokenizerError(
            f"llama.cpp's {pre} tokenizer is not this one: they differ in {', '.join(different)}; "
            "llama.cpp's convert_hf_to_gguf.py may know another name for it"
        )
    templates = {f"tokenizer.chat_template.{name}": text for name, text in tokenizer.templates.items()}
    if (default := templates.pop("tokenizer.chat_template.default", None)) is not None:
        metadata["tokenizer.chat_template"] = default
    if templates:
        metadata["tokenizer.chat_templates"] = [name for name in tokenizer.templates if name != "default"]
    return metadata | templates


def _spelled(pre_tokenizer: Any) -> Any:
    """A pre-tokenizer as tokenizer.json has it."""
    from tokenizers import Tokenizer, models

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    return json.loads(tokenizer.to_str())["pre_tokenizer"]


def _essence(backend: Any, rows: int) -> dict[str, Any]:
    """All of a tokenizer that decides which ids a text becomes, and which text they."""
    spec = json.loads(backend.to_str())
    model = {name: value for name, value in spec["model"].items() if name != "vocab"}
    model |= {name: None for name, value in model.items() if not value}  # an empty text, a 0 or a False does nothing
    flags = ("id", "content", "special", "single_word", "lstrip", "rstrip")
    return model | {
        "vocab": {token: i for token, i in backend.get_vocab().items() if i < rows},
        "added_tokens": [[token[flag] for flag in flags] for token in spec["added_tokens"] if token["id"] < rows],
        "normalizer": spec["normalizer"],
        "pre_tokenizer": spec["pre_tokenizer"],
        "decoder": spec["decoder"] and spec["decoder"]["type"],
        "post_processor": backend.encode("a").ids,
    }
