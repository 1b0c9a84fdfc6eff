"""Bodies of /v1/completions and their answers, with the released tokenizer."""

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types import Completion
from said import answer, deltas, ids_of

from smollm3_jax.serve import completions
from smollm3_jax.serve.errors import ApiError
from smollm3_jax.serve.job import Job, Server, parse
from smollm3_jax.serve.samples import LOWEST, finite

END = "<|im_end|>"
TEXT = "Once 👋🏽 upon"


def complete(server: Server, prompt: Any = TEXT, **fields: Any) -> Job:
    return parse("completions", {"prompt": prompt, "stream": True, **fields}, server)


def joined(events: list[Any]) -> list[dict[str, Any]]:
    """The choices that a stream makes."""
    *events, done = events
    assert done == (None, "[DONE]")
    choices: dict[int, dict[str, Any]] = {}
    for name, chunk in events:
        assert name is None and chunk["object"] == "text_completion"
        for new in chunk["choices"]:
            old = choices.setdefault(new["index"], {"index": new["index"], "text": "", "logprobs": None})
            old["text"] += new["text"]
            old["finish_reason"] = new["finish_reason"]
            if new["logprobs"]:
                lists = old["logprobs"] or {key: [] for key in new["logprobs"]}
                old["logprobs"] = {
                    key: None if new["logprobs"][key] is None else lists[key] + new["logprobs"][key] for key in lists
                }
    return [choices[i] for i in sorted(choices)]


def echoed(server: Server, job: Job, *texts: str) -> dict[str, Any]:
    """The body where the engine tells of the prompt, too: token i has -i, and the token 5 has -i / 2."""
    for i, (request, text) in enumerate(zip(job.requests, texts, strict=True)):
        values = range(1, len(request.prompt))
        first, *rest = deltas(server, request, ids_of(server.tokenizer, text))
        tops = tuple(((5, -i / 2),) for i in values)
        first = dataclasses.replace(first, prompt_logprobs=tuple(-float(i) for i in values), prompt_top=tops)
        for delta in (first, *rest):
            job.reply.add(i, delta)
    return job.reply.body()


def test_a_text(server):
    job = complete(server, seed=4, max_tokens=20)
    [request] = job.requests
    assert request.prompt == ids_of(server.tokenizer, TEXT) and request.ends == ()
    events, body = answer(server, job, " a time" + END)
    Completion.model_validate(body)
    assert body["choices"] == [{"index": 0, "text": " a time", "logprobs": None, "finish_reason": "stop"}]
    assert body["usage"]["completion_tokens"] == 3 and body["usage"]["prompt_tokens"] == len(request.prompt)
    assert (body["seed"], body["object"], body["model"]) == (4, "text_completion", server.name)
    assert joined(events) == body["choices"]


def test_texts_and_ids_and_lists_of_both(server):
    ids = ids_of(server.tokenizer, TEXT)
    for prompt, count in ((TEXT, 1), (ids, 1), ([TEXT, TEXT], 2), ([ids, ids], 2), ([TEXT, ids], 2), ([ids], 1)):
        assert [request.prompt for request in complete(server, prompt).requests] == [ids] * count
    job = complete(server, [TEXT, ids], n=2)
    body = answer(server, job, "a" + END, "b" + END, "c" + END, "d" + END)[1]
    assert [(choice["index"], choice["text"]) for choice in body["choices"]] == list(enumerate("abcd"))
    assert body["usage"]["prompt_tokens"] == 2 * len(ids)


@pytest.mark.parametrize("prompt", [TEXT, "ids"])
def test_echo_with_logprobs(server, prompt):
    ids = ids_of(server.tokenizer, TEXT)
    job = complete(server, ids if prompt == "ids" else TEXT, echo=True, logprobs=1, max_tokens=3)
    assert job.requests[0].params.prompt_logprobs
    [choice] = echoed(server, job, " a 👋🏽")["choices"]
    assert choice["text"].startswith(TEXT + " a ")
    logprobs = choice["logprobs"]
    count = len(ids)
    assert logprobs["token_logprobs"][:count] == [None, *(-float(i) for i in range(1, count))]
    assert logprobs["top_logprobs"][0] is None
    five = server.tokenizer.decode([5])
    for i in range(1, count):
        assert logprobs["top_logprobs"][i] == {five: -i / 2, logprobs["tokens"][i]: -float(i)}
    assert len({len(values) for values in logprobs.values()}) == 1
    # Each token that is whole characters stands where its offset says, and parts of one where that begins.
    for token, offset in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
        assert token.startswith("bytes:") or choice["text"].startswith(token, offset)
    assert any(token.startswith("bytes:") for token in logprobs["tokens"][:count])


def test_a_prompt_is_listed_once_for_all_its_samples(server, monkeypatch):
    """And what only a stream hands out is not listed for an answer that comes whole."""
    asked, text_of = [], completions.token_text
    monkeypatch.setattr(
        completions, "token_text", lambda tokenizer, token: asked.append(token) or text_of(tokenizer, token)
    )
    n, ids = 4, ids_of(server.tokenizer, TEXT)
    job = complete(server, echo=True, logprobs=0, n=n, max_tokens=1, stream=False)
    [first] = deltas(server, job.requests[0], ids_of(server.tokenizer, " a"))
    first = dataclasses.replace(first, prompt_logprobs=(-1.0,) * (len(ids) - 1), prompt_top=((),) * (len(ids) - 1))
    for sample in range(n):
        assert job.reply.add(0, dataclasses.replace(first, sample=sample)) == []
        first = dataclasses.replace(first, prompt_logprobs=None, prompt_top=None)
    body = job.reply.body()
    assert [len(choice["logprobs"]["tokens"]) for choice in body["choices"]] == [len(ids) + 1] * n
    assert len(asked) == len(ids) + n


