"""Whether a command printed what its page says, but for what goes by the clock."""

from __future__ import annotations

import re

# What is drafted ahead goes by measured times, and so does how many tokens each model ran, and what is there of both.
# Generations go by what other pages swapped before.
_BY_THE_CLOCK = (
    (re.compile(r""",? ?["']drafted["']: \d+, ["']accepted["']: \d+"""), ""),
    (re.compile(r"""\{(["'][\w.-]+["']: \d+(, )?)+\}"""), "{counts}"),
    (re.compile(r"\bgeneration \d+\b"), "generation N"),
    (re.compile(r"(?:\b\d+(\.\d+)?|…) ?(ms|s|seconds)\b"), "T"),
)
_NUMBER = re.compile(r"-?\d+\.\d+(?:e[+-]?\d+)?")
#: Relative and absolute: other processors round other bits.
_TOLERANCE = 2e-3


def differs(expected: str, printed: str) -> str | None:
    """None where `printed` is what the page says; else both, for a person to read.

    `…` in a page stands for any text, alone on a line for any lines. Spaces at ends of lines, and empty lines at both
    ends, do not count. Fractions may differ in the third digit.
    """
    said, found = (_normal(text) for text in (expected, printed))
    match = re.fullmatch(_pattern(said), _NUMBER.sub("\0", found) + "\n")
    if match is None or not _same_numbers(said, found):
        return f"the page says:\n{expected}\n\nwhat came:\n{printed.strip()}"
    return None


def _normal(text: str) -> str:
    text = "\n".join(line.rstrip() for line in text.strip("\n").split("\n"))
    for found, instead in _BY_THE_CLOCK:
        text = found.sub(instead, text)
    return text


def _pattern(said: str) -> str:
    lines = _NUMBER.sub("\0", said).split("\n")
    return "".join(
        r"(?:.*\n)*" if line == "…" else re.escape(line).replace("…", ".*") + r"\n" for line in lines
    )


def _same_numbers(said: str, found: str) -> bool:
    if "…" in said:
        return True  # which number is which is not known
    pairs = zip(_NUMBER.findall(said), _NUMBER.findall(found), strict=True)
    return all(
        abs(float(one) - float(other)) <= _TOLERANCE * max(1.0, abs(float(one))) for one, other in pairs
    )
