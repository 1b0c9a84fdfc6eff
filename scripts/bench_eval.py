"""Speed of evaluation beside lm-eval's HFLM (transformers), on the CPU, measured in one run.

    python scripts/bench_eval.py --model DIR|demo [--dtype float32] [--questions 32] [--rounds 3] [--batch 8]

Both are in one process, with the same requests: choices (a question and four answers), texts (windows of whole texts)
and answers (greedy, 32 tokens). Each kind is run once to warm up, compilation included, then once a round by one after
the other, so that a busy machine is busy for both; what counts is the median. A ratio above 1 is in favour of
smollm3_jax. It needs the extras eval and torch; --batch is HFLM's batch size.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from rich.console import Console
from rich.table import Table

import smollm3_jax as s3
from smollm3_jax.evaluate.answers import Answers
from smollm3_jax.evaluate.harness import EngineLM
from smollm3_jax.evaluate.suite import FOLDER
from smollm3_jax.files import write_output
from smollm3_jax.weights.demo import model_folder

ENDS = (" It is so.", " Nobody knows why it is like this.", " no", " and the next day all was as it had been before.")


def requests(questions: int) -> dict[str, list[Instance]]:
    """By the method of an LM; the same every time, but each question differs."""
    lines = (FOLDER / "languages.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    begun = [f"{i}. {texts[i % len(texts)]}" for i in range(questions)]
    kwargs = {"until": [], "max_gen_toks": 32, "do_sample": False}
    arguments: dict[str, list[tuple[Any, ...]]] = {
        "loglikelihood": [(text, end) for text in begun for end in ENDS],
        "loglikelihood_rolling": [(" ".join(begun[i : i + 4]),) for i in range(0, questions, 4)],
        "generate_until": [(text, kwargs) for text in begun[: questions // 2]],
    }
    return {
        method: [Instance(method, {}, one, number) for number, one in enumerate(of)]  # pyright: ignore[reportArgumentType]
        for method, of in arguments.items()
    }


def seconds(run: Any, *arguments: Any, **options: Any) -> float:
    begin = time.perf_counter()
    run(*arguments, **options)
    return time.perf_counter() - begin


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--questions", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--out", type=Path, help="gets the figures as JSON")
    args = parser.parse_args()
    folder = model_folder(args.model)
    model, tokenizer = s3.from_pretrained(folder, args.dtype), s3.load_tokenizer(folder)
    options: dict[str, Any] = {"pretrained": str(folder), "dtype": args.dtype, "batch_size": args.batch}
    theirs = HFLM(**options | {"device": "cpu"})
    figures: dict[str, dict[str, float]] = {}
    for method, asked in requests(args.questions).items():
        # New answers each time, or the second round would find those of the first.
        taken: dict[str, list[float]] = {"smollm3_jax": [], "HFLM": []}
        for _ in range(args.rounds + 1):
            ours = EngineLM(model, tokenizer, Answers(None, {}))
            taken["smollm3_jax"].append(seconds(getattr(ours, method), asked))
            taken["HFLM"].append(seconds(getattr(theirs, method), asked, disable_tqdm=True))
        medians = {name: statistics.median(of[1:]) for name, of in taken.items()}
        figures[method] = {**medians, "ratio": medians["HFLM"] / medians["smollm3_jax"]}
    table = Table("requests", "smollm3_jax, s", "HFLM, s", "ratio", title=f"{args.model}, {args.dtype}")
    for method, of in figures.items():
        table.add_row(method, *(f"{of[name]:.2f}" for name in ("smollm3_jax", "HFLM", "ratio")))
    Console().print(table)
    if args.out:
        write_output(args.out, json.dumps({**vars(args), "out": None, "figures": figures}, indent=2))
    slower = [method for method, of in figures.items() if of["ratio"] < 1]
    return int(args.dtype == "float32" and bool(slower))


if __name__ == "__main__":
    sys.exit(main())
