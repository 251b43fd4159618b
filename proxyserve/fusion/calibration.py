"""What calibration found for an expert: how much each weight costs on general text."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from proxyserve.errors import LoadError


@dataclass(frozen=True, slots=True)
class CalibrationPoint:
    """Mean loss per token, in nats, on the task's answers and on general text at one weight of rule `proxy`."""

    weight: float
    task_loss: float
    general_loss: float

    def __post_init__(self) -> None:
        if not all(math.isfinite(value) for value in (self.weight, self.task_loss, self.general_loss)):
            raise ValueError("a calibration's numbers must be finite")


@dataclass(frozen=True, slots=True)
class Calibration:
    """The curve of one expert, by rising weight; the first point is at weight 0, the base alone."""

    expert: str
    points: tuple[CalibrationPoint, ...]

    def __post_init__(self) -> None:
        weights = [point.weight for point in self.points]
        if not weights or weights[0] != 0.0 or weights != sorted(set(weights)):
            raise ValueError("a calibration's weights must rise from 0")

    def largest_within(self, budget: float) -> float:
        """The largest weight whose loss on general text is at most `1 + budget` times the base's (Hewitt et al. 2024,
        arXiv 2402.06155). 0 if none is."""
        limit = (1.0 + budget) * self.points[0].general_loss
        return max((point.weight for point in self.points if point.general_loss <= limit), default=0.0)

    def best_within(self, budget: float) -> float:
        """Among the weights that keep the loss on general text within the budget, the one with the least loss on the
        task."""
        limit = (1.0 + budget) * self.points[0].general_loss
        allowed = [point for point in self.points if point.general_loss <= limit]
        return min(allowed, key=lambda point: (point.task_loss, point.weight)).weight if allowed else 0.0


def write_calibrations(path: Path, calibrations: Mapping[str, Calibration]) -> None:
    """As JSON, for `--calibration`."""
    data = {name: [asdict(point) for point in found.points] for name, found in calibrations.items()}
    path.write_text(json.dumps({"calibrations": data}, indent=2) + "\n", encoding="utf-8")


def read_calibrations(path: Path) -> dict[str, Calibration]:
    """What `write_calibrations` wrote. Raises LoadError."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))["calibrations"]
        return {
            name: Calibration(name, tuple(CalibrationPoint(**point) for point in points))
            for name, points in data.items()
        }
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise LoadError(f"{path} is no file of calibrations: {error}") from error
