"""What a board is made of, before it is anybody's JSON."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Unit(enum.StrEnum):
    """Grafana's names."""

    NUMBER = "short"
    SECONDS = "s"
    BYTES = "bytes"
    SHARE = "percentunit"
    TOKENS_PER_SECOND = "suffix: tok/s"
    PER_SECOND = "suffix: /s"
    NATS = "suffix: nats"
    TOKENS = "suffix: tok"


class Form(enum.StrEnum):
    """Grafana's kinds of panels."""

    LINES = "timeseries"
    NUMBER = "stat"
    HEATMAP = "heatmap"
    TABLE = "table"


@dataclass(frozen=True, slots=True)
class Query:
    """`legend` may hold labels, as `{{model}}`."""

    expression: str
    legend: str


@dataclass(frozen=True, slots=True)
class Panel:
    """`text` is shown where the reader asks what this is. `width` is in 24ths of the board. `stacked` adds lines up,
    for parts of a whole. A value at or above `bad` is shown in red, below 1 where `bad_below_one`."""

    title: str
    queries: tuple[Query, ...]
    unit: Unit
    text: str
    form: Form = Form.LINES
    width: int = 8
    stacked: bool = False
    bad: float | None = None
    bad_below_one: bool = False

    def __post_init__(self) -> None:
        if not self.queries or not self.text:
            raise ValueError(f"panel '{self.title}' needs queries and a text")


@dataclass(frozen=True, slots=True)
class Row:
    title: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True, slots=True)
class Board:
    """`name` is that of its file and, after a prefix, its address."""

    name: str
    title: str
    text: str
    rows: tuple[Row, ...]

    @property
    def panels(self) -> tuple[Panel, ...]:
        return tuple(panel for row in self.rows for panel in row.panels)
