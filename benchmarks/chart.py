"""A recorded comparison as a picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.table import best_peer
from proxyserve.errors import ProxyserveError

_COLORS = {"fused": "#1b6ca8", "base": "#8fb8d8", "peer": "#e08214", "loop": "#999999"}


def save_comparison_chart(comparison: Mapping[str, Any], path: Path) -> None:
    """A PNG: tokens per second of everybody measured, a panel per load; bars are medians, lines reach from the lowest
    round to the highest, the dashed one is the best peer's base. Raises ProxyserveError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ProxyserveError(
            "The chart needs matplotlib: pip install 'proxyserve[eval]', or leave --chart out."
        ) from error
    settings = comparison["settings"]
    measured = [one for one in reversed(comparison["contestants"]) if one["loads"]]
    picture = Figure(figsize=(4 * len(settings["clients"]) + 2, 4), layout="constrained")
    panels = picture.subplots(1, len(settings["clients"]), sharey=True, squeeze=False)[0]
    for load, (clients, panel) in enumerate(zip(settings["clients"], panels, strict=True)):
        speeds = [one["loads"][load]["tokens_per_second"] for one in measured]
        medians = [speed["median"] for speed in speeds]
        spread = [
            [middle - speed["low"] for middle, speed in zip(medians, speeds, strict=True)],
            [speed["high"] - middle for middle, speed in zip(medians, speeds, strict=True)],
        ]
        panel.barh(
            [one["name"] for one in measured],
            medians,
            xerr=spread,
            color=[_COLORS[_kind(one)] for one in measured],
            ecolor="#444444",
        )
        if (best := best_peer(comparison, load)) is not None:
            panel.axvline(best, color=_COLORS["peer"], linestyle="--", linewidth=1)
        panel.set_title(
            f"{clients} client{'' if clients == 1 else 's'}, tokens/s", loc="left", fontsize="medium"
        )
        panel.spines[["top", "right"]].set_visible(False)
    picture.suptitle(
        f"{settings['size']}, {settings['dtype']}, rounds: {settings['rounds']}", fontsize="medium"
    )
    picture.savefig(path, dpi=150)


def _kind(one: Mapping[str, Any]) -> str:
    if one["peer"]:
        return "peer"
    if not one["name"].startswith("proxyserve"):
        return "loop"
    return "fused" if one["fused"] else "base"
