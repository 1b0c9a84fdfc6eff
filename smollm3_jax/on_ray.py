"""Many prompts on many machines: Ray Data (the extra `ray`) holds the rows, and each of its actors a whole model."""

import contextlib
import functools
import json
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import ModuleType
from typing import Any

import numpy as np
from jax.typing import DTypeLike

from .chat.template import encode_for_answer
from .errors import OptionError, SmolLM3Error, SupportError
from .generation.jsonl import Batch
from .generation.lines import SAMPLING_FIELDS, LineOptions, Shape, answers, shape_for
from .generation.sampling import SamplingParams, with_defaults
from .model import SmolLM3
from .pretrained import from_pretrained
from .support import how_to_install
from .tokenizer import Tokenizer, tokenizer_of

# Columns of a batch that ask; all others go through.
COLUMNS = ("prompt", "messages", "json_schema", *(name for name in SAMPLING_FIELDS if name != "n"))
# What an answer of one line has -> the column's value where there is none.
ANSWER: dict[str, Any] = {"text": "", "finish_reason": "", "prompt_tokens": 0, "completion_tokens": 0, "error": ""}
# How often an actor that was lost is started again, and its rows are answered again: as often as machines that can be
# taken away may go, and not for ever, as rows that no actor survives would ask.
RESTARTS = 16
# Calls of an actor have this many times the slots in lines: the slots stay full, and little is lost with an actor.
LINES_PER_SLOT = 4


