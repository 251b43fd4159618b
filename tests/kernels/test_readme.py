"""The example in the package's README runs."""

from __future__ import annotations

import re
from pathlib import Path


def test_example() -> None:
    text = (Path(__file__).parents[2] / "kernels" / "proxyserve_kernels" / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    names: dict[str, object] = {}
    exec(code, names)
    picks = names["picks"]
    assert picks.valid.all() and picks.logprobs[0] is None and len(picks.logprobs[1][1]) == 5  # type: ignore[attr-defined]
