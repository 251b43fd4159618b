"""What the README and the pages of docs/ tell people to type is typed here, and prints what they say."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.docs.blocks import ELSEWHERE, REPOSITORY, all_blocks, blocks_in, blocks_of, pages, reason_problem
from tests.docs.compare import differs
from tests.docs.conftest import Commands, Server
from tests.docs.runner import PageError, PageRunner

#: Walked from a clone by `test_newcomer.py`, in this order.
OF_NEWCOMERS = ("docs/start.md", "docs/tune_an_expert.md")

RUN = [
    path
    for path in pages()
    if path.relative_to(REPOSITORY).as_posix() not in (*OF_NEWCOMERS, *ELSEWHERE)
    and any(block.not_run is None for block in blocks_of(path))
]


@pytest.mark.parametrize("path", RUN, ids=lambda path: path.relative_to(REPOSITORY).as_posix())
def test_page(path: Path, server: Server, commands: Commands) -> None:
    folder = server.folder / path.stem
    folder.mkdir()
    runner = PageRunner(folder, server.url, commands.path)
    try:
        for block in blocks_of(path):
            if block.not_run is None:
                runner.run(block)
    finally:
        runner.close()


def test_pages_that_are_run_elsewhere_are() -> None:
    for page, test in ELSEWHERE.items():
        assert page in (REPOSITORY / test).read_text(encoding="utf-8")


def test_what_is_not_run_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = all_blocks()
    problems = [
        f"{block.where}: {problem}"
        for block in blocks
        if block.not_run is not None and (problem := reason_problem(block.not_run))
    ]
    assert not problems, "\n".join(problems)
    with capsys.disabled():
        left_out = [f"{block.where}: {block.not_run}" for block in blocks if block.not_run is not None]
        print(f"\n{len(left_out)} of {len(blocks)} blocks of the pages are not run:", *left_out, sep="\n  ")


RIGHT = (
    "```sh\n# a word\necho a; echo 1.2341\n# a\n# 1.2340\n```",
    "- item\n\n  ```python\n  x = 1.5\n  print(x)\n  # 1.5\n  print('b', x)\n  # b …\n  ```",
    "```sh\nname=c\n```\n\n```sh\necho $name\n# c\n```",
)
WRONG = (
    "```sh\necho a\n# b\n```",
    "```sh\necho 1.24\n# 1.23\n```",
    "```sh\nfalse | cat\n```",
    "```sh\nproxyserve formula 'base +'\n```",
    "```python\nprint(1)\n# 2\n```",
    "```python\nraise ValueError\n```",
)


@pytest.mark.parametrize("text", RIGHT + WRONG)
def test_wrong_pages_are_told_from_right_ones(text: str, commands: Commands, tmp_path: Path) -> None:
    runner = PageRunner(tmp_path, "http://127.0.0.1:1", commands.path)
    try:
        for block in blocks_in("page", text):
            runner.run(block)
    except PageError as error:
        assert text in WRONG
        assert str(error).startswith("page:2")
    else:
        assert text in RIGHT
    finally:
        runner.close()


def test_a_reason_has_a_kind_and_words_and_a_block() -> None:
    assert reason_problem("later") and reason_problem("gpu") and not reason_problem("gpu, a kernel runs")
    (block,) = blocks_in("page", "<!-- not run: gpu, a kernel runs -->\n\n```sh\nfalse\n```")
    assert block.not_run == "gpu, a kernel runs"
    with pytest.raises(ValueError):
        list(blocks_in("page", "<!-- not run: gpu, a kernel runs -->\n```json\n{}\n```"))


def test_what_goes_by_the_clock_is_not_compared() -> None:
    assert differs("[1, 2]", "[1, 3]")
    assert differs("took 1.5 s, 'kl': 1.5", "took 1.5 s, 'kl': 1.6")
    assert not differs("took 1.5 s, 'kl': 1.5", "took 20 ms, 'kl': 1.5001")
    assert not differs("{'flips': 1, 'drafted': 3, 'accepted': 1}", "{'flips': 1}")
