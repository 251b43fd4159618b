"""The documentation site: it builds without a warning, leads to every page, and asks no other host for anything."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from proxyserve.api.reference import as_markdown, sections
from tests.docs.blocks import REPOSITORY
from tests.docs.conftest import Server


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `make docs` builds, of a copy: links, anchors and entries of the navigation that lead nowhere fail it."""
    folder = tmp_path_factory.mktemp("site")
    shutil.copy(REPOSITORY / "mkdocs.yml", folder)
    shutil.copytree(REPOSITORY / "docs", folder / "docs")
    command = [sys.executable, "-m", "zensical", "build", "--strict"]
    built = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)
    assert built.returncode == 0, re.sub(r"\x1b\[[\d;]*m", "", built.stdout + built.stderr)
    assert "Warning" not in built.stdout + built.stderr
    return folder / "site"


def navigation(entry: Any) -> Iterator[str]:
    """The pages in a part of `nav`, in order."""
    if isinstance(entry, str):
        yield entry
        return
    for each in entry.values() if isinstance(entry, dict) else entry:
        yield from navigation(each)


def test_every_page_is_in_the_navigation_once() -> None:
    settings = yaml.safe_load((REPOSITORY / "mkdocs.yml").read_text(encoding="utf-8"))
    listed = list(navigation(settings["nav"]))
    docs = REPOSITORY / "docs"
    there = {path.relative_to(docs).as_posix() for path in docs.rglob("*.md")}
    assert there - set(listed) == set(), (
        "put these into nav in mkdocs.yml, where a newcomer would look for them"
    )
    assert set(listed) - there == set(), "these pages in nav of mkdocs.yml are not in docs/"
    assert len(listed) == len(set(listed))


def test_every_page_is_built(site: Path) -> None:
    for path in (REPOSITORY / "docs").rglob("*.md"):
        name = path.relative_to(REPOSITORY / "docs").with_suffix("")
        built = site / "index.html" if name.name == "index" else site / name / "index.html"
        assert "<article" in built.read_text(encoding="utf-8"), built


class Requests(HTMLParser):
    """What a browser fetches to show a page. Links that a reader may follow are none of it."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag == "link" and given.get("rel") in ("canonical", "next", "prev"):
            return
        if tag in ("link", "script", "img", "source", "iframe", "object", "use"):
            self.found += [value for name in ("href", "src", "data") if (value := given.get(name))]


def test_no_page_asks_another_host(site: Path) -> None:
    for path in site.rglob("*.html"):
        page = Requests()
        page.feed(path.read_text(encoding="utf-8"))
        assert page.found, path
        elsewhere = [target for target in page.found if re.match(r"(\w+:)?//", target)]
        assert not elsewhere, f"{path}: {elsewhere}"
    for path in site.rglob("*.css"):
        assert not re.search(r"url\(\s*[\"']?(https?:)?//", path.read_text(encoding="utf-8")), path


def test_routes_are_those_of_a_server(server: Server) -> None:
    document = httpx.get(f"{server.url}/openapi.json").raise_for_status().json()
    page = (REPOSITORY / "docs" / "routes.md").read_text(encoding="utf-8")
    assert page == as_markdown(list(sections(document))), (
        "run `proxyserve demo`, and: curl -s http://127.0.0.1:8000/openapi.json | "
        "python -m proxyserve.api.reference > docs/routes.md"
    )


def test_readme_links_to_what_is_there() -> None:
    for name in ("README.md", "CONTRIBUTING.md"):
        for target in re.findall(r"\]\(([^)#]+)", (REPOSITORY / name).read_text(encoding="utf-8")):
            assert target.startswith("http") or (REPOSITORY / target).exists(), f"{name}: {target}"
