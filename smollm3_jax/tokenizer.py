"""tokenizer.json through the `tokenizers` library, with the chat templates and special tokens beside it."""

import contextlib
import dataclasses
import functools
import logging
import os
import re
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .config import ModelConfig
from .errors import OptionError, SmolLM3Error, TextTooLong, TokenizerError
from .file_kind import what_it_is
from .tokenizer_files import NAMES, TEMPLATES, chat_templates, read_file, special_tokens_of

if TYPE_CHECKING:
    import tokenizers

# A model may have more embedding rows than its tokenizer has tokens: trainers round the vocabulary up, to a
# multiple of 64 or 128 and at most (Megatron's 128 for each of 8 tensor-parallel ranks) of 1024. Rounding up
# leaves fewer spare rows than the multiple, and never doubles a vocabulary that is worth padding.
MAX_SPARE_ROWS = 1023
MAX_SPARE_FRACTION = 0.5

# A text of more characters or tokens is a batch of one: while `tokenizers` works on a single text, no other thread of
# Python's runs, such as a server's that answers others.
LONG = 10_000
ANCHOR = 16  # tokens of a prompt that are decoded with what follows them

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """Text to token ids and back, and what a chat template needs; see `load_tokenizer`.

    special_tokens: what transformers hands to a template, by name ("bos_token", ...).
    templates: all chat templates by name; `chat_template` is the one named "default".
    rowless: the added tokens that the model has no row for, by id; a text with one of them is refused.
    """

    backend: Any = dataclasses.field(repr=False)
    chat_template: str | None = dataclasses.field(repr=False)
    special_tokens: dict[str, str]
    templates: Mapping[str, str] = dataclasses.field(default_factory=dict, repr=False)
    rowless: Mapping[int, str] = dataclasses.field(default_factory=dict, repr=False)

    @property
    def eos_token_id(self) -> int | None:
        """What the tokenizer itself takes for the end; None where its files do not say."""
        token = self.special_tokens.get("eos_token")
        return None if token is None else self.backend.token_to_id(token)

    def special_id(self, text: str) -> int | None:
        """The id of a special token, given as all of its text; None for any other text."""
        token_id = self.backend.token_to_id(text)
        return token_id if token_id in self._added and self._added[token_id].special else None

    def template(self, tools: Sequence[object] | None = None) -> str:
        """The chat template: the one named "tool_use" where there are tools and such a template, as in transformers.

        Raises:
          TokenizerError: there is none.
        """
        named = self.templates.get("tool_use") if tools is not None else None
        if (found := named or self.chat_template) is not None:
            return found
        if self.templates:
            raise TokenizerError(
                f"the model has the chat templates {', '.join(sorted(self.templates))}, but none named default, which "
                "a chat of this kind needs: copy one to chat_template.jinja beside the tokenizer"
            )
        raise TokenizerError(
            "the model has no chat template: neither chat_template.jinja nor an entry of tokenizer_config.json"
        )

    def encode(self, text: str, add_special_tokens: bool = True, *, context: int | None = None) -> list[int]:
        """Token ids of a text, with what tokenizer.json's post-processor adds (nothing in SmolLM3).

        A rendered chat holds its special tokens already: encode it with add_special_tokens=False.

        Args:
          context: refuse a text that cannot fit into this many tokens, before any work is done on it.

        Raises:
          OptionError: the text holds half of a surrogate pair, so it is no Unicode text; or it is too long; or it
            holds a token that the model has no row for.
          TokenizerError: the tokenizer cannot encode it.
        """
        return self.encoding(text, add_special_tokens, context=context).ids

    def encoding(
        self, text: str, add_special_tokens: bool = True, *, context: int | None = None
    ) -> "tokenizers.Encoding":
        """As `encode`, with all that `tokenizers` says of each token."""
        self.check_length(text, context)
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise OptionError(f"the text is not valid Unicode: a lone surrogate at character {error.start}") from None
        with typed(f"the tokenizer cannot encode a text of {len(text):,} characters"):
            if len(text) <= LONG:
                found = self.backend.encode(text, add_special_tokens=add_special_tokens)
            else:
                [found] = self.backend.encode_batch([text], add_special_tokens=add_special_tokens)
        if self.rowless and (without := self.rowless.keys() & set(found.ids)):
            token = min(without)
            raise OptionError(
                f"the text holds {self.rowless[token]!r:.80}, the token {token}, which the model has no row for: leave "
                "it out"
            )
        return found

    def check_length(self, text: str, context: int | None) -> None:
        """Refuses a text that cannot fit into `context` tokens, however it is cut; None is any number.

        Raises:
          TextTooLong: with the numbers.
        """
        if context is not None and len(text) > context * self._longest:
            raise TextTooLong(
                f"the text has {len(text):,} characters, which is more than {context:,} tokens can hold (a token of "
                f"this model is at most {self._longest} characters); shorten it"
            )

    def token_bytes(self, token: int) -> bytes:
        """What a token stands for, in UTF-8, of which it may be a part; of a special one its name, of none nothing."""
        if (found := self._bytes.get(token)) is None:
            found = self._bytes[token] = self._find_bytes(token)
        return found

    def _find_bytes(self, token: int) -> bytes:
        spelling = self.backend.id_to_token(token)
        if spelling is None or token in self._added:
            return (spelling or "").encode()
        if self._is_byte_level:
            return bytes(map(_byte_of().__getitem__, spelling))
        if re.fullmatch("<0x[0-9A-F]{2}>", spelling):
            return bytes([int(spelling[3:5], 16)])
        return spelling.replace("\u2581", " ").encode()

    def is_special(self, token: int) -> bool:
        """Whether texts leave the token out."""
        return token in self._added and self._added[token].special

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids; ids of padding rows, which no token has, give nothing."""
        with typed("the tokenizer cannot decode"):
            if len(ids) > LONG:
                return self.backend.decode_batch([ids], skip_special_tokens=skip_special_tokens)[0]
            return self.backend.decode(ids, skip_special_tokens=skip_special_tokens)

    def decode_stream(
        self, skip_special_tokens: bool = True, prompt: Sequence[int] = ()
    ) -> Callable[[int | None], str]:
        """A function from the next token id to the text that has become certain.

        A character may take several tokens. None ends the text: what is then incomplete comes out as
        `decode` writes it, so that the pieces joined are what `decode` gives for all ids.

        Args:
          prompt: the ids before the first one. Some decoders strip the space that begins a text, so new tokens are
            decoded after the prompt's last ones, whose text is left out.
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
                with typed("the tokenizer cannot decode"):
                    piece = pieces.step(self.backend, token) or ""
            said += len(piece)
            return piece

        for token in self._anchor(prompt, skip_special_tokens):
            step(token)
        return step

    def _anchor(self, prompt: Sequence[int], skip_special_tokens: bool) -> Sequence[int]:
        """The end of a prompt, from a token on that is whole characters, and with some text if there is any near."""
        prompt = [int(token) for token in prompt[-8 * ANCHOR :]]
        start = len(prompt)
        while start > 0:
            start = max(0, start - ANCHOR)
            while start > 0 and "\ufffd" in self.decode(prompt[start : start + 1], False):
                start -= 1
            if self.decode(prompt[start:], skip_special_tokens):
                break
        return prompt[start:]

    @functools.cached_property
    def _bytes(self) -> dict[int, bytes]:
        """Of the tokens that were asked for: log-probabilities ask for the same ones over and over."""
        return {}

    @functools.cached_property
    def _added(self) -> "Mapping[Any, tokenizers.AddedToken]":
        return self.backend.get_added_tokens_decoder()

    @functools.cached_property
    def _is_byte_level(self) -> bool:
        return "ByteLevel" in str(self.backend.decoder)

    @functools.cached_property
    def _longest(self) -> int:
        """The most characters that become one token. In a byte-level vocabulary a token's spelling has one a byte."""
        longest = max(map(len, self.backend.get_vocab(with_added_tokens=True)), default=1)
        return longest if self.backend.normalizer is None else 4 * longest  # which may join characters


