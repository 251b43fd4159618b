"""Boards as Grafana reads them (schema 39, Grafana 10.4 and newer), for provisioning from files or import by hand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from proxyserve.api.families import BUILD_INFO, EXPERT_INFO
from proxyserve.monitoring.board import Board, Form, Panel, Unit

_COLUMNS = 24
_HEIGHTS = {Form.NUMBER: 4}
_HEIGHT = 8
_SOURCE = {"type": "prometheus", "uid": "${datasource}"}
_TAG = "proxyserve"


def dashboard(board: Board) -> dict[str, Any]:
    """The JSON of one board. The data source, the job and the servers are chosen at its top."""
    return {
        "uid": f"proxyserve-{board.name}",
        "title": board.title,
        "description": board.text,
        "tags": [_TAG],
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "timezone": "",
        "templating": {"list": _variables()},
        "annotations": {"list": [_swaps()]},
        "links": [
            {
                "type": "dashboards",
                "title": "proxyserve",
                "tags": [_TAG],
                "asDropdown": True,
                "includeVars": True,
                "keepTime": True,
            }
        ],
        "panels": list(_panels(board)),
    }


def _variables() -> list[dict[str, Any]]:
    def values(name: str, query: str, **more: Any) -> dict[str, Any]:
        return {
            "type": "query",
            "name": name,
            "label": name,
            "datasource": _SOURCE,
            "query": {"query": query, "refId": name},
            "refresh": 2,
            "sort": 1,
            **more,
        }

    return [
        {"type": "datasource", "name": "datasource", "label": "data source", "query": "prometheus"},
        values("job", f"label_values({BUILD_INFO.name}, job)"),
        values(
            "instance",
            f'label_values({BUILD_INFO.name}{{job="$job"}}, instance)',
            multi=True,
            includeAll=True,
            allValue=".*",
            current={"text": "All", "value": "$__all"},
        ),
    ]


def _swaps() -> dict[str, Any]:
    published = f'{EXPERT_INFO.name}{{job="$job", instance=~"$instance", phase="published"}}'
    return {
        "name": "published experts",
        "datasource": _SOURCE,
        "enable": True,
        "iconColor": "blue",
        "expr": f"{published} unless {published} offset 1m",
        "step": "60s",
        "titleFormat": "{{expert}} {{generation}}",
        "textFormat": "published",
    }


def _panels(board: Board) -> Iterator[dict[str, Any]]:
    """Rows one below the other, their panels from left to right."""
    number, top = 0, 0
    for row in board.rows:
        number += 1
        place = {"x": 0, "y": top, "w": _COLUMNS, "h": 1}
        yield {
            "type": "row",
            "id": number,
            "title": row.title,
            "collapsed": False,
            "gridPos": place,
            "panels": [],
        }
        top, left, height = top + 1, 0, 0
        for panel in row.panels:
            if left + panel.width > _COLUMNS:
                top, left, height = top + height, 0, 0
            number += 1
            size = _HEIGHTS.get(panel.form, _HEIGHT)
            yield _panel(number, panel, {"x": left, "y": top, "w": panel.width, "h": size})
            left, height = left + panel.width, max(height, size)
        top += height


def _panel(number: int, panel: Panel, place: dict[str, int]) -> dict[str, Any]:
    return {
        "type": panel.form.value,
        "id": number,
        "title": panel.title,
        "description": panel.text,
        "datasource": _SOURCE,
        "gridPos": place,
        "targets": list(_targets(panel)),
        "fieldConfig": {"defaults": _defaults(panel), "overrides": []},
        **_options(panel),
    }


def _targets(panel: Panel) -> Iterator[dict[str, Any]]:
    for index, query in enumerate(panel.queries):
        target: dict[str, Any] = {
            "refId": chr(ord("A") + index),
            "datasource": _SOURCE,
            "expr": query.expression,
            "legendFormat": query.legend or "__auto",
        }
        if panel.form is Form.HEATMAP:
            target["format"] = "heatmap"
        if panel.form is Form.TABLE:
            target |= {"format": "table", "instant": True}
        yield target


def _defaults(panel: Panel) -> dict[str, Any]:
    defaults: dict[str, Any] = {"unit": panel.unit.value, "min": 0}
    if panel.unit is Unit.SHARE:
        defaults["max"] = 1
    if panel.form is Form.LINES:
        custom: dict[str, Any] = {"fillOpacity": 30 if panel.stacked else 0, "showPoints": "never"}
        if panel.stacked:
            custom["stacking"] = {"mode": "normal", "group": "A"}
        if panel.bad is not None:
            custom["thresholdsStyle"] = {"mode": "line"}
        defaults["custom"] = custom
    if panel.bad is not None:
        defaults["thresholds"] = _steps([("green", None), ("red", panel.bad)])
    elif panel.bad_below_one:
        defaults["thresholds"] = _steps([("red", None), ("green", 1)])
    elif panel.form is Form.NUMBER:
        defaults["thresholds"] = _steps([("text", None)])
    return defaults


def _steps(steps: Sequence[tuple[str, float | None]]) -> dict[str, Any]:
    return {"mode": "absolute", "steps": [{"color": color, "value": value} for color, value in steps]}


def _options(panel: Panel) -> dict[str, Any]:
    if panel.form is Form.LINES:
        legend = {"displayMode": "list", "placement": "bottom", "showLegend": True}
        return {"options": {"legend": legend, "tooltip": {"mode": "multi", "sort": "desc"}}}
    if panel.form is Form.NUMBER:
        return {"options": {"reduceOptions": {"calcs": ["lastNotNull"]}, "graphMode": "area"}}
    if panel.form is Form.HEATMAP:
        return {
            "options": {
                "calculate": False,
                "yAxis": {"unit": panel.unit.value},
                "color": {"mode": "scheme", "scheme": "Oranges"},
                "cellGap": 1,
            }
        }
    # Numbers of the table are 1 and say nothing.
    hidden = {"id": "organize", "options": {"excludeByName": {"Time": True, "Value": True}}}
    return {"transformations": [hidden]}
