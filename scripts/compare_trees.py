"""Whether two checkouts compute the same numbers, bit for bit.

    python scripts/compare_trees.py TREE_A TREE_B [--only NAME ...]

Runs the same probes in both, each in its own process with that tree's code, and compares what they print: for each
probe a digest a line, of logits, tokens, losses, gradients or parameters of tiny models with random weights. The exit
code is 1 if any line differs.

A new probe is one more function in PROBES. What has moved between the trees is found by `find`; what a function no
longer takes is left out by `call`.
"""

import argparse
import functools
import hashlib
import importlib
import inspect
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

# name -> the modules of smollm3_jax that may hold it, the newest place first.
PLACES = {
    "Batch": ("train.state", "train.step"),
    "init_state": ("train.state", "train.step"),
    "state_shardings": ("train.state", "train.step"),
    "StepOptions": ("train.options", "train.step"),
    "train_step": ("train.step",),
    "Pretrain": ("train.objectives.pretrain",),
    "loss_sums": ("train.step",),
    "adamw": ("train.optimizer",),
    "SmolLM3": ("model",),
    "ModelConfig": ("config",),
    "SamplingParams": ("generation.sampling",),
    "Request": ("generation.requests", "generation.api"),
    "complete": ("generation.api",),
}


def find(name: str) -> Any:
    """A name of this tree, wherever it is there."""
    for module in PLACES[name]:
        try:
            return getattr(importlib.import_module(f"smollm3_jax.{module}"), name)
        except (ImportError, AttributeError):
            continue
    raise SystemExit(f"compare_trees: {name} is in none of {', '.join(PLACES[name])}: say where it is in PLACES")


def loss_of_a_batch() -> Any:
    """(model, batch, options) -> (the sum to minimise, other sums)."""
    return (
        find("loss_sums")
        if hasattr(importlib.import_module("smollm3_jax.train.step"), "loss_sums")
        else find("Pretrain")()
    )


def call(function: Any, *arguments: Any, sharding: Any = None, **named: Any) -> Any:
    """A call with `sharding=` where the function takes it; elsewhere the model carries it (see `new_model`)."""
    takes = "sharding" in inspect.signature(function).parameters
    return function(*arguments, **named, **({"sharding": sharding} if takes else {}))


def digest(tree: Any) -> str:
    """Of the names, dtypes, shapes and bits of all arrays in a tree."""
    import jax
    import numpy as np

    sha = hashlib.sha256()
    for x in map(np.asarray, jax.tree.leaves(jax.device_get(tree))):
        sha.update(f"{x.dtype} {x.shape} ".encode() + x.tobytes())
    return sha.hexdigest()[:16]


def new_model(sharding: Any = None, **more: Any) -> Any:
    from flax import nnx

    tiny = importlib.import_module("tiny")  # of the tree's tests
    config = find("ModelConfig").from_hf(tiny.raw_config("plain") | {"rope_scaling": tiny.YARN} | more)
    takes = "sharding" in inspect.signature(find("SmolLM3").__init__).parameters
    return find("SmolLM3")(config, rngs=nnx.Rngs(0), **({"sharding": sharding} if takes else {}))


def rows(length: int = 32) -> Any:
    """Packed rows of several documents, one of them padded."""
    import jax.numpy as jnp
    import numpy as np

    random = np.random.RandomState(0)
    segments = np.sort(random.randint(1, 4, (8, length)), axis=1)
    segments[1, 20:] = 0
    return find("Batch")(*(jnp.asarray(x, jnp.int32) for x in (random.randint(3, 160, (8, length)), segments)))


def mesh(rules: str) -> Any:
    from sharding.mesh import make_mesh
    from sharding.rules import Sharding

    axes = {"fsdp": {"fsdp": 4}, "fsdp_tp": {"fsdp": 2, "tensor": 2}}[rules]
    return Sharding.of(make_mesh(axes), rules).fitted(new_model().config.axis_sizes)


def train(options: Any, sharding: Any = None) -> None:
    """Three steps: losses, and the parameters and moments at the end."""
    import jax
    from jax.sharding import NamedSharding

    optimizer, step = find("adamw")(1e-3), find("train_step")
    state, batch = find("init_state")(new_model(sharding), optimizer), rows()
    if sharding is not None:
        state = jax.device_put(state, call(find("state_shardings"), state, sharding=sharding))
        batch = jax.device_put(batch, NamedSharding(sharding.mesh, sharding.spec("batch", None)))
    for _ in range(3):
        state, metrics = call(step, state, batch, optimizer=optimizer, options=options, sharding=sharding)
        print("metrics", digest([metrics[name] for name in ("loss", "objective", "grad_norm", "tokens", "bad")]))
    print("parameters", digest(state.model), "moments", digest(state.optimizer), "step", int(state.step))


def training() -> dict[str, Callable[[], None]]:
    found = {}
    for dtype, micro, remat in itertools.product(("float32", "bfloat16"), (1, 2), ("none", "dots", "full")):
        named = {"dtype": dtype, "micro_batches": micro, "remat": remat}
        name = f"training {dtype}, {micro} micro-batches, remat {remat}"
        found[name] = lambda named=named: train(find("StepOptions")(**named))
    for rules, dtype in itertools.product(("fsdp", "fsdp_tp"), ("float32", "bfloat16")):
        named = {"dtype": dtype, "micro_batches": 2}
        found[f"training {dtype} under {rules}"] = lambda named=named, rules=rules: train(
            find("StepOptions")(**named), mesh(rules)
        )
    return found


