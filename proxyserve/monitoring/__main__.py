"""`python -m proxyserve.monitoring DIR`: boards and rules that fit this version of the server."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import yaml

from proxyserve.monitoring.boards import all_boards
from proxyserve.monitoring.grafana import dashboard
from proxyserve.monitoring.rules import kubernetes_rule, rule_groups, runbook

_HEADER = "# Made by `python -m proxyserve.monitoring`: change it there.\n"


def make_files(job: str = "proxyserve", docs: str = "docs") -> dict[str, str]:
    """Path within the folder -> text: `boards/*.json` for Grafana, `rules.yml` for Prometheus, and
    `prometheus-rule.yaml`, the same rules for its operator. `job` is the scrape's name."""
    groups = rule_groups(_selector(job), docs)
    boards = {
        f"boards/{board.name}.json": json.dumps(dashboard(board), indent=1) + "\n" for board in all_boards()
    }
    return {
        **boards,
        "rules.yml": _HEADER + _yaml({"groups": groups}),
        "prometheus-rule.yaml": _HEADER + _yaml(kubernetes_rule(groups)),
    }


def _selector(job: str) -> str:
    return f"job={json.dumps(job)}"


def _yaml(value: object) -> str:
    return yaml.safe_dump(value, sort_keys=False, width=110, allow_unicode=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m proxyserve.monitoring", description=__doc__)
    parser.add_argument("folder", metavar="DIR", nargs="?", type=Path, help="where to write them")
    parser.add_argument("--job", default="proxyserve", help="name of the scrape job in Prometheus")
    parser.add_argument(
        "--docs", default="docs", help="documentation that alerts point to: address of the site, or a folder"
    )
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a file differs")
    parser.add_argument("--runbook", action="store_true", help="print what to do at each alert, in Markdown")
    given = parser.parse_args(arguments)
    if given.runbook:
        print(runbook(_selector(given.job)), end="")
        return 0
    if given.folder is None:
        parser.error("name a folder, or give --runbook")
    files = make_files(given.job, given.docs)
    if given.check:
        return _check(given.folder, files)
    for name, text in files.items():
        file = given.folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    return 0


def _check(folder: Path, files: dict[str, str]) -> int:
    different = [
        name
        for name, text in files.items()
        if not (folder / name).is_file() or (folder / name).read_text(encoding="utf-8") != text
    ]
    for name in different:
        print(f"{folder / name} is not what this version makes", file=sys.stderr)
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
