"""Is it up, who waits, how fast are answers, and what is short."""

from __future__ import annotations

from proxyserve.api import families as f
from proxyserve.monitoring.board import Board, Form, Panel, Query, Row, Unit
from proxyserve.monitoring.boards.panels import Q, heatmap, number, one, percentiles


def overview_board() -> Board:
    failed = Q.rate(f.FAILURE, where='finished_reason="error"')
    ended = f"({Q.rate(f.SUCCESS)} + {Q.rate(f.FAILURE)})"
    return Board(
        "overview",
        "proxyserve / overview",
        "Is it up, who waits, how fast are answers, and what is short.",
        (
            Row(
                "Now",
                (
                    Panel(
                        "Servers ready",
                        one(Q.gauge(f.READY)),
                        Unit.NUMBER,
                        "Servers that take requests: neither starting, draining nor dead.",
                        form=Form.NUMBER,
                        width=4,
                        bad_below_one=True,
                    ),
                    number("Running", Q.gauge(f.RUNNING), Unit.NUMBER, f.RUNNING.text),
                    number("Waiting", Q.gauge(f.WAITING), Unit.NUMBER, f.WAITING.text),
                    number(
                        "Tokens",
                        Q.rate(f.GENERATION_TOKENS),
                        Unit.TOKENS_PER_SECOND,
                        "Generated, all servers.",
                    ),
                    number(
                        "First token, p95",
                        Q.quantile(0.95, f.FIRST_TOKEN),
                        Unit.SECONDS,
                        "95 of 100 choices had their first token within this time.",
                    ),
                    number(
                        "Failed",
                        f"{failed} / ({ended} > 0)",
                        Unit.SHARE,
                        "Share of choices that ended with an error of the server's making.",
                        bad=0.01,
                    ),
                ),
            ),
            Row(
                "Traffic",
                (
                    Panel(
                        "Choices ended",
                        (
                            Query(Q.rate(f.SUCCESS, ("finished_reason",)), "{{finished_reason}}"),
                            Query(Q.rate(f.FAILURE, ("finished_reason",)), "{{finished_reason}}"),
                        ),
                        Unit.PER_SECOND,
                        "By reason. Cancelled: the client left, or asked for it. Error: the server's.",
                        stacked=True,
                    ),
                    Panel(
                        "Refused",
                        one(Q.rate(f.REJECTED, ("reason",)), "{{reason}}"),
                        Unit.PER_SECOND,
                        "Requests that got no answer, by reason. queue_full, key_limit and rate_limit are 429.",
                        stacked=True,
                    ),
                    Panel(
                        "Tokens",
                        (
                            Query(Q.rate(f.GENERATION_TOKENS), "generated"),
                            Query(Q.rate(f.PROMPT_TOKENS), "of prompts"),
                            Query(Q.rate(f.PROMPT_TOKENS_CACHED), "of prompts, cached"),
                        ),
                        Unit.TOKENS_PER_SECOND,
                        "Prompts count when their choice has ended.",
                    ),
                ),
            ),
            Row(
                "Latency",
                (
                    percentiles(f.FIRST_TOKEN, "First token", f.FIRST_TOKEN.text),
                    percentiles(f.INTER_TOKEN, "Between tokens", f.INTER_TOKEN.text),
                    percentiles(f.END_TO_END, "Whole answer", f.END_TO_END.text),
                    percentiles(f.QUEUE_TIME, "In the queue", f.QUEUE_TIME.text),
                    percentiles(f.PREFILL_TIME, "Prefill", f.PREFILL_TIME.text),
                    percentiles(f.DECODE_TIME, "Decoding", f.DECODE_TIME.text),
                    heatmap(
                        f.FIRST_TOKEN, "First token, all", Unit.SECONDS, "Where the slow ones are.", width=12
                    ),
                    percentiles(
                        f.TIME_PER_TOKEN,
                        "Mean time per token of a choice",
                        f.TIME_PER_TOKEN.text,
                        width=12,
                    ),
                ),
            ),
            Row(
                "Queue and memory",
                (
                    Panel(
                        "Running and waiting",
                        (
                            Query(Q.gauge(f.RUNNING, by=("instance",)), "running {{instance}}"),
                            Query(Q.gauge(f.WAITING, by=("instance",)), "waiting {{instance}}"),
                        ),
                        Unit.NUMBER,
                        "Autoscaling goes by what waits.",
                    ),
                    Panel(
                        "Prompt tokens waiting",
                        one(Q.gauge(f.WAITING_TOKENS, by=("instance",)), "{{instance}}"),
                        Unit.TOKENS,
                        f.WAITING_TOKENS.text,
                    ),
                    Panel(
                        "KV blocks in use",
                        one(Q.gauge(f.KV_USAGE, "max", ("pool",)), "{{pool}}"),
                        Unit.SHARE,
                        "Of each pool, the fullest server. Each model has a pool, or shares one with models alike.",
                        bad=0.95,
                    ),
                    Panel(
                        "Preemptions",
                        one(Q.rate(f.PREEMPTIONS)),
                        Unit.PER_SECOND,
                        f.PREEMPTIONS.text + " They are computed again later: work done twice.",
                    ),
                    Panel(
                        "KV blocks cached",
                        one(Q.gauge(f.KV_BLOCKS_CACHED, by=("pool",)), "{{pool}}"),
                        Unit.NUMBER,
                        f.KV_BLOCKS_CACHED.text,
                    ),
                    Panel(
                        "Prompts found in the prefix cache",
                        one(Q.ratio(f.PREFIX_HITS, f.PREFIX_QUERIES, ("model",)), "{{model}}"),
                        Unit.SHARE,
                        "Share of prompt tokens, by model: lanes have prompts of their own.",
                    ),
                ),
            ),
            Row(
                "Requests",
                (
                    heatmap(
                        f.REQUEST_PROMPT_TOKENS,
                        "Length of prompts",
                        Unit.TOKENS,
                        f.REQUEST_PROMPT_TOKENS.text,
                    ),
                    heatmap(
                        f.REQUEST_GENERATION_TOKENS,
                        "Length of answers",
                        Unit.TOKENS,
                        f.REQUEST_GENERATION_TOKENS.text,
                    ),
                    Panel(
                        "What went wrong inside",
                        (
                            Query(Q.rate(f.STEP_FAILURES), "failed steps"),
                            Query(Q.rate(f.NONFINITE), "choices without a finite score"),
                        ),
                        Unit.PER_SECOND,
                        "Both should be 0. The log has the traceback of a failed step.",
                    ),
                ),
            ),
        ),
    )
