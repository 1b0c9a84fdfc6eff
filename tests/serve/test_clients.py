"""Programs that others have written, against a server on a socket: what they ask is theirs, not ours."""

import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from proxies import FULL
from serving import Running, Speaker, serving, started

import smollm3_jax as s3
from smollm3_jax.evaluate.perplexity import perplexity
from smollm3_jax.generation import grammar
from smollm3_jax.generation.requests import Delta, Request
from smollm3_jax.serve.job import Server, parse

SCRIPTS = Path(__file__).with_name("npm")
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Århus"}}\n</tool_call><|im_end|>'
# What a prompt's last message holds -> what answers it.
SAID = {
    "12 degrees": "It is cold.<|im_end|>",
    "Think": "<think>\nHm.\n</think>\nYes, of course: é 👋🏽.<|im_end|>",
    "weather": CALL,
    "JSON": '{"city": "Århus"}<|im_end|>',
    "Count": " and one" * 1500,
}


def by_its_last_message(server: Server, request: Request) -> str:
    prompt: list[int] = list(request.prompt)  # pyright: ignore[reportAssignmentType]
    last = server.tokenizer.decode(prompt, skip_special_tokens=False).rpartition("<|im_start|>user")[2]
    return next((said for word, said in SAID.items() if word in last), "Hello there.<|im_end|>")


def keeping(server: Server, request: Request) -> str:
    """An answer that keeps to the request's grammar, as every model's does: token by token what soonest ends it."""
    assert request.grammar is not None
    words, ids = grammar.vocabulary_of(server.tokenizer), []
    matcher, closing = words.begin(request.grammar), server.tokenizer.encode('"}]', add_special_tokens=False)
    while not matcher.is_accepting() and len(ids) < 50:
        allowed = grammar._ids(grammar._next(matcher, words.tokens, words.end))
        ids.append(next((token for token in closing if token in allowed), allowed[0]))
        assert matcher.consume_token(ids[-1])
    return server.tokenizer.decode(ids, skip_special_tokens=False) + ("<|im_end|>" if matcher.is_accepting() else "")


def by_its_grammar(server: Server, request: Request) -> str:
    """As `by_its_last_message`, where the request has no grammar."""
    return by_its_last_message(server, request) if request.grammar is None else keeping(server, request)


class Failing(Speaker):
    """Gives up the answers to prompts that ask for it, after a few tokens."""

    def _answer(self, number: int, request: Request, sample: int) -> list[Delta]:
        found = super()._answer(number, request, sample)
        if "Fail" not in self._server.tokenizer.decode(list(request.prompt)):  # pyright: ignore[reportArgumentType]
            return found
        return [found[0], Delta(number, sample, (5,), "", None, None, "error")]


