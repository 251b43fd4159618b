"""PromQL from metric families: a counter is only ever asked for its rate, a histogram for its buckets, and labels are
those that the family has. What a family cannot answer raises ValueError when the boards are made, not when somebody
looks at them.
"""

from __future__ import annotations

from collections.abc import Sequence

from proxyserve.api.families import Family, Kind

#: In boards: at least four scrapes, and as long as a pixel stands for.
RATE_INTERVAL = "$__rate_interval"

#: Labels that Prometheus adds to all series of a server.
_OF_TARGETS = ("job", "instance")


class Queries:
    """Queries over the series that `selector` picks, such as `job="proxyserve"`."""

    def __init__(self, selector: str) -> None:
        self._selector = selector

    def gauge(self, family: Family, how: str = "sum", by: Sequence[str] = (), where: str = "") -> str:
        """`how` is the aggregation over all servers and labels that are not in `by`."""
        _require(family, Kind.GAUGE, by)
        return f"{how}{_by(by)} ({self._series(family.name, where)})"

    def rate(self, family: Family, by: Sequence[str] = (), where: str = "", over: str = RATE_INTERVAL) -> str:
        """Per second."""
        _require(family, Kind.COUNTER, by)
        return f"sum{_by(by)} (rate({self._series(family.name, where)}[{over}]))"

    def increase(
        self, family: Family, by: Sequence[str] = (), where: str = "", over: str = RATE_INTERVAL
    ) -> str:
        """How often within `over`."""
        _require(family, Kind.COUNTER, by)
        return f"sum{_by(by)} (increase({self._series(family.name, where)}[{over}]))"

    def ratio(self, part: Family, whole: Family, by: Sequence[str] = (), over: str = RATE_INTERVAL) -> str:
        """Of two counters. Nothing where the whole did not grow."""
        return f"{self.rate(part, by, over=over)} / ({self.rate(whole, by, over=over)} > 0)"

    def quantile(self, share: float, family: Family, over: str = RATE_INTERVAL) -> str:
        """Of a histogram, over all servers."""
        _require(family, Kind.HISTOGRAM, ())
        return f"histogram_quantile({share:g}, {self.buckets(family, over)})"

    def buckets(self, family: Family, over: str = RATE_INTERVAL) -> str:
        """Values per second and bucket of a histogram."""
        _require(family, Kind.HISTOGRAM, ())
        return f"sum by (le) (rate({self._series(family.name + '_bucket')}[{over}]))"

    def above(self, bound: str, family: Family, over: str) -> str:
        """Share of a histogram's values above `bound`, which must be one of its bounds, as it writes them."""
        _require(family, Kind.HISTOGRAM, ())
        quoted = f'le="{bound}"'
        below = f"sum (rate({self._series(family.name + '_bucket', quoted)}[{over}]))"
        return f"1 - {below} / ({self.observed(family, over)} > 0)"

    def mean(self, family: Family, over: str = RATE_INTERVAL) -> str:
        """Of a histogram."""
        return f"{self.added(family, over)} / ({self.observed(family, over)} > 0)"

    def added(self, family: Family, over: str = RATE_INTERVAL) -> str:
        """The sum of a histogram's values, per second."""
        _require(family, Kind.HISTOGRAM, ())
        return f"sum (rate({self._series(family.name + '_sum')}[{over}]))"

    def observed(self, family: Family, over: str = RATE_INTERVAL) -> str:
        """How many values a histogram was given, per second."""
        _require(family, Kind.HISTOGRAM, ())
        return f"sum (rate({self._series(family.name + '_count')}[{over}]))"

    def each(self, family: Family, where: str = "") -> str:
        """The series of a gauge as they are."""
        _require(family, Kind.GAUGE, ())
        return self._series(family.name, where)

    def up(self) -> str:
        """Prometheus' own: 1 for each server that it reached at its last scrape."""
        return self._series("up")

    def _series(self, name: str, where: str = "") -> str:
        return f"{name}{{{', '.join(part for part in (self._selector, where) if part)}}}"


def _require(family: Family, kind: Kind, by: Sequence[str]) -> None:
    if family.kind is not kind:
        raise ValueError(f"{family.name} is a {family.kind}, not a {kind}")
    unknown = set(by) - {*family.labels, *_OF_TARGETS}
    if unknown:
        raise ValueError(f"{family.name} has no label {', '.join(sorted(unknown))}")


def _by(labels: Sequence[str]) -> str:
    return f" by ({', '.join(labels)})" if labels else ""
