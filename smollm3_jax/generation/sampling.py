"""How the next token is chosen: the parameters, and the computation for a batch of slots.

Every parameter is an array with one entry a slot, so that requests of all kinds share one program.
Nothing is sorted: the thresholds of top-k and top-p come from bisection, which needs no memory of its
own and works on logits that are split over devices.

Shapes: B slots, V vocabulary, N listed ids (padded with -1).
"""

import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from sharding.arrays import spec
from sharding.rules import PyTree

from ..config import GenerationConfig
from ..errors import ConfigError, OptionError, unknown_name

# Limits of what one slot carries on the device.
MAX_STOP_IDS = 16
MAX_BIASES = 300
MAX_LOGPROBS = 20

# What other libraries call a parameter -> its name here.
ELSEWHERE = {
    **dict.fromkeys(("max_tokens", "max_length", "max_output_tokens", "num_predict", "n_predict"), "max_new_tokens"),
    **dict.fromkeys(("num_return_sequences", "best_of"), "n"),
    **dict.fromkeys(("stop_strings", "stop_sequences", "stop_words", "stop_str"), "stop"),
    **dict.fromkeys(("eos_token_id", "stop_ids"), "stop_token_ids"),
    **dict.fromkeys(("random_seed", "rng_seed", "random_state"), "seed"),
    **dict.fromkeys(("repeat_penalty", "rep_pen"), "repetition_penalty"),
    **dict.fromkeys(("num_logprobs", "top_logprobs", "output_logprobs"), "logprobs"),
    **dict.fromkeys(("bad_token_ids", "banned_tokens"), "suppress_tokens"),
    "temp": "temperature",
    "do_sample": "temperature (0 is greedy, above it samples)",
    "thinking_budget": "max_thinking_tokens",
    "sharding": "nothing in its place: the model knows where it lies (model.sharding)",
}
# What generation_config.json may ask for that is not done here -> the values that ask for nothing.
NOT_DONE: dict[str, tuple[object, ...]] = {
    **dict.fromkeys(("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "min_length", "min_new_tokens"), (0,)),
    **dict.fromkeys(("num_beams", "num_beam_groups", "num_return_sequences"), (0, 1)),
    **dict.fromkeys(("guidance_scale", "typical_p", "encoder_repetition_penalty"), (1,)),
    **dict.fromkeys(("penalty_alpha", "epsilon_cutoff", "eta_cutoff", "diversity_penalty", "top_h"), (0,)),
    **dict.fromkeys(("bad_words_ids", "force_words_ids", "begin_suppress_tokens", "forced_decoder_ids"), ([],)),
    **dict.fromkeys(("sequence_bias", "exponential_decay_length_penalty"), ([], {})),
    **dict.fromkeys(("forced_bos_token_id", "forced_eos_token_id", "constraints", "watermarking_config"), ()),
    **dict.fromkeys(("max_length", "max_time"), (0, 20)),  # 20 is what transformers takes where nothing is said
}

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to choose tokens, and when to stop.

    max_new_tokens: the most that are generated, the end-of-sequence token included.
    temperature: 0 is greedy.
    top_k: sample among the k likeliest only; 0 is off.
    top_p: sample among the fewest tokens that hold this much probability; 1 is off.
    min_p: sample among tokens at least this fraction as likely as the likeliest; 0 is off.
    repetition_penalty: divides positive logits (multiplies negative ones) of all tokens of the prompt
      and the text so far (arXiv:1909.05858); 1 is off.
    presence_penalty: subtracted from the logits of tokens generated so far; 0 is off.
    frequency_penalty: the same, once for each time; 0 is off.
    logit_bias: token id -> what is added to its logit.
    suppress_tokens: ids that are never chosen.
    stop: texts that end the generation; they are not part of the text. The text of a special token, such as
      `<|im_end|>`, is that token.
    stop_token_ids: ids that end it, beside the model's own end-of-sequence ids.
    ignore_eos: go on to max_new_tokens whatever comes (for benchmarks); stop and stop_token_ids hold.
    seed: row i of a batch, or sample i of one prompt, draws with seed + i.
    n: how many samples of each prompt.
    logprobs: None, or how many alternatives to each chosen token's log-probability to report (0 to 20).
      They are the model's own, before penalties, temperature and cuts.
    prompt_logprobs: report the log-probability of each prompt token after the first.
    max_thinking_tokens: None, or after how many tokens of thinking `</think>` is written for the model.

    Raises:
      OptionError: a value is out of range.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict)
    suppress_tokens: Sequence[int] = ()
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    seed: int = 0
    n: int = 1
    logprobs: int | None = None
    prompt_logprobs: bool = False
    max_thinking_tokens: int | None = None

    def __new__(cls, *_: object, **given: object) -> "SamplingParams":
        known = [field.name for field in dataclasses.fields(cls)]
        for name in given:
            if name not in known:
                raise unknown_name("SamplingParams", name, known, ELSEWHERE)
        return super().__new__(cls)

    def __post_init__(self):
        def check(ok: bool, field: str, must: str) -> None:
            if not ok:
                raise OptionError(f"{field} is {getattr(self, field)!r:.200}; it must be {must}")

        def number(field: str, ok: Callable[[float], bool], must: str) -> None:
            value = getattr(self, field)
            check(_is_float32(value) and ok(value), field, must)

        def whole(field: str, low: int, high: int, must: str) -> None:
            value = getattr(self, field)
            check(isinstance(value, int) and not isinstance(value, bool) and low <= value <= high, field, must)

        whole("max_new_tokens", 1, 2**31 - 1, "a whole number of at least 1, below 2**31")
        number("temperature", lambda x: x >= 0, "a number that float32 can hold, 0 (greedy) or more")
        whole("top_k", 0, 2**31 - 1, "a whole number, 0 (off) or more, below 2**31")
        number("top_p", lambda x: 0 < x <= 1, "a number above 0 and at most 1")
        number("min_p", lambda x: 0 <= x <= 1, "a number from 0 (off) to 1")
        number("repetition_penalty", lambda x: x > 0, "a number above 0 (1 is off)")
        number("presence_penalty", lambda x: True, "a number that float32 can hold")
        number("frequency_penalty", lambda x: True, "a number that float32 can hold")
        whole("seed", 0, 2**32 - 1, "a whole number from 0 to 2**32 - 1")
        whole("n", 1, 1024, "a whole number from 1 to 1024")
        if self.logprobs is not None:
            whole("logprobs", 0, MAX_LOGPROBS, f"None, or a whole number from 0 to {MAX_LOGPROBS}")
        if self.max_thinking_tokens is not None:
            whole("max_thinking_tokens", 0, 2**31 - 1, "None, or a whole number, 0 or more, below 2**31")
        check(isinstance(self.logit_bias, Mapping), "logit_bias", "a mapping from token ids to numbers")
        banned = isinstance(self.suppress_tokens, Sequence) and not isinstance(self.suppress_tokens, str)
        check(banned, "suppress_tokens", "a list of ids")
        if len(self.logit_bias) + len(self.suppress_tokens) > MAX_BIASES:
            raise OptionError(f"logit_bias and suppress_tokens name more than {MAX_BIASES} ids together")
        check(all(map(_is_float32, self.logit_bias.values())), "logit_bias", "of numbers that float32 can hold")
        texts = isinstance(self.stop, Sequence) and not isinstance(self.stop, str)
        texts = texts and all(isinstance(text, str) and text for text in self.stop)
        check(texts, "stop", "a list of texts that are not empty")
        halves = any("\ud800" <= char <= "\udfff" for text in self.stop for char in text)
        check(not halves, "stop", "of whole characters: a lone surrogate is none")
        ids = isinstance(self.stop_token_ids, Sequence) and len(self.stop_token_ids) <= MAX_STOP_IDS
        check(ids, "stop_token_ids", f"a list of at most {MAX_STOP_IDS} ids")
        for field in ("ignore_eos", "prompt_logprobs"):
            check(isinstance(getattr(self, field), bool), field, "true or false")

    def check_ids(self, vocab_size: int) -> None:
        """Refuses ids that the vocabulary does not have.

        Raises:
          OptionError: naming the field.
        """
        for field in ("logit_bias", "suppress_tokens", "stop_token_ids"):
            for token in getattr(self, field):
                if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < vocab_size:
                    raise OptionError(f"{field} names the id {token!r}; the vocabulary has {vocab_size} tokens")


def with_defaults(own: GenerationConfig, vocab_size: int, **given: Any) -> SamplingParams:
    """What was given; for the rest what the model's generation_config.json says, then the defaults of SamplingParams.

    What it asks for and cannot be had here is named in a warning, once.

    Raises:
      ConfigError: a value of generation_config.json that would count is none, by its key.
      OptionError: what was given is not right.
    """
    raw = own.to_hf()
    found: dict[str, Any] = {"temperature": own.temperature * own.do_sample, "top_p": own.top_p, "top_k": own.top_k}
    for name in ("min_p", "repetition_penalty", "max_new_tokens", "suppress_tokens"):
        if raw.get(name) is not None:
            found[name] = raw[name]
    if stops := raw.get("stop_strings"):
        found["stop"] = [stops] if isinstance(stops, str) else stops
    found = {name: value for name, value in found.items() if name not in given}
    try:
        SamplingParams(**found).check_ids(vocab_size)
    except OptionError as error:
        raise ConfigError(f"generation_config.json: {error}; correct it there, or give another value") from None
    asked = {name: raw[name] for name, nothing in NOT_DONE.items() if raw.get(name) not in (None, False, *nothing)}
    if "max_new_tokens" in raw:
        asked.pop("max_length", None)  # the same, and it does not count then
    if asked:
        _not_done(", ".join(f"{name} ({value!r:.60})" for name, value in asked.items()))
    return SamplingParams(**found | given)


@functools.lru_cache(maxsize=64)
def _not_done(what: str) -> None:
    """Says it once."""
    log.warning("generation_config.json asks for what is not done here, and is left out: %s", what)


def _is_float32(value: Any) -> bool:
    """A number that float32 can hold: larger ones, of any number of digits, would become infinite on the device."""
    real = isinstance(value, int | float) and not isinstance(value, bool)
    return real and abs(value) <= float(np.finfo(np.float32).max)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplingState:
    """What `choose` reads of each slot: its parameters, and what it has said so far.

    temperature, top_p, min_p, repetition, presence, frequency: float32 [B]; top_k, logprobs: int32 [B]
    (-1: no log-probabilities); seed: uint32 [B]; bias_ids: int32 [B, N]; biases: float32 [B, N];
    in_prompt: bool [B, V]; counts: int32 [B, V], how often each token was generated; constrained: bool [B];
    forbidden: bool [B, V], if a slot is constrained the tokens that its grammar does not have next.
    """

    temperature: Array
    top_k: Array
    top_p: Array
    min_p: Array
    repetition: Array
    presence: Array
    frequency: Array
    seed: Array
    logprobs: Array
    bias_ids: Array
    biases: Array
    in_prompt: Array
    counts: Array
    constrained: Array
    forbidden: Array

    @classmethod
    def specs(cls, batch: int, vocab_size: int) -> PyTree:
        """A SamplingState of ArraySpecs."""
        number, index = spec(jnp.float32, batch=batch), spec(jnp.int32, batch=batch)
        fields: dict[str, Any] = {name: number for name in ("temperature", "top_p", "min_p")}
        fields |= {name: number for name in ("repetition", "presence", "frequency")}
        fields |= {"top_k": index, "logprobs": index, "seed": spec(jnp.uint32, batch=batch)}
        fields |= {"bias_ids": spec(jnp.int32, batch=batch, biases=MAX_BIASES)}
        fields |= {"biases": spec(jnp.float32, batch=batch, biases=MAX_BIASES)}
        fields |= {name: spec(bool, batch=batch, vocab=vocab_size) for name in ("in_prompt", "forbidden")}
        fields |= {"constrained": spec(bool, batch=batch)}
        fields |= {"counts": spec(jnp.int32, batch=batch, vocab=vocab_size)}
        return cls(**fields)

    @classmethod
    def of(cls, params: SamplingParams, prompt: Sequence[int], sample: int, vocab_size: int) -> "SamplingState":
        """One slot's, without the leading B, as NumPy has them."""
        biases = [*params.logit_bias.items(), *((token, -np.inf) for token in params.suppress_tokens)]
        biases += [(-1, 0.0)] * (MAX_BIASES - len(biases))
        in_prompt = np.zeros(vocab_size, bool)
        in_prompt[np.asarray(prompt)] = True
        f32 = np.float32
        fields: dict[str, Any] = dict(
            temperature=f32(params.temperature),
            top_k=np.int32(params.top_k),
            top_p=f32(params.top_p),
            min_p=f32(params.min_p),
            repetition=f32(params.repetition_penalty),
            presence=f32(params.presence_penalty),
            frequency=f32(params.frequency_penalty),
            seed=np.uint32((params.seed + sample) % 2**32),
            logprobs=np.int32(-1 if params.logprobs is None else params.logprobs),
            bias_ids=np.array([token for token, _ in biases], np.int32),
            biases=np.array([bias for _, bias in biases], f32),
            in_prompt=in_prompt,
            counts=np.zeros(vocab_size, np.int32),
            constrained=np.bool_(False),
            forbidden=np.zeros(vocab_size, bool),
        )
        return cls(**fields)


def choose(logits_BV: Array, choice: SamplingState, step_B: Array) -> Array:
    """The next token of each slot, int32 [B].

    The order is transformers': penalties and biases, what the grammar forbids, temperature, top-k, top-p, min-p, the
    draw.

    Args:
      step_B: how many tokens each slot has generated; with its seed it names the draw, so that a
        slot's tokens do not depend on the others.
    """
    adjusts = (choice.repetition != 1) | (choice.presence != 0) | (choice.frequency != 0) | (choice.bias_ids[:, 0] >= 0)
    logits_BV = jax.lax.cond(adjusts.any(), lambda x: _adjust(x, choice), lambda x: x, logits_BV)
    logits_BV = jax.lax.cond(choice.constrained.any(), lambda x: _forbid(x, choice), lambda x: x, logits_BV)
    greedy_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    draws_B = choice.temperature > 0
    return jax.lax.cond(
        draws_B.any(), lambda x: jnp.where(draws_B, _draw(x, choice, step_B), greedy_B), lambda _: greedy_B, logits_BV
    )


def _adjust(logits_BV: Array, choice: SamplingState) -> Array:
    seen_BV = choice.in_prompt | (choice.counts > 0)
    repetition_B1 = choice.repetition[:, None]
    damped_BV = jnp.where(logits_BV > 0, logits_BV / repetition_B1, logits_BV * repetition_B1)
    logits_BV = jnp.where(seen_BV, damped_BV, logits_BV)
    counts_BV = choice.counts.astype(jnp.float32)
    logits_BV -= choice.presence[:, None] * (counts_BV > 0).astype(jnp.float32) + choice.frequency[:, None] * counts_BV
    rows_B1 = jnp.arange(logits_BV.shape[0], dtype=jnp.int32)[:, None]
    ids_BN = jnp.where(choice.bias_ids < 0, logits_BV.shape[1], choice.bias_ids)  # dropped: out of range
    return logits_BV.at[rows_B1, ids_BN].add(choice.biases, mode="drop")


def _forbid(logits_BV: Array, choice: SamplingState) -> Array:
    # A token that is suppressed (-inf) is still better than one that the grammar does not have.
    held_BV = jnp.where(choice.forbidden, -jnp.inf, jnp.maximum(logits_BV, jnp.finfo(logits_BV.dtype).min))
    return jnp.where(choice.constrained[:, None], held_BV, logits_BV)


def _draw(logits_BV: Array, choice: SamplingState, step_B: Array) -> Array:
    temperature_B1 = jnp.where(choice.temperature > 0, choice.temperature, 1)[:, None]
    # From the largest down: however low the temperature, only differences become infinite.
    logits_BV = logits_BV - logits_BV.max(axis=1, keepdims=True)
    kept_BV = cut(logits_BV / temperature_B1, choice.top_k, choice.top_p, choice.min_p)

    def draw(seed: Array, step: Array, kept_V: Array) -> Array:
        return jax.random.categorical(jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), step), kept_V)

    with jax.threefry_partitionable(True):  # a seed means the same draws whatever JAX is configured to use
        return jax.vmap(draw)(choice.seed, step_B, kept_BV).astype(jnp.int32)


