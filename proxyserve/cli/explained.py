"""Explained tokens in a terminal: a coloured text, a table, totals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

#: Nats of push at which the colour is full.
_FULL = 4.0


def coloured(entry: dict[str, Any]) -> Text:
    """One token: green where the experts pushed it up, red where down, the stronger the fuller; flips underlined.
    `entry` is an `ExplainedToken` as JSON."""
    push = sum(entry["push"].values())
    share = min(1.0, abs(push) / _FULL)
    pale = round(235 - 150 * share)
    colour = f"rgb({pale},235,{pale})" if push > 0 else f"rgb(235,{pale},{pale})"
    style = f"black on {colour}" if share > 0.05 else ""
    if entry["flip"]:
        style += " underline bold"
    return Text(entry["token"], style=style.strip())


def explained_table(entries: Sequence[dict[str, Any]]) -> Table:
    """A row per token: log-probs of the fused law and the base, each expert's push and weight, KL and flips."""
    experts = list(dict.fromkeys(name for entry in entries for name in entry["push"]))
    table = Table()
    table.add_column("token")
    for title in ("fused", "base", *(f"push {name}" for name in experts), "KL", ""):
        table.add_column(title, justify="right")
    for entry in entries:
        base = entry["lanes"].get("base")
        pushes = [_push(entry, name) for name in experts]
        kl = "" if entry["kl"] is None else f"{entry['kl']:.3f}"
        marks = " ".join(mark for mark, on in (("flip", entry["flip"]), ("gated", entry["gated"])) if on)
        table.add_row(
            Text(repr(entry["token"])),  # a plain string would be read as markup: "[/INST]"
            f"{entry['fused']['logprob']:.3f}",
            "" if base is None else f"{base['logprob']:.3f}",
            *pushes,
            kl,
            marks,
            style="bold" if entry["flip"] else "",
        )
    return table


def _push(entry: dict[str, Any], expert: str) -> str:
    if expert not in entry["push"]:
        return ""
    return f"{entry['push'][expert]:+.2f} (w {entry['weights'][expert]:.2f})"


def totals(entries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Sum of log-probs in nats, perplexity, mean KL to the base and number of flips."""
    total = sum(entry["fused"]["logprob"] for entry in entries)
    kls = [entry["kl"] for entry in entries if entry["kl"] is not None]
    return {
        "tokens": len(entries),
        "logprob": total,
        "perplexity": math.exp(min(700.0, -total / max(1, len(entries)))),
        "mean_kl": sum(kls) / len(kls) if kls else None,
        "flips": sum(bool(entry["flip"]) for entry in entries),
    }


def report(entries: Sequence[dict[str, Any]]) -> RenderableType:
    """The table and, under it, the totals in a line."""
    found = totals(entries)
    line = f"{found['tokens']} tokens, log-prob {found['logprob']:.3f}, perplexity {found['perplexity']:.3f}"
    if found["mean_kl"] is not None:
        line += f", mean KL to the base {found['mean_kl']:.3f}, {found['flips']} flips"
    return Group(explained_table(entries), Text(line))
