"""Batched logit arithmetic: fuse rows of several models' logits, filter, draw, solve weights, verify drafts.

The package knows nothing of requests or servers. `backend_for(device)` gives an object with every operation; `rows`,
`controls`, `tilt` and `speculation` hold what goes in and comes out; `reference` is the slow, obvious twin of it all.
"""

from proxyserve_kernels.backend import Backend, BackendName, Needs, backend_for
from proxyserve_kernels.controls import Adjustments, Logprobs, PickControls, Picks
from proxyserve_kernels.rows import (
    ABSENT,
    BLOCK,
    CLIP,
    FUSED,
    Ref,
    Row,
    RowBatch,
    Rules,
    Support,
    Supports,
    Term,
)
from proxyserve_kernels.speculation import Drafts, Verdicts
from proxyserve_kernels.tilt import Match, Moments, PairDivergences, Solution, SolveControls, Tilt

__all__ = [
    "ABSENT",
    "BLOCK",
    "CLIP",
    "FUSED",
    "Adjustments",
    "Backend",
    "BackendName",
    "Drafts",
    "Logprobs",
    "Match",
    "Moments",
    "Needs",
    "PairDivergences",
    "PickControls",
    "Picks",
    "Ref",
    "Row",
    "RowBatch",
    "Rules",
    "Solution",
    "SolveControls",
    "Support",
    "Supports",
    "Term",
    "Tilt",
    "Verdicts",
    "backend_for",
]
