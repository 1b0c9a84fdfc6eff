"""tokenizer.json through the `tokenizers` library, with the chat template and special tokens beside it."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .config import ModelConfig, read_json
from .errors import ConfigError, OptionError, TokenizerError

# A model may have more embedding rows than its tokenizer has tokens: trainers round the vocabulary up, to a
# multiple of 64 or 128 and at most (Megatron's 128 for each of 8 tensor-parallel ranks) of 1024. Rounding up
# leaves fewer spare rows than the multiple, and never doubles a vocabulary that is worth padding.
MAX_SPARE_ROWS = 1023
MAX_SPARE_FRACTION = 0.5

# The names under which transformers hands special tokens to a chat template.
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """Text to token ids and back, and what a chat template needs; see `load_tokenizer`."""

    backend: Any = dataclasses.field(repr=False)
    chat_template: str | None = dataclasses.field(repr=False)
    special_tokens: dict[str, str]

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text, with what tokenizer.json's post-processor adds (nothing in SmolLM3).

        A rendered chat holds its special tokens already: encode it with add_special_tokens=False.

        Raises:
          OptionError: the text holds half of a surrogate pair, so it is no Unicode text.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise OptionError(f"the text is not valid Unicode: a lone surrogate at character {error.start}") from None
        return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids; ids of padding rows, which no token has, give nothing."""
        return self.backend.decode(ids, skip_special_tokens=skip_special_tokens)

    def decode_stream(self, skip_special_tokens: bool = True) -> Callable[[int | None], str]:
        """A function from the next token id to the text that has become certain.

        A character may take several tokens. None ends the text: what is then incomplete comes out as
        `decode` writes it, so that the pieces joined are what `decode` gives for all ids.
        """
        from tokenizers.decoders import DecodeStream

        pieces = DecodeStream(skip_special_tokens=skip_special_tokens)
        ids: list[int] = []
        said = 0

        def step(token: int | None) -> str:
            nonlocal said
            if token is None:
                piece = self.decode(ids, skip_special_tokens)[said:]
            else:
                ids.append(token)
                piece = pieces.step(self.backend, token) or ""
            said += len(piece)
            return piece

        return step


def load_tokenizer(folder: str | Path, config: ModelConfig) -> Tokenizer:
    """Reads a model folder's tokenizer and checks that it belongs to the model.

    Raises:
      TokenizerError: a file is missing or unreadable, or the vocabularies of tokenizer and model differ.
    """
    import tokenizers

    if Path(folder).is_file():
        raise TokenizerError(f"{folder} is a single file; this command works on a folder: smollm3 convert it first")
    path = Path(folder) / "tokenizer.json"
    if not path.exists():
        raise TokenizerError(
            f"{path} is missing; this command works on text: copy tokenizer.json from the model's release "
            "next to config.json"
        )
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing more specific
        raise TokenizerError(
            f"{path} cannot be read as a tokenizer ({error}); copy it again from the model's release"
        ) from None
    _check_vocabulary(path, backend, config)
    # Files saved in the middle of a training carry its limits, which would cut every text without a word.
    backend.no_truncation()
    backend.no_padding()

    raw = _tokenizer_config(Path(folder) / "tokenizer_config.json")
    return Tokenizer(backend, _chat_template(Path(folder), raw), _special_tokens(raw))


def _check_vocabulary(path: Path, backend: Any, config: ModelConfig) -> None:
    tokens = max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
    rows = config.vocab_size
    if tokens > rows or rows - tokens > min(MAX_SPARE_ROWS, rows * MAX_SPARE_FRACTION):
        raise TokenizerError(
            f"{path} belongs to another model: its largest token id is {tokens - 1}, but vocab_size of config.json "
            f"is {rows}; copy the tokenizer.json that was released with these weights"
        )


def _tokenizer_config(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        return read_json(path)
    except ConfigError as error:
        raise TokenizerError(str(error)) from None


def _chat_template(folder: Path, raw: dict[str, Any]) -> str | None:
    """The folder's own file first, as transformers does, then the entry of tokenizer_config.json."""
    path = folder / "chat_template.jinja"
    if path.exists():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise TokenizerError(f"{path} cannot be read as text: {error}") from None
    entry = raw.get("chat_template")
    try:
        template = {t["name"]: t["template"] for t in entry}.get("default") if isinstance(entry, list) else entry
    except (KeyError, TypeError):
        template = entry
    if not isinstance(template, str | None):
        raise TokenizerError(
            f"{folder / 'tokenizer_config.json'}: chat_template must be a string, or a list of objects with "
            "name and template"
        )
    return template


def _special_tokens(raw: dict[str, Any]) -> dict[str, str]:
    """The special tokens that are set; null ones stay out, so that a template finds them undefined."""
    found = {name: raw.get(name) for name in SPECIAL_TOKENS}
    found = {name: token.get("content") if isinstance(token, dict) else token for name, token in found.items()}
    return {name: token for name, token in found.items() if isinstance(token, str)}
