"""The curves of a calibration as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from proxyserve.errors import ProxyserveError
from proxyserve.fusion.calibration import Calibration


def save_calibration_chart(calibrations: Sequence[Calibration], budget: float, path: Path) -> None:
    """A PNG with a panel per expert: loss on the task and on general text, each relative to the base's, and where the
    budget ends. Needs the `eval` extra (matplotlib)."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ProxyserveError(
            "The chart needs matplotlib: pip install 'proxyserve[eval]', or leave --chart out."
        ) from error
    figure = Figure(figsize=(3.4 * len(calibrations), 3.2), layout="constrained")
    panels = figure.subplots(1, len(calibrations), squeeze=False, sharey=True)[0]
    for axes, calibration in zip(panels, calibrations, strict=True):
        base = calibration.points[0]
        weights = [point.weight for point in calibration.points]
        axes.plot(
            weights, [p.task_loss / base.task_loss for p in calibration.points], color="#1b6ca8", label="task"
        )
        axes.plot(
            weights,
            [p.general_loss / base.general_loss for p in calibration.points],
            color="#e08214",
            label="general",
        )
        axes.axhline(1.0 + budget, color="#888888", linestyle=":", linewidth=1, label=f"budget {budget:.0%}")
        axes.axvline(
            calibration.best_within(budget), color="#4d9a57", linewidth=1, label="gains most within it"
        )
        axes.set_title(calibration.expert)
        axes.set_xlabel("weight")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("loss / loss of the base")
    panels[0].set_ylim(0, 2)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize="small")
    figure.savefig(path, dpi=150)
