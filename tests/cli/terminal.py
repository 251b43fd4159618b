"""A command in a real pseudo-terminal, as somebody would type into it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Self

_PATIENCE = 30.0
_ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Terminal:
    """`seen` is everything that came, without the escape sequences that `raw` has; `wait_for` looks at what it has not
    looked at yet."""

    def __init__(self, process: subprocess.Popen[bytes], end: int) -> None:
        self.process = process
        self.raw = self.seen = ""
        self._bytes = b""
        self._looked = 0
        self._end = end

    @classmethod
    @contextmanager
    def running(
        cls, *arguments: str, environment: Mapping[str, str], cwd: Path | None = None
    ) -> Iterator[Self]:
        """`proxyserve` with these arguments; it is killed at the end if it still runs."""
        ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
        process = subprocess.Popen(
            [sys.executable, "-m", "proxyserve", *arguments],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=dict(environment),
            cwd=cwd,
            # Its own session with this as its terminal, so that Ctrl-C reaches it.
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(theirs)
        terminal = cls(process, ours)
        try:
            yield terminal
        finally:
            process.kill()
            process.wait()
            os.close(ours)

    def type(self, text: str) -> None:
        os.write(self._end, text.encode())

    def enter(self, line: str) -> None:
        self.type(line + "\r")

    def wait_for(self, text: str) -> str:
        """What came up to and with `text`. Fails if that does not come."""
        deadline = time.monotonic() + _PATIENCE
        while (at := self.seen.find(text, self._looked)) < 0:
            if time.monotonic() > deadline or not self._read(deadline):
                raise AssertionError(f"{text!r} does not come:\n{self.seen[self._looked :]}")
        begun, self._looked = self._looked, at + len(text)
        return self.seen[begun : self._looked]

    def wait_for_end(self) -> int:
        """The exit code."""
        deadline = time.monotonic() + _PATIENCE
        while self._read(deadline):
            pass
        return self.process.wait(_PATIENCE)

    def interrupt(self) -> None:
        """Ctrl-C, as a key."""
        self.type("\x03")

    def _read(self, deadline: float) -> bool:
        """Whether something came."""
        if not select.select([self._end], [], [], max(0.0, deadline - time.monotonic()))[0]:
            return False
        with contextlib.suppress(OSError):  # the other end is closed
            if piece := os.read(self._end, 65536):
                self._bytes += piece
                self.raw = self._bytes.decode(errors="ignore").replace("\r\n", "\n")
                self.seen = _ESCAPE.sub("", self.raw)
                return True
        return False
