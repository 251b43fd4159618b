"""From the logits of one step to one call of the kernels, for a batch of unlike requests."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from proxyserve.engine.choice import Choice
from proxyserve.scheduler.scheduler import LaneWork
from proxyserve.types import ModelKey, TokenLogprob
from proxyserve_kernels import ABSENT, Adjustments, Logprobs, PickControls, RowBatch


def build_batch(
    choices: Sequence[Choice],
    work: Mapping[ModelKey, Sequence[LaneWork]],
    logits: Mapping[ModelKey, Tensor],
) -> tuple[RowBatch, PickControls]:
    """Describe which rows of `logits` (per model [rows, width]) make up each choice's fused row, and how its token is
    chosen. Row r of the batch is `choices[r]`."""
    number = {model: index for index, model in enumerate(logits)}
    refs = {
        id(item.lane): (number[model], row)
        for model, items in work.items()
        for row, item in enumerate(item for item in items if item.last)
    }
    most = max(len(choice.terms) for choice in choices)
    base, positive, negative, weights = [], [], [], []
    for choice in choices:
        lanes, unused = choice.scheduled.lanes, most - len(choice.terms)
        base.append(refs[id(lanes[0])])
        positive.append([*(refs[id(lanes[term.tuned])] for term in choice.terms), *[(ABSENT, 0)] * unused])
        negative.append([*(refs[id(lanes[term.untuned])] for term in choice.terms), *[(ABSENT, 0)] * unused])
        weights.append([*(term.weight for term in choice.terms), *[0.0] * unused])
    rows = RowBatch(
        sources=tuple(logits.values()),
        base=_ints(base),
        widths=_ints([choice.vocabulary.size for choice in choices]),
        positive=_ints(positive).view(len(choices), most, 2),
        negative=_ints(negative).view(len(choices), most, 2),
        weights=_floats(weights).view(len(choices), most),
    )
    return rows, _controls(choices)


def _controls(choices: Sequence[Choice]) -> PickControls:
    sampling = [choice.submission.sampling for choice in choices]
    return PickControls(
        temperature=_floats([params.temperature for params in sampling]),
        top_k=_ints([params.top_k for params in sampling]),
        top_p=_floats([params.top_p for params in sampling]),
        min_p=_floats([params.min_p for params in sampling]),
        seeds=_ints([choice.seed for choice in choices]),
        positions=_ints([choice.position for choice in choices]),
        raw=[params.logprobs for params in sampling],
        adjustments=_adjustments(choices),
    )


def _adjustments(choices: Sequence[Choice]) -> Adjustments | None:
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
        bias_rows=_ints(bias_rows),
        bias_ids=_ints(bias_ids),
        bias_values=_floats(bias_values),
        seen_rows=_ints(rows),
        seen_ids=_ints(ids),
        counts=_floats(counts),
        repetition=_floats(repetition),
        presence=_floats(presence),
        frequency=_floats(frequency),
    )


def token_logprobs(
    choices: Sequence[Choice], tokens: Sequence[int], logprobs: Logprobs | None
) -> list[TokenLogprob | None]:
    """The kernels' report in the API's type, for the choices that asked. Ids that cannot be are left out."""
    if logprobs is None:
        return [None] * len(choices)
    entries: list[TokenLogprob | None] = []
    chosen, all_ids, all_values = logprobs.chosen.tolist(), logprobs.ids.tolist(), logprobs.values.tolist()
    for choice, token, value, ids, values in zip(choices, tokens, chosen, all_ids, all_values, strict=True):
        wanted = choice.submission.sampling.logprobs
        listed = [pair for pair in zip(ids[:wanted], values[:wanted], strict=True) if pair[0] >= 0]
        entries.append(None if wanted is None else TokenLogprob(token, value, tuple(listed)))
    return entries


def _ints(values: Iterable[object]) -> Tensor:
    return torch.tensor(list(values), dtype=torch.int64)


def _floats(values: Iterable[object]) -> Tensor:
    return torch.tensor(list(values), dtype=torch.float32)
