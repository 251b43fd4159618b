"""What a command said, whatever the width of the terminal."""

from __future__ import annotations

from typer.testing import Result


def said(result: Result) -> str:
    """The output with the boxes of usage errors taken away and lines joined."""
    return " ".join(result.output.replace("│", " ").split())
