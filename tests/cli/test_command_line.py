"""What all commands have in common: help, a start without torch, exit codes, JSON, and the generated reference."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from proxyserve.api.keys import new_key
from proxyserve.cli import main as command_line
from proxyserve.cli.main import COMMANDS, app, usage_error
from proxyserve.cli.reference import reference
from tests.api.live import Live
from tests.cli.in_process import run_command


def commands() -> Iterator[tuple[list[str], Any]]:
    """All of them, those of groups too."""
    for name, entry in COMMANDS.items():
        command = entry.load(name)
        inner = getattr(command, "commands", {})
        if not inner or getattr(command, "invoke_without_command", False):
            yield [name], command
        yield from (([name, below], each) for below, each in inner.items())


def test_every_command_and_every_option_has_help() -> None:
    for path, command in commands():
        assert command.help, path
        for parameter in command.params:
            assert getattr(parameter, "help", None), (path, parameter.name)
        result = CliRunner().invoke(app, [*path, "--help"])
        assert result.exit_code == 0 and "Usage: " in result.output, path


def test_nothing_but_models_waits_for_torch() -> None:
    """Help of every command, and what talks to servers, starts without what takes seconds to import."""
    code = """
import importlib, json, sys
from proxyserve.cli.main import COMMANDS
for name, entry in COMMANDS.items():
    entry.load(name)
import proxyserve.cli.chat_session, proxyserve.cli.completing, proxyserve.cli.reference
slow = ("torch", "transformers", "numpy", "fastapi", "uvicorn")
print(json.dumps([name for name in slow if name in sys.modules]))
"""
    # `keys` checks records by the schema that the server reads them with, which brings FastAPI.
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert set(json.loads(result.stdout)) <= {"fastapi"}


def test_the_reference_is_current(repository: Path) -> None:
    assert (repository / "docs" / "cli.md").read_text() == reference(), (
        "write it anew: python -m proxyserve.cli.reference > docs/cli.md"
    )


def run(*arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr."""
    ended = run_command(*arguments)
    return ended.returncode, ended.stdout, ended.stderr


def test_exit_codes_and_errors(demo: Live) -> None:
    """The same codes for people and for `--json`, which writes one document to stdout and nothing to stderr."""
    away, there = ["--url", "http://127.0.0.1:9"], ["--url", demo.url]
    for arguments, code, kind, words in (
        (["experts", "list", *away], 3, "unreachable", "cannot be reached"),
        (["experts", "show", "nobody", *there], 4, "refused", "nobody"),
        (["presets", "list", "--sideways"], 2, "usage", "--sideways"),
        (["presets", "set", "new", "[1]", *there], 2, "usage", "must be a JSON object"),
        (["presets", "set", "new", '{"rule": "none"}', *there], 4, "refused", "the rules are"),
        (["formula", "base +"], 1, "failed", "base +"),
        (["nonsense"], 2, "usage", "nonsense"),
        (["calibrate", "/nowhere"], 2, "usage", "--expert"),
    ):
        found, out, err = run(*arguments)
        assert (found, out) == (code, ""), arguments
        assert words in " ".join(err.split()) and "Traceback" not in err
        found, out, err = run(*arguments, "--json")
        error = json.loads(out)["error"]
        assert (found, error["type"], err) == (code, kind, ""), arguments
        assert words in error["message"]


def test_json_results(demo: Live) -> None:
    """One document on stdout, and what only accompanies it elsewhere."""
    there = ["--url", demo.url]
    house = {"rule": "dynamic", "experts": {"qa": 1}}
    for arguments, expected in (
        (["experts", "list", *there], lambda value: {entry["name"] for entry in value} >= {"qa", "record"}),
        (["experts", "show", "qa", *there], lambda value: value["name"] == "qa"),
        (["presets", "list", *there], lambda value: value[0]["fusion"] == house),
        (["formula", "base + 0.5*qa"], lambda value: value["coefficients"]["qa.tuned"] == 0.5),
        (
            ["score", "--server", demo.url, "--model", "atlas+qa", "--prompt", "Kustin", "--max-tokens", "2"],
            lambda value: value["tokens"] == len(value["entries"]) == 2,
        ),
    ):
        code, out, _ = run(*arguments, "--json")
        assert code == 0 and expected(json.loads(out)), arguments


def test_version_and_no_arguments() -> None:
    assert run("--version")[:2] == (0, f"{command_line.__version__}\n")
    code, out, err = run()
    assert code == 2 and "chat" in out + err


def test_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("proxyserve.cli.connection.Connection.call", interrupt)
    assert run("experts", "list")[0] == run("experts", "list", "--json")[0] == 130


def test_the_one_error_that_typer_names_is_of_the_kind_of_all() -> None:
    assert issubclass(typer.BadParameter, usage_error()) and usage_error() is not typer.BadParameter


def test_keys_are_never_repeated(tmp_path: Path) -> None:
    key, file = new_key(), tmp_path / "key"
    file.write_text(f"{key} and more\n")
    code, out, err = run("experts", "list", "--admin-key-file", str(file))
    assert code == 2 and key not in out + err
    code, out, err = run("chat", "hello", "--api-key", f"{key} and more")
    assert code == 2 and key not in out + err
