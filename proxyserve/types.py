"""The plain types that every layer shares. Nothing here imports torch, HTTP or another proxyserve module
except `errors`."""

from __future__ import annotations

import enum
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from proxyserve.errors import InvalidRequest

#: Hard bounds of the request format itself. Server policy (see `config.Limits`) may be tighter, never looser.
MAX_SEED = 2**64

#: Of models, experts and presets. Names must survive model-name syntax (`base+expert:0.5`), lane names (`qa.tuned`) and
#: URLs.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


class ModelKey(NamedTuple):
    """Names one set of weights: `atlas`, `qa.tuned` or the name of a small untuned model, and which published
    version of it. KV blocks and prefix-cache entries belong to a key and never cross to another."""

    name: str
    generation: int = 1

    def __str__(self) -> str:
        return f"{self.name}@{self.generation}"


class FinishReason(enum.StrEnum):
    """Why a choice ended. `STOP` covers stop ids and stop strings; `LENGTH` covers max_tokens and a full context."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    ERROR = "error"


def _require(condition: bool, param: str, message: str) -> None:
    if not condition:
        raise InvalidRequest(message, param=param)


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one choice is drawn from the fused law. Field names are those of the HTTP API.

    Order of application: logit bias and penalties, then what rules tokens out (`allowed_token_ids`, `bad_words`,
    `min_tokens`, grammars), then temperature, then min-p, top-k and top-p (top-p on what top-k left, renormalised),
    then the draw. `temperature` 0 is greedy. `top_k` 0, `top_p` 1 and `min_p` 0 switch the filters off. `logprobs` None
    means none, 0 the chosen token only, k the k most likely as well; `logprob_token_ids` are given at each position
    too. `prompt_logprobs` asks the same of the prompt's tokens, from number `prompt_logprobs_from` on; only with it may
    `max_tokens` be 0.

    Before `min_tokens` tokens no token comes that would end the text. `bad_words` are sequences of ids that never come.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None
    logprob_token_ids: tuple[int, ...] = ()
    prompt_logprobs: int | None = None
    prompt_logprobs_from: int = 0
    min_tokens: int = 0
    bad_words: tuple[tuple[int, ...], ...] = ()
    allowed_token_ids: tuple[int, ...] | None = None
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        for name in (
            "temperature",
            "top_p",
            "min_p",
            "presence_penalty",
            "frequency_penalty",
            "repetition_penalty",
        ):
            value = getattr(self, name)
            _require(math.isfinite(value), name, f"{name} must be a finite number, not {value}.")
        least = 1 if self.prompt_logprobs is None else 0
        _require(self.max_tokens >= least, "max_tokens", f"max_tokens must be at least {least}.")
        _require(
            0 <= self.min_tokens <= self.max_tokens,
            "min_tokens",
            "min_tokens must be between 0 and max_tokens.",
        )
        _require(all(self.bad_words), "bad_words", "bad_words must not be empty.")
        _require(
            self.allowed_token_ids is None or len(self.allowed_token_ids) > 0,
            "allowed_token_ids",
            "allowed_token_ids must name at least one token.",
        )
        _require(0.0 <= self.temperature <= 100.0, "temperature", "temperature must be between 0 and 100.")
        _require(0.0 < self.top_p <= 1.0, "top_p", "top_p must be above 0 and at most 1.")
        _require(self.top_k >= 0, "top_k", "top_k must be 0 (off) or a positive number.")
        _require(0.0 <= self.min_p <= 1.0, "min_p", "min_p must be between 0 and 1.")
        _require(
            self.seed is None or -(MAX_SEED // 2) <= self.seed < MAX_SEED,
            "seed",
            "seed must fit in 64 bits.",
        )
        _require(all(self.stop), "stop", "stop strings must not be empty.")
        _require(-2.0 <= self.presence_penalty <= 2.0, "presence_penalty", "must be between -2 and 2.")
        _require(-2.0 <= self.frequency_penalty <= 2.0, "frequency_penalty", "must be between -2 and 2.")
        _require(
            0.01 <= self.repetition_penalty <= 10.0, "repetition_penalty", "must be between 0.01 and 10."
        )
        for token, bias in self.logit_bias.items():
            _require(
                not math.isnan(bias) and -100.0 <= bias <= 100.0,
                f"logit_bias.{token}",
                "logit_bias values must be between -100 and 100.",
            )
        for name in ("logprobs", "prompt_logprobs"):
            count = getattr(self, name)
            _require(count is None or count >= 0, name, f"{name} must not be negative.")
        _require(
            self.prompt_logprobs_from == 0
            or (self.prompt_logprobs is not None and self.prompt_logprobs_from > 0),
            "prompt_logprobs_from",
            "prompt_logprobs_from is the number of a prompt token, and says nothing without prompt_logprobs.",
        )

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def penalised(self) -> bool:
        """Whether a token's score depends on which tokens came before."""
        return self.presence_penalty != 0.0 or self.frequency_penalty != 0.0 or self.repetition_penalty != 1.0


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Natural-log probabilities of one position under the fused law before bias, penalties, temperature and
    filters, over the shared vocabulary. `top` is ordered from most to least likely, ties by lowest id; `listed` has the
    ids of `SamplingParams.logprob_token_ids` in their order. A token that is in several has one value. `rank` is 1 for
    the likeliest token, None for one that the law rules out."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    listed: tuple[tuple[int, float], ...] = ()
    rank: int | None = None


