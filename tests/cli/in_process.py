"""`proxyserve` commands without a process of their own, which would spend seconds on imports."""

from __future__ import annotations

import io
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass

import pytest

from proxyserve.cli import main


@dataclass(frozen=True)
class Ended:
    returncode: int
    stdout: str
    stderr: str


def run_command(*arguments: str) -> Ended:
    """What the entry point does with these arguments, but that pytest's logging stays as it is."""
    output, errors = io.StringIO(), io.StringIO()
    code: object = 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(output), redirect_stderr(errors):
        patch.setattr(sys, "argv", ["proxyserve", *arguments])
        patch.setattr(main, "configure_logging", lambda *_: None)
        patch.setenv("COLUMNS", "500")
        try:
            main.main()
        except SystemExit as end:
            code = end.code
    return Ended(
        code if isinstance(code, int) else int(code is not None), output.getvalue(), errors.getvalue()
    )