def cut(logits_BV: Array, top_k_B: Array, top_p_B: Array, min_p_B: Array) -> Array:
    """Logits with -inf where top-k, then top-p, then min-p cut off; of equal logits all stay or none."""
    vocab = logits_BV.shape[1]

    def top_k(logits_BV: Array) -> Array:
        k_B1 = jnp.where(top_k_B == 0, vocab, top_k_B)[:, None]
        return _keep_above(logits_BV, lambda kept_BV: kept_BV.sum(axis=1, keepdims=True, dtype=jnp.int32) >= k_B1)

    def top_p(logits_BV: Array) -> Array:
        weights_BV = jax.nn.softmax(logits_BV)
        enough_B1 = top_p_B[:, None]
        cut_BV = _keep_above(
            logits_BV, lambda kept_BV: jnp.where(kept_BV, weights_BV, 0).sum(axis=1, keepdims=True) >= enough_B1
        )
        # Rounding may leave the sum of all below 1: off is off.
        return jnp.where(enough_B1 < 1, cut_BV, logits_BV)

    def min_p(logits_BV: Array) -> Array:
        # A ratio of probabilities is a difference of logits. log(0) = -inf cuts nothing.
        floor_B1 = logits_BV.max(axis=1, keepdims=True) + jnp.log(min_p_B)[:, None]
        return jnp.where(logits_BV >= floor_B1, logits_BV, -jnp.inf)

    logits_BV = jax.lax.cond((top_k_B > 0).any(), top_k, lambda x: x, logits_BV)
    logits_BV = jax.lax.cond((top_p_B < 1).any(), top_p, lambda x: x, logits_BV)
    return jax.lax.cond((min_p_B > 0).any(), min_p, lambda x: x, logits_BV)


