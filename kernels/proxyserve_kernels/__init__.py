"""Batched logit arithmetic: fuse rows of several models' logits, filter, and draw tokens.

The package knows nothing of requests or servers. `fuse_and_pick` is the one call per step; the modules behind it can
be used alone. `reference` is the slow, obvious twin of all of it.
"""

from proxyserve_kernels.adjust import Adjustments
from proxyserve_kernels.pick import PickControls, Picks, fuse_and_pick
from proxyserve_kernels.rows import DeltaGroup, RowBatch, fuse

__all__ = ["Adjustments", "DeltaGroup", "PickControls", "Picks", "RowBatch", "fuse", "fuse_and_pick"]
