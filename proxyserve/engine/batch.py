"""From the logits of one step to one call of the kernels, for a batch of unlike requests."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from proxyserve.engine.choice import Choice
from proxyserve.scheduler.scheduler import LaneWork
from proxyserve.types import ModelKey, TokenLogprob
from proxyserve_kernels import Adjustments, DeltaGroup, PickControls, RowBatch


def build_batch(
    choices: Sequence[Choice],
    work: Mapping[ModelKey, Sequence[LaneWork]],
    logits: Mapping[ModelKey, Tensor],
    base: ModelKey,
) -> tuple[RowBatch, PickControls]:
    """Describe which rows of `logits` (per model [rows, width]) make up each choice's fused row, and how its token is
    chosen. Row r of the batch is `choices[r]`."""
    device = logits[base].device
    row_of = {
        id(item.lane): row
        for items in work.values()
        for row, item in enumerate(item for item in items if item.last)
    }
    rows = RowBatch(
        base=logits[base],
        base_rows=_ints([row_of[id(choice.scheduled.lanes[0])] for choice in choices], device),
        widths=[choice.vocabulary.size for choice in choices],
        groups=_delta_groups(choices, row_of, logits, device),
    )
    return rows, _controls(choices, device)


def _delta_groups(
    choices: Sequence[Choice],
    row_of: Mapping[int, int],
    logits: Mapping[ModelKey, Tensor],
    device: torch.device,
) -> list[DeltaGroup]:
    """Terms grouped by their pair of models. Groups are also split by a term's place in its request and come in that
    order, so that a row's deltas are always added in the same order whatever its neighbours are."""
    members: dict[tuple[int, ModelKey, ModelKey], list[tuple[int, int, int, float]]] = {}
    for row, choice in enumerate(choices):
        lanes = choice.scheduled.lanes
        for place, term in enumerate(choice.terms):
            tuned, untuned = lanes[term.tuned], lanes[term.untuned]
            entry = (row, row_of[id(tuned)], row_of[id(untuned)], term.weight)
            members.setdefault((place, tuned.model, untuned.model), []).append(entry)
    groups = []
    for (_, tuned_model, untuned_model), entries in sorted(members.items(), key=lambda item: item[0][0]):
        rows, tuned_rows, untuned_rows, weights = zip(*entries, strict=True)
        groups.append(
            DeltaGroup(
                rows=_ints(rows, device),
                weights=torch.tensor(weights, dtype=torch.float32, device=device),
                positive=logits[tuned_model],
                positive_rows=_ints(tuned_rows, device),
                negative=logits[untuned_model],
                negative_rows=_ints(untuned_rows, device),
            )
        )
    return groups


def _controls(choices: Sequence[Choice], device: torch.device) -> PickControls:
    sampling = [choice.submission.sampling for choice in choices]
    return PickControls(
        temperature=_floats([params.temperature for params in sampling], device),
        top_k=_ints([params.top_k for params in sampling], device),
        top_p=_floats([params.top_p for params in sampling], device),
        min_p=_floats([params.min_p for params in sampling], device),
        seeds=_ints([choice.seed for choice in choices], device),
        positions=_ints([choice.position for choice in choices], device),
        want_logprobs=tuple(params.logprobs for params in sampling),
        adjustments=_adjustments(choices, device),
    )


def _adjustments(choices: Sequence[Choice], device: torch.device) -> Adjustments | None:
    """Bias and penalties of the rows that have any. Ids that the models do not share are removed by a bias of -inf."""
    bias: list[tuple[int, int, float]] = []
    seen: list[tuple[int, int, int, float, float, float]] = []
    for row, choice in enumerate(choices):
        params = choice.submission.sampling
        bias.extend((row, token, value) for token, value in params.logit_bias.items())
        bias.extend((row, hole, float("-inf")) for hole in choice.vocabulary.holes)
        if params.penalised:
            prompt = choice.scheduled.lanes[0].prompt if params.repetition_penalty != 1.0 else ()
            for token in {*choice.generated, *prompt}:
                if token in choice.vocabulary:
                    count = choice.generated.get(token, 0)
                    penalties = (params.repetition_penalty, params.presence_penalty, params.frequency_penalty)
                    seen.append((row, token, count, *penalties))
    if not bias and not seen:
        return None
    bias_rows, bias_ids, bias_values = zip(*bias, strict=True) if bias else ((), (), ())
    rows, ids, counts, repetition, presence, frequency = zip(*seen, strict=True) if seen else ((),) * 6
    return Adjustments(
        bias_rows=_ints(bias_rows, device),
        bias_ids=_ints(bias_ids, device),
        bias_values=_floats(bias_values, device),
        seen_rows=_ints(rows, device),
        seen_ids=_ints(ids, device),
        counts=_floats(counts, device),
        repetition=_floats(repetition, device),
        presence=_floats(presence, device),
        frequency=_floats(frequency, device),
    )


def token_logprob(token: int, entry: tuple[float, list[int], list[float]] | None) -> TokenLogprob | None:
    """The kernels' triple in the API's type."""
    if entry is None:
        return None
    value, ids, values = entry
    return TokenLogprob(token, value, tuple(zip(ids, values, strict=True)))


def _ints(values: Iterable[int], device: torch.device) -> Tensor:
    return torch.tensor(list(values), dtype=torch.int64, device=device)


def _floats(values: Iterable[float], device: torch.device) -> Tensor:
    return torch.tensor(list(values), dtype=torch.float32, device=device)
