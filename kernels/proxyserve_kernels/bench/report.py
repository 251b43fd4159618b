"""Tables as plain text, results as JSON, both while the run goes on."""

from __future__ import annotations

import json
import math
import platform
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

Table = list[dict[str, Any]]


@dataclass
class Report:
    """Collects sections. With a folder each section goes to `FOLDER/NAME-SECTION.json` when it ends, and at the end all
    of them to `FOLDER/NAME.json` and, as text, `FOLDER/NAME.txt`. `wrong` lists results that are not what they must be,
    `failed` sections that ended with an error."""

    name: str
    folder: Path | None
    started: float = field(default_factory=time.monotonic)
    text: list[str] = field(default_factory=list)
    sections: dict[str, dict[str, Any]] = field(default_factory=dict)
    goals: Table = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    def progress(self, line: str) -> None:
        """What is being done, on stderr."""
        print(f"[{time.monotonic() - self.started:6.1f} s] {line}", file=sys.stderr, flush=True)

    @contextmanager
    def table(self, name: str, note: str = "") -> Iterator[Table]:
        """Rows to fill in; whatever is there is printed and written also if an error ends the section."""
        rows: Table = []
        try:
            yield rows
        finally:
            self._section(name, rows, note)

    def goal(self, what: str, goal: str, measured: float, unit: str, met: bool, spread: str = "") -> None:
        """A prediction beside its measurement, for the summary. Missing a goal is a result, not an error."""
        self.goals.append(
            {
                "what": what,
                "goal": goal,
                "measured": measured,
                "unit": unit,
                "spread": spread,
                "met": "yes" if met else "no",
            }
        )

    def check(self, good: bool, what: str) -> bool:
        """Note a wrong result. Returns `good`."""
        if not good:
            self.wrong.append(what)
            self.progress(f"WRONG: {what}")
        return good

    def finish(self) -> int:
        """Print the summary, write everything; the exit status."""
        self._section("summary", self.goals, "goals beside measurements")
        for word, lines in (("FAILED", self.failed), ("WRONG", self.wrong)):
            for line in lines:
                self._print(f"{word}: {line}")
        if self.folder is not None:
            whole = {"wrong": self.wrong, "failed": self.failed, "sections": self.sections}
            self._write(f"{self.name}.json", json.dumps(_plain(whole), indent=1))
            self._write(f"{self.name}.txt", "\n".join(self.text))
        return 1 if self.wrong else 0

    def _section(self, name: str, rows: Table, note: str) -> None:
        self._print(f"\n== {name}" + (f": {note}" if note else ""))
        columns = list(dict.fromkeys(column for row in rows for column in row))
        cells = [columns, *([_cell(row.get(column)) for column in columns] for row in rows)]
        widths = [max(len(line[index]) for line in cells) for index in range(len(columns))]
        for line in cells if rows else [["(nothing)"]]:
            self._print(
                "  ".join(cell.rjust(width) for cell, width in zip(line, widths or [0], strict=True)).rstrip()
            )
        self.sections[name] = {"note": note, "rows": rows}
        if self.folder is not None:
            body = {"section": name, **self.sections[name]}
            self._write(f"{self.name}-{name}.json", json.dumps(_plain(body), indent=1))

    def _print(self, line: str) -> None:
        print(line, flush=True)
        self.text.append(line)

    def _write(self, name: str, text: str) -> None:
        assert self.folder is not None
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / name).write_text(text.lstrip("\n") + "\n")


def _plain(value: Any) -> Any:
    """As JSON can say it: no infinities or NaN, four digits are enough for a time."""
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, float):
        return float(f"{value:.4g}") if math.isfinite(value) else str(value)
    return value


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        size = abs(value)
        return f"{value:.0f}" if size >= 1000 else f"{value:.1f}" if size >= 100 else f"{value:.3g}"
    return str(value)


def environment(device: torch.device) -> dict[str, Any]:
    """Versions and the machine, without names of hosts or users."""
    values: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "triton": _triton_version(),
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        values |= {
            "gpu": properties.name,
            "cuda": torch.version.cuda,
            "multiprocessors": properties.multi_processor_count,
            "L2 MiB": getattr(properties, "L2_cache_size", 0) / 2**20,
            "memory GiB": properties.total_memory / 2**30,
        }
    return values


def _triton_version() -> str:
    try:
        import triton
    except ImportError:
        return "none"
    return str(triton.__version__)


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
