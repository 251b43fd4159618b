"""An environment for the examples that use LangChain and LlamaIndex, whose packages do not go together with ours."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

from filelock import FileLock

EXAMPLES = Path(__file__).parents[2] / "clients" / "examples"


def installed(folder: Path) -> Path:
    """The Python of an environment in `folder`; the first process that asks makes it. Packages that are here in the
    right version are not installed again, and all are named, so that there is nothing to resolve: both save half of
    the time."""
    python = folder / "bin" / "python"
    with FileLock(f"{folder}.lock"):
        if not (folder / "complete").exists():
            venv.create(folder, with_pip=False, clear=True)
            (own,) = folder.glob("lib/python*/site-packages")
            (own / "repository.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
            install = ["install", "--quiet", "--no-deps", "--no-compile", "--requirement"]
            command = [sys.executable, "-m", "pip", "--python", str(python), *install]
            done = subprocess.run(
                [*command, str(EXAMPLES / "requirements.txt")], capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, done.stdout + done.stderr
            (folder / "complete").touch()
    return python