@functools.cache
def _byte_of() -> dict[str, int]:
    """How byte-level vocabularies spell bytes: those that print as themselves, the others from U+0100 on."""
    printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printed]
    return {chr(byte): byte for byte in printed} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


# What came along with a model, beside the module: in it, it would be static metadata, and part of every jit's key.
_of_model: "weakref.WeakKeyDictionary[object, Callable[[], Tokenizer | None]]" = weakref.WeakKeyDictionary()


def carry_tokenizer(model: object, load: Callable[[], Tokenizer | None]) -> None:
    """Makes `tokenizer_of(model)` what `load` gives when it is first asked for."""
    _of_model[model] = functools.cache(load)


def tokenizer_of(model: object) -> Tokenizer | None:
    """The tokenizer that came with a model, or None.

    Raises:
      TokenizerError: as for `load_tokenizer`.
    """
    load = _of_model.get(model)
    return None if load is None else load()


@contextlib.contextmanager
def typed(what: str) -> Iterator[None]:
    """`tokenizers` raises bare exceptions, and where it panics a BaseException that is no Exception."""
    try:
        yield
    except (SmolLM3Error, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        raise TokenizerError(f"{what}: {error}") from None


def load_tokenizer(folder: str | Path, config: ModelConfig | None = None) -> Tokenizer:
    """Reads a model folder's tokenizer and checks that it belongs to the model.

    Args:
      config: the model's; None is that of the folder, if it has one.

    Raises:
      TokenizerError: a file is missing or unreadable, or the vocabularies of tokenizer and model differ.
      ConfigError: the folder's config.json cannot be read.
    """
    folder = Path(folder)
    if folder.is_file():
        raise TokenizerError(f"{folder} is a single file; this command works on a folder: smollm3 convert it first")
    if config is None and (folder / "config.json").exists():
        config = ModelConfig.from_hf(folder)
    names = ["tokenizer.json", *NAMES]
    names += sorted(f"{TEMPLATES}/{path.name}" for path in (folder / TEMPLATES).glob("*.jinja"))
    # A link that leads nowhere is there: to pass over it would give another prompt, without a word.
    files = {name: read_file(folder / name) for name in names if os.path.lexists(folder / name)}
    return build_tokenizer(files, folder, config)


def build_tokenizer(files: Mapping[str, bytes], folder: str | Path, config: ModelConfig | None = None) -> Tokenizer:
    """A tokenizer from the contents of its files, as transformers builds it.

    Args:
      files: by their names in a model folder; others than a tokenizer's may be among them.
      folder: where they come from, for messages.

    Raises:
      TokenizerError: as for `load_tokenizer`.
    """
    import tokenizers

    folder = Path(folder)
    path = folder / "tokenizer.json"
    if "tokenizer.json" not in files:
        raise TokenizerError(
            f"{path} is missing; this command works on text: copy tokenizer.json from the model's release "
            "next to config.json"
        )
    try:
        with typed("tokenizers"):
            backend = tokenizers.Tokenizer.from_buffer(files["tokenizer.json"])
    except TokenizerError as error:
        raise TokenizerError(
            f"{path} cannot be read as a tokenizer ({what_it_is(path) or str(error).removeprefix('tokenizers: ')}); "
            "copy it again from the model's release"
        ) from None
    # Files saved in the middle of a training carry its limits, which would cut every text without a word.
    backend.no_truncation()
    backend.no_padding()
    named, extra, added = special_tokens_of(files, folder)
    beyond = _add_tokens(path, backend, config, named, extra, added)
    templates = chat_templates(files, folder)
    return Tokenizer(backend, templates.get("default"), named, templates, beyond)


def _check_vocabulary(path: Path, backend: "tokenizers.Tokenizer", config: ModelConfig) -> dict[int, str]:
    """The added tokens that the model has no row for, by id: they came after its training, for padding, say."""
    rows = config.vocab_size
    added = {i: token.content for i, token in backend.get_added_tokens_decoder().items()}
    ids = backend.get_vocab(with_added_tokens=True).values()
    beyond = {i: added.get(i, "") for i in sorted(i for i in ids if i >= rows)}
    spare = rows - max(ids, default=-1) - 1
    if not all(i in added for i in beyond) or not -MAX_SPARE_ROWS <= spare <= min(
        MAX_SPARE_ROWS, rows * MAX_SPARE_FRACTION
    ):
        raise TokenizerError(
            f"{path} belongs to another model: its largest token id is {max(ids, default=-1)}, but vocab_size of "
            f"config.json is {rows}; copy the tokenizer.json that was released with these weights"
        )
    return beyond


_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def _add_tokens(
    path: Path,
    backend: "tokenizers.Tokenizer",
    config: ModelConfig | None,
    named: Mapping[str, str],
    extra: Sequence[str],
    added: Sequence[Mapping[str, Any]],
) -> dict[int, str]:
    """Adds the tokens that tokenizer.json lacks, with the next free ids, and the flags that others say differently.

    What comes back is `_check_vocabulary`'s.
    """
    from tokenizers import AddedToken

    known = {token.content: token for token in backend.get_added_tokens_decoder().values()}
    new: dict[str, AddedToken] = {}
    for entry in added:
        flags = {flag: entry[flag] for flag in _FLAGS if isinstance(entry.get(flag), bool)}
        token = AddedToken(entry["content"], **{"normalized": not flags.get("special", False)} | flags)
        before = known.get(token.content)
        if before is None or any(getattr(before, flag) != getattr(token, flag) for flag in _FLAGS):
            new[token.content] = token
    for text in dict.fromkeys([*named.values(), *extra]):
        before = new.get(text) or known.get(text)
        if before is None:
            new[text] = AddedToken(text, special=True, normalized=False)
        elif not before.special:
            flags = {flag: getattr(before, flag) for flag in _FLAGS}
            new[text] = AddedToken(text, **flags | {"special": True})
    with typed(f"{path}: its added tokens are not sound"):
        backend.add_tokens(list(new.values()))
    beyond = {} if config is None else _check_vocabulary(path, backend, config)
    given = {entry["content"]: entry["id"] for entry in added}
    ids = {text: backend.token_to_id(text) for text in new}
    others = {t: ids[t] for t in given if ids.get(t, given[t]) != given[t]}
    for what, found in (
        ("have no row in the model, so that a text with one is refused", {text: i for i, text in beyond.items()}),
        ("get other ids than the file says, those after the largest", others),
    ):
        if found:
            names = ", ".join(f"{text!r:.40} ({i})" for text, i in list(found.items())[:10])
            log.warning("%s: %d added tokens %s: %s", path.parent, len(found), what, names)
    return beyond
