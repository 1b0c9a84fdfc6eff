"""/v1/completions: prompts as texts or ids to requests, and deltas to an answer or its chunks."""

import secrets
import time
from typing import Any

from ..errors import OptionError, TextTooLong, TokenizerError
from ..generation.requests import Delta, Request
from ..generation.sampling import MAX_LOGPROBS
from .contract import DONE, Event, Job, Server
from .errors import bad, too_long
from .formats import read_format
from .params import MAX_PROMPTS, NAMES, check_ids, is_id, make_request, shared_fields
from .samples import Offsets, Sample, Token, finite, token_text, usage

REFUSED = {
    "suffix": "this model does not fill in",
    "best_of": "give n, and choose",
    "messages": "/v1/chat/completions takes them",
    "tools": "/v1/chat/completions takes them",
}


def parse(body: dict[str, Any], server: Server) -> Job:
    """Raises ApiError, OptionError."""
    server, fields, stream, told, given = shared_fields(body, server, REFUSED)
    logprobs = fields.take("logprobs", int)
    if logprobs is not None and not 0 <= logprobs <= MAX_LOGPROBS:
        raise fields.error("logprobs", f"a whole number from 0 to {MAX_LOGPROBS}")
    echo = fields.take("echo", bool, False)
    limit = fields.take("max_tokens", int)
    nothing = echo and limit == 0  # the prompt alone: a token is generated that nobody sees
    grammar = read_format(fields.object("response_format"))
    salt = fields.take("cache_salt", str, "")
    value = fields.any("prompt")
    fields.finish(NAMES)
    given |= {"logprobs": logprobs, "prompt_logprobs": echo and logprobs is not None}
    options = {} if grammar is None else {"grammar": grammar()}
    prompts = _prompts(value, server)
    if len(prompts) * given.get("n", 1) > MAX_PROMPTS:
        raise bad(f"prompt has {len(prompts)} entries; with n there may be {MAX_PROMPTS} answers", "prompt")
    requests = [
        make_request(server, ids, given, 1 if nothing else limit, "max_tokens", name, **options)
        for ids, _, name in prompts
    ]
    texts = [text for _, text, _ in prompts]
    reply = CompletionsReply(server, requests, texts if echo else None, told, nothing, stream)
    return Job("completions", requests, stream, reply, salt)


def _prompts(value: Any, server: Server) -> list[tuple[list[int], str, str]]:
    """Token ids, text and name in errors of each prompt."""
    if isinstance(value, str) or (isinstance(value, list) and value and all(map(is_id, value))):
        return [_prompt(value, server, "prompt")]
    if not isinstance(value, list) or not value:
        raise bad("prompt must be a text, a list of token ids, or a list of at least one of those", "prompt")
    if len(value) > MAX_PROMPTS:
        raise bad(f"prompt has {len(value)} entries; it may have {MAX_PROMPTS}", "prompt")
    return [_prompt(one, server, f"prompt[{i}]") for i, one in enumerate(value)]


def _prompt(value: Any, server: Server, name: str) -> tuple[list[int], str, str]:
    if not isinstance(value, str | list) or not value:
        raise bad(f"{name} must be a text or a list of token ids, and not empty", name)
    if isinstance(value, list):
        ids = check_ids(value, server.config, name)
        return ids, server.tokenizer.decode(ids, skip_special_tokens=False), name
    try:
        return server.tokenizer.encode(value, context=server.context), value, name
    except TextTooLong as error:
        raise too_long(str(error), server.context, name) from None
    except (OptionError, TokenizerError) as error:
        raise bad(f"{name}: {error}", name) from None


