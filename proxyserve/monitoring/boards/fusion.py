"""How far experts push the base, what each model costs, and whether drafts pay."""

from __future__ import annotations

from proxyserve.api import families as f
from proxyserve.monitoring.board import Board, Panel, Query, Row, Unit
from proxyserve.monitoring.boards.panels import Q, heatmap, one, percentiles


def fusion_board() -> Board:
    step_time = Q.added(f.STEP_SECONDS)
    return Board(
        "fusion",
        "proxyserve / fusion and lanes",
        "How far experts push the base, what each model costs, and whether drafts pay.",
        (
            Row(
                "What experts change",
                (
                    Panel(
                        "Flipped tokens",
                        one(Q.ratio(f.FLIPS, f.FUSED_TOKENS)),
                        Unit.SHARE,
                        "Fused tokens where the base's own first choice is another. A jump often follows a swap.",
                    ),
                    Panel(
                        "Distance from the base",
                        (
                            Query(Q.mean(f.KL), "mean"),
                            Query(Q.quantile(0.95, f.KL), "p95"),
                        ),
                        Unit.NATS,
                        f.KL.text,
                    ),
                    Panel(
                        "Fused tokens",
                        (
                            Query(Q.rate(f.FUSED_TOKENS), "fused"),
                            Query(Q.rate(f.GATED_TOKENS), "of them, left to the base by a gate"),
                            Query(Q.rate(f.GENERATION_TOKENS), "all"),
                        ),
                        Unit.TOKENS_PER_SECOND,
                        "Requests for the plain base run no experts.",
                    ),
                    heatmap(f.KL, "Distance from the base, all", Unit.NATS, f.KL.text, width=12),
                    heatmap(f.SOLVED_WEIGHT, "Solved weights", Unit.NUMBER, f.SOLVED_WEIGHT.text, width=12),
                ),
            ),
            Row(
                "Lanes",
                (
                    Panel(
                        "Where a step's time goes",
                        (
                            Query(f"{Q.rate(f.LANE_SECONDS, ('model',))} / scalar({step_time})", "{{model}}"),
                            Query(
                                f"{Q.rate(f.SAMPLING_SECONDS)} / {step_time}", "logits: fuse, solve, sample"
                            ),
                        ),
                        Unit.SHARE,
                        "Of the time in steps. On a GPU a model's time ends when its work is handed over, and the wait "
                        "is in the logits' share.",
                        stacked=True,
                    ),
                    Panel(
                        "Tokens through each model",
                        one(Q.rate(f.LANE_TOKENS, ("model",)), "{{model}}"),
                        Unit.TOKENS_PER_SECOND,
                        "Prompts, answers and drafts. Experts of weight 0 run no tokens.",
                    ),
                    Panel(
                        "Steps",
                        (
                            Query(Q.quantile(0.5, f.STEP_SECONDS), "p50"),
                            Query(Q.quantile(0.99, f.STEP_SECONDS), "p99"),
                        ),
                        Unit.SECONDS,
                        f.STEP_SECONDS.text,
                    ),
                    Panel(
                        "Steps per second",
                        one(Q.rate(f.STEPS, ("instance",)), "{{instance}}"),
                        Unit.PER_SECOND,
                        "0 while requests run means that the engine is stuck.",
                    ),
                    percentiles(
                        f.STEP_BARRIER,
                        "Base's logits waiting for experts, per step",
                        f.STEP_BARRIER.text,
                    ),
                    percentiles(
                        f.REQUEST_BARRIER, "Lanes waiting for lanes, per choice", f.REQUEST_BARRIER.text
                    ),
                    Panel(
                        "Tokens per step",
                        one(Q.mean(f.STEP_TOKENS), "mean"),
                        Unit.TOKENS,
                        f.STEP_TOKENS.text,
                    ),
                    Panel(
                        "Kernels compiled late",
                        one(Q.rate(f.KERNEL_COMPILATIONS)),
                        Unit.PER_SECOND,
                        f.KERNEL_COMPILATIONS.text,
                    ),
                ),
            ),
            Row(
                "Drafts",
                (
                    Panel(
                        "Drafts that stand",
                        one(Q.ratio(f.ACCEPTED_TOKENS, f.DRAFT_TOKENS, ("drafter",)), "{{drafter}}"),
                        Unit.SHARE,
                        "Share of drafted tokens that are what would have been drawn without them.",
                    ),
                    Panel(
                        "Drafted and accepted",
                        (
                            Query(Q.rate(f.DRAFT_TOKENS, ("drafter",)), "drafted {{drafter}}"),
                            Query(Q.rate(f.ACCEPTED_TOKENS, ("drafter",)), "accepted {{drafter}}"),
                        ),
                        Unit.TOKENS_PER_SECOND,
                        "Where it does not pay nothing is drafted.",
                    ),
                    Panel(
                        "Tokens per draft",
                        one(Q.ratio(f.DRAFT_TOKENS, f.DRAFTS, ("drafter",)), "{{drafter}}"),
                        Unit.TOKENS,
                        f.DRAFTS.text,
                    ),
                ),
            ),
            Row(
                "Structured output",
                (
                    Panel(
                        "Grammars asked for",
                        one(Q.rate(f.GRAMMAR_COMPILATIONS, ("outcome",)), "{{outcome}}"),
                        Unit.PER_SECOND,
                        f.GRAMMAR_COMPILATIONS.text,
                        stacked=True,
                    ),
                    percentiles(f.GRAMMAR_SECONDS, "Compiling a grammar", f.GRAMMAR_SECONDS.text),
                    heatmap(
                        f.REMOVED_MASS, "Probability that forms took away", Unit.SHARE, f.REMOVED_MASS.text
                    ),
                ),
            ),
        ),
    )
