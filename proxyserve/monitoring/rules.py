"""Alerts and recordings as Prometheus reads them, and the runbook as people do."""

from __future__ import annotations

from itertools import groupby
from typing import Any

from proxyserve.monitoring.alerts import Alert, all_alerts, recordings


def rule_groups(selector: str, docs: str) -> list[dict[str, Any]]:
    """The groups of a rule file. `docs` is where the documentation is, to which alerts point: the address of the site
    that `make docs` builds, or a folder with the pages."""
    recorded = [{"record": entry.name, "expr": entry.expression} for entry in recordings(selector)]
    alerts = [_rule(alert, docs) for alert in all_alerts(selector)]
    return [
        {"name": "proxyserve-objectives", "rules": recorded},
        {"name": "proxyserve-alerts", "rules": alerts},
    ]


def _rule(alert: Alert, docs: str) -> dict[str, Any]:
    page = "monitoring/" if "://" in docs else "monitoring.md"
    return {
        "alert": alert.name,
        "expr": alert.expression,
        "for": alert.lasting,
        "labels": {"severity": alert.severity.value},
        "annotations": {
            "summary": alert.summary,
            "description": alert.meaning,
            "runbook_url": f"{docs.rstrip('/')}/{page}#{alert.name.lower()}",
        },
    }


def kubernetes_rule(groups: list[dict[str, Any]]) -> dict[str, Any]:
    """The same for the Prometheus operator."""
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "proxyserve", "labels": {"app.kubernetes.io/name": "proxyserve"}},
        "spec": {"groups": groups},
    }


def runbook(selector: str) -> str:
    """The part of `docs/monitoring.md` that says what to do, in Markdown."""
    lines = []
    for name, group in groupby(all_alerts(selector), key=lambda alert: alert.name):
        alerts = list(group)
        lines += [f"### {name}", "", alerts[0].meaning, ""]
        lines += [f"1. {step}" for step in alerts[0].steps]
        for alert in alerts:
            after = "at once" if alert.lasting == "0m" else f"after {alert.lasting}"
            lines += [
                "",
                f"{alert.severity.value.capitalize()}, {after}:",
                "",
                "```promql",
                alert.expression,
                "```",
            ]
        lines.append("")
    return "\n".join(lines)
