"""Run submissions through an engine to the end, checking its bookkeeping after every step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from proxyserve.engine.engine import Engine
from proxyserve.engine.submission import LanePrompts, Submission
from proxyserve.fusion.fusion import Fusion, proxy
from proxyserve.types import OutputEvent, SamplingParams, TokenExplanation, TokenLogprob


@dataclass
class Collected:
    """All that one choice put out."""

    tokens: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    explanations: list[TokenExplanation] = field(default_factory=list)
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    prompt_explanations: tuple[TokenExplanation | None, ...] | None = None
    last: OutputEvent | None = None

    def add(self, event: OutputEvent) -> None:
        assert self.last is None, "an event after the last one"
        if event.prompt_logprobs is not None:
            assert not self.tokens, "the prompt's log-probs come once, not later than the first token"
            assert self.prompt_logprobs is None
            self.prompt_logprobs = event.prompt_logprobs
            self.prompt_explanations = event.prompt_explanations
        self.tokens.extend(event.token_ids)
        self.text += event.text
        self.logprobs.extend(event.logprobs or ())
        self.explanations.extend(event.explanations or ())
        if event.finish_reason is not None:
            self.last = event


def run(
    engine: Engine,
    submissions: Sequence[Submission],
    *,
    most_steps: int = 5000,
    watch: Callable[[], None] = lambda: None,
) -> dict[str, Collected]:
    """Choices by key (`request/index`). Fails if the engine stops advancing or loses a block. `watch` is called after
    every step."""
    results = {key: Collected() for submission in submissions for key in engine.submit(submission)}
    for _ in range(most_steps):
        if not engine.has_work:
            break
        for event in engine.step():
            results[f"{event.request_id}/{event.index}"].add(event)
        engine.check()
        watch()
    assert not engine.has_work, "requests are left over"
    assert all(pool.in_use == 0 for pool in engine.pools.values()), "blocks are lost"
    assert all(result.last is not None for result in results.values())
    return results


def submission(
    request_id: str,
    prompt: Sequence[int],
    weights: Mapping[str, float] | None = None,
    *,
    by_lane: Mapping[str, Sequence[int]] | None = None,
    n: int = 1,
    salt: str = "",
    fusion: Fusion | None = None,
    **sampling: object,
) -> Submission:
    """Greedy, 12 tokens, end-of-text ignored, unless `sampling` says otherwise."""
    values: dict[str, object] = {"max_tokens": 12, "temperature": 0.0, "ignore_eos": True, **sampling}
    return Submission(
        request_id,
        LanePrompts(tuple(prompt), {lane: tuple(ids) for lane, ids in (by_lane or {}).items()}),
        SamplingParams(**values),  # type: ignore[arg-type]
        proxy(weights or {}) if fusion is None else fusion,
        n=n,
        salt=salt,
    )
