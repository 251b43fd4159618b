"""Which tokens of a prompt can be scored, and what has been found out about them so far.

A token is scored by rows of logits that all lanes have at the same place of the same text. The prompts of lanes may
begin differently (special tokens, a `prefix` of one lane), so that places are counted from the end:

    base       B  T  h  e  c  a  t            scored: T h e c a t
    qa.tuned   few shots  T  h  e  c  a  t    each has something before it in every lane
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from proxyserve.engine.submission import Submission
from proxyserve.errors import InvalidRequest
from proxyserve.fusion.binding import BoundProgram, LaneSpec
from proxyserve.fusion.program import BASE_LANE
from proxyserve.models.remote import RemoteModel
from proxyserve.types import OutputEvent, TokenExplanation, TokenLogprob


class Score(NamedTuple):
    """Of one token of a prompt, as the request asked for it."""

    law: TokenLogprob
    explanation: TokenExplanation | None


@dataclass(slots=True)
class Scoring:
    """The scores of one choice's prompt. `targets` are the tokens to be scored: those of the base's prompt from number
    `first` on. `scores` has what is known of the first of them. It stays as it is when the choice is preempted."""

    first: int
    targets: tuple[int, ...]
    scores: list[Score] = field(default_factory=list)
    told: bool = False

    def next(self, count: int) -> Sequence[int]:
        """The next `count` tokens to be scored, or as many as are left."""
        return self.targets[len(self.scores) : len(self.scores) + count]

    def add(self, scores: Iterable[Score]) -> None:
        """Of the next tokens."""
        self.scores.extend(scores)

    def tell(self, event: OutputEvent) -> OutputEvent:
        """`event`, with the scores if they have not been told before. All tokens must have been scored."""
        if self.told:
            return event
        self.told = True
        unknown = (None,) * self.first
        laws = tuple(score.law for score in self.scores)
        explanations = tuple(score.explanation for score in self.scores if score.explanation is not None)
        return replace(
            event,
            prompt_logprobs=(*unknown, *laws),
            prompt_explanations=(*unknown, *explanations) if explanations else None,
        )


def plan_scoring(submission: Submission, program: BoundProgram) -> Scoring | None:
    """What is to be scored; None if nothing is. Raises InvalidRequest where it cannot be."""
    sampling = submission.sampling
    if sampling.prompt_logprobs is None:
        return None
    prompt, first = submission.prompts.of(BASE_LANE), sampling.prompt_logprobs_from
    if first and first >= len(prompt):
        raise InvalidRequest(
            f"prompt_logprobs_from is {first}, and the prompt has {len(prompt)} tokens.",
            param="prompt_logprobs_from",
        )
    for spec in program.lanes:
        if isinstance(spec.model, RemoteModel):
            raise InvalidRequest(
                f"prompt_logprobs needs whole laws at the tokens of the prompt, and '{spec.model.name}' is on another "
                "server, which shows the likeliest next tokens alone; leave it out.",
                param="prompt_logprobs",
            )
        common = _common_ending(prompt, spec.prompt)
        if common < len(prompt) - max(sampling.prompt_logprobs_from, 1):
            raise _other_text(submission, spec, common)
        first = max(first, len(prompt) - min(common, len(spec.prompt) - 1))
    return Scoring(first, prompt[first:])


def _common_ending(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens at the ends of both are the same."""
    if one == other:
        return len(one)
    most = min(len(one), len(other))
    pairs = zip(reversed(one), reversed(other), strict=False)
    return next((count for count, (left, right) in enumerate(pairs) if left != right), most)


def _other_text(submission: Submission, spec: LaneSpec, common: int) -> InvalidRequest:
    own = next((name for name in spec.names if name in submission.fusion.prompts), None)
    return InvalidRequest(
        f"prompt_logprobs is what all lanes think of the same tokens, and of the prompt of lane '{spec.names[0]}' only "
        f"the last {common} tokens are those of the base's prompt; give the lane a 'prefix' instead of a prompt of its "
        "own, or leave prompt_logprobs out.",
        param="prompt_logprobs" if own is None else f"fusion.prompts.{own}",
    )
