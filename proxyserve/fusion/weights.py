"""How much an expert counts: a number, or a number that changes with the position."""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass
from itertools import pairwise

from proxyserve.errors import InvalidRequest

#: `((0, 1.0), (32, 0.25))`: from generated token 0 on the weight counts fully, from token 32 on a quarter of it.
Schedule = tuple[tuple[int, float], ...]

LONGEST_SCHEDULE = 64


@dataclass(frozen=True, slots=True)
class ExpertWeight:
    """One expert and the real number that multiplies its delta. `schedule` has pairs of a generated token's number,
    rising from 0, and the factor that multiplies `weight` from there on; without one the factor is 1 throughout."""

    expert: str
    weight: float = 1.0
    schedule: Schedule = ()

    def __post_init__(self) -> None:
        where = f"fusion.experts.{self.expert}"
        if not self.expert:
            raise InvalidRequest("An expert's name must not be empty.", param="fusion.experts")
        if not math.isfinite(self.weight):
            raise InvalidRequest(
                f"The weight of expert '{self.expert}' must be a finite number, not {self.weight}.",
                param=where,
            )
        check_schedule(self.schedule, f"{where}.schedule")


def check_schedule(schedule: Schedule, where: str) -> None:
    """Raises InvalidRequest, naming the field `where`."""
    if not schedule:
        return
    starts = [start for start, _ in schedule]
    if starts[0] != 0:
        raise InvalidRequest(f"'{where}' must begin at token 0, not {starts[0]}.", param=where)
    if any(later <= earlier for earlier, later in pairwise(starts)):
        raise InvalidRequest(f"The token numbers of '{where}' must rise.", param=where)
    if not all(math.isfinite(factor) for _, factor in schedule):
        raise InvalidRequest(f"The factors of '{where}' must be finite numbers.", param=where)
    if len(schedule) > LONGEST_SCHEDULE:
        raise InvalidRequest(
            f"'{where}' has {len(schedule)} entries; at most {LONGEST_SCHEDULE} are allowed.", param=where
        )


def factor_at(schedule: Schedule, token: int) -> float:
    """What multiplies the weight at generated token number `token`."""
    if not schedule:
        return 1.0
    return schedule[bisect_right(schedule, (token, math.inf)) - 1][1]
