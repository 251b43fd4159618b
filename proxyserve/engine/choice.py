"""One choice of one submission while it is being generated."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field, replace
from time import perf_counter

from torch import Tensor

from proxyserve.engine.adjustments import ChoiceAdjustments
from proxyserve.engine.clock import Clock
from proxyserve.engine.scoring import Scoring
from proxyserve.engine.speculation.ahead import Ahead
from proxyserve.engine.submission import Submission
from proxyserve.fusion.binding import BoundProgram
from proxyserve.models.vocabulary import SharedVocabulary
from proxyserve.scheduler.lane import Lane
from proxyserve.scheduler.request import ScheduledRequest
from proxyserve.text.detokenizer import Detokenizer
from proxyserve.types import (
    FinishReason,
    FusionReport,
    ModelKey,
    OutputEvent,
    TokenExplanation,
    TokenLogprob,
    Usage,
)

_GOLDEN = 0x9E3779B97F4A7C15  # odd, so that the choices of one seed have different keys
_U64 = 2**64


@dataclass(frozen=True, slots=True)
class Certificate:
    """Of a token over a remote base. `certified`: the greedy choice is sure to be the one over the base's whole law.
    `unseen` is the base's probability that was not returned."""

    certified: bool
    unseen: float


@dataclass(frozen=True, slots=True)
class Sampled:
    """A token and what is known about how it was chosen. `weights` are those of the program's terms at this position;
    `removed` is the probability that constraints took from the fused law; `gated`: the base alone decided.
    `certificate` is None where no remote law took part."""

    token: int
    logprob: TokenLogprob | None = None
    explanation: TokenExplanation | None = None
    kl: float = 0.0
    flip: bool = False
    weights: tuple[float, ...] = ()
    removed: float = 0.0
    gated: bool = False
    certificate: Certificate | None = None