def needs(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed (the extra peers has it)")


@pytest.fixture
def spoken(server: Server) -> Iterator[Running]:
    """The released model's forms, and answers that are written down."""
    engine = Failing(server, lambda request, sample: by_its_last_message(server, request), pace=0.002)
    with serving(lambda: engine, parse, server=server, keys=["secret"], max_queue=64, max_queue_tokens=10**6) as it:
        yield it


@pytest.fixture(scope="module")
def demo(demo_folder: Path) -> Iterator[int]:
    """The port of a server with a real model, as a user starts it."""
    with started("demo", "--dtype", "float32", "--slots", "4", "--context", "512") as (process, port):
        yield port
        process.terminate()
        assert process.wait(60) == 0


# --- npm --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def npm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the scripts and the packages that they import."""
    if shutil.which("npm") is None or shutil.which("node") is None:
        pytest.skip("no npm: the clients for JavaScript are not tested")
    folder = shutil.copytree(SCRIPTS, tmp_path_factory.mktemp("npm") / "npm")
    command = ["npm", "install", "--no-audit", "--no-fund", "--no-package-lock"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    if done.returncode:
        pytest.skip(f"npm gives no packages: {done.stderr.strip()[-300:]}")
    return folder


def run(script: Path, port: int, model: str) -> None:
    command = ["node", script, f"http://localhost:{port}/v1", model]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("client, left", [("openai", (1, 2)), ("ai", (1,))])
def test_clients_of_npm(npm: Path, spoken: Running, client: str, left: tuple[int, ...]):
    """Chat, streams, reasoning, tools, schemas, errors, and streams that are left: C4 to C8. (A busy machine may see
    openai's second one, which is given up after 300 ms, before it has arrived.)"""
    run(npm / f"{client}.mjs", spoken.port, "SmolLM3-3B")
    spoken.until(spoken.is_at_rest)
    assert spoken.service.metrics.cancelled.labels("disconnect")._value.get() in left


@FULL
@pytest.mark.slow
def test_clients_of_npm_and_a_real_model(npm: Path, demo: int):
    run(npm / "demo.mjs", demo, "demo")


# --- schemathesis -----------------------------------------------------------------------------------------


@pytest.fixture
def obedient(server: Server) -> Iterator[Running]:
    """As `spoken`, and what is asked for by a schema keeps to it."""
    engine = Failing(server, lambda request, sample: by_its_grammar(server, request), pace=0.002)
    with serving(lambda: engine, parse, server=server, keys=["secret"], max_queue=64, max_queue_tokens=10**6) as it:
        yield it


@pytest.mark.slow
@pytest.mark.parametrize("examples", [5, pytest.param(500, marks=FULL)])
def test_schemathesis(obedient: Running, examples: int, tmp_path: Path):
    """All that it checks, of every operation, streams too, with good and bad data: never a 500, and all answers as
    they are described. But for one thing: a body may be of the right form and yet be refused, as where a call names a
    tool that nobody offers."""
    needs("schemathesis")
    command = [Path(sys.executable).with_name("st"), "run", f"http://localhost:{obedient.port}/openapi.json"]
    options = ["--max-examples", str(examples), "--exclude-checks", "positive_data_acceptance", "--continue-on-failure"]
    more = ["--header", "Authorization: Bearer secret", "--no-color", "--request-timeout", "60"]
    done = subprocess.run([*command, *options, *more], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    paths = obedient.ask("GET", "/openapi.json", Authorization="Bearer secret")[1]["paths"]
    assert f"Tested: {len(paths)}" in done.stdout and "Coverage (in" in done.stdout and "Fuzzing (in" in done.stdout
    obedient.until(obedient.is_at_rest)
    assert obedient.service.worker.failure is None


# --- lm-eval ----------------------------------------------------------------------------------------------

PROSE = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: {kind}
doc_to_text: {text}
doc_to_target: {target}
{more}metric_list: [{{metric: {metric}}}]
"""
TEXTS = [
    "The sky is blue because air scatters short waves of light more than long ones. At dusk the light has a longer way "
    "through the air, and what is left of it is red.",
    "Æbler og pærer: 3 kg à 12,50 kr. — i alt 37,50 kr. 👋🏽",
    "def add(a, b):\\n    return a + b\\n",
]
QUESTIONS = [
    {"question": "The capital of France is", "choices": ["Paris", "Rome", "Oslo"], "answer": 0},
    {"question": "Water freezes at", "choices": ["noon", "zero degrees", "the river bank"], "answer": 1},
    {"question": "The opposite of hot is", "choices": ["seven", "cold"], "answer": 1},
    {"question": "Two and two are", "choices": ["five", "four", "nine thousand"], "answer": 1},
]


def write_tasks(folder: Path) -> None:
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    (folder / "questions.jsonl").write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    texts = {"name": "texts", "kind": "loglikelihood_rolling", "text": '""', "target": '"{{text}}"', "more": ""}
    questions = {"name": "questions", "kind": "multiple_choice", "text": '"{{question}}"', "target": "answer"}
    questions["more"] = "doc_to_choice: choices\n"
    for task, metric in ((texts, "bits_per_byte"), (questions, "acc")):
        data = folder / f"{task['name']}.jsonl"
        (folder / f"{task['name']}.yaml").write_text(PROSE.format(**task, data=data, metric=metric))


@FULL
@pytest.mark.slow
def test_lm_eval_finds_what_the_model_says_offline(
    demo: int, demo_folder: Path, tmp_path: Path, programs_as_users_run_them: None
):
    """Log-likelihoods of texts and of choices, by HTTP, are those of one forward pass over each, and perplexity is that
    of `smollm3 perplexity`."""
    needs("lm_eval")
    write_tasks(tmp_path)
    arguments = {"model": "demo", "base_url": f"http://localhost:{demo}/v1/completions", "max_length": 512}
    arguments |= {"tokenizer": demo_folder, "tokenizer_backend": "huggingface", "num_concurrent": 4}
    own = ["--model_args", ",".join(f"{key}={value}" for key, value in arguments.items())]
    own += ["--tasks", "texts,questions", "--include_path", tmp_path, "--log_samples", "--output_path", tmp_path]
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "local-completions", *own]
    offline = {"HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | offline, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]

    model, tokenizer = s3.from_pretrained(demo_folder, dtype="float32"), s3.load_tokenizer(demo_folder)
    # lm-eval puts the tokenizer's bos_token before a text.
    texts = [[tokenizer.backend.token_to_id("<|im_start|>"), *tokenizer.encode(text)] for text in TEXTS]
    found = [float(sample["filtered_resps"][0]) for sample in samples(tmp_path, "texts")]
    for value, ids in zip(found, texts, strict=True):
        assert value == pytest.approx(likelihoods(model, ids).sum(), abs=LOG_ERROR * len(ids))
    report, tokens = perplexity(model, {"": texts}), sum(len(ids) - 1 for ids in texts)
    assert math.exp(-sum(found) / tokens) == pytest.approx(report["perplexity"], rel=2 * LOG_ERROR)

    answered = samples(tmp_path, "questions")
    for sample, asked in zip(answered, QUESTIONS, strict=True):
        before, wanted = len(tokenizer.encode(asked["question"])), []
        for choice in asked["choices"]:
            ids = tokenizer.encode(f"{asked['question']} {choice}")
            wanted.append(likelihoods(model, ids)[before - 1 :].sum())
        said = [float(response[0]) for response in sample["filtered_resps"]]
        assert said == pytest.approx(wanted, abs=LOG_ERROR * 8)
        assert np.argmax(said) == np.argmax(wanted)
    assert sum(sample["acc"] for sample in answered) >= 3  # it is no model of random words


# A token's: float32's unit roundoff is 6e-8, logits are of up to 40, and 30 layers add up errors of a few roundoffs.
LOG_ERROR = 1e-4


def samples(folder: Path, task: str) -> list[dict[str, Any]]:
    """What lm-eval has written of a task, in the order of its questions."""
    (file,) = folder.rglob(f"samples_{task}_*.jsonl")
    return sorted(map(json.loads, file.read_text().splitlines()), key=lambda sample: sample["doc_id"])


def likelihoods(model: s3.SmolLM3, ids: list[int]) -> np.ndarray:
    """The log-probability of each token but the first, given those before it: float64 [T - 1]."""
    padded = jnp.array([[*ids, *[0] * (128 - len(ids))]])  # what comes after a token changes nothing
    logits = np.asarray(model(padded), np.float64)[0, : len(ids) - 1]
    logits -= logits.max(-1, keepdims=True)
    logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
    return logits[np.arange(len(ids) - 1), ids[1:]]