def test_log_probabilities_that_are_no_numbers_are_the_lowest():
    assert [finite(x) for x in (float("nan"), float("-inf"), None, -2.5)] == [LOWEST] * 3 + [-2.5]


def test_what_lm_eval_reads(server):
    """It asks for one token, and takes the last one off, whatever it is: an end, too."""
    for said in (" a", END):
        job = complete(server, [ids_of(server.tokenizer, TEXT)], echo=True, logprobs=1, max_tokens=1, seed=1234)
        [choice] = echoed(server, job, said)["choices"]
        assert len(choice["logprobs"]["token_logprobs"]) == len(job.requests[0].prompt) + 1
    assert choice["text"] == TEXT  # the end is a token of the list alone


def test_the_prompt_alone(server):
    [choice] = (body := echoed(server, complete(server, echo=True, logprobs=0, max_tokens=0), " a"))["choices"]
    assert (choice["text"], choice["finish_reason"], body["usage"]["completion_tokens"]) == (TEXT, "length", 0)
    assert len(choice["logprobs"]["tokens"]) == len(ids_of(server.tokenizer, TEXT))
    assert choice["logprobs"]["top_logprobs"] is None


def test_an_end_is_not_among_the_tokens(server):
    body = answer(server, complete(server, logprobs=0), " a time" + END)[1]
    assert body["choices"][0]["logprobs"]["tokens"] == [" a", " time"]
    assert body["choices"][0]["logprobs"]["text_offset"] == [0, 2]
    Completion.model_validate(body, strict=True)


def test_of_tokens_with_one_text_the_likelier_counts(server):
    text = " a 👋🏽"
    body = answer(server, complete(server, logprobs=20), text + END)[1]
    logprobs = body["choices"][0]["logprobs"]
    for i, (token, top) in enumerate(zip(logprobs["tokens"], logprobs["top_logprobs"], strict=True)):
        assert len(top) == 21 and top[token] == -i / 8 and max(top.values()) == 0


@pytest.mark.filterwarnings("ignore:Generating overly large repr")
@settings(max_examples=60)
@given(
    text=st.lists(st.sampled_from([" a", "👩‍👩‍👧", "STO", "STOP", "é", "\n"]), min_size=1).map("".join),
    cuts=st.lists(st.integers(1, 40)),
    fields=st.fixed_dictionaries(
        {}, optional={"stop": st.just(["STOP"]), "logprobs": st.just(2), "echo": st.just(True)}
    ),
)
def test_an_answer_in_pieces_is_the_answer_in_one(server, text, cuts, fields):
    """C9, C10."""
    job, whole = (complete(server, seed=1, **fields) for _ in range(2))
    events, body = answer(server, job, text + END, cuts=cuts)
    one = answer(server, whole, text + END)[1]
    assert body["choices"] == one["choices"]
    [streamed], [choice] = joined(events), body["choices"]
    if streamed["logprobs"] is None and "logprobs" in fields:  # no text, and so no chunk with any
        assert not choice["logprobs"].pop("tokens")
        streamed["logprobs"] = choice["logprobs"]
    assert streamed == choice
    assert body["usage"] == one["usage"]
    expected = text.split("STOP")[0] if "stop" in fields else text
    assert choice["text"] == (TEXT if "echo" in fields else "") + expected


def test_usage_of_a_stream(server):
    """C10."""
    job = complete(server, stream=True, stream_options={"include_usage": True})
    events, body = answer(server, job, " a" + END)
    assert events[-2][1]["usage"] == body["usage"] and events[-2][1]["choices"] == []
    for _, chunk in events[:-1]:
        json.dumps(chunk)
        Completion.model_validate(chunk | {"choices": []})


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"prompt": None}, "prompt", "a text"),
    ({"prompt": ""}, "prompt", "not empty"),
    ({"prompt": []}, "prompt", "at least one"),
    ({"prompt": [""]}, "prompt[0]", "not empty"),
    ({"prompt": [[]]}, "prompt[0]", "not empty"),
    ({"prompt": [1.5]}, "prompt[0]", "token ids"),
    ({"prompt": [1, "a"]}, "prompt[0]", "token ids"),
    ({"prompt": [[1, 2**31]]}, "prompt[0][1]", "a token id from 0"),
    ({"prompt": [128256]}, "prompt[0]", "from 0 to 128255"),
    ({"prompt": ["a"] * 257}, "prompt", "256"),
    ({"prompt": ["a"] * 200, "n": 2}, "prompt", "256"),
    ({"suffix": "end"}, "suffix", "does not fill in"),
    ({"best_of": 2}, "best_of", "give n"),
    ({"logprobs": True}, "logprobs", "a whole number"),
    ({"logprobs": 21}, "logprobs", "from 0 to 20"),
    ({"max_tokens": 0}, "max_tokens", "at least 1"),
    ({"echo": 1}, "echo", "true or false"),
    ({"messages": [1]}, "messages", "chat/completions"),
    ({"ecko": True}, "ecko", "use echo"),
]


@pytest.mark.parametrize(("fields", "param", "words"), REFUSED, ids=[str(fields)[:60] for fields, _, _ in REFUSED])
def test_refused(server, fields, param, words):
    with pytest.raises(ApiError) as error:
        complete(server, **{"prompt": TEXT} | fields)
    assert (error.value.status, error.value.param) == (400, param), error.value
    assert words in error.value.message


def test_prompts_that_are_too_long(server):
    """S5, C12."""
    for prompt in ("word " * server.context, "x" * 10**7, [5] * server.context):
        with pytest.raises(ApiError, match="maximum context length is 4096 tokens") as error:
            complete(server, prompt)
        assert (error.value.code, error.value.param) == ("context_length_exceeded", "prompt")
