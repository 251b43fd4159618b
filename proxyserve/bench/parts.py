"""What `proxyserve bench` can measure, by name; apart from how, which needs torch."""

from __future__ import annotations

import enum


class Part(enum.StrEnum):
    """What can be measured: fused decoding beside the plain loop, what solving weights costs, experts that are swapped
    under load, many experts at once, what drafting ahead gives, alike models in one forward, what streams notice of a
    long prompt, different requests in one batch, and what a process takes."""

    LOOP = "loop"
    SOLVING = "solving"
    SWAPS = "swaps"
    ADAPTERS = "adapters"
    SPECULATION = "speculation"
    PAIRS = "pairs"
    STALLS = "stalls"
    MIXED = "mixed"
    MEMORY = "memory"


class Sampling(enum.StrEnum):
    """How tokens are chosen beside the loop: the best, or drawn at temperature 1 from the nucleus of 0.9."""

    GREEDY = "greedy"
    TOP_P = "top-p"


#: The pairs of models that speculation is measured with: random ones of these sizes, and the demo family.
SPECULATED = ("68M", "300M", "demo")