class CompletionsReply:
    """See `contract.Reply`.

    Args:
      echo: the texts of the prompts, if answers begin with them.
      told: where a stream tells the usage, as `stream_options` says it.
      nothing: of what is generated, nothing is shown.
      streams: `add` makes events; else it makes none, which would list all log-probabilities a second time.
    """

    def __init__(
        self,
        server: Server,
        requests: list[Request],
        echo: list[str] | None,
        told: str,
        nothing: bool,
        streams: bool,
    ):
        self._requests, self._told, self._streams = requests, told, streams
        self._head = {"id": f"cmpl-{secrets.token_hex(12)}", "object": "text_completion", "created": int(time.time())}
        self._head |= {"model": server.model, "seed": requests[0].params.seed}
        texts = [""] * len(requests) if echo is None else echo
        self._prompts = [_Prompt(server, request) for request in requests]
        self._choices = [
            [_Choice(server, prompt, text, echo is not None, nothing) for _ in range(prompt.request.params.n)]
            for prompt, text in zip(self._prompts, texts, strict=True)
        ]

    def begin(self) -> list[Event]:
        return []

    def add(self, index: int, delta: Delta) -> list[Event]:
        choices = self._choices[index]
        if delta.prompt_logprobs is not None:  # it comes with the first sample alone
            self._prompts[index].set(delta)
        text, tokens, begins = choices[delta.sample].add(delta)
        if not self._streams:
            return []
        logprobs = choices[delta.sample].listed(tokens, begins)
        if not text and not logprobs and delta.finish_reason is None:
            return []
        number = index * len(choices) + delta.sample
        return [self._chunk(number, text, logprobs, choices[delta.sample].finish_reason)]

    def end(self) -> list[Event]:
        last = self._head | {"choices": [], "usage": self._usage()}
        return [(None, last), DONE] if self._told else [DONE]

    def body(self) -> dict[str, Any]:
        choices = [choice.body() for of_prompt in self._choices for choice in of_prompt]
        numbered = [{"index": i, **choice} for i, choice in enumerate(choices)]
        return self._head | {"choices": numbered, "usage": self._usage()}

    def _usage(self) -> dict[str, Any]:
        prompts = sum(len(request.prompt) for request in self._requests)
        found = usage(prompts, [choice.sample for of_prompt in self._choices for choice in of_prompt])
        cached = sum(max(choice.sample.cached for choice in of_prompt) for of_prompt in self._choices)
        return found | {"prompt_tokens_details": {"cached_tokens": cached}}

    def _chunk(self, number: int, text: str, logprobs: dict[str, Any] | None, finish_reason: str | None) -> Event:
        choice = {"index": number, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}
        counted = {"usage": self._usage() if self._told == "each" else None} if self._told else {}
        return None, self._head | {"choices": [choice]} | counted


class _Prompt:
    """One prompt, and its log-probabilities as all its samples list them."""

    def __init__(self, server: Server, request: Request):
        self.request, self._tokenizer = request, server.tokenizer
        self.logprobs: dict[str, Any] | None = None

    def set(self, delta: Delta) -> None:
        """The prompt's log-probabilities, which its first token has none of."""
        ids: list[Any] = list(self.request.prompt)
        offsets = Offsets(self._tokenizer, special=True)
        values = [None, *(delta.prompt_logprobs or ())]
        tops = [(), *(delta.prompt_top or [()] * (len(values) - 1))]
        self.logprobs = self.listed(
            [Token(token, value, top, offsets.next(token)) for token, value, top in zip(ids, values, tops, strict=True)]
        )

    def listed(self, tokens: list[Token]) -> dict[str, Any]:
        return {
            "tokens": [token_text(self._tokenizer, token.token_id) for token in tokens],
            "token_logprobs": [None if token.logprob is None else finite(token.logprob) for token in tokens],
            "top_logprobs": [self._top(token) for token in tokens] if self.request.params.logprobs else None,
            "text_offset": [token.offset for token in tokens],
        }

    def _top(self, token: Token) -> dict[str, float] | None:
        """The likeliest tokens by their texts, and the token itself; of two with one text, the likelier."""
        if token.logprob is None:
            return None
        found: dict[str, float] = {}
        for other, logprob in (*token.top, (token.token_id, token.logprob)):
            text = token_text(self._tokenizer, other)
            found[text] = max(finite(logprob), found.get(text, finite(logprob)))
        return found


class _Choice:
    """One sample of one prompt.

    An end token is listed only after an echoed prompt: those who ask for that (lm-eval does) take the last token off.
    """

    def __init__(self, server: Server, prompt: _Prompt, echo: str, echoes: bool, nothing: bool):
        self._prompt, self._nothing = prompt, nothing
        self.sample = Sample(server, prompt.request, len(echo), ends=echoes)
        self._echo, self._wanted = echo, prompt.request.params.logprobs is not None
        self._text: list[str] = []
        self._tokens: list[Token] = []

    @property
    def finish_reason(self) -> str | None:
        return "length" if self._nothing and self.sample.finish_reason else self.sample.finish_reason

    def add(self, delta: Delta) -> tuple[str, list[Token], bool]:
        """New text, its tokens, and whether the answer begins with it."""
        tokens = self.sample.add(delta)
        text, begins = delta.text, not self._text
        if self._nothing:
            text, tokens, self.sample.generated = "", [], 0
        if begins:
            text = self._echo + text
        self._text.append(text)
        self._tokens += tokens
        return text, tokens, begins

    def body(self) -> dict[str, Any]:
        logprobs = (self.listed(self._tokens, True) or self._prompt.listed([])) if self._wanted else None
        return {"text": "".join(self._text), "logprobs": logprobs, "finish_reason": self.finish_reason}

    def listed(self, tokens: list[Token], begins: bool) -> dict[str, Any] | None:
        """Log-probabilities of tokens; begins: after those of the prompt, where it has any."""
        before = self._prompt.logprobs if begins else None
        if not self._wanted or not (tokens or before):
            return None
        own = self._prompt.listed(tokens)
        return own if before is None else {key: value and value + own[key] for key, value in before.items()}