def _keep_above(logits_BV: Array, enough: Callable[[Array], Array]) -> Array:
    """-inf below the highest threshold at which the mask of what is kept (>= threshold) is `enough` in each row.

    Found exactly, by bisection over the bits of float32 in their order as numbers: 32 passes.
    """

    def threshold(order_B1: Array) -> Array:
        # Negative floats order backwards; so turned, floats order as their integers do.
        bits_B1 = jnp.where(order_B1 < 0, order_B1 ^ 0x7FFFFFFF, order_B1)
        return jax.lax.bitcast_convert_type(bits_B1, jnp.float32)

    def halve(_: Array, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds  # enough at low, not at high
        middle = (low >> 1) + (high >> 1) + (low & high & 1)
        good = enough(logits_BV >= threshold(middle))
        return jnp.where(good, middle, low), jnp.where(good, high, middle)

    # From minus infinity to the first number after infinity, which nothing reaches.
    rows, infinity = logits_BV.shape[0], 0x7F800000
    bounds = jnp.full((rows, 1), ~infinity, jnp.int32), jnp.full((rows, 1), infinity + 1, jnp.int32)
    low, _ = jax.lax.fori_loop(0, 32, halve, bounds)
    return jnp.where(logits_BV >= threshold(low), logits_BV, -jnp.inf)


def log_probabilities(logits_BV: Array, token_B: Array, wanted_B: Array) -> tuple[Array, Array, Array]:
    """(of the token [B], the likeliest ids [B, 20], theirs [B, 20]); the lists are zeros where none wants them."""
    chosen_B = jnp.take_along_axis(logits_BV, token_B[:, None], axis=1)[:, 0]
    total_B = jax.nn.logsumexp(logits_BV, axis=1)
    width = min(MAX_LOGPROBS, logits_BV.shape[1])

    def listed(logits_BV: Array) -> tuple[Array, Array]:
        values, ids = jax.lax.top_k(logits_BV, width)
        return ids.astype(jnp.int32), values - total_B[:, None]

    def nothing(logits_BV: Array) -> tuple[Array, Array]:
        shape = (logits_BV.shape[0], width)
        return jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32)

    ids, values = jax.lax.cond((wanted_B > 0).any(), listed, nothing, logits_BV)
    return chosen_B - total_B, ids, values
