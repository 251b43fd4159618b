"""A recorded comparison as Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

_HEAD = (
    "| | tokens/s | lowest-highest | x best peer's base | first text, ms | per token, ms | right |\n"
    "|---| ---: | ---: | ---: | ---: | ---: | ---: |"
)


def best_peer(comparison: Mapping[str, Any], load: int) -> float | None:
    """Tokens per second of the fastest peer with the base alone, at the load of that place; None without peers."""
    speeds = [
        one["loads"][load]["tokens_per_second"]["median"]
        for one in comparison["contestants"]
        if one["peer"] and one["loads"]
    ]
    return max((speed for speed in speeds if speed), default=None)


def markdown(comparison: Mapping[str, Any]) -> str:
    """`comparison` as `Comparison.as_dict` has it."""
    return "\n".join(_lines(comparison)) + "\n"


def _lines(comparison: Mapping[str, Any]) -> Iterator[str]:
    settings, machine = comparison["settings"], comparison["machine"]
    yield (
        f"{comparison['began'][:10]}, {machine['cpu']}, {machine['cores']} cores, "
        f"{' '.join(machine['instructions'])}, load before {machine['load_average']:g}. "
        f"Models {settings['size']}, {settings['dtype']}, drafts stand at {settings['share']:.0%}, one thread each, "
        f"{settings['prompt']} prompt and {settings['new']} new tokens; rounds: {settings['rounds']}."
    )
    yield ""
    yield "; ".join(f"{name} {version}" for name, version in comparison["versions"].items())
    for load, clients in enumerate(settings["clients"]):
        best = best_peer(comparison, load)
        yield ""
        yield f"{clients} client{'' if clients == 1 else 's'}:"
        yield ""
        yield _HEAD
        for one in comparison["contestants"]:
            yield _row(one, load, best)
    notes = list(_notes(comparison))
    if notes:
        yield ""
        yield from notes


def _row(one: Mapping[str, Any], load: int, best: float | None) -> str:
    if one["failure"] is not None:
        return f"| {one['name']} | not measured | | | | | |"
    found = one["loads"][load]
    speed, seconds = found["tokens_per_second"], found["seconds"]
    ratio = "" if best is None else f"{speed['median'] / best:.2f}x"
    # Where a whole answer comes at once, nothing was streamed.
    per_token = seconds["per_token"]["p50"]["median"]
    first = seconds["ttft"]["p50"]["median"] if per_token is not None else None
    right, checked = one["right"]
    cells = (
        one["name"],
        f"{speed['median']:.0f}",
        f"{speed['low']:.0f}-{speed['high']:.0f}",
        f"**{ratio}**" if ratio and one["fused"] else ratio,
        _milliseconds(first),
        _milliseconds(per_token),
        f"{right} of {checked}",
    )
    return f"| {' | '.join(cells)} |"


def _notes(comparison: Mapping[str, Any]) -> Iterator[str]:
    for one in comparison["contestants"]:
        if one["failure"] is not None:
            yield f"- {one['name']}: {one['failure']}"
        for clients, found in zip(comparison["settings"]["clients"], one["loads"], strict=False):
            kinds = {kind: error["count"] for kind, error in found["errors"].items()} | found["doubts"]
            for kind, count in kinds.items():
                yield f"- {one['name']}, {clients} clients: {count} x {kind}"


def _milliseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e3:.0f}" if seconds > 0.1 else f"{seconds * 1e3:.1f}"