class SmolLM3Predictor:
    """A model that answers the rows of a batch, for Ray Data: `ds.map_batches(SmolLM3Predictor, ...)`.

    A row asks by its column "prompt" or "messages", and may have "json_schema" and any field of SamplingParams but "n"
    for itself; what is null is not said. It gets "text", "finish_reason", "prompt_tokens", "completion_tokens" and
    "error", which is empty unless the row cannot be run. Columns of other names stay.
    """

    def __init__(
        self,
        model: str | Callable[[], SmolLM3],
        params: SamplingParams | Mapping[str, Any] | None = None,
        *,
        chat: bool = False,
        thinking: bool = True,
        slots: int | None = None,
        context: int | None = None,
        cache_dtype: DTypeLike | None = None,
        **load: Any,
    ):
        """Loads the model.

        Args:
          model: a name as for `from_pretrained`, that every machine knows, or what gives a model with its tokenizer.
          params: for rows that say nothing else, or fields of it over the model's own generation_config.json. A row
            without a seed draws with seed + its column "index", if it has one.
          chat: a "prompt" is a user's message, and the chat template is applied to it.
          thinking: what the chat template is told about thinking.
          slots: how many rows are answered at a time, 16 if nothing is said.
          context: the most tokens of a row, its prompt included; None takes what each batch needs. Answers do not
            depend on their batch, bit for bit, where slots and context are given.
          cache_dtype: as for `stream`.
          **load: of `from_pretrained`, such as dtype and weights.

        Raises:
          OptionError: params.n is not 1, or logprobs are asked for, or a field is unknown.
          SmolLM3Error: the model cannot be loaded.
        """
        self.model = from_pretrained(model, **load) if isinstance(model, str) else model()
        tokenizer = tokenizer_of(self.model)
        if tokenizer is None:
            raise OptionError("the model has no tokenizer, and rows are texts")
        self.tokenizer: Tokenizer = tokenizer
        if not isinstance(params, SamplingParams):
            own = self.model.generation_config, self.model.config.vocab_size
            params, fit = with_defaults(*own, **(params or {})), "max_new_tokens" not in (params or {})
        else:
            fit = False
        if params.n != 1 or params.logprobs is not None or params.prompt_logprobs:
            raise OptionError("a row has one answer, a text: leave out n, logprobs and prompt_logprobs")
        self.options = LineOptions(params, encode_for_answer, chat, thinking, fit)
        self.slots, self.context, self.cache_dtype = slots, context, cache_dtype

    def __call__(self, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The batch with the answers' columns; a column is an array [rows] of any dtype."""
        asked = {name: batch[name] for name in COLUMNS if name in batch}
        rows = len(next(iter(batch.values()), ()))
        lines: list[tuple[int, bytes]] = []
        for i in range(rows):
            said = {name: value for name in asked if (value := _said(asked[name][i])) is not None}
            index = int(batch["index"][i]) if "index" in batch else 0
            fields = {"seed": (self.options.params.seed + index) % 2**32} | said
            lines.append((i, json.dumps(fields).encode()))
        own = self.model.config, self.model.generation_config, self.tokenizer
        shape = shape_for(lines, self.options, *own, self.slots, self.context)
        found: dict[int, dict[str, Any]] = {}
        for some in answers(self.model, self.tokenizer, lines, self.options, shape, cache_dtype=self.cache_dtype):
            found |= some
        columns = {name: np.array([found[i].get(name, none) for i in range(rows)]) for name, none in ANSWER.items()}
        return dict(batch) | columns


class _Lines:
    """An actor that answers lines of a file: {"index", "line"} comes, {"index", "answer"} goes, an answer as JSON."""

    def __init__(self, load: Callable[[], SmolLM3], options: LineOptions, shape: Shape, cache_dtype: DTypeLike | None):
        self.model = load()
        tokenizer = tokenizer_of(self.model)
        assert tokenizer is not None  # whoever loads brings it along
        self.answers = functools.partial(answers, self.model, tokenizer)
        self.rest = options, shape
        self.cache_dtype = cache_dtype

    def __call__(self, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        lines = list(zip(batch["index"].tolist(), batch["line"].tolist(), strict=True))
        found: dict[int, dict[str, Any]] = {}
        for some in self.answers(lines, *self.rest, cache_dtype=self.cache_dtype):
            found |= some
        return {"index": batch["index"], "answer": np.array([json.dumps(found[index]) for index, _ in lines], object)}


def run_on_ray(
    batch: Batch,
    address: str,
    load: Callable[[], SmolLM3],
    shape: Shape,
    *,
    actors: int | None = None,
    cache_dtype: DTypeLike | None = None,
) -> None:
    """Answers a batch's lines as its `run` does with an engine of this shape, in their order, on a cluster.

    An actor that is lost is started again, and so are the calls that it had; what has been written stays.

    Args:
      address: of a running cluster, HOST:PORT or "auto"; "local" starts one on this machine, for this call.
      load: gives the model with its tokenizer, on any machine of the cluster; it is pickled.
      actors: how many; None is one for each GPU of the cluster, or each TPU chip, or each machine.

    Raises:
      SupportError: Ray is not installed, there is no cluster at the address, or it cannot go on.
      OptionError: the cluster has too little for the actors.
      SmolLM3Error: of an actor, such as OutOfMemoryError.
      DataError, SaveError, KeyboardInterrupt: as for `Batch.collect`.
    """
    with _joined(address) as ray:
        count, each = _placed(ray.cluster_resources(), len(ray.nodes()), actors)
        lines = [{"index": index, "line": line} for index, line in batch.pending()]
        per_call = min(LINES_PER_SLOT * shape.slots, math.ceil(len(lines) / count))
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.execution_options.preserve_order = True
        rows = ray.data.from_items(lines, override_num_blocks=math.ceil(len(lines) / per_call))
        answered = rows.map_batches(
            _Lines,
            fn_constructor_args=(load, batch.options, shape, cache_dtype),
            batch_size=None,  # a block
            compute=ray.data.ActorPoolStrategy(size=count),
            ray_remote_args_fn=functools.partial(dict, max_restarts=RESTARTS, max_task_retries=RESTARTS),
            **each,
        )
        with _own_errors(ray):
            batch.collect(_arriving(answered.iter_batches(batch_size=None, prefetch_batches=0), batch))


def _arriving(blocks: Iterable[Mapping[str, np.ndarray]], batch: Batch) -> Iterator[list[tuple[int, dict[str, Any]]]]:
    for block in blocks:
        some = [(int(index), json.loads(answer)) for index, answer in zip(*block.values(), strict=True)]
        batch.stats.tokens += sum(answer.get("completion_tokens", 0) for _, answer in some)
        yield some


def _said(value: Any) -> Any:
    """A value of a column as JSON knows it; Arrow fills what one row of structures lacks and another has with nulls."""
    if isinstance(value, np.ndarray | list | tuple):
        return [_said(one) for one in value]
    if isinstance(value, Mapping):
        return {name: said for name, one in value.items() if (said := _said(one)) is not None}
    value = value.item() if isinstance(value, np.generic) else value
    return None if isinstance(value, float) and math.isnan(value) else value


def _placed(resources: Mapping[str, float], machines: int, actors: int | None) -> tuple[int, dict[str, Any]]:
    """How many actors, and what each of them asks of Ray."""
    kinds: dict[str, dict[str, Any]] = {
        "GPU": {"num_gpus": 1},
        "TPU": {"resources": {"TPU": 1}},
        "CPU": {"num_cpus": 1},  # a process computes on all that a machine has, and Ray Data spreads them
    }
    kind = next((kind for kind in kinds if resources.get(kind, 0) >= 1), None)
    if kind is None:
        raise OptionError("the Ray cluster has no GPU, TPU or CPU that is free for work; see `ray status`")
    most = int(resources[kind])
    if actors is not None and not 0 < actors <= most:
        raise OptionError(f"{actors} actors are asked for; the Ray cluster has {most} {kind}s, one for each")
    return actors or (min(most, machines) if kind == "CPU" else most), kinds[kind]


@contextlib.contextmanager
def _joined(address: str) -> Iterator[ModuleType]:
    """Ray, as a module, with this process in its cluster."""
    try:
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # it has its own files for what it logs
        import ray
        import ray.data
    except ImportError as error:
        raise SupportError(f"--ray needs Ray ({error}): {how_to_install('ray')}") from None
    options: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if address == "local":
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would report to its makers
        options["include_dashboard"] = False
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    for name in ("ray", "ray.data"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # jax's, that Ray's processes are forked: they exec at once
            ray.init(address, **options)
    except Exception as error:  # Ray raises bare ones, too
        told = str(error).strip().splitlines() or [type(error).__name__]
        raise SupportError(
            f"there is no Ray cluster at {address}: {told[0]}; give HOST:PORT, auto for the one of this machine, or "
            "local to start one"
        ) from None
    try:
        yield ray
    finally:
        ray.shutdown()


@contextlib.contextmanager
def _own_errors(ray: ModuleType) -> Iterator[None]:
    """What an actor raised, as if it had been raised here, and what Ray says of actors that are gone in one line."""
    try:
        yield
    except ray.exceptions.RayError as error:
        seen: BaseException | None = error
        while seen is not None:
            if isinstance(seen, SmolLM3Error) and not isinstance(seen, ray.exceptions.RayError):
                raise seen from None
            seen = getattr(seen, "cause", None) or seen.__cause__
        told = " ".join(str(error).split())
        raise SupportError(f"Ray cannot go on: {told:.500}; the same command goes on from there") from None
