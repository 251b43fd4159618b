"""Lines that are typed: editing, history and completion by readline where Python has it."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

readline: ModuleType | None
try:
    import readline
except ImportError:  # some builds of Python have none: then lines are read as the terminal gives them
    readline = None

_MOST_LINES = 1000

#: Given what is typed before the word and the word so far, the words that it may become.
Words = Callable[[str, str], Sequence[str]]


def state_folder() -> Path:
    """Where the command keeps what it remembers, by the XDG base directory specification."""
    home = os.environ.get("XDG_STATE_HOME", "")
    # The specification has relative paths ignored.
    return (Path(home) if Path(home).is_absolute() else Path.home() / ".local" / "state") / "proxyserve"


class LineEditor:
    """Reads lines. Those that are remembered go to `history` at once (None: nowhere), readable by nobody else."""

    def __init__(self, history: Path | None, words: Words) -> None:
        self._history = history
        self._words = words
        self._found: Sequence[str] = ()
        if readline is None:
            return
        readline.set_auto_history(False)
        readline.clear_history()
        readline.set_completer_delims(" ")
        readline.set_completer(self._complete)
        libedit = "libedit" in (readline.__doc__ or "")
        readline.parse_and_bind("bind ^I rl_complete" if libedit else "tab: complete")
        for line in self._remembered():
            readline.add_history(line)

    def read(self, prompt: str, *, style: str = "") -> str:
        """Raises EOFError at Ctrl-D and KeyboardInterrupt at Ctrl-C. `style` is an escape sequence for the prompt."""
        if style and readline is not None:  # the marks tell readline what takes no room
            prompt = f"\x01{style}\x02{prompt}\x01\x1b[0m\x02"
        elif style:
            prompt = f"{style}{prompt}\x1b[0m"
        return input(prompt)

    def remember(self, line: str) -> None:
        """A history that cannot be written is not worth a word in the middle of a conversation; `doctor` tells."""
        if readline is not None:
            readline.add_history(line)
        if self._history is not None:
            with contextlib.suppress(OSError), _private(self._history, os.O_APPEND) as file:
                file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def _remembered(self) -> list[str]:
        """The latest lines of the file, which is cut where it has grown long."""
        if self._history is None:
            return []
        try:
            written = self._history.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError):
            return []
        if len(written) > 2 * _MOST_LINES:
            with contextlib.suppress(OSError), _private(self._history, os.O_TRUNC) as file:
                file.write("\n".join(written[-_MOST_LINES:]) + "\n")
        lines = []
        for entry in written[-_MOST_LINES:]:
            with contextlib.suppress(ValueError):
                line = json.loads(entry)
                if isinstance(line, str):
                    lines.append(line)
        return lines

    def _complete(self, begun: str, number: int) -> str | None:
        if number == 0:
            assert readline is not None
            before = readline.get_line_buffer()[: readline.get_begidx()]
            self._found = [word for word in self._words(before, begun) if word.startswith(begun)]
        return self._found[number] if number < len(self._found) else None


def _private(file: Path, flag: int):  # type: ignore[no-untyped-def]
    """The file for writing, made for its owner alone."""
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    return os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | flag, 0o600), "w", encoding="utf-8")
