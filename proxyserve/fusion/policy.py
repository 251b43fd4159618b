"""What a server allows its clients to ask of fusion."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from proxyserve.errors import Forbidden, InvalidRequest

if TYPE_CHECKING:  # settings are read before torch is
    from proxyserve.fusion.fusion import Fusion
    from proxyserve.fusion.program import Program, Term


@dataclass(frozen=True, slots=True)
class FusionPolicy:
    """The range of experts' weights, how many terms and lanes one request may have, which experts only an administrator
    may push away from (`protected`: negative weights can undo an alignment), how many tokens an explanation may list,
    and whether only administrators may ask for one."""

    min_weight: float = -4.0
    max_weight: float = 4.0
    max_experts: int = 8
    protected: frozenset[str] = frozenset()
    max_explain: int = 20
    explain_to_all: bool = False

    def __post_init__(self) -> None:
        if not self.min_weight <= 0.0 <= self.max_weight:
            raise ValueError("the allowed range of weights must contain 0")

    @property
    def most_lanes(self) -> int:
        """Of one request: the base's, and two for each expert."""
        return 2 * self.max_experts + 1

    def check(
        self,
        fusion: Fusion,
        program: Program,
        *,
        admin: bool,
        vetted: bool = False,
        explain: bool | None = None,
    ) -> None:
        """Raise InvalidRequest if `fusion`, compiled to `program`, is outside this policy, and Forbidden if it takes an
        administrator. `vetted`: one has decided on these weights already. `explain`: whether the caller has a right
        of their own to explanations, None if this policy decides."""
        if len(program.terms) > self.max_experts:
            raise InvalidRequest(
                f"The fusion has {len(program.terms)} terms; this server allows {self.max_experts} per request.",
                param=".".join(program.terms[0].param.split(".")[:2]),
            )
        for term in () if vetted else program.terms:
            self._check_term(term, admin=admin)
        if program.law is not None and program.law.max_weight > self.max_weight:
            raise InvalidRequest(
                f"The largest weight that may be solved for is {program.law.max_weight:g}; this server allows "
                f"{self.max_weight:g}.",
                param="fusion.max_weight",
            )
        if fusion.explain > self.max_explain:
            raise InvalidRequest(
                f"{fusion.explain} tokens are to be explained; this server lists at most {self.max_explain}.",
                param="fusion.explain",
            )
        if fusion.explain and explain is False:
            raise Forbidden("This key may not ask for explanations.", param="fusion.explain")
        if fusion.explain and not (explain or admin or self.explain_to_all):
            raise Forbidden("Explanations are for administrators on this server.", param="fusion.explain")

    def _check_term(self, term: Term, *, admin: bool) -> None:
        low, high = term.extremes
        if term.bounded and not self.min_weight <= low <= high <= self.max_weight:
            what = (
                f"A weight of {term.lane}"
                if term.minus is None
                else f"A weight of {term.lane} - {term.minus}"
            )
            raise InvalidRequest(
                f"{what} is {low if low < self.min_weight else high:g}; this server allows {self.min_weight:g} to "
                f"{self.max_weight:g}.",
                param=term.param,
            )
        if admin:
            return
        for lane, against in ((term.lane, low < 0.0), (term.minus, high > 0.0)):
            expert, _, role = (lane or "").partition("@")[0].partition(".")
            if role == "tuned" and against and expert in self.protected:
                raise Forbidden(
                    f"Expert '{expert}' is protected: only an administrator may weigh against it.",
                    param=term.param,
                )
