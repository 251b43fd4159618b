"""What completes names in a shell: those that the server has now. A shell waits for every press of a key, so this takes
little time, and where no server answers it gives nothing."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import typer

#: Seconds for a whole look at the server.
_PATIENCE = 0.6


def complete_models(context: typer.Context, incomplete: str) -> list[str]:
    """The models of `/v1/models`; after a `+` the experts that may follow."""
    names = _look(context, lambda server: server.models(timeout=_PATIENCE), admin=False)
    before, plus, begun = incomplete.rpartition("+")
    if plus:
        experts = [name.split("+", 1)[1] for name in names if "+" in name]
        chosen = {part.partition(":")[0] for part in before.split("+")}
        return [f"{before}+{name}" for name in experts if name.startswith(begun) and name not in chosen]
    return [name for name in names if name.startswith(incomplete)]


def complete_experts(context: typer.Context, incomplete: str) -> list[str]:
    return _of_control_plane(context, "experts", incomplete)


def complete_presets(context: typer.Context, incomplete: str) -> list[str]:
    return _of_control_plane(context, "presets", incomplete)


def _of_control_plane(context: typer.Context, what: str, incomplete: str) -> list[str]:
    def names(server: Any) -> Iterator[str]:
        listing = server.call("GET", f"/admin/v1/{what}", timeout=_PATIENCE)
        yield from (entry["name"] for entry in listing["data"])

    return [name for name in _look(context, names, admin=True) if name.startswith(incomplete)]


def _look(context: typer.Context, names: Callable[[Any], Any], *, admin: bool) -> list[str]:
    from proxyserve.cli.connection import DEFAULT_URL, Connection, key_in

    option = "admin_key_file" if admin else "api_key_file"
    try:
        file = context.params.get(option) or os.environ.get(f"PROXYSERVE_{option.upper()}")
        key = None if admin else context.params.get("api_key") or os.environ.get("PROXYSERVE_API_KEY")
        if key is None and file is not None:
            key = key_in(Path(file), option)
        url = context.params.get("url") or os.environ.get("PROXYSERVE_URL") or DEFAULT_URL
        with Connection(url, key) as server:
            return [str(name) for name in names(server)]
    except Exception:  # whatever it is, a shell that asks for words is no place to tell it
        return []
