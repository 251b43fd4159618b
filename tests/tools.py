"""Programs that tests run beside proxyserve."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

#: Set where everything is installed, so that a test that is left out cannot go unnoticed (.ci/run).
ALL_TOOLS = "PROXYSERVE_ALL_TOOLS"


def need(tool: str) -> Path:
    """The path of a program; without it the test is skipped, or fails where all of them should be there."""
    found = shutil.which(tool, path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if found is not None:
        return Path(found)
    message = f"{tool} is not installed (`make tools`)"
    if os.environ.get(ALL_TOOLS):
        pytest.fail(message)
    pytest.skip(message)