@dataclass(slots=True, eq=False)
class Choice:
    """The lanes of `scheduled` are those of `program`. `stop_ids` end the text and are shared by all lanes;
    `max_output` is the most ids that may be generated. `held` are the base's logits [1, width] for the next token,
    while a gated request awaits its other lanes. `scoring` is there if this choice scores the prompt, `ahead` if it may
    run ahead of its text; `drafted` and `accepted` count the tokens that were drafted, and those of them that stood."""

    submission: Submission
    index: int
    scheduled: ScheduledRequest
    program: BoundProgram
    stop_ids: frozenset[int]
    max_output: int
    generations: dict[str, int]
    detokenizer: Detokenizer
    seed: int
    adjustments: ChoiceAdjustments
    clock: Clock = field(default_factory=Clock)
    held: Tensor | None = None
    scoring: Scoring | None = None
    differences: list[tuple[Lane, Lane]] | None = None  # see `batch.shared_heads`, which finds them once
    ahead: Ahead | None = None
    drafted: int = 0
    accepted: int = 0
    kl_total: float = 0.0
    removed_total: float = 0.0
    flips: int = 0
    gated_tokens: int = 0
    certified: int = 0
    unseen_total: float = 0.0
    weight_totals: dict[str, float] = field(default_factory=dict)  # of solved weights, by expert

    @property
    def key(self) -> str:
        return self.scheduled.request_id

    @property
    def models(self) -> frozenset[ModelKey]:
        """Those of its lanes."""
        return frozenset(lane.model for lane in self.scheduled.lanes)

    @property
    def is_gated(self) -> bool:
        """Whether the base may decide alone."""
        return self.submission.fusion.gate is not None and len(self.scheduled.lanes) > 1

    @property
    def vocabulary(self) -> SharedVocabulary:
        return self.program.vocabulary

    @property
    def output(self) -> list[int]:
        return self.scheduled.output

    @property
    def position(self) -> int:
        """Absolute position in the base's text of the token to be sampled next."""
        return self.scheduled.lanes[0].wanted

    def accept(self, sampled: Sampled) -> OutputEvent:
        """Append a sampled token and report it; the event carries a finish reason if it is the last."""
        sampling, token = self.submission.sampling, sampled.token
        self.output.append(token)
        self.adjustments.add(token)
        self._add_up(sampled)
        reason: FinishReason | None = None
        stop_reason: str | int | None = None
        error: str | None = None
        refused = False
        text = ""
        if token in sampling.stop_token_ids:
            reason, stop_reason = FinishReason.STOP, token
        elif token in self.stop_ids and not sampling.ignore_eos:
            reason = FinishReason.STOP
        else:
            text = self.detokenizer.push(token, may_stop=len(self.output) >= sampling.min_tokens)
            if self.detokenizer.stopped_by is not None:
                reason, stop_reason = FinishReason.STOP, self.detokenizer.stopped_by
        if reason is None:
            halt = self.adjustments.advance(token)
            if halt is not None:
                reason, error, refused = halt
        if reason is None and len(self.output) >= self.max_output:
            reason = FinishReason.LENGTH
        logprobs = None if sampled.logprob is None else (sampled.logprob,)
        explanations = None if sampled.explanation is None else (sampled.explanation,)
        event = OutputEvent(self.submission.request_id, self.index, (token,), text, logprobs, explanations)
        if reason is None:
            return event
        text += self.detokenizer.finish()
        if self.detokenizer.stopped_by is not None and error is None:
            reason, stop_reason = FinishReason.STOP, self.detokenizer.stopped_by
        return self._last(
            replace(event, text=text), reason, stop_reason=stop_reason, error=error, refused=refused
        )

    def _add_up(self, sampled: Sampled) -> None:
        self.kl_total += sampled.kl
        self.flips += sampled.flip
        self.removed_total += sampled.removed
        self.gated_tokens += sampled.gated
        if sampled.certificate is not None:
            self.certified += sampled.certificate.certified
            self.unseen_total += sampled.certificate.unseen
        if self.program.law is not None:
            # Where the base alone decided nothing was solved: the experts counted 0.
            weights = (0.0,) * len(self.program.terms) if sampled.gated else sampled.weights
            for term, weight in zip(self.program.terms, weights, strict=True):
                if term.expert is not None:
                    self.weight_totals[term.expert] = self.weight_totals.get(term.expert, 0.0) + weight

    def end(self, reason: FinishReason, error: str | None = None, *, refused: bool = False) -> OutputEvent:
        """The last event of a choice that ends without a further token."""
        event = OutputEvent(self.submission.request_id, self.index, text=self.detokenizer.finish())
        return self._last(event, reason, error=error, refused=refused)

    def _last(
        self,
        event: OutputEvent,
        reason: FinishReason,
        *,
        stop_reason: str | int | None = None,
        error: str | None = None,
        refused: bool = False,
    ) -> OutputEvent:
        return replace(
            event,
            finish_reason=reason,
            stop_reason=stop_reason,
            usage=self._usage(),
            fusion=self._fusion(),
            removed_mass=self._removed_mass(),
            timing=self.clock.timing(perf_counter()),
            error=error,
            refused=refused,
        )

    def _removed_mass(self) -> float | None:
        if not self.adjustments.constraints or not self.output:
            return None
        return self.removed_total / len(self.output)

    def _usage(self) -> Usage:
        lanes, prompt_tokens = self.scheduled.lanes, len(self.program.lanes[0].prompt)
        lane_tokens: dict[str, int] = {}
        skipped: dict[str, int] = {}
        for lane in lanes:
            lane_tokens[lane.model.name] = lane_tokens.get(lane.model.name, 0) + lane.tokens_run
            # The last token is never run, in any lane.
            missing = max(0, lane.wanted - 1 - lane.reached)
            if missing:
                skipped[lane.model.name] = skipped.get(lane.model.name, 0) + missing
        usage = Usage(prompt_tokens, len(self.output), min(lanes[0].cached, prompt_tokens), lane_tokens)
        if self.submission.fusion.gate is None:
            return usage
        return replace(usage, gated_tokens=self.gated_tokens, skipped_lane_tokens=skipped)

    def _fusion(self) -> FusionReport | None:
        fusion = self.submission.fusion
        remote = bool(self.program.remote_weights)
        if fusion.is_base and not remote:
            return None
        tokens = max(1, len(self.output))
        compared = self.program.base is not None
        return FusionReport(
            rule=fusion.rule.name,
            sum_of_weights=self.program.program.sum_of_weights,
            generations=self.generations,
            mean_kl=self.kl_total / tokens if compared else None,
            flips=self.flips if compared else None,
            mean_weights=None
            if self.program.law is None
            else {expert: total / tokens for expert, total in self.weight_totals.items()},
            certified=self.certified if remote else None,
            mean_unseen_mass=self.unseen_total / tokens if remote else None,
            drafted=self.drafted or None,
            accepted=self.accepted if self.drafted else None,
        )


def choice_seed(seed: int | None, index: int) -> int:
    """The 64-bit noise key of choice `index`, as a signed integer (that is what int64 tensors hold). Choice 0 uses
    the seed as given; without a seed the key is random."""
    start = secrets.randbits(64) if seed is None else seed
    key = (start + index * _GOLDEN) % _U64
    return key - _U64 if key >= _U64 // 2 else key
