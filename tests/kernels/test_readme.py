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
    assert picks.valid.all() and picks.raw.ids.shape == (2, 5) and picks.raw.values[1, 0] < 0  # type: ignore[attr-defined]
