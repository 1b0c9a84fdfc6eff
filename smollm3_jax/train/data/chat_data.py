"""Conversations as a run would train on them: lengths, what is trained, what is left out and why."""

import codecs
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ...config import ModelConfig
from ...progress import tally as shown_tally
from ...tokenizer import Tokenizer
from ..settings import Settings
from .conversations import Conversation, conversation_encoder, preference_encoder, read_template, with_template
from .mixture import sources
from .records import BadRecord
from .sources import open_documents
from .windows import LONG, NOTHING, WINDOW, best_fit, items_of

REASONS = 20  # of records that are left out, how many are named


def describe(settings: Settings, tokenizer: Tokenizer, config: ModelConfig, show: int) -> dict[str, Any]:
    """What `smollm3 chat-data --json` prints.

    Args:
      settings: of whose only source every record is read, in its order.
      show: of how many records, the first ones, each token is told.

    Raises:
      DataError: the source cannot be read. OptionError: the template does not say what is trained.
    """
    ((name, source),) = sources(settings).items()
    documents = open_documents(name, source, settings.data.max_document_bytes)
    encode = _encoder(settings, tokenizer, config)
    length, tally = settings.data.length, Counter()
    lengths: list[int] = []
    window: list[int] = []
    left_out: list[dict[str, Any]] = []
    shown: list[dict[str, Any]] = []
    rows = stripped = 0
    with shown_tally("records", len(documents)) as report:
        for number in range(len(documents)):
            try:
                found = encode(documents[number])
            except BadRecord as reason:
                tally["bad"] += 1
                left_out.append({"record": number, "why": str(reason)})
                found = {}
            for side, conversation in found.items():
                before = Counter(tally)
                window += [len(item[0]) for item in items_of(conversation, length, settings.data.overflow, tally)]
                lengths.append(len(conversation.ids))
                stripped += conversation.left_out
                why = _why(tally - before, len(conversation.ids), length)
                if why:
                    left_out.append({"record": number, "why": f"{side}: {why}" if side else why})
                if number < show:
                    shown.append(_shown(number, side, conversation, tokenizer, why))
            if (number + 1) % WINDOW == 0 or number + 1 == len(documents):
                rows += len(best_fit(window, length))
                window = []
            report(number + 1, tally["tokens"])
    kept = tally["tokens"] - tally["cut"]
    quantiles = np.quantile(lengths, [0, 0.5, 0.95, 1]).astype(int).tolist() if lengths else [0] * 4
    return {
        "records": len(documents),
        "tokens": tally["tokens"],
        "trained": tally["trained"],
        "lengths": dict(zip(("shortest", "median", "95 %", "longest"), quantiles, strict=True)),
        "left_out": {"no trained token": tally[NOTHING], "too long": tally[LONG], "unreadable": tally["bad"]},
        "tokens_left_out": tally["cut"],
        "turns_without_their_reasoning": stripped,
        "row_length": length,
        "rows": rows,
        "filled": kept / (rows * length) if rows else 0.0,
        "why": left_out[:REASONS],
        "shown": shown,
    }


def _encoder(settings: Settings, tokenizer: Tokenizer, config: ModelConfig) -> Callable[[Any], dict[str, Conversation]]:
    """A record -> its conversations by name: one without a name, or chosen and rejected."""
    data = settings.data
    if data.template:
        tokenizer = with_template(tokenizer, read_template(data.template))
    conversation = conversation_encoder(tokenizer, config, date=data.date, train_on=settings.objective.train_on)
    preference = preference_encoder(tokenizer, config, date=data.date)

    def encode(record: Mapping[str, Any]) -> dict[str, Conversation]:
        if "chosen" not in record:
            return {"": conversation(record)}
        sides = zip(("chosen", "rejected"), preference(record), strict=True)
        return {side: Conversation(x.ids, np.arange(len(x.ids)) >= x.first) for side, x in sides}

    return encode


def _why(counted: Counter[str], tokens: int, length: int) -> str:
    """Why a conversation, or a part of it, is left out; "" if nothing is."""
    if counted[LONG]:
        return f"{tokens:,} tokens, and a row has {length:,}"
    if counted[NOTHING]:
        return f"none of its trained tokens is among the first {length:,}" if tokens > length else "no trained token"
    return f"{counted['cut']:,} of {tokens:,} tokens are cut off" if counted["cut"] else ""


def _shown(number: int, side: str, conversation: Conversation, tokenizer: Tokenizer, why: str) -> dict[str, Any]:
    # A character may take several tokens: the last of them has it.
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    texts = [decoder.decode(tokenizer.token_bytes(int(token))) for token in conversation.ids]
    tokens = zip(conversation.ids.tolist(), texts, conversation.trained.tolist(), strict=True)
    return {
        "record": number,
        "side": side,
        "length": len(conversation.ids),
        "trained": int(conversation.trained[1:].sum()),
        "left_out": why,
        "turns_without_their_reasoning": conversation.left_out,
        "tokens": [{"id": token, "text": text, "trained": trained} for token, text, trained in tokens],
    }