def gradients() -> None:
    import jax

    loss, batch = loss_of_a_batch(), rows()
    for dtype in ("float32", "bfloat16"):
        options = find("StepOptions")(dtype=dtype)
        gradient = jax.jit(lambda model, options=options: jax.grad(lambda m: loss(m, batch, options)[0])(model))
        print(dtype, digest(gradient(new_model())))


def logits() -> None:
    for more in ({}, {"tie_word_embeddings": False}, {"attention_bias": True}):
        batch = rows()
        print(more, digest(new_model(**more)(batch.tokens, segment_ids=batch.segment_ids)))


def tokens() -> None:
    """Greedy and sampled, with their log-probabilities."""
    import smollm3_jax as s3

    tiny = importlib.import_module("tiny")
    with tempfile.TemporaryDirectory() as folder:
        model = s3.from_pretrained(tiny.tiny_checkpoint(Path(folder) / "model"))
    for name, more in {"greedy": {"temperature": 0}, "sampled": {"temperature": 0.8, "top_p": 0.9, "seed": 3}}.items():
        sampling = find("SamplingParams")(max_new_tokens=24, ignore_eos=True, logprobs=2, **more)
        answers = find("complete")(model, [find("Request")(list(range(3, 3 + n)), sampling) for n in (5, 17, 40)])
        print(name, [answer.token_ids for answer in answers])
        print(name, "log-probabilities", [x.logprob for answer in answers for x in answer.logprobs])


def run_of_the_command(devices: int) -> None:
    """`smollm3 train` with held-out text and two stages: metrics.jsonl and the digests in its checkpoints."""
    runs, tiny = importlib.import_module("runs"), importlib.import_module("tiny")
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        tiny.talking_checkpoint(place / "model")
        runs.write_corpus(place / "corpus.jsonl")
        words = ["run.steps=6", "data.length=16", "data.rows=4", "optimizer.warmup_steps=2", "checkpoint.every=2"]
        words += ["eval.every=2", "data.eval_every_nth=5", "step.micro_batches=2", "step.z_loss=1e-4"]
        stages = "[[stages]]\nstart = 3\nrope_theta = 20000.0\nreset_optimizer = true\n"
        importlib.import_module("smollm3_jax.files").write(place / "run.toml", stages)
        env = {**os.environ, "JAX_NUM_CPU_DEVICES": str(devices)}
        command = runs.command(place, place / "run", *words)
        subprocess.run([*command, "checkpoint.keep=9"], check=True, stdout=subprocess.DEVNULL, env=env)
        for name in ("00000006", "00000004"):
            about = json.loads((place / "run" / "checkpoints" / name / "about" / "metadata").read_text())
            print(name, hashlib.sha256(json.dumps(about["arrays"], sort_keys=True).encode()).hexdigest()[:16])
        for line in map(json.loads, (place / "run" / "metrics.jsonl").read_text().splitlines()):
            print(json.dumps({key: x for key, x in line.items() if "second" not in key}, sort_keys=True))


PROBES: dict[str, Callable[[], None]] = {
    "logits": logits,
    "tokens": tokens,
    "gradients": gradients,
    **training(),
    **{f"a run on {n} devices": functools.partial(run_of_the_command, n) for n in (1, 2)},
}


def probe(tree: Path, names: list[str]) -> dict[str, list[str]]:
    """What each probe prints in a tree."""
    quiet = {"JAX_PLATFORMS": "cpu", "TRANSFORMERS_VERBOSITY": "error", "JAX_NUM_CPU_DEVICES": "4"}
    path = {"PYTHONPATH": f"{tree}:{tree / 'tests'}"}
    with tempfile.TemporaryDirectory() as cache:
        done = subprocess.run(
            [sys.executable, __file__, "--probe", *names],
            env={**os.environ, **quiet, **path, "SMOLLM3_JAX_CACHE": cache},
            stdout=subprocess.PIPE,
            text=True,
        )
    if done.returncode:
        raise SystemExit(f"compare_trees: the probes failed in {tree}")
    found: dict[str, list[str]] = {}
    for line in done.stdout.splitlines():
        if line.startswith("# "):
            found[line[2:]] = []
        else:
            found[list(found)[-1]].append(line)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trees", nargs="*", type=Path, metavar="TREE", help="two checkouts of this repository")
    parser.add_argument("--only", nargs="+", default=list(PROBES), choices=list(PROBES), metavar="NAME")
    parser.add_argument("--probe", nargs="+", help=argparse.SUPPRESS)  # in a tree's own process
    args = parser.parse_args()
    if args.probe:
        for name in args.probe:
            print(f"# {name}", flush=True)
            PROBES[name]()
        return 0
    if len(args.trees) != 2:
        parser.error("give two trees")
    one, other = (probe(tree.resolve(), args.only) for tree in args.trees)
    differ = [name for name in args.only if one[name] != other[name]]
    for name in args.only:
        print(f"{'differs' if name in differ else 'equal':8}{len(one[name]):4} lines  {name}")
        for a, b in itertools.zip_longest(one[name], other[name]) if name in differ else ():
            if a != b:
                print(f"    {a}\n    {b}")
    return 1 if differ else 0


if __name__ == "__main__":
    sys.exit(main())
