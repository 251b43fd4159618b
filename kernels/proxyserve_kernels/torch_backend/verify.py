"""Speculative verification; see `proxyserve_kernels.speculation`."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from proxyserve_kernels.controls import PickControls, Picks
from proxyserve_kernels.philox import STREAM_ACCEPT, STREAM_RESIDUAL_BLOCK, STREAM_RESIDUAL_TOKEN, uniform
from proxyserve_kernels.rows import RowBatch
from proxyserve_kernels.speculation import Drafts, Verdicts, VerifyRule, emitted, leading, settle
from proxyserve_kernels.torch_backend.blocks import block_log_mass
from proxyserve_kernels.torch_backend.draw import draw
from proxyserve_kernels.torch_backend.pick import pick, processed


def verify(
    batch: RowBatch, controls: PickControls, drafts: Drafts, rule: VerifyRule = "rejection"
) -> Verdicts:
    """See `Backend.verify`."""
    silent = replace(controls, raw=(None,) * batch.size, processed=None, forced=None, listed=None)
    picks = pick(batch, silent)
    rows = drafts.rows.to(batch.device)
    tokens = drafts.tokens.to(batch.device)
    drawn = picks.tokens[rows.clamp(min=0)]
    drafted = tokens >= 0
    if rule == "shared_noise":
        accepted = leading(drafted & (drawn[:, :-1] == tokens))
        return _verdicts(batch, controls, drafts, accepted, drawn, picks)
    if drafts.laws is None or drafts.law_controls is None or drafts.law_rows is None:
        raise ValueError("rejection needs laws, law_controls and law_rows of the drafts")
    n, k = tokens.shape
    at = drafted.cpu().nonzero()
    target = processed(batch, controls, drafts.rows[:, :-1][at[:, 0], at[:, 1]])
    draft = processed(drafts.laws, drafts.law_controls, drafts.law_rows[at[:, 0], at[:, 1]])
    width = min(target.shape[1], draft.shape[1])
    proposed = tokens[drafted][:, None]
    ratio = torch.full((n, k), -math.inf, dtype=torch.float64, device=batch.device)
    ratio[drafted] = (_at(target, proposed) - _at(draft, proposed)).double()
    stands = drafted & (coins(controls, drafts.rows[:, :-1], batch.device).log() < ratio)
    accepted = leading(stands)
    stopped = accepted < drafted.sum(dim=1)
    if bool(stopped.any()):
        place = torch.zeros(n, k, dtype=torch.int64, device=batch.device)
        place[drafted] = torch.arange(at.shape[0], device=batch.device)
        request = stopped.nonzero()[:, 0]
        index = place[request, accepted[request]]
        left = target[index].exp()
        left[:, :width] -= draft[index, :width].exp()
        residual = left.clamp_(min=0.0).log()
        row = rows[request, accepted[request]].cpu()
        corrected = draw(
            residual,
            controls.seeds[row].to(batch.device),
            controls.positions[row].to(batch.device),
            (STREAM_RESIDUAL_BLOCK, STREAM_RESIDUAL_TOKEN),
        )
        # Rounding alone can reject a draft from the target's own law and leave nothing; then the target draws.
        some = torch.isfinite(block_log_mass(residual).amax(dim=1))
        drawn[request, accepted[request]] = torch.where(some, corrected, drawn[request, accepted[request]])
    return _verdicts(batch, controls, drafts, accepted, drawn, picks)


def _at(law: Tensor, tokens: Tensor) -> Tensor:
    """Log-probs [n] of `tokens` int64 [n, 1]; -inf for a token beyond the law's width."""
    found = law.gather(1, tokens.clamp(max=law.shape[1] - 1))
    return torch.where(tokens < law.shape[1], found, -math.inf)[:, 0]


def coins(controls: PickControls, rows: Tensor, device: torch.device) -> Tensor:
    """The acceptance uniform of every row, float64, shaped as `rows` int64 on the host (-1 entries are undefined)."""
    flat = rows.flatten().clamp(min=0)
    seeds, positions = controls.seeds[flat].to(device), controls.positions[flat].to(device)
    drawn = uniform(seeds, positions, STREAM_ACCEPT, torch.zeros_like(seeds), 1)
    return drawn[:, 0].view(rows.shape)


def _verdicts(
    batch: RowBatch, controls: PickControls, drafts: Drafts, accepted: Tensor, drawn: Tensor, picks: Picks
) -> Verdicts:
    accepted, tokens, good = settle(drafts, accepted, drawn, picks.valid)
    if controls.reports:
        picks = pick(batch, replace(controls, forced=emitted(drafts, tokens, batch.size)))
    return Verdicts(accepted, tokens, good, picks)
