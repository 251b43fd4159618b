"""Runs the blocks of one page, in order: the shell's in one bash, Python's with one set of names."""

from __future__ import annotations

import contextlib
import io
import os
import shlex
import subprocess
from pathlib import Path

from tests.docs.blocks import Block, Piece, pieces_of
from tests.docs.compare import differs

#: The address that pages speak to.
WRITTEN = "http://127.0.0.1:8000"


class PageError(AssertionError):
    """A block failed, or printed something else than its page says. Names the line."""


class PageRunner:
    """What the blocks of a page share: a folder, a shell with its variables, and Python's names.

    `url` is the server's, which stands for the one that pages write. Call `close` at the end.
    """

    def __init__(self, folder: Path, url: str, path: Path) -> None:
        self._folder = folder
        self._url = url
        self._names: dict[str, object] = {"__name__": "__main__"}
        environment = {
            name: value for name, value in os.environ.items() if not name.startswith("PROXYSERVE_")
        }
        environment |= {"PATH": f"{path}:{environment['PATH']}", "PROXYSERVE_URL": url, "COLUMNS": "100"}
        self._log = (folder / ".output").open("w+b")
        self._shell = subprocess.Popen(
            ["bash", "--noprofile", "--norc"],
            cwd=folder,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            bufsize=1,
        )
        self._tell("set -eo pipefail")

    def run(self, block: Block) -> None:
        """Run it whole; raises `PageError`."""
        for piece in pieces_of(block):
            code = piece.code.replace(WRITTEN, self._url)
            try:
                printed = self._python(piece, code) if block.language == "python" else self._sh(code)
            except Exception as error:
                raise PageError(f"{block.page}:{piece.line}: {type(error).__name__}: {error}") from error
            if piece.expected is not None and (wrong := differs(piece.expected, printed)):
                raise PageError(f"{block.page}:{piece.line}: {wrong}".replace(self._url, WRITTEN))

    def close(self) -> None:
        assert self._shell.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._shell.stdin.close()
        try:
            self._shell.wait(10)
        finally:
            self._shell.kill()
            self._log.close()

    def _tell(self, line: str) -> None:
        assert self._shell.stdin is not None
        self._shell.stdin.write(f"{line}\n")

    def _sh(self, code: str) -> str:
        """What `code` writes to its standard output; raises `RuntimeError` with standard error where it fails."""
        script = self._folder / ".block.sh"
        script.write_text(code, encoding="utf-8")
        end = "--- end of the block ---"
        begun = self._log.seek(0, os.SEEK_END)
        self._tell(f". {shlex.quote(str(script))} </dev/null; printf '%s\\n' {shlex.quote(end)}")
        assert self._shell.stdout is not None
        printed = ""
        for line in self._shell.stdout:
            if line.endswith(f"{end}\n"):
                return printed + line.removesuffix(f"{end}\n")
            printed += line
        self._log.seek(begun)
        errors = self._log.read().decode(errors="replace")
        raise RuntimeError(f"exit status {self._shell.wait()}\n{code}\n{printed}{errors}")

    def _python(self, piece: Piece, code: str) -> str:
        """What `code` prints. Lines of errors are those of the page."""
        source = "\n" * (piece.line - 1) + code
        compiled = compile(source, "page", "exec", dont_inherit=True)
        output = io.StringIO()
        with contextlib.chdir(self._folder), contextlib.redirect_stdout(output):
            exec(compiled, self._names)
        return output.getvalue()
