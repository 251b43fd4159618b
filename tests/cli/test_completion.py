"""Completion as shells do it: the real script, evaluated by a real bash."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.api.live import Live

BASH = shutil.which("bash")


@pytest.fixture
def home(environment: dict[str, str], tmp_path: Path) -> dict[str, str]:
    """A `proxyserve` on the path, whose completion has been installed for bash."""
    program = tmp_path / "bin" / "proxyserve"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m proxyserve "$@"\n')
    program.chmod(0o755)
    return {**environment, "PATH": f"{program.parent}:{environment['PATH']}", "SHELL": BASH or ""}


def installed(home: dict[str, str]) -> None:
    # Without this variable Typer asks the parent process which shell it is: here that is no shell.
    command = ["proxyserve", "--install-completion", "bash"]
    environment = {**home, "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.skipif(BASH is None, reason="there is no bash")
def test_bash(home: dict[str, str], demo: Live) -> None:
    """Commands, options and their values, names that the server has; nothing, and soon, where there is none."""
    installed(home)

    def complete(*words: str, **variables: str) -> list[str]:
        script = f"""
source ~/.bashrc
COMP_WORDS=({" ".join(map(shlex.quote, words))})
COMP_CWORD={len(words) - 1}
$(complete -p proxyserve | sed 's/.*-F \\([^ ]*\\).*/\\1/') proxyserve
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
        environment = {**home, **variables}
        result = subprocess.run(
            ["bash", "-c", script], env=environment, capture_output=True, text=True, timeout=60, check=True
        )
        assert result.stderr == ""
        return result.stdout.split()

    there = {"PROXYSERVE_URL": demo.url}
    assert complete("proxyserve", "e") == ["experts", "explore", "eval"]
    assert complete("proxyserve", "serve", "--max-b") == ["--max-batch", "--max-batch-tokens"]
    assert complete("proxyserve", "demo", "--kernels", "t") == ["torch", "triton"]
    assert complete("proxyserve", "experts", "swap", "r", **there) == ["record"]
    assert complete("proxyserve", "presets", "show", "", **there) == ["house"]
    assert complete("proxyserve", "chat", "--url", demo.url, "-m", "atlas+q") == ["atlas+qa"]
    assert complete("proxyserve", "chat", "-m", "atlas+qa+g", **there) == ["atlas+qa+guard"]
    begun = time.monotonic()
    assert complete("proxyserve", "experts", "swap", "", PROXYSERVE_URL="http://10.255.255.1:9") == []
    assert time.monotonic() - begun < 20


def test_scripts_of_other_shells(home: dict[str, str]) -> None:
    environment = {**home, "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    for shell, words in (("zsh", "#compdef proxyserve"), ("fish", "complete --command proxyserve")):
        command = ["proxyserve", "--show-completion", shell]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        assert words in result.stdout
