"""What changes the scores of a step's rows before a token is drawn: logit bias, penalties, and which tokens may come.

Each choice carries what it needs from step to step; a step writes its masks into one buffer, which is used again, and
joins the rest without walking through any text. A choice can go ahead of its text by drafts, tokens that are only
supposed, and come back; the rows that are ruled on the way stay as they were.
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
    """Of one choice. `output` is its list of generated ids, which grows elsewhere, and not while drafts are supposed to
    follow it; `drafts` is its list of those, which changes here. `seen` is None where nothing is penalised."""

    params: SamplingParams
    output: Sequence[int]
    rules: TokenRules
    seen: SeenTokens | None
    constraints: tuple[Constraint, ...] = ()
    bias_ids: npt.NDArray[np.int64] = field(init=False)
    bias_values: npt.NDArray[np.float32] = field(init=False)
    drafts: list[int] = field(default_factory=list)
    _ahead: list[int] = field(
        default_factory=list
    )  # of `output` as far as it was when drafts were last supposed
    _latest: RowAdjustments | None = None  # which reads `seen` itself

    def __post_init__(self) -> None:
        bias = self.params.logit_bias
        self.bias_ids = np.fromiter(bias.keys(), dtype=np.int64, count=len(bias))
        self.bias_values = np.fromiter(bias.values(), dtype=np.float32, count=len(bias))

    @property
    def text(self) -> Sequence[int]:
        """What was generated, and the drafts."""
        return self._ahead if self.drafts else self.output

    def add(self, token: int) -> None:
        """`token` was generated. No drafts are supposed. Voids the choice's row."""
        if self.seen is not None:
            self.seen.add(token)

    def advance(self, token: int) -> Halt | None:
        """Tell the constraints of `token`, unless it was the last. Why the choice ends, if it does. No drafts are
        supposed."""
        try:
            for constraint in self.constraints:
                constraint.advance(token)
            return self.whole()
        except Exception as error:
            return failed(error)

    def suppose(self, token: int) -> Halt | None:
        """Go ahead as if `token`, a draft, came next. If constraints would end the choice with it or fail: why; the
        draft is not supposed then. What else may end a text (stop ids and strings, lengths) is not looked at, nor
        whether `token` may come: see `Adjuster.allows`."""
        advanced = 0
        try:
            for constraint in self.constraints:
                advanced += 1
                constraint.advance(token)
            halt = self.whole()
        except Exception as error:
            halt = failed(error)
        if halt is not None:
            for constraint in self.constraints[:advanced]:
                constraint.rollback(1)
            return halt
        self._detach()
        if not self.drafts:
            self._ahead += self.output[len(self._ahead) :]
        self._ahead.append(token)
        self.drafts.append(token)
        if self.seen is not None:
            self.seen.add(token)
        return None

    def take_back(self, count: int | None = None) -> None:
        """Suppose the last `count` drafts no longer, by default all."""
        count = len(self.drafts) if count is None else count
        if not count:
            return
        self._detach()
        for constraint in self.constraints:
            constraint.rollback(count)
        for _ in range(count):
            self._ahead.pop()
            token = self.drafts.pop()
            if self.seen is not None:
                self.seen.take_back(token)

    def row(self, mask: int, removed_by: int) -> RowAdjustments:
        """Of the text as it is now."""
        written, seen = len(self.output) + len(self.drafts), self.seen
        if not seen:  # and so nothing is penalised
            return RowAdjustments(self, written, mask, removed_by, None, None)
        self._latest = RowAdjustments(self, written, mask, removed_by, seen.ids, seen.counts)
        return self._latest

    def _detach(self) -> None:
        """Before `seen` changes under a row that is still needed."""
        if self._latest is not None:
            self._latest.detach()
            self._latest = None

    def whole(self) -> Halt | None:
        """Whether a constraint says that nothing may follow."""
        return Halt(FinishReason.STOP) if any(one.complete for one in self.constraints) else None


