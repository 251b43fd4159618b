"""One request's work in the engine: submitting it, following its events, adding up what it cost."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from fastapi import Request

from proxyserve.api.deadline import DeadlineExceeded, seconds_left
from proxyserve.api.errors import GenerationFailed
from proxyserve.api.presence import ServerStopping
from proxyserve.api.record import Work
from proxyserve.api.running import Running
from proxyserve.api.schemas.fusion import FusionSummary
from proxyserve.api.schemas.responses import PromptTokensDetails, UsageBody
from proxyserve.api.state import server_state
from proxyserve.engine.submission import Submission
from proxyserve.errors import NO_TOKEN_LEFT, InvalidRequest, ProxyserveError
from proxyserve.types import (
    FinishReason,
    FusionReport,
    OutputEvent,
    TokenExplanation,
    TokenLogprob,
    Usage,
)

if TYPE_CHECKING:
    from proxyserve.engine.loop import ResponseStream
    from proxyserve.engine.offer import Lease


class Generation:
    """Submissions that were accepted together and are answered in one response.

    Choice `i` of submission `s` has number `s * n + i`. Creating one queues the work, so its `events` must be read or
    closed; closing them early cancels what still runs. `work` is what log and traces say of it.
    """

    def __init__(
        self, request: Request, submissions: Sequence[Submission], lease: Lease, work: Work | None = None
    ) -> None:
        """Raises what `AsyncEngine.submit` raises, and DeadlineExceeded; then nothing is queued. The submissions were
        made from what `lease` offers. `work` is that of the request so far, where these submissions are more of it. At
        the request's deadline, or when it is cancelled by id, the work ends early."""
        state = server_state(request)
        left = seconds_left(request)
        self._n = submissions[0].n
        self._order = {submission.request_id: number for number, submission in enumerate(submissions)}
        self._stream: ResponseStream = state.engine.submit(submissions, lease, more=work is not None)
        self.work = Work.of(submissions, self._stream.generations)
        if work is not None:
            self.work = work.with_more(self.work)
        self._metrics = state.metrics
        self._arrived: float = request.state.arrived
        self._begun: set[int] = set()
        self._unfinished = self._n * len(submissions)
        self._usage: dict[int, Usage] = {}
        self._reports: list[tuple[int, FusionReport]] = []
        self._early: ProxyserveError | None = None
        self._running = Running(request.state.caller, self._end_early)
        self._requests = state.running
        self.known_as(request.state.request_id)
        loop = asyncio.get_running_loop()
        self._timer = None if left is None else loop.call_later(left, self._end_early, DeadlineExceeded())
        self._prompts_first = _PromptsFirst(submissions)

    @property
    def choices(self) -> int:
        return self._n * len(self._order)

    @property
    def finished(self) -> bool:
        """Whether every choice has had its last event; `usage` and `fusion` are complete then."""
        return self._unfinished == 0

    def known_as(self, request_id: str) -> None:
        """Until its end it can be cancelled by that id as well."""
        self._requests.add(self._running, request_id)

    def _end_early(self, reason: ProxyserveError) -> None:
        """Free the lanes now; whoever reads `events` gets the reason."""
        self._early = self._early or reason
        self._stream.cancel()

    async def events(self) -> AsyncGenerator[tuple[int, OutputEvent], None]:
        """Each event with the number of its choice. Where log-probabilities of the prompt were asked for, the first
        event of each choice has them. Raises GenerationFailed, InvalidRequest, ServerStopping, DeadlineExceeded or
        RequestCancelled if a choice could not be finished, and cancels the others."""
        try:
            async for event in self._stream:
                number = self._order[event.request_id] * self._n + event.index
                self.work.add(event, counts_prompt=number % self._n == 0)
                if self._early is not None:
                    raise self._early
                if event.finish_reason is FinishReason.ERROR:
                    if event.refused:
                        raise InvalidRequest(event.error or "", code=NO_TOKEN_LEFT)
                    raise GenerationFailed(event.error or "The engine could not finish this request.")
                if event.finish_reason is FinishReason.CANCELLED:  # not by the client, who closes `events`
                    raise ServerStopping
                self._record(number, event)
                for each in self._prompts_first.take(event):
                    yield self._order[each.request_id] * self._n + each.index, each
        finally:
            if self._timer is not None:
                self._timer.cancel()
            self._requests.remove(self._running)
            await self._stream.aclose()

    def _record(self, number: int, event: OutputEvent) -> None:
        now = time.perf_counter()
        if event.token_ids and number not in self._begun:
            self._begun.add(number)
            self._metrics.first_token_seconds.observe(now - self._arrived)
        if event.finish_reason is None:
            return
        self._metrics.request_seconds.observe(now - self._arrived)
        self._unfinished -= 1
        if event.usage is not None:
            self._usage[number] = event.usage
            if event.fusion is not None:
                self._reports.append((event.usage.completion_tokens, event.fusion))

    def usage(self) -> UsageBody:
        """Over all choices. A prompt counts once however many choices continue it."""
        return total_usage([self])

    @property
    def costs(self) -> list[tuple[Usage, bool]]:
        """Of each choice that finished, and whether it is the one that its prompt is counted with."""
        return [(usage, number % self._n == 0) for number, usage in self._usage.items()]

    def fusion(self) -> FusionSummary | None:
        """Over all choices, None for requests to a plain base of this server. `mean_kl` weighs every generated position
        alike."""
        if not self._reports:
            return None
        report = self._reports[0][1]
        generated = any(tokens for tokens, _ in self._reports)  # or a prompt alone was scored
        compared = generated and report.mean_kl is not None
        summary = FusionSummary(
            rule=report.rule,
            sum_of_weights=report.sum_of_weights,
            generations=dict(report.generations),
            mean_kl=self._mean(lambda report: report.mean_kl or 0.0) if compared else None,
            flips=sum(report.flips or 0 for _, report in self._reports) if compared else None,
        )
        if not generated:
            return summary
        if report.mean_weights is not None:
            summary.mean_weights = {
                expert: self._mean(lambda report, expert=expert: (report.mean_weights or {}).get(expert, 0.0))  # type: ignore[misc]
                for expert in report.mean_weights
            }
        if report.certified is not None:
            summary.certified = sum(report.certified or 0 for _, report in self._reports)
            summary.mean_unseen_mass = self._mean(lambda report: report.mean_unseen_mass or 0.0)
        if any(report.drafted for _, report in self._reports):
            summary.drafted = sum(report.drafted or 0 for _, report in self._reports)
            summary.accepted = sum(report.accepted or 0 for _, report in self._reports)
        return summary

    def _mean(self, value: Callable[[FusionReport], float]) -> float:
        """Over generated positions."""
        positions = sum(tokens for tokens, _ in self._reports)
        return sum(tokens * value(report) for tokens, report in self._reports) / max(1, positions)


