"""What changes the scores of a step's rows before a token is drawn: logit bias, penalties, and which tokens may come.

Each choice carries what it needs from step to step; a step writes its masks into one buffer, which is used again, and
joins the rest without walking through any text.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from proxyserve.engine.constraint import Constraint, ConstraintFailed
from proxyserve.engine.seen_tokens import SeenTokens
from proxyserve.engine.token_rules import TokenRules, Words, conflict_message
from proxyserve.types import FinishReason, SamplingParams
from proxyserve_kernels import Adjustments

logger = logging.getLogger(__name__)

_ALL = np.uint32(0xFFFFFFFF)


class Halt(NamedTuple):
    """Why a choice ends before its next token; `message` for ERROR, and `refused` where the request brought it about:
    its fields leave no token, its grammar takes too much work, or its weights are too large."""

    reason: FinishReason
    message: str | None = None
    refused: bool = False


class _Wish(NamedTuple):
    """The mask of a constraint of the choice `key` is wanted in a row of the buffer."""

    key: str
    constraint: Constraint
    row: int


@dataclass(slots=True, eq=False)
class ChoiceAdjustments:
    """Of one choice. `output` is its list of generated ids, which grows elsewhere. `seen` is None where nothing is
    penalised. `mask` and `removed_by` are the rows of its masks in the buffer, -1 for none; valid in the step that
    wrote them."""

    params: SamplingParams
    output: Sequence[int]
    rules: TokenRules
    seen: SeenTokens | None
    constraints: tuple[Constraint, ...] = ()
    bias_ids: npt.NDArray[np.int64] = field(init=False)
    bias_values: npt.NDArray[np.float32] = field(init=False)
    mask: int = -1
    removed_by: int = -1

    def __post_init__(self) -> None:
        bias = self.params.logit_bias
        self.bias_ids = np.fromiter(bias.keys(), dtype=np.int64, count=len(bias))
        self.bias_values = np.fromiter(bias.values(), dtype=np.float32, count=len(bias))

    def add(self, token: int) -> None:
        """`token` was generated."""
        if self.seen is not None:
            self.seen.add(token)

    def advance(self, token: int) -> Halt | None:
        """Tell the constraints of `token`, unless it was the last. Why the choice ends, if it does."""
        try:
            for constraint in self.constraints:
                constraint.advance(token)
            return self.whole()
        except Exception as error:
            return failed(error)

    def whole(self) -> Halt | None:
        """Whether a constraint says that nothing may follow."""
        return Halt(FinishReason.STOP) if any(one.complete for one in self.constraints) else None

    def lawless(self) -> Halt | None:
        """What to tell where tokens may come, and the fused law gives none of them any probability. None if the request
        rules none out."""
        fields = self.rules.fields(self.output, constrained=bool(self.constraints))
        if not fields:
            return None
        return Halt(
            FinishReason.ERROR,
            f"No token may come next: what is left by {', '.join(fields)} has no probability under the fused law, "
            "whose support or whose remote base rules it out.",
            refused=True,
        )


#: Of a row whose models are sound.
NO_FINITE_SCORE = Halt(
    FinishReason.ERROR,
    "The fusion gives no token a finite score here, though its models do; use smaller weights.",
    refused=True,
)


def failed(error: Exception) -> Halt:
    """A constraint raised `error`: its own message is for the client, any other stays inside."""
    if isinstance(error, ConstraintFailed):
        return Halt(FinishReason.ERROR, str(error), refused=True)
    logger.error("a constraint failed; the choice is ended", exc_info=error)
    return Halt(FinishReason.ERROR, f"A constraint of this request failed: {type(error).__name__}.")


class Adjuster:
    """Holds the buffer of masks: uint32 [rows, words], with room for what any step so far needed."""

    def __init__(self) -> None:
        self._masks = np.zeros((0, 0), dtype=np.uint32)
        self._used = 0

    def rule(self, choices: Mapping[str, ChoiceAdjustments]) -> dict[str, Halt]:
        """Find which tokens may come in each of a step's choices, by key. Returns those that end here, and why; the
        others can be adjusted for until the next call."""
        halted: dict[str, Halt] = {}
        ruled: dict[str, ChoiceAdjustments] = {}
        for key, choice in choices.items():
            choice.mask = choice.removed_by = -1
            try:
                halt = None if choice.output else choice.whole()
            except Exception as error:
                halt = failed(error)
            if halt is not None:
                halted[key] = halt
            elif choice.constraints or choice.rules.say_something(choice.output):
                ruled[key] = choice
        if not ruled:
            return halted
        wishes: list[_Wish] = []
        for row, (key, choice) in enumerate(ruled.items()):
            choice.mask = row
            for constraint in choice.constraints:
                wishes.append(_Wish(key, constraint, len(ruled) + len(wishes)))
        self._reserve(len(ruled) + len(wishes), max(len(choice.rules.known) for choice in ruled.values()))
        halted |= self._ask(wishes)
        for wish in wishes:
            choice = ruled[wish.key]
            if choice.removed_by < 0:
                choice.removed_by = wish.row
            else:  # a token must be allowed by all of them
                self._masks[choice.removed_by] &= self._masks[wish.row]
        for choice in ruled.values():
            choice.rules.write(self._masks[choice.mask], choice.output, self._constrained(choice))
        for key, choice in ruled.items():
            if key not in halted and not self._masks[choice.mask].any():
                halted[key] = self._nothing_left(choice)
        return halted

    def _reserve(self, rows: int, words: int) -> None:
        height, width = self._masks.shape
        if rows > height or words > width:
            self._masks = np.zeros((max(rows, height), max(words, width)), dtype=np.uint32)
        self._used = rows

    def _ask(self, wishes: Sequence[_Wish]) -> dict[str, Halt]:
        """Write what the constraints allow to their rows. Returns the choices of those that fail."""
        halted: dict[str, Halt] = {}
        together: dict[Any, list[_Wish]] = {}
        for wish in wishes:
            together.setdefault(getattr(type(wish.constraint), "fill", None), []).append(wish)
        for fill, members in together.items():
            if fill is not None and self._fill(fill, members):
                continue
            for key, constraint, row in members:
                try:
                    self._store(constraint.mask(), row)
                except Exception as error:
                    halted[key] = failed(error)
        return halted

    def _fill(self, fill: Any, wishes: Sequence[_Wish]) -> bool:
        """Whether one call could write the masks of all."""
        try:
            fill([wish.constraint for wish in wishes], self._tensor(), [wish.row for wish in wishes])
        except Exception:  # told when the one at fault is asked by itself
            return False
        return True

    def _store(self, mask: Tensor | None, row: int) -> None:
        if mask is None:
            self._masks[row] = _ALL
            return
        own: Words = mask.numpy().view(np.uint32)[: self._masks.shape[1]]
        self._masks[row, : len(own)] = own
        self._masks[row, len(own) :] = 0

    def _constrained(self, choice: ChoiceAdjustments) -> Words | None:
        """What its constraints allow; None if it has none."""
        return None if choice.removed_by < 0 else self._masks[choice.removed_by]

    def _nothing_left(self, choice: ChoiceAdjustments) -> Halt:
        constrained = self._constrained(choice)
        if constrained is not None and choice.rules.is_whole(choice.output, constrained):
            return Halt(FinishReason.STOP)
        fields = choice.rules.conflict(choice.output, constrained)
        return Halt(FinishReason.ERROR, conflict_message(fields), refused=True)

    def _tensor(self) -> Tensor:
        return torch.from_numpy(self._masks[: self._used].view(np.int32))

    def adjustments(self, choices: Sequence[ChoiceAdjustments]) -> Adjustments | None:
        """Of a batch with one row per choice, all of them ruled in this step; None if nothing changes a score."""
        biased = [row for row, choice in enumerate(choices) if len(choice.bias_ids)]
        penalised = [(row, choice.seen) for row, choice in enumerate(choices) if choice.seen]
        mask_of = [choice.mask for choice in choices]
        removed_by = [choice.removed_by for choice in choices]
        masked = max(mask_of) >= 0
        if not biased and not penalised and not masked:
            return None
        lengths = [len(seen) for _, seen in penalised]
        params = [choices[row].params for row, _ in penalised]
        return Adjustments(
            bias_rows=_repeated(biased, [len(choices[row].bias_ids) for row in biased], np.int64),
            bias_ids=_joined([choices[row].bias_ids for row in biased], np.int64),
            bias_values=_joined([choices[row].bias_values for row in biased], np.float32),
            seen_rows=_repeated([row for row, _ in penalised], lengths, np.int64),
            seen_ids=_joined([seen.ids for _, seen in penalised], np.int64),
            counts=_joined([seen.counts for _, seen in penalised], np.float32),
            repetition=_repeated([one.repetition_penalty for one in params], lengths, np.float32),
            presence=_repeated([one.presence_penalty for one in params], lengths, np.float32),
            frequency=_repeated([one.frequency_penalty for one in params], lengths, np.float32),
            masks=self._tensor() if masked else None,
            mask_of=torch.tensor(mask_of) if masked else None,
            removed_by=torch.tensor(removed_by) if max(removed_by) >= 0 else None,
        )


def _joined(parts: Sequence[npt.NDArray[Any]], dtype: type[np.generic]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts) if parts else np.zeros(0, dtype=dtype))


def _repeated(values: Sequence[float], lengths: Sequence[int], dtype: type[np.generic]) -> Tensor:
    """Each value as often as its length says."""
    return torch.from_numpy(np.repeat(np.array(values, dtype=dtype), lengths))
