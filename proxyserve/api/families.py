"""Metrics with one value and no labels."""

from __future__ import annotations

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric


def gauge_family(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"proxyserve_{name}", text, value=value)


def counter_family(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(f"proxyserve_{name}", text, value=value)
