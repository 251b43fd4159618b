"""From the logits of prompt tokens to their scores: the fused law at each, with nothing but the fusion in it.

Bias, penalties, temperature and filters say how tokens are drawn, and these are there already.
"""

from __future__ import annotations

from collections.abc import Sequence

from proxyserve.engine.adjustments import NO_FINITE_SCORE, Halt
from proxyserve.engine.batch import (
    FusedRow,
    LogitRows,
    build_batch,
    build_scoring,
    is_sure,
    models_are_sound,
    token_logprobs,
    wanted,
    weights_used,
    with_solved_weights,
)
from proxyserve.engine.choice import Choice, Sampled
from proxyserve.engine.explain import explain
from proxyserve.engine.scoring import Score
from proxyserve_kernels import Backend


def rows_to_score(choice: Choice, count: int) -> list[FusedRow]:
    """Those of a step in which each lane of the choice has `count` rows, in the order of the tokens that they score.
    Under a gate there are two for each: the base alone, then the fused law."""
    if choice.scoring is None:
        return []
    rows = []
    for nth, target in enumerate(choice.scoring.next(count)):
        if choice.is_gated:
            rows.append(FusedRow(choice, nth, alone=True, target=target))
        rows.append(FusedRow(choice, nth, target=target))
    return rows


def score(
    backend: Backend, rows: Sequence[FusedRow], logits: LogitRows, at_once: int
) -> dict[Choice, list[Score | Halt | None]]:
    """Scores of the rows' targets by choice, in their order; None where the models gave no law, and a Halt where they
    did, but their fusion is none. At most
    `at_once` rows are fused together, since each takes several times the vocabulary of memory."""
    found: dict[Choice, dict[int, Score | Halt | None]] = {}
    for start in range(0, len(rows), at_once):
        some = rows[start : start + at_once]
        for row, result in zip(some, _scores(backend, some, logits), strict=True):
            if not row.alone or not isinstance(result, Score) or is_sure(row.choice, result.law):
                # What the base alone decides comes first, and stands.
                found.setdefault(row.choice, {}).setdefault(row.nth, _as_asked(row, result))
    return {choice: list(scores.values()) for choice, scores in found.items()}


def _scores(backend: Backend, rows: Sequence[FusedRow], logits: LogitRows) -> list[Score | Halt | None]:
    """Of each row, with the tokens that are listed for any end."""
    batch = with_solved_weights(backend, rows, build_batch(rows, logits))
    controls = build_scoring(rows)
    picks = backend.pick(batch, controls)
    targets = [row.target for row in rows if row.target is not None]
    laws = token_logprobs(targets, picks.raw, controls.listed)
    valid, kl, flips = picks.valid.tolist(), picks.kl.tolist(), picks.flips.tolist()
    weights = batch.weights.tolist()
    sampled = [
        Sampled(
            target,
            kl=kl[number],
            flip=flips[number],
            weights=weights_used(rows[number], weights[number]),
            gated=rows[number].alone,
        )
        for number, target in enumerate(targets)
    ]
    reasons = explain(backend, rows, logits, sampled, laws)
    scores: list[Score | Halt | None] = []
    for number, law in enumerate(laws):
        if law is not None and valid[number]:
            scores.append(Score(law, reasons[number]))
        else:
            scores.append(NO_FINITE_SCORE if models_are_sound(batch, number) else None)
    return scores


def _as_asked(row: FusedRow, score: Score | Halt | None) -> Score | Halt | None:
    if not isinstance(score, Score):
        return score
    law = wanted(row, score.law)
    return None if law is None else score._replace(law=law)
