"""One choice of one submission while it is being generated."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field

from proxyserve.engine.submission import Submission
from proxyserve.fusion.terms import LaneTerm
from proxyserve.models.vocabulary import SharedVocabulary
from proxyserve.scheduler.request import ScheduledRequest
from proxyserve.text.detokenizer import Detokenizer
from proxyserve.types import FinishReason, FusionReport, OutputEvent, TokenLogprob, Usage

_GOLDEN = 0x9E3779B97F4A7C15  # odd, so that the choices of one seed have different keys
_U64 = 2**64


@dataclass(slots=True, eq=False)
class Choice:
    """Lane 0 of `scheduled` is the base. `terms` say which lanes make which delta. `stop_ids` end the text and are
    shared by all lanes; `max_output` is the most ids that may be generated."""

    submission: Submission
    index: int
    scheduled: ScheduledRequest
    terms: tuple[LaneTerm, ...]
    vocabulary: SharedVocabulary
    stop_ids: frozenset[int]
    max_output: int
    generations: dict[str, int]
    detokenizer: Detokenizer
    seed: int
    generated: dict[int, int] = field(default_factory=dict)  # id -> occurrences, kept for penalties
    kl_total: float = 0.0
    flips: int = 0

    @property
    def key(self) -> str:
        return self.scheduled.request_id

    @property
    def output(self) -> list[int]:
        return self.scheduled.output

    @property
    def position(self) -> int:
        """Absolute position in the base's text of the token to be sampled next."""
        return self.scheduled.lanes[0].wanted

    def accept(self, token: int, logprob: TokenLogprob | None, kl: float, flip: bool) -> OutputEvent:
        """Append a sampled token and report it; the event carries a finish reason if it is the last."""
        sampling = self.submission.sampling
        self.output.append(token)
        self.generated[token] = self.generated.get(token, 0) + 1
        self.kl_total += kl
        self.flips += flip
        reason: FinishReason | None = None
        stop_reason: str | int | None = None
        text = ""
        if token in sampling.stop_token_ids:
            reason, stop_reason = FinishReason.STOP, token
        elif token in self.stop_ids and not sampling.ignore_eos:
            reason = FinishReason.STOP
        else:
            text = self.detokenizer.push(token)
            if self.detokenizer.stopped_by is not None:
                reason, stop_reason = FinishReason.STOP, self.detokenizer.stopped_by
        if reason is None and len(self.output) >= self.max_output:
            reason = FinishReason.LENGTH
        logprobs = None if logprob is None else (logprob,)
        if reason is None:
            return OutputEvent(self.submission.request_id, self.index, (token,), text, logprobs)
        text += self.detokenizer.finish()
        if self.detokenizer.stopped_by is not None:
            reason, stop_reason = FinishReason.STOP, self.detokenizer.stopped_by
        return self._last((token,), text, logprobs, reason, stop_reason=stop_reason)

    def end(self, reason: FinishReason, error: str | None = None) -> OutputEvent:
        """The last event of a choice that ends without a further token."""
        return self._last((), self.detokenizer.finish(), None, reason, error=error)

    def _last(
        self,
        tokens: tuple[int, ...],
        text: str,
        logprobs: tuple[TokenLogprob, ...] | None,
        reason: FinishReason,
        *,
        stop_reason: str | int | None = None,
        error: str | None = None,
    ) -> OutputEvent:
        return OutputEvent(
            self.submission.request_id,
            self.index,
            tokens,
            text,
            logprobs,
            finish_reason=reason,
            stop_reason=stop_reason,
            usage=self._usage(),
            fusion=self._fusion(),
            error=error,
        )

    def _usage(self) -> Usage:
        base = self.scheduled.lanes[0]
        lane_tokens: dict[str, int] = {}
        for lane in self.scheduled.lanes:
            lane_tokens[lane.model.name] = lane_tokens.get(lane.model.name, 0) + lane.tokens_run
        return Usage(len(base.prompt), len(self.output), min(base.cached, len(base.prompt)), lane_tokens)

    def _fusion(self) -> FusionReport | None:
        fusion = self.submission.fusion
        if not fusion.experts:
            return None
        return FusionReport(
            rule=fusion.rule,
            sum_of_weights=fusion.sum_of_weights,
            generations=self.generations,
            mean_kl=self.kl_total / max(1, len(self.output)),
            flips=self.flips,
        )


def choice_seed(seed: int | None, index: int) -> int:
    """The 64-bit noise key of choice `index`, as a signed integer (that is what int64 tensors hold). Choice 0 uses
    the seed as given; without a seed the key is random."""
    start = secrets.randbits(64) if seed is None else seed
    key = (start + index * _GOLDEN) % _U64
    return key - _U64 if key >= _U64 // 2 else key
