"""`proxyserve calibrate` as a command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from proxyserve.cli.main import app
from proxyserve.errors import ProxyserveError
from proxyserve.fusion.calibration import read_calibrations
from tests.cli.output import said
from tests.tiny import TinyFamily


@pytest.fixture
def arguments(tiny_family: TinyFamily, tmp_path: Path) -> list[str]:
    (tmp_path / "task.jsonl").write_text(
        '{"prompt": "Question", "answer": "fox"}\n\n{"prompt": "a", "answer": "b"}\n'
    )
    (tmp_path / "general.txt").write_text("The quick brown fox jumps over the lazy dog. " * 5)
    expert = f"qa={tiny_family.experts['qa']},{tiny_family.untuned}"
    files = ["--task", str(tmp_path / "task.jsonl"), "--general", str(tmp_path / "general.txt")]
    return ["calibrate", str(tiny_family.base), "--expert", expert, *files, "--step", "0.5"]


def test_own_models(arguments: list[str], tmp_path: Path) -> None:
    saved, chart = tmp_path / "c.json", tmp_path / "c.png"
    result = CliRunner().invoke(app, [*arguments, "--save", str(saved), "--chart", str(chart), "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)["experts"]["qa"]
    assert [point["weight"] for point in found["points"]] == [0.0, 0.5, 1.0, 1.5, 2.0]
    assert found["preset"]["experts"]["qa"] == found["best"]
    assert read_calibrations(saved)["qa"].points[1].task_loss == found["points"][1]["task_loss"]
    assert chart.read_bytes().startswith(b"\x89PNG")
    table = CliRunner().invoke(app, arguments)
    assert "--preset 'qa-calibrated=" in table.stdout and "gains most within" in table.stdout


def test_refusals(arguments: list[str], tmp_path: Path) -> None:
    without_task = [word for word in arguments if not word.endswith("task.jsonl")]
    without_task.remove("--task")
    assert "--task" in CliRunner().invoke(app, without_task).output
    (tmp_path / "task.jsonl").write_text('{"prompt": "a"}\n')
    bad = CliRunner().invoke(app, arguments)
    assert bad.exit_code == 1 and "task.jsonl:1" in str(bad.exception)
    unnamed = CliRunner().invoke(app, ["calibrate", arguments[1]])
    assert unnamed.exit_code == 2 and "--expert" in unnamed.output


def test_files_are_checked(arguments: list[str], tmp_path: Path) -> None:
    for option in ("--save", "--chart"):
        result = CliRunner().invoke(app, [*arguments, option, str(tmp_path / "none" / "file")])
        assert result.exit_code == 2 and option in said(result) and "no folder" in said(result)
    twice = CliRunner().invoke(app, [*arguments, "--task", f"qa={tmp_path / 'task.jsonl'}"])
    assert twice.exit_code == 2 and "two tasks" in said(twice)
    (tmp_path / "general.txt").write_bytes(b"caf\xe9 and more")
    latin = CliRunner().invoke(app, arguments)
    assert isinstance(latin.exception, ProxyserveError) and "not UTF-8" in str(latin.exception)


def test_a_task_of_ones_own_for_the_demo_family(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["calibrate", "--expert", "qa", "--task", str(tmp_path / "none.jsonl")])
    assert isinstance(result.exception, ProxyserveError) and "none.jsonl" in str(result.exception)


@pytest.mark.slow
def test_demo_family() -> None:
    arguments = ["--expert", "record", "--step", "0.5", "--budget", "0.05", "--json"]
    result = CliRunner().invoke(app, ["calibrate", *arguments])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)["experts"]["record"]
    assert found["best"] == 1.0, "what the table in docs/tools.md says, at coarser steps"
    losses = [point["task_loss"] for point in found["points"]]
    assert losses[0] > 5 * losses[2]
    assert CliRunner().invoke(app, ["calibrate", "--expert", "nobody"]).exit_code == 2