@dataclass(slots=True, eq=False)
class RowAdjustments:
    """For the token that follows the first `written` tokens of a choice's text, drafts among them. `mask` and
    `removed_by` are rows of the Adjuster's buffer, -1 for none, and valid until its next `begin`; `seen_ids` int64 [n]
    and `seen_counts` float32 [n], None where nothing is penalised, until the choice is told of a generated token."""

    choice: ChoiceAdjustments
    written: int
    mask: int
    removed_by: int
    seen_ids: npt.NDArray[np.int64] | None
    seen_counts: npt.NDArray[np.float32] | None

    def detach(self) -> None:
        """Keep what has been seen so far, whatever comes."""
        if self.seen_ids is not None and self.seen_counts is not None:
            self.seen_ids, self.seen_counts = self.seen_ids.copy(), self.seen_counts.copy()

    def lawless(self) -> Halt | None:
        """What to tell where tokens may come, and the fused law gives none of them any probability. None if the request
        rules none out."""
        fields = self.choice.rules.fields(self.written, constrained=bool(self.choice.constraints))
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

    def begin(self) -> None:
        """A step begins: the rows of the one before are void."""
        self._used = 0

    def rule(
        self, choices: Mapping[str, ChoiceAdjustments]
    ) -> tuple[dict[str, RowAdjustments], dict[str, Halt]]:
        """Find which tokens may come next in each of these choices, by key, drafts supposed. Returns a row for each
        that goes on, and for the others why they end here. May be called again in the same step, for the same choices
        further ahead or others."""
        rows: dict[str, RowAdjustments] = {}
        halted: dict[str, Halt] = {}
        ruled: list[tuple[str, ChoiceAdjustments, Sequence[int]]] = []
        for key, choice in choices.items():
            text = choice.text
            try:
                halt = None if text else choice.whole()
            except Exception as error:
                halt = failed(error)
            if halt is not None:
                halted[key] = halt
            elif choice.constraints or choice.rules.say_something(text):
                ruled.append((key, choice, text))
            else:
                rows[key] = choice.row(-1, -1)
        if not ruled:
            return rows, halted
        # First a row for each choice, then one for each of their constraints.
        first = self._used
        after = first + len(ruled)
        wishes: list[_Wish] = []
        for key, choice, _ in ruled:
            for constraint in choice.constraints:
                wishes.append(_Wish(key, constraint, after + len(wishes)))
        self._reserve(len(ruled) + len(wishes), max(len(choice.rules.known) for _, choice, _ in ruled))
        halted |= self._ask(wishes)
        for place, (key, choice, text) in enumerate(ruled, first):
            mask, removed_by, constrained = self._masks[place], -1, None
            if choice.constraints:
                removed_by, after = after, after + len(choice.constraints)
                constrained = self._masks[removed_by]
                for further in range(removed_by + 1, after):  # a token must be allowed by all of them
                    constrained &= self._masks[further]
            if key in halted:
                continue
            choice.rules.write(mask, text, constrained)
            if mask.any():
                rows[key] = choice.row(place, removed_by)
            else:
                halted[key] = _nothing_left(choice, constrained)
        return rows, halted

    def allows(self, row: RowAdjustments, token: int) -> bool:
        """Whether the mask of a row of this step lets `token` come."""
        return row.mask < 0 or bool(
            self._masks[row.mask, token // 32] >> np.uint32(token % 32) & np.uint32(1)
        )

    def _reserve(self, rows: int, words: int) -> None:
        """Room for `rows` more; those in use stay as they are. A choice's own words fit into the rows that it has, so
        what is added to them says nothing."""
        height, width = self._masks.shape
        used, self._used = self._used, self._used + rows
        if self._used > height or words > width:
            masks = np.zeros((max(self._used, height), max(words, width)), dtype=np.uint32)
            masks[:used, :width] = self._masks[:used]
            self._masks = masks

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

    def _tensor(self) -> Tensor:
        return torch.from_numpy(self._masks[: self._used].view(np.int32))

    def adjustments(self, rows: Sequence[RowAdjustments]) -> Adjustments | None:
        """Of a batch of rows of this step, any of them and in any order; None if nothing changes a score."""
        biased = [number for number, row in enumerate(rows) if len(row.choice.bias_ids)]
        ids = [row.seen_ids for row in rows if row.seen_ids is not None]
        counts = [row.seen_counts for row in rows if row.seen_counts is not None]
        penalised = [number for number, row in enumerate(rows) if row.seen_ids is not None]
        mask_of = [row.mask for row in rows]
        removed_by = [row.removed_by for row in rows]
        masked = max(mask_of) >= 0
        if not biased and not penalised and not masked:
            return None
        bias = [rows[number].choice for number in biased]
        lengths = [len(seen) for seen in ids]
        params = [rows[number].choice.params for number in penalised]
        return Adjustments(
            bias_rows=_repeated(biased, [len(choice.bias_ids) for choice in bias], np.int64),
            bias_ids=_joined([choice.bias_ids for choice in bias], np.int64),
            bias_values=_joined([choice.bias_values for choice in bias], np.float32),
            seen_rows=_repeated(penalised, lengths, np.int64),
            seen_ids=_joined(ids, np.int64),
            counts=_joined(counts, np.float32),
            repetition=_repeated([one.repetition_penalty for one in params], lengths, np.float32),
            presence=_repeated([one.presence_penalty for one in params], lengths, np.float32),
            frequency=_repeated([one.frequency_penalty for one in params], lengths, np.float32),
            masks=self._tensor() if masked else None,
            mask_of=torch.tensor(mask_of) if masked else None,
            removed_by=torch.tensor(removed_by) if max(removed_by) >= 0 else None,
        )


def _nothing_left(choice: ChoiceAdjustments, constrained: Words | None) -> Halt:
    if constrained is not None and choice.rules.is_whole(choice.text, constrained):
        return Halt(FinishReason.STOP)
    return Halt(
        FinishReason.ERROR, conflict_message(choice.rules.conflict(choice.text, constrained)), refused=True
    )


def _joined(parts: Sequence[npt.NDArray[Any]], dtype: type[np.generic]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts) if parts else np.zeros(0, dtype=dtype))


def _repeated(values: Sequence[float], lengths: Sequence[int], dtype: type[np.generic]) -> Tensor:
    """Each value as often as its length says."""
    return torch.from_numpy(np.repeat(np.array(values, dtype=dtype), lengths))
