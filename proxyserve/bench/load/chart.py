"""A load measurement as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from proxyserve.bench.load.run import LoadResult
from proxyserve.bench.load.statistics import Figure, Summary
from proxyserve.errors import ProxyserveError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_PANELS = (("ttft", "first text"), ("gap", "between two pieces"), ("whole", "whole answer"))
_COLORS = {0.5: "#1b6ca8", 0.9: "#e08214", 0.99: "#b0413e"}


def check_charts() -> None:
    """Raises ProxyserveError without matplotlib, which does not come with every installation."""
    if find_spec("matplotlib") is None:
        raise ProxyserveError(
            "The chart needs matplotlib: pip install 'proxyserve[eval]', or leave --chart out."
        )


def save_load_chart(result: LoadResult, path: Path) -> None:
    """A PNG: tokens per second, and three kinds of times at three quantiles, over the loads; lines are medians of the
    rounds, bands reach from the lowest round to the highest. Needs what `check_charts` looks for."""
    from matplotlib.figure import Figure as Picture

    summaries = result.summaries
    picture = Picture(figsize=(11, 7), layout="constrained")
    axes = picture.subplots(2, 2).flat
    _line(axes[0], summaries, [summary.tokens_per_second for summary in summaries], "#1b6ca8", "")
    axes[0].set_title("generated tokens per second", loc="left", fontsize="medium")
    for panel, (kind, title) in zip(axes[1:], _PANELS, strict=True):
        for share, color in _COLORS.items():
            figures = [summary.times[kind][share] for summary in summaries]
            _line(panel, summaries, figures, color, f"p{share * 100:g}", scale=1e3)
        panel.set_title(f"{title}, milliseconds", loc="left", fontsize="medium")
        panel.legend(frameon=False, fontsize="small")
    picture.suptitle(
        f"{', '.join(result.settings.workload.models)}: {result.settings.rounds} rounds", fontsize="medium"
    )
    picture.savefig(path, dpi=150)


def _line(
    axes: Axes,
    summaries: Sequence[Summary],
    figures: Sequence[Figure],
    color: str,
    label: str,
    *,
    scale: float = 1.0,
) -> None:
    places = range(len(summaries))
    axes.plot(places, [figure.median * scale for figure in figures], "o-", color=color, label=label)
    axes.fill_between(
        places,
        [figure.low * scale for figure in figures],
        [figure.high * scale for figure in figures],
        color=color,
        alpha=0.2,
        linewidth=0,
    )
    axes.set_xticks(places, [str(summary.load) for summary in summaries])
    axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)
