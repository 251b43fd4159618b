"""What runs where, and what it takes of the machine."""

from __future__ import annotations

from proxyserve.api import families as f
from proxyserve.monitoring.board import Board, Form, Panel, Query, Row, Unit
from proxyserve.monitoring.boards.panels import Q, one


def process_board() -> Board:
    return Board(
        "process",
        "proxyserve / process",
        "What runs where, and what it takes of the machine.",
        (
            Row(
                "Process",
                (
                    Panel(
                        "Versions",
                        one(Q.gauge(f.BUILD_INFO, "max", ("instance", "version", "torch", "transformers"))),
                        Unit.NUMBER,
                        f.BUILD_INFO.text,
                        form=Form.TABLE,
                        width=12,
                    ),
                    Panel(
                        "Parts of the base",
                        one(Q.gauge(f.BASE_PARTS, "max", ("instance",)), "{{instance}}"),
                        Unit.NUMBER,
                        f.BASE_PARTS.text,
                        width=6,
                    ),
                    Panel(
                        "Running for",
                        one(f"time() - {Q.gauge(f.PROCESS_START, 'max', ('instance',))}", "{{instance}}"),
                        Unit.SECONDS,
                        "Since the process started. Falls to 0 when it is started again.",
                        width=6,
                    ),
                    Panel(
                        "Resident memory",
                        one(Q.gauge(f.PROCESS_MEMORY, "max", ("instance",)), "{{instance}}"),
                        Unit.BYTES,
                        "Of the host; weights and KV on a GPU are not in it.",
                    ),
                    Panel(
                        "Cores in use",
                        one(Q.rate(f.PROCESS_CPU, ("instance",)), "{{instance}}"),
                        Unit.NUMBER,
                        "Seconds of CPU per second.",
                    ),
                    Panel(
                        "Open files",
                        (
                            Query(Q.gauge(f.PROCESS_FILES, "max", ("instance",)), "open {{instance}}"),
                            Query(Q.gauge(f.PROCESS_MOST_FILES, "max", ("instance",)), "limit {{instance}}"),
                        ),
                        Unit.NUMBER,
                        "Each connection is one.",
                    ),
                ),
            ),
        ),
    )
