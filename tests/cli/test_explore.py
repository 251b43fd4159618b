"""`proxyserve explore` as a command."""

from __future__ import annotations

import json
from pathlib import Path

from typer.testing import CliRunner

from proxyserve.cli.main import app
from tests.cli.output import said


def test_texts_and_file(tmp_path: Path) -> None:
    output = tmp_path / "texts.jsonl"
    arguments = ["explore", "record", "--texts", "3", "--max-tokens", "8", "--save", str(output)]
    result = CliRunner().invoke(app, [*arguments, "--iterative", "--learning-rate", "0.001"])
    assert result.exit_code == 0, result.output
    findings = [json.loads(line) for line in output.read_text().splitlines()]
    assert 1 <= len(findings) <= 3
    for number, finding in enumerate(findings, 1):
        assert f"{number:3} {finding['contrast']:+.2f} nats per token" in result.output
        assert repr(finding["text"]) in result.output


def test_refusals(tmp_path: Path) -> None:
    assert "record" in CliRunner().invoke(app, ["explore", "nobody"]).output
    half = CliRunner().invoke(app, ["explore", "x", "--tuned", str(tmp_path)])
    assert half.exit_code == 2 and "--untuned" in half.output
    for arguments, words in (
        (["--learning-rate", "0.1"], "--iterative"),
        (["--iterative", "--learning-rate", "0"], "above 0"),
        (["--save", str(tmp_path / "none" / "texts.jsonl")], "no folder"),
        (["--save", str(tmp_path)], "name a file"),
    ):
        result = CliRunner().invoke(app, ["explore", "record", *arguments])
        assert result.exit_code == 2 and words in said(result), arguments
