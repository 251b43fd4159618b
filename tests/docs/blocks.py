"""The code blocks of the README and the pages of docs/, and what they are expected to print.

A block runs as it stands, unless the line before it says why it cannot: `<!-- not run: gpu, a kernel is compiled -->`.
Comments right after a command or statement, each at the start of its line, are what it prints; comments at the start of
a block or after an empty line are words for the reader. `python -m tests.docs.blocks` lists what is not run.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]

#: What may keep a block from being run, and what that means.
REASONS = {
    "server": "starts or stops a server; the pages run against one that is there",
    "yours": "takes models, texts or keys that the reader has",
    "gpu": "needs a GPU",
    "download": "fetches something, or asks another machine",
    "minutes": "takes longer than tests may",
    "machine": "changes the machine that it runs on",
}

#: Pages made of files that another test runs.
ELSEWHERE = {"docs/clients.md": "tests/clients/test_examples.py"}

_FENCE = re.compile(r"^(?P<indent> *)(?P<marks>`{3,})(?P<language>[\w+-]*)(?P<rest>.*)$")
_NOT_RUN = re.compile(r"^ *<!-- not run: (?P<reason>.*) -->$")
_SHELLS = ("sh", "bash", "shell", "console")


@dataclass(frozen=True, slots=True)
class Block:
    """One fenced block of shell or Python. `line` is its first line's number in the file, from 1."""

    page: str
    line: int
    language: str
    code: str
    not_run: str | None

    @property
    def where(self) -> str:
        return f"{self.page}:{self.line}"


@dataclass(frozen=True, slots=True)
class Piece:
    """Commands or statements, then what they print; None where the page does not say. `line` counts as in `Block`."""

    line: int
    code: str
    expected: str | None


def pages() -> list[Path]:
    """The README, then every page of docs/."""
    return [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]


def blocks_of(path: Path) -> Iterator[Block]:
    """All blocks of shell and Python of a page, in its order."""
    return blocks_in(path.relative_to(REPOSITORY).as_posix(), path.read_text(encoding="utf-8"))


def blocks_in(name: str, text: str) -> Iterator[Block]:
    """The same of a page's text. Raises `ValueError` for a block without an end, or a reason that keeps nothing."""
    lines = text.split("\n")
    reason: str | None = None
    number = 0
    while number < len(lines):
        line = lines[number]
        number += 1
        if found := _NOT_RUN.match(line):
            reason = found["reason"]
            continue
        opening = _FENCE.match(line)
        if opening is None:
            # Anything but an empty line between the reason and its block parts them.
            reason = reason if not line.strip() else None
            continue
        start = number
        while number < len(lines) and lines[number].strip() != opening["marks"]:
            number += 1
        if number == len(lines):
            raise ValueError(f"{name}:{start}: the block does not end")
        code = textwrap.dedent("\n".join(lines[start:number]))
        number += 1
        language = "sh" if opening["language"] in _SHELLS else opening["language"]
        if language in ("sh", "python"):
            yield Block(name, start + 1, language, code, reason)
        elif reason is not None:
            raise ValueError(f"{name}:{start}: only shell and Python are run, so nothing keeps this from it")
        reason = None


def pieces_of(block: Block) -> Iterator[Piece]:
    """The block's code, cut where the page says what was printed."""
    code: list[str] = []
    printed: list[str] = []
    begin = block.line
    after_code = False
    for number, line in enumerate(block.code.split("\n"), block.line):
        if line.startswith("#") and (after_code or printed):
            printed.append(line.removeprefix("#").removeprefix(" "))
            continue
        if printed:
            yield Piece(begin, "\n".join(code), "\n".join(printed))
            code, printed, begin = [], [], number
        code.append(line)
        after_code = bool(line.strip()) and not line.startswith("#")
    if printed or any(line.strip() for line in code):
        yield Piece(begin, "\n".join(code), "\n".join(printed) if printed else None)


def all_blocks() -> list[Block]:
    return [block for path in pages() for block in blocks_of(path)]


def reason_problem(reason: str) -> str | None:
    """What is wrong with the form of a reason; None if nothing."""
    kind, comma, words = reason.partition(", ")
    if kind not in REASONS:
        return f"{kind!r} is none of {', '.join(REASONS)}"
    if not comma or len(words.split()) < 2:
        return f"say after {kind!r} and a comma in a few words why"
    return None


if __name__ == "__main__":
    for each in all_blocks():
        if each.not_run:
            print(f"{each.where}: {each.not_run}")
