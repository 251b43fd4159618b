"""The README's examples run as they stand, but for the address."""

import ast
import re
from pathlib import Path
from typing import Any

import pytest

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("example", EXAMPLES)
async def test_example(stub: Any, example: str, capsys: pytest.CaptureFixture[str]) -> None:
    source = example.replace("http://127.0.0.1:8000", stub.url)
    code = compile(source, "README.md", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    running = eval(code, {})
    if running is not None:
        await running
    assert "Oakham." in capsys.readouterr().out


def test_there_are_examples() -> None:
    assert len(EXAMPLES) == 4