@dataclass(frozen=True, slots=True)
class LaneView:
    """What one law, before bias, penalties and temperature, thought of a chosen token: its log-prob in nats, and the
    likeliest tokens with theirs."""

    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class TokenExplanation:
    """Why one token was chosen. `lanes` maps lane names to their views, `fused` is the fused law's. `weights` maps
    experts to the weight that multiplied their delta here, `push` to weight times delta of this token, in nats. `kl` is
    KL(fused || base) and `flip` whether the two have different best tokens, None where the base did not run. `gated`:
    the base was sure enough, its law alone was used and the other lanes did not run."""

    token_id: int
    fused: LaneView
    lanes: Mapping[str, LaneView]
    weights: Mapping[str, float]
    push: Mapping[str, float]
    kl: float | None
    flip: bool | None
    gated: bool = False


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of one choice. `lane_tokens` counts, per model, the tokens that ran through it for this
    choice (prompt tokens served from the prefix cache are not counted). Under a gate, `gated_tokens` are those that the
    base alone decided, and `skipped_lane_tokens`, per model, those that its lanes never ran."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    lane_tokens: Mapping[str, int]
    gated_tokens: int | None = None
    skipped_lane_tokens: Mapping[str, int] | None = None


@dataclass(frozen=True, slots=True)
class FusionReport:
    """What fusion did to one choice.

    `mean_kl` is the mean over generated positions of KL(fused || base) in nats, `flips` the number of
    positions where the fused argmax differs from the base's; both are None where the base takes no part. `generations`
    maps each expert to the generation that served the request. `mean_weights`, where weights are solved per position,
    maps each expert to the mean of its weight.

    With a base on another server, which returns its likeliest tokens only: `certified` is the number of tokens whose
    greedy choice is sure to be the one over the base's whole law, `mean_unseen_mass` the mean of the base's probability
    that was not returned; KL and flips are over the returned ids.

    `drafted` tokens were proposed ahead of the text, `accepted` of them are what it went on with; both None where
    none was.
    """

    rule: str
    sum_of_weights: float
    generations: Mapping[str, int]
    mean_kl: float | None
    flips: int | None
    mean_weights: Mapping[str, float] | None = None
    certified: int | None = None
    mean_unseen_mass: float | None = None
    drafted: int | None = None
    accepted: int | None = None


@dataclass(frozen=True, slots=True)
class Timing:
    """When things happened to one choice, in seconds of `time.perf_counter`, as the engine's thread saw them: prepared
    and queued, given KV blocks for the first time, its first token chosen, ended. None for what never happened.

    `barrier_seconds` is how long some lane of it had caught up and waited for another one of its lanes before the next
    token could be chosen."""

    queued_at: float
    admitted_at: float | None
    first_token_at: float | None
    finished_at: float
    barrier_seconds: float = 0.0

    @property
    def queue_seconds(self) -> float:
        """Until it was admitted, or ended without that."""
        return (self.finished_at if self.admitted_at is None else self.admitted_at) - self.queued_at

    @property
    def prefill_seconds(self) -> float | None:
        """From admission to the first token, or to the end of a choice that has none."""
        if self.admitted_at is None:
            return None
        return (self.finished_at if self.first_token_at is None else self.first_token_at) - self.admitted_at

    @property
    def decode_seconds(self) -> float | None:
        """From the first token to the end."""
        return None if self.first_token_at is None else self.finished_at - self.first_token_at


@dataclass(frozen=True, slots=True)
class OutputEvent:
    """What one step produced for one choice.

    `text` is text that is final (bytes of unfinished characters and possible beginnings of stop strings are
    held back and come later). `logprobs` and `explanations` have one entry per id in `token_ids` where the request
    asked for them. `prompt_logprobs`, if asked for, comes once, for choice 0 alone, not later than its first token,
    with one entry per prompt token of the base; None for those before `SamplingParams.prompt_logprobs_from` and for the
    first ones, which have nothing before them in some lane. `prompt_explanations` comes with it if explanations were
    asked for too, with None in the same places. `removed_mass` is the mean, over generated positions, of the
    probability that constraints took from the fused law; None without any. It, `finish_reason`, `usage`, `timing` and,
    for fused requests, `fusion` are set on the last event only; `error` says what failed when `finish_reason` is
    `ERROR`, and `refused` that the request's own fields are why.
    """

    request_id: str
    index: int
    token_ids: tuple[int, ...] = ()
    text: str = ""
    logprobs: tuple[TokenLogprob, ...] | None = None
    explanations: tuple[TokenExplanation, ...] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    usage: Usage | None = None
    fusion: FusionReport | None = None
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    prompt_explanations: tuple[TokenExplanation | None, ...] | None = None
    removed_mass: float | None = None
    timing: Timing | None = None
    error: str | None = None
    refused: bool = False
