"""Which generation answers, what is being swapped, and what failed."""

from __future__ import annotations

from proxyserve.api import families as f
from proxyserve.monitoring.board import Board, Form, Panel, Query, Row, Unit
from proxyserve.monitoring.boards.panels import Q, one


def experts_board() -> Board:
    moves = f"{Q.rate(f.EXPERT_PHASE_SECONDS, ('phase',))} / ({Q.rate(f.EXPERT_PHASES, ('phase',))} > 0)"
    return Board(
        "experts",
        "proxyserve / experts",
        "Which generation answers, what is being swapped, and what failed.",
        (
            Row(
                "Generations",
                (
                    Panel(
                        "Generations",
                        one(Q.gauge(f.EXPERT_INFO, "max", ("expert", "generation", "phase"))),
                        Unit.NUMBER,
                        f.EXPERT_INFO.text,
                        form=Form.TABLE,
                    ),
                    Panel(
                        "Who answers",
                        one(
                            Q.rate(f.EXPERT_REQUESTS, ("expert", "generation"), 'generation!="older"'),
                            "{{expert}} {{generation}}",
                        ),
                        Unit.PER_SECOND,
                        "Choices that ended, by the generation that they had. During a swap two of them answer.",
                        stacked=True,
                    ),
                    Panel(
                        "In flight",
                        one(
                            Q.gauge(f.EXPERT_RUNNING, by=("expert", "generation")),
                            "{{expert}} {{generation}}",
                        ),
                        Unit.NUMBER,
                        f.EXPERT_RUNNING.text + " An old generation goes when this is 0.",
                    ),
                    Panel(
                        "Weights loaded for each generation",
                        one(
                            Q.gauge(f.EXPERT_BYTES, "max", ("expert", "generation")),
                            "{{expert}} {{generation}}",
                        ),
                        Unit.BYTES,
                        f.EXPERT_BYTES.text,
                        width=12,
                        stacked=True,
                    ),
                    Panel(
                        "All weights and KV",
                        one(Q.gauge(f.MEMORY, by=("instance",)), "{{instance}}"),
                        Unit.BYTES,
                        f.MEMORY.text,
                        width=12,
                    ),
                ),
            ),
            Row(
                "Swaps",
                (
                    Panel(
                        "Loading",
                        one(
                            Q.gauge(f.EXPERT_PROGRESS, "min", ("expert", "generation")),
                            "{{expert}} {{generation}}",
                        ),
                        Unit.SHARE,
                        f.EXPERT_PROGRESS.text,
                    ),
                    Panel(
                        "Phases gone through",
                        one(Q.increase(f.EXPERT_PHASES, ("phase",)), "{{phase}}"),
                        Unit.NUMBER,
                        f.EXPERT_PHASES.text,
                    ),
                    Panel(
                        "Mean time in a phase",
                        one(moves, "{{phase}}"),
                        Unit.SECONDS,
                        "Of generations that left the phase. loading, verifying and warming make up a swap.",
                    ),
                    Panel(
                        "Failed swaps",
                        one(Q.increase(f.EXPERT_FAILURES, ("phase",)), "{{phase}}"),
                        Unit.NUMBER,
                        f.EXPERT_FAILURES.text + " The old generation goes on serving.",
                    ),
                    Panel(
                        "Rollbacks",
                        one(Q.increase(f.EXPERT_ROLLBACKS)),
                        Unit.NUMBER,
                        "Somebody went back to the generation before.",
                    ),
                    Panel(
                        "Evicted and woken",
                        (
                            Query(Q.increase(f.EXPERT_EVICTIONS), "evicted"),
                            Query(Q.increase(f.EXPERT_WAKES), "woken"),
                        ),
                        Unit.NUMBER,
                        "Both at once, again and again: memory is too small for the experts in use.",
                    ),
                ),
            ),
        ),
    )
