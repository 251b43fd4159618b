"""Whether a greedy choice over the likeliest tokens of a remote base is the one over its whole law.

The base returned ids K, and no other id has more than `b`. Score every token once more with `b` where the base is
unknown: that is the most that each can have. If the best of those scores belongs to a token that the base did return,
its score is exact and no other token can beat it:

    max over K of s(x) >= max over the others of (b + sum of w (l_tuned - l_untuned))   =>   certified

The same after logit bias and penalties, which raise no score above another by its base, and among the tokens that may
come at all. A lane of the base that counts
negatively (a negative prompt) has no such bound: what it did not return may be arbitrarily unlikely, so nothing is
certified then.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from proxyserve.engine.adjustments import Adjuster, RowAdjustments
from proxyserve.engine.batch import FusedRow, LogitRows, build_batch
from proxyserve.engine.choice import Certificate
from proxyserve_kernels import Backend, PickControls


def certify(
    backend: Backend,
    rows: Sequence[FusedRow],
    adjusted: Sequence[RowAdjustments],
    logits: LogitRows,
    adjuster: Adjuster,
) -> list[Certificate | None]:
    """An entry per row, None for those that no remote law takes part in. One more call of the kernels over the others;
    none if there are none. `adjusted` are the adjustments of each row."""
    found: list[Certificate | None] = [None] * len(rows)
    places = [place for place, row in enumerate(rows) if row.choice.program.remote_weights]
    if not places:
        return found
    own = [rows[place] for place in places]
    batch = build_batch(own, logits, highest=True)
    adjustments = adjuster.adjustments([adjusted[place] for place in places])
    controls = replace(PickControls.greedy(len(own)), adjustments=adjustments, compare=False)
    best = backend.pick(batch, controls).tokens.tolist()
    for place, row, token in zip(places, own, best, strict=True):
        found[place] = _certificate(row, logits, token)
    return found


def _certificate(row: FusedRow, logits: LogitRows, token: int) -> Certificate:
    program, lanes = row.choice.program, row.choice.scheduled.lanes
    weights = program.remote_weights
    certified = all(
        weight > 0.0 and logits.returned(lanes[lane], token) for lane, weight in weights.items() if weight
    )
    return Certificate(certified and token >= 0, logits.unseen(lanes[program.origin]))
