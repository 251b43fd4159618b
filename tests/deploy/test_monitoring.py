"""Boards and rules, against the list of metrics that they are made from. `test_stack` asks them of a live server."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from proxyserve.api import families
from proxyserve.api.families import Kind, all_families
from proxyserve.monitoring.__main__ import main, make_files
from proxyserve.monitoring.alerts import all_alerts, recordings
from proxyserve.monitoring.board import Form, Panel, Unit
from proxyserve.monitoring.boards import LEFT_OUT, all_boards
from proxyserve.monitoring.grafana import dashboard
from proxyserve.monitoring.queries import Queries
from proxyserve.monitoring.rules import runbook
from tests.api.test_metrics import everything
from tests.tools import need

FAMILIES = {family.name: family for family in all_families()}
SELECTOR = 'job="proxyserve"'
RULES = Path(__file__).parents[2] / "deploy" / "monitoring" / "rules.yml"

#: Names of series in an expression: what is followed by a selector, and what was recorded.
SERIES = re.compile(r"([a-zA-Z_:][a-zA-Z0-9_:]*)\{([^}]*)\}|(proxyserve:[a-z_]+:[a-z0-9_]+)")
#: Series that Prometheus makes itself.
OWN = {"up"}


def board_expressions() -> Iterator[tuple[str, str]]:
    for board in all_boards():
        for panel in board.panels:
            for query in panel.queries:
                yield f"{board.name}: {panel.title}", query.expression
        for annotation in dashboard(board)["annotations"]["list"]:
            yield f"{board.name}: annotation", annotation["expr"]


def rule_expressions() -> Iterator[tuple[str, str]]:
    yield from ((entry.name, entry.expression) for entry in recordings(SELECTOR))
    yield from ((alert.name, alert.expression) for alert in all_alerts(SELECTOR))


def series_of(expression: str) -> Iterator[tuple[str, str]]:
    """Name and selector of each series that is asked for."""
    for name, selector, recorded in SERIES.findall(expression):
        yield (name or recorded), selector


# The list of metrics --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("where", "expression"), [*board_expressions(), *rule_expressions()])
def test_what_is_asked_for_is_there(where: str, expression: str) -> None:
    """Every series is of a family, of the right kind: buckets of histograms, rates of counters, gauges as they are."""
    recorded = {entry.name for entry in recordings(SELECTOR)}
    found = list(series_of(expression))
    assert found, expression
    for name, selector in found:
        if name in OWN | recorded:
            continue
        family = FAMILIES.get(name)
        labels = set(re.findall(r"([a-z_]+)=", selector)) - {"job", "instance"}
        rated = f"rate({name}{{{selector}}}[" in expression or f"increase({name}{{{selector}}}[" in expression
        if family is None:
            base = FAMILIES[re.sub(r"_(bucket|sum|count)$", "", name)]
            assert base.kind is Kind.HISTOGRAM
            assert rated
            labels -= {"le"}
        else:
            assert family.kind is not Kind.HISTOGRAM
            assert rated == (family.kind is Kind.COUNTER)
            assert labels <= set(family.labels)


def test_bounds_that_rules_name_are_bounds() -> None:
    buckets: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(everything().render().decode()):
        for sample in family.samples:
            if "le" in sample.labels:
                buckets.setdefault(sample.name, set()).add(sample.labels["le"])
    named = [
        (name, bound)
        for _, expression in rule_expressions()
        for name, selector in series_of(expression)
        for bound in re.findall(r'le="([^"]*)"', selector)
    ]
    assert len(named) == 8
    for name, bound in named:
        assert bound in buckets[name]


def test_values_that_selectors_name_are_values() -> None:
    """Of labels whose values are a fixed list. A misspelt one would never match."""
    values: dict[tuple[str, str], set[str]] = {}
    for family in text_string_to_metric_families(everything().render().decode()):
        for sample in family.samples:
            for label, value in sample.labels.items():
                values.setdefault((sample.name, label), set()).add(value)
    checked = set()
    for _, expression in [*board_expressions(), *rule_expressions()]:
        for name, selector in series_of(expression):
            for label, chosen in re.findall(r'([a-z_]+)=~?"([^"]*)"', selector):
                if (name, label) in values and label in ("reason", "finished_reason", "kind"):
                    assert set(chosen.split("|")) <= values[name, label]
                    checked.add(name)
    assert checked == {families.REJECTED.name, families.FAILURE.name, families.KEY_TOKENS.name}


def test_every_metric_is_on_a_board_or_left_out_for_a_reason() -> None:
    shown = {
        re.sub(r"_(bucket|sum|count)$", "", name) if name not in FAMILIES else name
        for _, expression in board_expressions()
        for name, _ in series_of(expression)
    }
    left_out = {family.name for family in LEFT_OUT}
    assert shown | left_out == set(FAMILIES)
    assert not shown & left_out


def test_queries_refuse_what_a_family_cannot_answer() -> None:
    q = Queries(SELECTOR)
    for ask in (
        lambda: q.rate(families.RUNNING),
        lambda: q.gauge(families.STEPS),
        lambda: q.quantile(0.5, families.STEPS),
        lambda: q.rate(families.REJECTED, ("model",)),
    ):
        with pytest.raises(ValueError, match="proxyserve_"):
            ask()


# Boards ---------------------------------------------------------------------------------------------------------

UNITS = (
    (r"histogram_quantile\(\S+ sum by \(le\) \(rate\(\w+_seconds_bucket", Unit.SECONDS),
    (r"^sum by \(le\) \(rate\(\w+_seconds_bucket", Unit.SECONDS),
    (r"_nats_bucket", Unit.NATS),
    (r"^(max|sum)[^(]*(\([^)]*\) )?\(\w+_bytes\{", Unit.BYTES),
    (r"_perc\{|_progress\{", Unit.SHARE),
    (r"^sum[^(]*(\([^)]*\) )?\(rate\(\w+_tokens_total\{", Unit.TOKENS_PER_SECOND),
    (
        r"^sum[^(]*(\([^)]*\) )?\(rate\(\w+(requests|success|failure|preemptions|rejected)_total\{",
        Unit.PER_SECOND,
    ),
)


@pytest.mark.parametrize(
    "panel", [panel for board in all_boards() for panel in board.panels], ids=lambda panel: panel.title
)
def test_units_fit_what_is_shown(panel: Panel) -> None:
    for query in panel.queries:
        for pattern, unit in UNITS:
            if re.search(pattern, query.expression) and " / " not in query.expression:
                assert panel.unit is unit, query.expression
        if (
            re.match(r"sum[^/]*rate\([^/]* / \(sum[^/]*rate\(", query.expression)
            and "_sum{" not in query.expression
        ):
            apart = {"Tokens per draft": Unit.TOKENS, "Mean time in a phase": Unit.SECONDS}
            assert panel.unit is apart.get(panel.title, Unit.SHARE), "a ratio of two counters"


def test_units_are_checked_for_most_panels() -> None:
    """The list of patterns above is not idle."""
    panels = [panel for board in all_boards() for panel in board.panels]
    seen = [p for p in panels if any(re.search(pattern, p.queries[0].expression) for pattern, _ in UNITS)]
    assert len(seen) > len(panels) / 2


def test_panels_lie_side_by_side() -> None:
    for board in all_boards():
        cells: set[tuple[int, int]] = set()
        drawn = dashboard(board)
        for panel in drawn["panels"]:
            place = panel["gridPos"]
            covered = {
                (place["x"] + dx, place["y"] + dy) for dx in range(place["w"]) for dy in range(place["h"])
            }
            assert not covered & cells, f"{board.name}: {panel['title']} lies over another panel"
            assert place["x"] + place["w"] <= 24
            cells |= covered
        assert len({panel["id"] for panel in drawn["panels"]}) == len(drawn["panels"])
        for row in board.rows:
            total = sum(panel.width for panel in row.panels)
            assert total % 24 in (0, 8, 16), f"{board.name}: row '{row.title}' is ragged"


def test_heatmaps_are_of_buckets_and_tables_of_gauges() -> None:
    for board in all_boards():
        for panel in board.panels:
            expression = panel.queries[0].expression
            assert (panel.form is Form.HEATMAP) == expression.startswith("sum by (le)")
            assert (panel.form is Form.TABLE) == ("_info{" in expression)


# Files ----------------------------------------------------------------------------------------------------------


def test_the_files_are_those_of_this_version(repository: Path, tmp_path: Path) -> None:
    folder = repository / "deploy" / "monitoring"
    assert main([str(folder), "--check"]) == 0, "run: python -m proxyserve.monitoring deploy/monitoring"
    assert {path.stem for path in (folder / "boards").iterdir()} == {board.name for board in all_boards()}
    assert main([str(tmp_path / "new")]) == 0
    assert main([str(tmp_path / "new"), "--check"]) == 0
    assert main([str(tmp_path / "new"), "--check", "--job", "other"]) == 1


def test_the_runbook_is_in_the_documentation(repository: Path) -> None:
    """And where alerts point to."""
    page = (repository / "docs" / "monitoring.md").read_text()
    assert page.endswith(runbook(SELECTOR)), (
        "run: python -m proxyserve.monitoring --runbook, and put it at the end of docs/monitoring.md"
    )
    headings = {line.removeprefix("### ").lower() for line in page.splitlines() if line.startswith("### ")}
    groups = yaml.safe_load(make_files(docs="https://docs.example/")["rules.yml"])["groups"]
    links = {
        rule["annotations"]["runbook_url"] for group in groups for rule in group["rules"] if "alert" in rule
    }
    for link in links:
        address, _, anchor = link.partition("#")
        assert address == "https://docs.example/monitoring/"
        assert anchor in headings
    panels = {panel.title for board in all_boards() for panel in board.panels}
    for title in re.findall(r"\*([A-Z][^*]+)\*", runbook(SELECTOR)):
        assert title in panels, f"the runbook points to a panel '{title}'"
    options = set(re.findall(r"`(--[a-z-]+)", runbook(SELECTOR)))
    known = set(re.findall(r'"(--[a-z-]+)', (repository / "proxyserve" / "cli" / "options.py").read_text()))
    assert options
    assert options <= known


def test_commands_of_the_documentation(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    page = (repository / "docs" / "monitoring.md").read_text()
    prefix = "python -m proxyserve.monitoring "
    commands = [line for line in page.splitlines() if line.startswith(prefix)]
    assert len(commands) == 2
    for command in commands:
        assert main(shlex.split(command.removeprefix(prefix), comments=True)) == 0
    rules = (tmp_path / "monitoring" / "rules.yml").read_text()
    assert 'up{job="inference"}' in rules
    assert "runbook_url: https://docs.example/proxyserve/monitoring/#proxyservedown" in rules


# What Prometheus makes of them ----------------------------------------------------------------------------------

#: How long the made-up series are; all but one rule decide within this.
MINUTES = 40
HOURS = 8 * 60


def constant(series: str, value: float, minutes: int = MINUTES) -> dict[str, str]:
    return {"series": series, "values": f"{value:g}+0x{minutes}"}


def growing(series: str, step: float, start: float = 0, minutes: int = MINUTES) -> dict[str, str]:
    """By `step` a minute."""
    return {"series": series, "values": f"{start:g}+{step:g}x{minutes}"}


ON = 'job="proxyserve", instance="a"'
UP = constant(f"up{{{ON}}}", 1)
LONG_UP = constant(f"up{{{ON}}}", 1, HOURS)
READY = constant(f"proxyserve_ready{{{ON}}}", 1)
SUCCESS = f'proxyserve_request_success_total{{{ON}, finished_reason="stop"}}'
FAILED = f'proxyserve_request_failure_total{{{ON}, finished_reason="error"}}'
BUSY = f'proxyserve_requests_rejected_total{{{ON}, reason="queue_full"}}'
WAITING = f"proxyserve_num_requests_waiting{{{ON}}}"
RUNNING = f"proxyserve_num_requests_running{{{ON}}}"
KV = f'proxyserve_kv_cache_usage_perc{{{ON}, pool="atlas"}}'
RSS = f"process_resident_memory_bytes{{{ON}}}"
START = f"process_start_time_seconds{{{ON}}}"
WEIGHTS = f"proxyserve_memory_bytes{{{ON}}}"


def late(name: str, bound: str, share: float) -> list[dict[str, str]]:
    """A histogram of which `share` of the values, of a thousand a minute, lie above `bound`."""
    return [
        growing(f'{name}_bucket{{{ON}, le="{bound}"}}', 1000 * (1 - share)),
        growing(f"{name}_count{{{ON}}}", 1000),
    ]


FIRST = "proxyserve_time_to_first_token_seconds"
GAP = "proxyserve_inter_token_latency_seconds"

#: Alert -> series that set it off, and series like them that must not.
CASES: dict[str, tuple[list[dict[str, str]], list[dict[str, str]]]] = {
    "ProxyserveDown": ([constant(f"up{{{ON}}}", 0)], [UP]),
    "ProxyserveAbsent": ([constant('up{job="other"}', 1)], [UP]),
    "ProxyserveNotReady": ([UP, constant(f"proxyserve_ready{{{ON}}}", 0)], [UP, READY]),
    "ProxyserveRestarting": ([UP, growing(START, 600)], [UP, constant(START, 600)]),
    "ProxyserveErrors": (
        [UP, growing(SUCCESS, 95), growing(FAILED, 5)],
        [UP, growing(SUCCESS, 99), growing(FAILED, 1)],
    ),
    "ProxyserveRefusing": (
        [UP, growing(SUCCESS, 90), growing(FAILED, 0), growing(BUSY, 10)],
        [UP, growing(SUCCESS, 99), growing(FAILED, 0), growing(BUSY, 1)],
    ),
    "ProxyserveQueueGrowing": ([UP, growing(WAITING, 1, start=1)], [UP, constant(WAITING, 5)]),
    "ProxyserveFirstTokenSlow": ([UP, *late(FIRST, "2.0", 0.2)], [UP, *late(FIRST, "2.0", 0.02)]),
    "ProxyserveTokensSlow": ([UP, *late(GAP, "0.2", 0.2)], [UP, *late(GAP, "0.2", 0.02)]),
    "ProxyserveKVExhausted": (
        [UP, constant(KV, 0.99), constant(WAITING, 3)],
        [UP, constant(KV, 0.99), constant(WAITING, 0)],
    ),
    "ProxyservePreempting": (
        [UP, growing(f"proxyserve_num_preemptions_total{{{ON}}}", 20), growing(SUCCESS, 100)],
        [UP, growing(f"proxyserve_num_preemptions_total{{{ON}}}", 5), growing(SUCCESS, 100)],
    ),
    "ProxyserveMemoryGrowing": (
        [LONG_UP, growing(RSS, 2e6, 1e9, HOURS), constant(WEIGHTS, 5e8, HOURS), constant(START, 0, HOURS)],
        [LONG_UP, growing(RSS, 2e6, 1e9, HOURS), growing(WEIGHTS, 2e6, 5e8, HOURS), constant(START, 0, HOURS)],
    ),
    "ProxyserveFilesLow": (
        [UP, constant(f"process_open_fds{{{ON}}}", 900), constant(f"process_max_fds{{{ON}}}", 1024)],
        [UP, constant(f"process_open_fds{{{ON}}}", 90), constant(f"process_max_fds{{{ON}}}", 1024)],
    ),
    "ProxyserveStuck": (
        [UP, constant(RUNNING, 1), constant(f"proxyserve_engine_steps_total{{{ON}}}", 50)],
        [UP, constant(RUNNING, 1), growing(f"proxyserve_engine_steps_total{{{ON}}}", 50)],
    ),
    "ProxyserveStepFailing": (
        [UP, growing(f"proxyserve_engine_step_failures_total{{{ON}}}", 1)],
        [UP, constant(f"proxyserve_engine_step_failures_total{{{ON}}}", 7)],
    ),
    "ProxyserveNonfinite": (
        [UP, growing(f"proxyserve_nonfinite_choices_total{{{ON}}}", 1)],
        [UP, constant(f"proxyserve_nonfinite_choices_total{{{ON}}}", 7)],
    ),
    "ProxyserveSwapFailed": (
        [UP, growing(f'proxyserve_expert_failures_total{{{ON}, phase="verifying"}}', 1)],
        [UP, constant(f'proxyserve_expert_failures_total{{{ON}, phase="verifying"}}', 7)],
    ),
}  # fmt: skip


def test_every_alert_has_a_case() -> None:
    assert set(CASES) == {alert.name for alert in all_alerts(SELECTOR)}


def check_rules(folder: Path, tests: Sequence[dict[str, Any]], evaluate: str = "1m") -> Path:
    """A file for `promtool test rules`, whose rules are worked out every `evaluate`."""
    file = folder / f"every-{evaluate}.yml"
    file.write_text(
        yaml.safe_dump({"rule_files": [str(RULES)], "evaluation_interval": evaluate, "tests": [*tests]})
    )
    return file


def run_promtool(*arguments: str | Path) -> None:
    command = [need("promtool"), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert result.returncode == 0, (result.stdout + result.stderr)[-6000:]


def alerts_test(name: str, series: list[dict[str, str]], expected: list[str], minutes: int) -> dict[str, Any]:
    """At the end exactly the `expected` alerts are on."""
    samples = [{"labels": f'{{alertname="{alert}"}}', "value": 1} for alert in expected]
    question = 'group by (alertname) (ALERTS{alertstate="firing"})'
    return {
        "interval": "1m",
        "name": f"{name}, {'on' if expected else 'off'}",
        "input_series": series,
        "promql_expr_test": [{"expr": question, "eval_time": f"{minutes - 10}m", "exp_samples": samples}],
    }


def test_alerts_go_off_when_they_should_and_only_then(tmp_path: Path) -> None:
    """`promtool test rules` runs Prometheus' own engine over made-up series."""
    tests: dict[int, list[dict[str, Any]]] = {MINUTES: [], HOURS: []}
    for name, (firing, quiet) in CASES.items():
        minutes = HOURS if LONG_UP in firing else MINUTES
        tests[minutes] += [
            alerts_test(name, firing, [name], minutes),
            alerts_test(name, quiet, [], minutes),
        ]
    files = [check_rules(tmp_path, tests[MINUTES]), check_rules(tmp_path, tests[HOURS], evaluate="10m")]
    run_promtool("check", "rules", RULES)
    run_promtool("test", "rules", *files)


