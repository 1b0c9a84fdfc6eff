"""lm-evaluation-harness over our engine finds what it finds over transformers, its own HFLM."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rounding
import tiny
from proxies import FULL

import smollm3_jax as s3
from smollm3_jax.commands.main import main
from smollm3_jax.evaluate.answers import Answers
from smollm3_jax.evaluate.likelihood import Span, log_likelihoods
from smollm3_jax.generation.requests import Delta, Request
from smollm3_jax.weights.load import load, open_checkpoint, with_adapters
from smollm3_jax.weights.peft import read_adapter

pytest.importorskip("lm_eval", reason="lm-eval is not installed (the extra eval has it)")

from lm_eval.api.instance import Instance

from smollm3_jax.evaluate import harness

TASKS = ("local_choices", "local_texts", "local_answers")
BOUND = 1e-3


@pytest.fixture(scope="session")
def tasks(tmp_path_factory) -> Path:
    """Three tasks, and their data."""
    import datasets

    source = Path(__file__).parents[1] / "data" / "tasks"
    folder = tmp_path_factory.mktemp("tasks")
    for file in source.glob("*.yaml"):
        (folder / file.name).write_text(file.read_text().replace("DATA", str(source)))
    datasets.config.HF_DATASETS_CACHE = folder / "cache"
    return folder


@pytest.fixture(scope="module")
def small(tmp_path_factory, release) -> Path:
    return tiny.chat_checkpoint(tmp_path_factory.mktemp("harness") / "small", release / "chat_template.jinja")


@pytest.fixture(scope="module")
def shallow(tmp_path_factory, release) -> Path:
    """Of one layer, whose programs are compiled sooner."""
    folder = tmp_path_factory.mktemp("harness") / "shallow"
    return tiny.chat_checkpoint(folder, release / "chat_template.jinja", num_hidden_layers=1)


def evaluated(model: Path, tasks: Path, output: Path, *options: str) -> dict[str, Any]:
    common = ["--dtype", "float32", "--tasks", ",".join(TASKS), "--include-path", str(tasks), "--output", str(output)]
    assert main(["eval", str(model), *common, *options]) == 0
    [file] = output.rglob("results_*.json")
    return json.loads(file.read_text())


def samples(output: Path, task: str) -> list[dict[str, Any]]:
    """What was written of a task, in the order of its questions."""
    [file] = output.rglob(f"samples_{task}_*.jsonl")
    return sorted(map(json.loads, file.read_text().splitlines()), key=lambda sample: sample["doc_id"])


def by_transformers(model: Path, tasks: Path, **options: Any) -> dict[str, Any]:
    pytest.importorskip("torch")
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    lm = HFLM(pretrained=str(model), dtype="float32", device="cpu", batch_size=4, **options)
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    results: Any = simple_evaluate(model=lm, tasks=list(TASKS), task_manager=manager, bootstrap_iters=0)
    assert results is not None
    return results


def compare(found: dict[str, Any], output: Path, reference: dict[str, Any]) -> None:
    for task in TASKS:
        theirs = sorted(reference["samples"][task], key=lambda sample: sample["doc_id"])
        for ours, other in zip(samples(output, task), theirs, strict=True):
            for mine, its in zip(ours["filtered_resps"], other["filtered_resps"], strict=True):
                if task == "local_choices":
                    assert float(mine[0]) == pytest.approx(its[0], abs=BOUND)
                    assert mine[1] == str(its[1])
                elif task == "local_texts":
                    assert float(mine) == pytest.approx(its, abs=BOUND)
                else:
                    assert mine == its
            assert ours["metrics"] == other["metrics"]
            assert all(ours[name] == other[name] for name in ("acc", "acc_norm", "exact_match") if name in other)
        for name, value in reference["results"][task].items():
            if "stderr" not in name and isinstance(value, float):
                assert found["results"][task][name] == pytest.approx(value, rel=1e-4)


@pytest.mark.slow
@pytest.mark.torch
def test_a_small_model_finds_what_transformers_finds(small, tasks, tmp_path, capsys):
    found = evaluated(small, tasks, tmp_path)
    compare(
        found,
        tmp_path,
        by_transformers(small, tasks, max_length=s3.from_pretrained(small).config.max_position_embeddings),
    )
    assert found["n-samples"]["local_choices"] == {"original": 6, "effective": 6}
    table = capsys.readouterr().out
    assert all(task in table for task in TASKS) and "acc_norm" in table


@FULL
@pytest.mark.torch
def test_the_demo_model_finds_what_transformers_finds(demo_folder, tasks, tmp_path, programs_as_users_run_them):
    found = evaluated(demo_folder, tasks, tmp_path)
    compare(found, tmp_path, by_transformers(demo_folder, tasks))
    assert found["results"]["local_choices"]["acc,none"] >= 0.5  # it is no model of random words


def test_a_run_that_was_stopped_goes_on(small, tasks, tmp_path, monkeypatch):
    whole = evaluated(small, tasks, tmp_path / "whole")
    lines = (tmp_path / "whole" / "answers.jsonl").read_text().splitlines(keepends=True)
    assert len(lines) == 1 + 15 + 5 + 4  # of choices, windows of texts, and answers, each once
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "answers.jsonl").write_text("".join(lines[:16]))
    added: list[str] = []
    add = Answers.add
    monkeypatch.setattr(Answers, "add", lambda self, found: add(self, [added.append(one[0]) or one for one in found]))
    part = evaluated(small, tasks, tmp_path / "part")
    assert len(added) == len(lines) - 16
    assert part["results"] == whole["results"]
    for task in TASKS:
        assert [s["resps"] for s in samples(tmp_path / "part", task)] == [
            s["resps"] for s in samples(tmp_path / "whole", task)
        ]
    # Nothing is left to do, and nothing is done.
    added.clear()
    shutil.copy(tmp_path / "whole" / "answers.jsonl", tmp_path / "part" / "answers.jsonl")
    shutil.rmtree(next(path for path in (tmp_path / "part").iterdir() if path.is_dir()))
    assert evaluated(small, tasks, tmp_path / "part")["results"] == whole["results"]
    assert added == []


def choices(folder: Path, model: s3.SmolLM3, output: Path) -> list[float]:
    """The log-likelihoods of the choices that a run was asked about, in its order, by the model itself."""
    tokenizer, spans = s3.load_tokenizer(folder), []
    for sample in samples(output, "local_choices"):
        for request in sample["arguments"].values():
            before, after = (tokenizer.encode(request[name]) for name in ("arg_0", "arg_1"))
            spans.append(Span([*before, *after], len(before)))
    found = {number: one for batch in log_likelihoods(model, spans) for number, one in batch.items()}
    return [found[number][0] for number in range(len(spans))]


def written(output: Path) -> list[float]:
    """The same as the run wrote them."""
    return [float(value) for sample in samples(output, "local_choices") for value, _ in sample["filtered_resps"]]


def answered(folder: Path, model: s3.SmolLM3, output: Path) -> tuple[list[str], list[str]]:
    """What a run answered, and what the engine answers to the same prompts; a line each."""
    run = samples(output, "local_answers")
    prompts = [sample["arguments"]["gen_args_0"]["arg_0"] for sample in run]
    texts = s3.generate(model, prompts, tokenizer=s3.load_tokenizer(folder), max_new_tokens=24, temperature=0.0)
    return [sample["filtered_resps"][0] for sample in run], [text.partition("\n")[0] for text in texts]


@pytest.mark.parametrize("option", ["--adapter", "--weights"])
def test_adapters_and_quantized_weights_are_those_of_python(shallow, tasks, tmp_path, option):
    if option == "--adapter":
        raw = json.loads((shallow / "config.json").read_text())
        adapter = read_adapter(tiny.tiny_adapter(tmp_path / "adapter", shallow, raw))
        value = f"{tmp_path / 'adapter'}:0.5"
        model = load(with_adapters(open_checkpoint(shallow), [(adapter, 0.5)]), "float32")
    else:
        value, model = "int8", s3.from_pretrained(shallow, "float32", weights="int8")
    found = evaluated(shallow, tasks, tmp_path / "out", option, value)
    assert written(tmp_path / "out") == choices(shallow, model, tmp_path / "out")
    run, direct = answered(shallow, model, tmp_path / "out")
    assert run == direct
    # The option counts: without it the numbers are others.
    assert written(tmp_path / "out") != choices(shallow, s3.from_pretrained(shallow, "float32"), tmp_path / "out")
    assert found["config"]["model_args"][option.removeprefix("--")] == ([value] if option == "--adapter" else value)


@pytest.mark.slow
def test_a_mesh_gives_what_one_device_gives(shallow, tasks, tmp_path):
    evaluated(shallow, tasks, tmp_path, "--mesh", "data=4,tensor=2")
    model = s3.from_pretrained(shallow, "float32")
    bounded = rounding.shaken(lambda model: np.array(choices(shallow, model, tmp_path)), model)[0]
    assert rounding.within(written(tmp_path), bounded) <= 1
    assert rounding.within(written(tmp_path)[::-1], bounded) > 1
    run, direct = answered(shallow, model, tmp_path)
    assert run == direct


class Said:
    """An engine that answers each prompt with the next of these texts, some letters a step."""

    def __init__(self, texts: list[str]):
        self.left, self.running, self.requests = list(texts), dict[int, str](), list[Request]()
        self.cancelled: list[int] = []
        self.has_room = True

    def submit(self, request: Request, name: str) -> int:
        self.requests.append(request)
        self.running[len(self.requests) - 1] = self.left.pop(0)
        return len(self.requests) - 1

    def step(self) -> list[Delta]:
        found = []
        for number, text in list(self.running.items()):
            said, self.running[number] = text[:5], text[5:]
            reason = None if self.running[number] else "stop"
            found.append(Delta(number, 0, (1,) * len(said), said, None, None, reason))
            if reason:
                del self.running[number]
        return found

    def cancel(self, number: int) -> None:
        self.cancelled.append(number)
        del self.running[number]

    def close(self) -> None:
        pass


def test_what_lost_its_beginning_is_counted_and_said(shallow, tasks, tmp_path, capsys, caplog, monkeypatch):
    monkeypatch.setattr(
        harness, "log_likelihoods", lambda _, spans, __: [dict.fromkeys(range(len(spans)), (-1.0, False))]
    )
    monkeypatch.setattr(harness, "Engine", lambda *_, **__: Said(["honey"] * 4))
    common = ["eval", str(shallow), "--tasks", ",".join(TASKS), "--include-path", str(tasks), "--max-length"]
    assert main([*common, "56", "--json", "--output", str(tmp_path)]) == 0
    [file] = tmp_path.rglob("results_*.json")
    found = json.loads(capsys.readouterr().out)["smollm3_jax"]
    assert json.loads(file.read_text())["smollm3_jax"] == found
    # As it is asked: a prompt leaves room for 24 tokens; of a text the last token is not given.
    encode = s3.load_tokenizer(shallow).encode
    given = [sample["arguments"]["gen_args_0"] for sample in samples(tmp_path, "local_answers")]
    prompts = [len(encode(one["arg_0"])) > 56 - 24 for one in given]
    pairs = [one for sample in samples(tmp_path, "local_choices") for one in sample["arguments"].values()]
    texts = [len(encode(one["arg_0"])) + len(encode(one["arg_1"])) > 56 + 1 for one in pairs]
    assert 0 < sum(prompts) < len(prompts) and 0 < sum(texts) < len(texts)
    windows = len(samples(tmp_path, "local_texts"))  # which lose nothing
    counts = {"prompts": len(prompts), "prompts_cut": sum(prompts)}
    counts |= {"texts": len(texts) + windows, "texts_cut": sum(texts)}
    assert found == {"max_length": 56, **counts}
    note = "{prompts_cut} of {prompts} prompts and {texts_cut} of {texts} texts lost their beginning"
    note = f"{note.format(**counts)}: max_length is 56 tokens"
    [warning] = [one.getMessage() for one in caplog.records if "lost their beginning" in one.getMessage()]
    assert warning == note
    # Once more, from what is known: the note stands below the table.
    assert main([*common, "56", "--output", str(tmp_path)]) == 0
    assert note in " ".join(capsys.readouterr().out.split())


def test_thinking_is_not_graded_and_no_stop_is_looked_for_in_it(small, monkeypatch):
    """lm-eval #3576, lighteval #790: what was graded was the thinking, or the answer had ended in it."""
    texts = {
        "<think>\nIs it 3? Question: no.\n\nNo.\n</think>\n\nIt is 4.\nQuestion: more": "It is 4.\n",
        "<think>\nIt may be 4, or ": "",
        "It is 4.\n\nQuestion: 2 + 3": "It is 4.\n\n",
        "Well. <think>\nOh": "Well. ",
    }
    model, tokenizer = s3.from_pretrained(small), s3.load_tokenizer(small)
    engine = Said(list(texts))
    monkeypatch.setattr(harness, "Engine", lambda *_, **__: engine)
    kwargs = {"until": ["Question:", "<|im_end|>"], "max_gen_toks": 9}
    asked = [Instance("generate_until", {}, (f"{i} + 2?", kwargs), i) for i in range(len(texts))]
    found = harness.EngineLM(model, tokenizer, Answers(None, {}), chat=True).generate_until(asked)
    assert found == list(texts.values())
    assert engine.cancelled == [2, 0]
    assert all(request.params.stop == ["<|im_end|>"] for request in engine.requests)
    # Without a chat all is the answer, and the engine stops by itself.
    engine.left = ["<think> 4"]
    assert harness.EngineLM(model, tokenizer, Answers(None, {})).generate_until(asked[:1]) == ["<think> 4"]
    assert engine.requests[-1].params.stop == kwargs["until"]


