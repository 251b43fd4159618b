"""The weight that gains most within a loss budget: an expert's losses on its task and on general text, by weight."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from proxyserve.engine.submission import LanePrompts
from proxyserve.errors import InvalidRequest
from proxyserve.evaluation.likelihood import Likelihood
from proxyserve.fusion.binding import BoundProgram
from proxyserve.fusion.calibration import Calibration, CalibrationPoint
from proxyserve.fusion.fusion import proxy


@dataclass(frozen=True, slots=True)
class Scored:
    """`text` is scored after `prompt`, both as token ids; the prompt is not."""

    prompt: tuple[int, ...]
    text: tuple[int, ...]


def calibrate(
    likelihood: Likelihood,
    expert: str,
    task: Sequence[Scored],
    general: Sequence[Scored],
    weights: Sequence[float],
    progress: Callable[[str], None] = lambda _: None,
) -> Calibration:
    """The curve of `expert` under rule `proxy` (Hewitt et al. 2024, arXiv 2402.06155, find their weight on one). Every
    model reads each text once, whatever the number of weights. `weights` rise from 0.

    Raises UnknownModel, and InvalidRequest for an expert without an untuned model, an empty set or a text that is
    longer than a context."""
    losses = []
    for name, texts in (("task", task), ("general text", general)):
        if not texts:
            raise InvalidRequest(f"There is nothing to score as {name}.")
        losses.append(_losses(likelihood, expert, texts, weights, f"{expert}: {name}", progress))
    points = zip(weights, *losses, strict=True)
    return Calibration(expert, tuple(CalibrationPoint(*point) for point in points))


def _losses(
    likelihood: Likelihood,
    expert: str,
    texts: Sequence[Scored],
    weights: Sequence[float],
    what: str,
    progress: Callable[[str], None],
) -> list[float]:
    """Mean loss per token of all texts, at each weight."""
    totals = [0.0] * len(weights)
    tokens = 0
    for number, scored in enumerate(texts, 1):
        progress(f"{what}, {number} of {len(texts)}")
        # With weight 1 both lanes of the expert run; the other weights read the same logits.
        program = likelihood.bind(proxy({expert: 1.0}), LanePrompts(scored.prompt))
        for chunk in likelihood.chunks(program, scored.text):
            tokens += len(chunk.tokens)
            for place, weight in enumerate(weights):
                totals[place] -= float(likelihood.logprobs(_weighted(program, weight), chunk).double().sum())
    return [total / tokens for total in totals]


def _weighted(program: BoundProgram, weight: float) -> BoundProgram:
    return replace(program, terms=tuple(replace(term, weight=weight) for term in program.terms))


def windows(ids: Sequence[int], first: int, length: int) -> Iterator[Scored]:
    """A long text in pieces of at most `length` tokens, each after the token before it; the first after `first`."""
    for start in range(0, len(ids), length):
        before = ids[start - 1] if start else first
        yield Scored((before,), tuple(ids[start : start + length]))


def weight_steps(largest: float, step: float) -> list[float]:
    """0, step, 2 step .. largest. Raises InvalidRequest."""
    if not 0.0 < step <= largest:
        raise InvalidRequest(f"The step must be above 0 and at most the largest weight, {largest:g}.")
    return [round(number * step, 10) for number in range(int(largest / step + 1e-9) + 1)]