class _PromptsFirst:
    """The engine finds a prompt's log-probabilities once and reports them with the prompt's first choice. Here each
    choice gets them with its first event; those that are earlier wait."""

    def __init__(self, submissions: Sequence[Submission]) -> None:
        self._wanted = {
            submission.request_id
            for submission in submissions
            if submission.sampling.prompt_logprobs is not None
        }
        self._found: dict[str, OutputEvent] = {}
        self._begun: set[tuple[str, int]] = set()
        self._waiting: dict[str, list[OutputEvent]] = {}

    def take(self, event: OutputEvent) -> list[OutputEvent]:
        """The events that may go on now."""
        prompt = event.request_id
        if prompt not in self._wanted:
            return [event]
        if event.prompt_logprobs is not None:
            self._found[prompt] = event
        if prompt not in self._found:
            self._waiting.setdefault(prompt, []).append(event)
            return []
        return [self._begin(each) for each in (event, *self._waiting.pop(prompt, ()))]

    def _begin(self, event: OutputEvent) -> OutputEvent:
        choice = (event.request_id, event.index)
        if choice in self._begun:
            return event
        self._begun.add(choice)
        found = self._found[event.request_id]
        return replace(
            event, prompt_logprobs=found.prompt_logprobs, prompt_explanations=found.prompt_explanations
        )


def total_usage(generations: Iterable[Generation]) -> UsageBody:
    """What they cost together. A prompt counts once however many choices continue it."""
    costs = [cost for generation in generations for cost in generation.costs]
    prompts = [usage for usage, counts_prompt in costs if counts_prompt]
    usages = [usage for usage, _ in costs]
    prompt_tokens = sum(usage.prompt_tokens for usage in prompts)
    completion_tokens = sum(usage.completion_tokens for usage in usages)
    body = UsageBody(
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        total_tokens=prompt_tokens + completion_tokens,
        prompt_tokens_details=PromptTokensDetails(
            cached_tokens=sum(usage.cached_tokens for usage in prompts)
        ),
        lane_tokens=_added(usage.lane_tokens for usage in usages),
    )
    gated = [usage.gated_tokens for usage in usages if usage.gated_tokens is not None]
    if gated:
        body.gated_tokens = sum(gated)
        body.skipped_lane_tokens = _added(usage.skipped_lane_tokens or {} for usage in usages)
    return body


def _added(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    total: dict[str, int] = {}
    for entry in counts:
        for name, count in entry.items():
            total[name] = total.get(name, 0) + count
    return total


@dataclass(slots=True)
class Answer:
    """Everything that one choice produced. `lengths` are the numbers of tokens that its `pieces` came with."""

    pieces: list[str] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    explanations: list[TokenExplanation] = field(default_factory=list)
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    prompt_explanations: tuple[TokenExplanation | None, ...] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    removed_mass: float | None = None

    @property
    def text(self) -> str:
        return "".join(self.pieces)


async def collect(generation: Generation) -> Sequence[Answer]:
    """Wait for all choices; in order of their numbers. Cancelling this cancels the work."""
    answers = [Answer() for _ in range(generation.choices)]
    async with aclosing(generation.events()) as events:
        async for number, event in events:
            answer = answers[number]
            answer.pieces.append(event.text)
            answer.lengths.append(len(event.token_ids))
            answer.token_ids.extend(event.token_ids)
            answer.logprobs.extend(event.logprobs or ())
            answer.explanations.extend(event.explanations or ())
            answer.prompt_logprobs = event.prompt_logprobs or answer.prompt_logprobs
            answer.prompt_explanations = event.prompt_explanations or answer.prompt_explanations
            answer.finish_reason, answer.stop_reason = event.finish_reason, event.stop_reason
            answer.removed_mass = event.removed_mass
    return answers
