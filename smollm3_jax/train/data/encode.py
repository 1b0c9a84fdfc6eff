"""What turns a document into token ids."""

from collections.abc import Callable

import numpy as np

from ...config import ModelConfig
from ...errors import DataError, OptionError, SmolLM3Error
from ...tokenizer import Tokenizer
from .records import BadRecord, Document

Encode = Callable[[Document], np.ndarray]


def encoder(tokenizer: Tokenizer, config: ModelConfig) -> Encode:
    """What turns a document into token ids: texts through the tokenizer, tokens as they are, checked.

    Raises:
      OptionError: the config names no token for the end of a text.
    """
    eos = config.eos_token_id
    ends = eos if isinstance(eos, tuple) else () if eos is None else (eos,)
    if not ends:
        raise OptionError("config.json has no eos_token_id, which training puts after each document: add it")
    # A tokenizer may append it by itself. (Another token that it appends is no end, and one that is written out in a
    # document is text.)
    bare, whole = tokenizer.encode("a", add_special_tokens=False), tokenizer.encode("a")
    appended = len(whole) > len(bare) and whole[-1] in (*ends, tokenizer.eos_token_id)
    end = [] if appended else [ends[0]]

    def encode(document: Document) -> np.ndarray:
        assert not isinstance(document, dict), "a record, of a source that has a field"
        if isinstance(document, str):
            try:
                return np.asarray([*tokenizer.encode(document), *end], np.int32)
            except SmolLM3Error as error:
                raise BadRecord(str(error)) from None
        if not document.size:
            raise BadRecord("a document without tokens")
        if document.min() < 0 or document.max() >= config.vocab_size:
            raise DataError(
                f"tokens up to {document.max()}, but the model has {config.vocab_size}: another tokenizer's shards"
            )
        return document

    return encode