@FULL
def test_samples_of_one_question_differ_and_are_found_again(small, tmp_path):
    model, tokenizer = s3.from_pretrained(small), s3.load_tokenizer(small)
    kwargs = {"do_sample": True, "temperature": 1.5, "top_p": 0.95, "max_gen_toks": 9, "until": []}
    asked = [Instance("generate_until", {}, ("2 + 2?", kwargs), 0)] * 3
    found = harness.EngineLM(model, tokenizer, Answers(None, {})).generate_until(asked)
    assert len(set(found)) == 3
    # One after the other they are the same: none depends on the others.
    with Answers(tmp_path, {}) as answers:
        lm = harness.EngineLM(model, tokenizer, answers)
        assert [lm.generate_until(asked[: i + 1])[-1] for i in range(3)] == found


def test_chats_are_those_of_transformers(small, release):
    pytest.importorskip("transformers")
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(small)
    model, tokenizer = s3.from_pretrained(small), s3.load_tokenizer(small)
    chat = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": " 2 + 2? "}]
    begun = [*chat, {"role": "assistant", "content": "It is"}]
    for thinking in (True, False):
        lm = harness.EngineLM(model, tokenizer, Answers(None, {}), chat=True, thinking=thinking)
        options = {"tokenize": False, "enable_thinking": thinking}
        text = theirs.apply_chat_template(chat, add_generation_prompt=True, **options)
        assert lm.apply_chat_template(chat) == text
        text = theirs.apply_chat_template(begun, continue_final_message=True, **options)
        assert lm.apply_chat_template(begun, add_generation_prompt=False) == text
