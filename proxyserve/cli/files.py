"""Files that options name: read with errors that say what is wrong, and checked before long work that they can be
written after it."""

from __future__ import annotations

import os
from pathlib import Path

import typer

from proxyserve.errors import ProxyserveError


def read_text(file: Path) -> str:
    """The file as UTF-8. Raises ProxyserveError."""
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ProxyserveError(f"{file} is not UTF-8 text: {error.reason} at byte {error.start}") from error
    except OSError as error:
        raise ProxyserveError(f"{file} cannot be read: {error.strerror}") from error


def check_writable(file: Path | None, option: str) -> None:
    """Nothing is created. Raises BadParameter, naming the option, where `file` cannot be written."""
    if file is None:
        return
    if file.is_dir():
        raise typer.BadParameter(f"{file} is a folder; name a file", param_hint=option)
    if not file.parent.is_dir():
        raise typer.BadParameter(f"there is no folder {file.parent}; make it first", param_hint=option)
    if not os.access(file if file.exists() else file.parent, os.W_OK):
        raise typer.BadParameter(f"{file} may not be written", param_hint=option)
