"""What a check-up finds, and how it is shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

Status = Literal["ok", "note", "warning", "problem"]

_MARKS: Mapping[Status, tuple[str, str]] = {
    "ok": ("ok", "green"),
    "note": ("-", "dim"),
    "warning": ("warning", "bold yellow"),
    "problem": ("problem", "bold red"),
}


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at. A `problem` is what a server cannot start or be trusted with; a `warning` costs
    speed, safety or features; a `note` is only told. `advice` says what to do; `data` is for machines."""

    topic: str
    what: str
    found: str
    status: Status = "ok"
    advice: str | None = None
    data: Mapping[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        entry = {"topic": self.topic, "what": self.what, "status": self.status, "found": self.found}
        return {
            **entry,
            **({} if self.advice is None else {"advice": self.advice}),
            **({"data": dict(self.data)} if self.data else {}),
        }


def is_fine(findings: Sequence[Finding]) -> bool:
    return not any(finding.status == "problem" for finding in findings)


def as_json(findings: Sequence[Finding]) -> dict[str, Any]:
    counts = {status: sum(finding.status == status for finding in findings) for status in _MARKS}
    return {
        "ok": is_fine(findings),
        "counts": counts,
        "findings": [finding.as_json() for finding in findings],
    }


def show(findings: Sequence[Finding], console: Console) -> None:
    """A table by topic, then what to do, and a last line that says how it is."""
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column()
    topic = ""
    for finding in findings:
        if finding.topic != topic:
            topic = finding.topic
            table.add_row(Text(topic, style="bold"), "", "")
        mark, style = _MARKS[finding.status]
        table.add_row(Text(f"  {finding.what}"), Text(mark, style=style), Text(finding.found))
    console.print(table)
    wrong = [finding for finding in findings if finding.advice is not None]
    if wrong:
        console.print()
    for finding in wrong:
        mark, style = _MARKS[finding.status]
        line = Text.assemble(("what to do" if mark == "-" else mark, style), f": {finding.what}: ")
        console.print(line + Text(finding.advice or ""), soft_wrap=True, highlight=False)
    problems = sum(finding.status == "problem" for finding in findings)
    warnings = sum(finding.status == "warning" for finding in findings)
    console.print()
    console.print(
        f"{problems} problem{'s' * (problems != 1)}, {warnings} warning{'s' * (warnings != 1)}",
        highlight=False,
    )
