"""How often a drafter is right.

A draft is tried if all before it stood, so a request's drafts are trials of one rate: as many successes as stood, and a
failure where one did not. Where nothing is drafted the rate is kept up by the drafter's shadow: the token that it would
have drafted, which its logits of a plain step give without another forward, against the one that was drawn.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable

#: Trials that a request's rate, and that of all requests of a kind, remember.
_WINDOW = 16.0
_WINDOW_OF_KIND = 256.0
#: Trials without which nothing is drafted.
_ENOUGH = 4.0
#: A request is unlike its kind if its rate is further from the kind's than so many standard deviations of its trials.
_UNLIKE = 2.0
_LEAST_VARIANCE = 0.05
#: Tokens from one shadow to the next at most.
SPARSEST = 16
#: A new request of a kind of which so many trials are known begins with half as many between them.
_KNOWN = 32.0
#: An outcome further than this from the rate is news.
_NEWS = 0.5


class Acceptance:
    """Trials, and how many of them were right. The last `window` trials or so count, older ones fade."""

    __slots__ = ("_window", "right", "tried")

    def __init__(self, window: float = _WINDOW) -> None:
        self._window = window
        self.right = 0.0
        self.tried = 0.0

    @property
    def rate(self) -> float:
        return self.right / self.tried if self.tried else 0.0

    def observe(self, accepted: int, drafted: int) -> None:
        """The first `accepted` of `drafted` drafts stood; those after the first that did not were not tried."""
        if not 0 <= accepted <= drafted:
            raise ValueError(f"{accepted} of {drafted} drafts cannot have stood")
        trials = accepted + (accepted < drafted)
        kept = (1.0 - 1.0 / self._window) ** trials
        self.tried = self.tried * kept + trials
        self.right = self.right * kept + accepted


class Drafting:
    """One request's drafter: how often it is right, and when to look again while it does not draft. `kind` has what is
    known of other requests with the same drafter and rule, and learns from this one."""

    __slots__ = ("_gap", "_kind", "_own", "_since")

    def __init__(self, kind: Acceptance) -> None:
        self._own = Acceptance()
        self._kind = kind
        self._gap = 1 if kind.tried < _KNOWN else SPARSEST // 2
        self._since = 0

    @property
    def rate(self) -> float | None:
        """The share of drafts that stand, in [0, 1]; None as long as too little is known to speculate on it. That of
        the kind, unless this request is unlike the others: of many alike, the luckiest would seem to be the best."""
        own, kind = self._own, self._kind
        if kind.tried < _ENOUGH:
            return None
        variance = max(_LEAST_VARIANCE, kind.rate * (1.0 - kind.rate))
        unlike = (own.rate - kind.rate) ** 2 * own.tried > _UNLIKE**2 * variance
        return own.rate if unlike else kind.rate

    @property
    def due(self) -> float:
        """From 1 on a plain step should draw the drafter's token too, and from 1/2 on if others do. At each token until
        something is known, then ever more rarely as long as the outcome is what the rate says."""
        return 1.0 if self.rate is None else (self._since + 1) / self._gap

    def skipped(self) -> None:
        """A plain step without a shadow."""
        self._since += 1

    def shadowed(self, right: bool) -> None:
        """A plain step whose shadow agreed with the token, or did not."""
        rate = self.rate
        if rate is not None:
            self._gap = max(1, self._gap // 4) if abs(right - rate) > _NEWS else min(SPARSEST, self._gap * 2)
        self._since = 0
        self._observe(int(right), 1)

    def verified(self, accepted: int, drafted: int) -> None:
        """A step with drafts."""
        self._since = 0
        self._observe(accepted, drafted)

    def _observe(self, accepted: int, drafted: int) -> None:
        self._own.observe(accepted, drafted)
        self._kind.observe(accepted, drafted)


class Kinds:
    """What is known of each drafter under each rule, of the last `most` of them that began a request."""

    def __init__(self, most: int = 1024) -> None:
        self._most = most
        self._known: OrderedDict[Hashable, Acceptance] = OrderedDict()

    def begin(self, kind: Hashable) -> Drafting:
        """For a new request."""
        known = self._known.setdefault(kind, Acceptance(_WINDOW_OF_KIND))
        self._known.move_to_end(kind)
        if len(self._known) > self._most:
            self._known.popitem(last=False)
        return Drafting(known)
