"""Requests that are copied from the page do what the page did."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
from contextlib import redirect_stdout

import pytest

from tests.playground.conftest import Opening
from tests.playground.test_answers import RECORD, answered


def run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout


def test_copied_commands_give_the_same_text(tab: Opening) -> None:
    page = answered(tab)
    page.page.get_by_text("The request as code").click()
    code = page.page.locator("details.code")

    def copied(language: str, side: str) -> str:
        code.get_by_role("radio", name=language).check()
        code.get_by_role("radio", name=side, exact=True).check()
        code.locator("button.copy").click()
        text: str = page.page.evaluate("navigator.clipboard.readText()")
        return text

    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    reply = json.loads(run("bash", "-c", copied("curl", "A")))
    assert reply["choices"][0]["message"]["content"] == RECORD
    # The base has no chat template; what is copied is the prompt that it was really given.
    reply = json.loads(run("bash", "-c", copied("curl", "B")))
    assert reply["choices"][0]["text"] == page.text(1)
    with redirect_stdout(io.StringIO()) as printed:
        exec(copied("Python", "A"), {})
    assert printed.getvalue() == RECORD + "\n"
    assert "client.chat.completions.create(request)" in copied("TypeScript", "A")


def test_code_has_no_key_and_quotes_what_it_must(tab: Opening) -> None:
    page = tab()
    page.page.evaluate("sessionStorage.setItem('proxyserve-key', 'sk-of-mine')")
    page.page.reload()
    page.page.get_by_text("The request as code").click()
    page.page.locator(".prompt").fill('it\'s "quoted" \\ $HOME `id`\n{é}')
    shown = page.page.locator("details.code pre").inner_text()
    assert "sk-of-mine" not in shown
    assert "Bearer $PROXYSERVE_API_KEY" in shown
    assert "sk-of-mine" not in page.page.url
    body = shown.partition("-d ")[2]
    sent = json.loads(run("bash", "-c", f"printf %s {body}"))
    assert sent["messages"][0]["content"] == 'it\'s "quoted" \\ $HOME `id`\n{é}'
