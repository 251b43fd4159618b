"""The TypeScript client as others get it: packed, installed into a project of its own, compiled, and run against a live
server."""

from __future__ import annotations

import json
import re
import tarfile
from pathlib import Path

import pytest

from tests.clients.node_packages import CLIENT, NodePackages, examples, run

#: What each example of the README prints, among other things.
PRINTED = ("harp", "qa", "[ ' harp' ]", "careful")


def test_types_are_those_that_the_server_documents(
    openapi: bytes, node_packages: NodePackages, tmp_path: Path
) -> None:
    document = tmp_path / "openapi.json"
    document.write_bytes(openapi)
    written = tmp_path / "openapi.ts"
    run(
        ["npm", "run", "--silent", "types", "--", str(document), "--output", str(written)],
        node_packages.client,
    )
    assert written.read_text() == (CLIENT / "src/openapi.ts").read_text(), (
        "the server's API has changed: in clients/typescript run `npm ci` and `npm run types -- "
        "URL/openapi.json --output src/openapi.ts` with the URL of a running `proxyserve demo`"
    )


def test_package(node_packages: NodePackages) -> None:
    with tarfile.open(node_packages.tarball) as tar:
        names = {name.removeprefix("package/") for name in tar.getnames()}
    modules = {path.stem for path in (CLIENT / "src").glob("*.ts")}
    built = {f"dist/{module}{suffix}" for module in modules for suffix in (".js", ".d.ts")}
    assert names == {"package.json", "README.md", "LICENSE", *built}
    package = json.loads((CLIENT / "package.json").read_text())
    assert "dependencies" not in package
    for path in (node_packages.client / "dist").glob("*.js"):
        imported = set(re.findall(r'from "([^"]+)"', path.read_text()))
        assert {name for name in imported if not name.startswith("./")} <= {"openai"}, (
            "it must run in browsers"
        )


def test_lock_file_names_no_registry() -> None:
    lock = json.loads((CLIENT / "package-lock.json").read_text())
    for name, entry in lock["packages"].items():
        assert "resolved" not in entry, name
        assert name == "" or entry["integrity"].startswith("sha512-")


@pytest.mark.slow
def test_its_own_tests(live_url: str, node_packages: NodePackages) -> None:
    tests = sorted(str(path) for path in node_packages.built.glob("*.test.js"))
    assert len(tests) == 4
    told = run(["node", "--test", *tests], node_packages.built, PROXYSERVE_TEST_URL=live_url)
    assert int(re.findall(r"^# pass (\d+)", told, re.MULTILINE)[0]) >= 30


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(PRINTED)))
def test_readme(live_url: str, node_packages: NodePackages, number: int) -> None:
    assert len(examples()) == len(PRINTED)
    told = run(["node", f"example{number}.js"], node_packages.built, PROXYSERVE_TEST_URL=live_url)
    assert PRINTED[number] in told