def test_severities_follow_the_rate_at_which_the_objective_is_missed(tmp_path: Path) -> None:
    """A fifth of the first tokens late: both. A tenth: only the slower one."""
    tests = []
    for share, severities in ((0.2, ("critical", "warning")), (0.1, ("warning",))):
        samples = [{"labels": f'{{severity="{severity}"}}', "value": 1} for severity in severities]
        question = 'group by (severity) (ALERTS{alertname="ProxyserveFirstTokenSlow", alertstate="firing"})'
        tests.append(
            {
                "interval": "1m",
                "input_series": [UP, *late(FIRST, "2.0", share)],
                "promql_expr_test": [
                    {"expr": question, "eval_time": f"{MINUTES - 10}m", "exp_samples": samples}
                ],
            }
        )
    run_promtool("test", "rules", check_rules(tmp_path, tests))


def test_boards_are_valid_json_for_provisioning(repository: Path) -> None:
    uids = set()
    for file in (repository / "deploy" / "monitoring" / "boards").iterdir():
        board = json.loads(file.read_text())
        assert "id" not in board, "Grafana gives ids; a file that has one is refused"
        uids.add(board["uid"])
        for panel in board["panels"]:
            for target in panel.get("targets", ()):
                assert target["datasource"]["uid"] == "${datasource}"
    assert len(uids) == len(all_boards())
