"""The npm packages of the TypeScript tests: installed once, from the lock file of `clients/typescript`."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from tests.clients.example_packages import EXAMPLES

CLIENT = Path(__file__).parents[2] / "clients" / "typescript"
UNMODIFIED = Path(__file__).parent / "openai_typescript"

#: The README's examples call the server at this address.
README_URL = "http://127.0.0.1:8000"


@dataclass(frozen=True)
class NodePackages:
    """`client` is a built copy of `clients/typescript` with its `node_modules`. `consumer` is another project that has
    installed what `npm pack` made of it (`tarball`): in `built` are the package's own tests, the examples of its README
    and of docs/clients.md, and `drive.ts`, compiled there."""

    client: Path
    tarball: Path
    consumer: Path

    @property
    def built(self) -> Path:
        return self.consumer / "built"


def installed(folder: Path) -> NodePackages:
    """What is in `folder`; the first process that asks puts it there."""
    client = folder / "client"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            unfinished = folder.with_suffix(".unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)
            _install(unfinished / "client")
            unfinished.rename(folder)
    (tarball,) = client.glob("*.tgz")
    return NodePackages(client, tarball, client / "consumer")


def _install(client: Path) -> None:
    """Installs, packs and compiles. A consumer below the client's copy finds `openai` there and needs no second
    download."""
    ignored = shutil.ignore_patterns("node_modules", "dist", "build", "*.tgz")
    shutil.copytree(CLIENT, client, ignore=ignored)
    run(["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"], client)
    tarball = run(["npm", "pack", "--silent"], client).split()[-1]  # builds it first
    consumer = client / "consumer"
    consumer.mkdir()
    (consumer / "package.json").write_text('{"name": "consumer", "private": true, "type": "module"}')
    offline = ["--offline", "--legacy-peer-deps", "--no-package-lock", "--no-audit", "--no-fund"]
    run(["npm", "install", "--ignore-scripts", *offline, f"../{tarball}"], consumer)
    shutil.copytree(client / "test", consumer, dirs_exist_ok=True)
    shutil.copy(UNMODIFIED / "drive.ts", consumer)
    shutil.copy(EXAMPLES / "typescript_client.ts", consumer)
    for index, example in enumerate(examples()):
        (consumer / f"example{index}.ts").write_text(example)
    run([str(client / "node_modules/.bin/tsc"), "--project", ".", "--outDir", "built"], consumer)


def examples() -> list[str]:
    """The TypeScript in the README, with the address taken from the environment."""
    readme = (CLIENT / "README.md").read_text(encoding="utf-8")
    found = re.findall(r"```ts\n(.*?)```", readme, re.DOTALL)
    return [example.replace(f'"{README_URL}"', 'process.env["PROXYSERVE_TEST_URL"]!') for example in found]


def run(command: list[str], folder: Path, **environment: str) -> str:
    """What it prints; a failure shows that and its errors."""
    result = subprocess.run(
        command,
        cwd=folder,
        env={**_environment(), **environment},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def _environment() -> dict[str, str]:
    """Without settings of whoever runs the tests."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PROXYSERVE_")}
