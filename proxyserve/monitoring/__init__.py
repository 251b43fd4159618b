"""Grafana boards and Prometheus rules, made from the list of metrics (`proxyserve.api.families`).

`python -m proxyserve.monitoring DIR` writes them; `deploy/monitoring` holds what it wrote for this version.
"""
