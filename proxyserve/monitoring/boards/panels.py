"""Panels that several boards have."""

from __future__ import annotations

from proxyserve.api.families import Family
from proxyserve.monitoring.board import Form, Panel, Query, Unit
from proxyserve.monitoring.queries import Queries

#: `$job` and `$instance` are chosen at the top of each board.
Q = Queries('job="$job", instance=~"$instance"')


def one(expression: str, legend: str = "") -> tuple[Query, ...]:
    """The queries of a panel that has one."""
    return (Query(expression, legend),)


def percentiles(family: Family, title: str, text: str, width: int = 8) -> Panel:
    """Half, 95 and 99 of 100 values of a histogram of seconds."""
    shares = (0.5, 0.95, 0.99)
    return Panel(
        title,
        tuple(Query(Q.quantile(share, family), f"p{share * 100:g}") for share in shares),
        Unit.SECONDS,
        text,
        width=width,
    )


def heatmap(family: Family, title: str, unit: Unit, text: str, width: int = 8) -> Panel:
    """All values of a histogram by size, along time."""
    return Panel(title, one(Q.buckets(family), "{{le}}"), unit, text, form=Form.HEATMAP, width=width)


def number(title: str, expression: str, unit: Unit, text: str, bad: float | None = None) -> Panel:
    """The value of this moment, large; red from `bad` on."""
    return Panel(title, one(expression), unit, text, form=Form.NUMBER, width=4, bad=bad)
