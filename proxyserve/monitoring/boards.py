"""The boards: which questions they answer, in the order in which an operator asks them."""

from __future__ import annotations

from collections.abc import Mapping

from proxyserve.api import families as f
from proxyserve.api.families import Family
from proxyserve.monitoring.board import Board, Form, Panel, Query, Row, Unit
from proxyserve.monitoring.queries import Queries

#: `$job` and `$instance` are chosen at the top of each board.
Q = Queries('job="$job", instance=~"$instance"')

#: Families that are on no board, and why.
LEFT_OUT: Mapping[Family, str] = {
    f.KV_BLOCKS: "the share in use says it without needing the pool's size",
    f.KV_BLOCKS_IN_USE: "the share in use says it without needing the pool's size",
    f.PROCESS_VIRTUAL_MEMORY: "address space that torch reserves says nothing of memory in use",
}


def all_boards() -> tuple[Board, ...]:
    return (_overview(), _fusion(), _experts(), _keys(), _process())


def _one(expression: str, legend: str = "") -> tuple[Query, ...]:
    return (Query(expression, legend),)


def _percentiles(family: Family, title: str, text: str, width: int = 8) -> Panel:
    """Half, 95 and 99 of 100 values of a histogram of seconds."""
    shares = (0.5, 0.95, 0.99)
    return Panel(
        title,
        tuple(Query(Q.quantile(share, family), f"p{share * 100:g}") for share in shares),
        Unit.SECONDS,
        text,
        width=width,
    )


def _heatmap(family: Family, title: str, unit: Unit, text: str, width: int = 8) -> Panel:
    return Panel(title, _one(Q.buckets(family), "{{le}}"), unit, text, form=Form.HEATMAP, width=width)


def _number(title: str, expression: str, unit: Unit, text: str, bad: float | None = None) -> Panel:
    return Panel(title, _one(expression), unit, text, form=Form.NUMBER, width=4, bad=bad)


def _overview() -> Board:
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
                        _one(Q.gauge(f.READY)),
                        Unit.NUMBER,
                        "Servers that take requests: neither starting, draining nor dead.",
                        form=Form.NUMBER,
                        width=4,
                        bad_below_one=True,
                    ),
                    _number("Running", Q.gauge(f.RUNNING), Unit.NUMBER, f.RUNNING.text),
                    _number("Waiting", Q.gauge(f.WAITING), Unit.NUMBER, f.WAITING.text),
                    _number(
                        "Tokens",
                        Q.rate(f.GENERATION_TOKENS),
                        Unit.TOKENS_PER_SECOND,
                        "Generated, all servers.",
                    ),
                    _number(
                        "First token, p95",
                        Q.quantile(0.95, f.FIRST_TOKEN),
                        Unit.SECONDS,
                        "95 of 100 choices had their first token within this time.",
                    ),
                    _number(
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
                        _one(Q.rate(f.REJECTED, ("reason",)), "{{reason}}"),
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
                    _percentiles(f.FIRST_TOKEN, "First token", f.FIRST_TOKEN.text),
                    _percentiles(f.INTER_TOKEN, "Between tokens", f.INTER_TOKEN.text),
                    _percentiles(f.END_TO_END, "Whole answer", f.END_TO_END.text),
                    _percentiles(f.QUEUE_TIME, "In the queue", f.QUEUE_TIME.text),
                    _percentiles(f.PREFILL_TIME, "Prefill", f.PREFILL_TIME.text),
                    _percentiles(f.DECODE_TIME, "Decoding", f.DECODE_TIME.text),
                    _heatmap(
                        f.FIRST_TOKEN, "First token, all", Unit.SECONDS, "Where the slow ones are.", width=12
                    ),
                    _percentiles(
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
                        _one(Q.gauge(f.WAITING_TOKENS, by=("instance",)), "{{instance}}"),
                        Unit.TOKENS,
                        f.WAITING_TOKENS.text,
                    ),
                    Panel(
                        "KV blocks in use",
                        _one(Q.gauge(f.KV_USAGE, "max", ("pool",)), "{{pool}}"),
                        Unit.SHARE,
                        "Of each pool, the fullest server. Each model has a pool, or shares one with models alike.",
                        bad=0.95,
                    ),
                    Panel(
                        "Preemptions",
                        _one(Q.rate(f.PREEMPTIONS)),
                        Unit.PER_SECOND,
                        f.PREEMPTIONS.text + " They are computed again later: work done twice.",
                    ),
                    Panel(
                        "KV blocks cached",
                        _one(Q.gauge(f.KV_BLOCKS_CACHED, by=("pool",)), "{{pool}}"),
                        Unit.NUMBER,
                        f.KV_BLOCKS_CACHED.text,
                    ),
                    Panel(
                        "Prompts found in the prefix cache",
                        _one(Q.ratio(f.PREFIX_HITS, f.PREFIX_QUERIES, ("model",)), "{{model}}"),
                        Unit.SHARE,
                        "Share of prompt tokens, by model: lanes have prompts of their own.",
                    ),
                ),
            ),
            Row(
                "Requests",
                (
                    _heatmap(
                        f.REQUEST_PROMPT_TOKENS,
                        "Length of prompts",
                        Unit.TOKENS,
                        f.REQUEST_PROMPT_TOKENS.text,
                    ),
                    _heatmap(
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


def _fusion() -> Board:
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
                        _one(Q.ratio(f.FLIPS, f.FUSED_TOKENS)),
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
                    _heatmap(f.KL, "Distance from the base, all", Unit.NATS, f.KL.text, width=12),
                    _heatmap(f.SOLVED_WEIGHT, "Solved weights", Unit.NUMBER, f.SOLVED_WEIGHT.text, width=12),
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
                        _one(Q.rate(f.LANE_TOKENS, ("model",)), "{{model}}"),
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
                        _one(Q.rate(f.STEPS, ("instance",)), "{{instance}}"),
                        Unit.PER_SECOND,
                        "0 while requests run means that the engine is stuck.",
                    ),
                    _percentiles(
                        f.STEP_BARRIER,
                        "Base's logits waiting for experts, per step",
                        f.STEP_BARRIER.text,
                    ),
                    _percentiles(
                        f.REQUEST_BARRIER, "Lanes waiting for lanes, per choice", f.REQUEST_BARRIER.text
                    ),
                    Panel(
                        "Tokens per step",
                        _one(Q.mean(f.STEP_TOKENS), "mean"),
                        Unit.TOKENS,
                        f.STEP_TOKENS.text,
                    ),
                    Panel(
                        "Kernels compiled late",
                        _one(Q.rate(f.KERNEL_COMPILATIONS)),
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
                        _one(Q.ratio(f.ACCEPTED_TOKENS, f.DRAFT_TOKENS, ("drafter",)), "{{drafter}}"),
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
                        _one(Q.ratio(f.DRAFT_TOKENS, f.DRAFTS, ("drafter",)), "{{drafter}}"),
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
                        _one(Q.rate(f.GRAMMAR_COMPILATIONS, ("outcome",)), "{{outcome}}"),
                        Unit.PER_SECOND,
                        f.GRAMMAR_COMPILATIONS.text,
                        stacked=True,
                    ),
                    _percentiles(f.GRAMMAR_SECONDS, "Compiling a grammar", f.GRAMMAR_SECONDS.text),
                    _heatmap(
                        f.REMOVED_MASS, "Probability that forms took away", Unit.SHARE, f.REMOVED_MASS.text
                    ),
                ),
            ),
        ),
    )


def _experts() -> Board:
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
                        _one(Q.gauge(f.EXPERT_INFO, "max", ("expert", "generation", "phase"))),
                        Unit.NUMBER,
                        f.EXPERT_INFO.text,
                        form=Form.TABLE,
                    ),
                    Panel(
                        "Who answers",
                        _one(
                            Q.rate(f.EXPERT_REQUESTS, ("expert", "generation"), 'generation!="older"'),
                            "{{expert}} {{generation}}",
                        ),
                        Unit.PER_SECOND,
                        "Choices that ended, by the generation that they had. During a swap two of them answer.",
                        stacked=True,
                    ),
                    Panel(
                        "In flight",
                        _one(
                            Q.gauge(f.EXPERT_RUNNING, by=("expert", "generation")),
                            "{{expert}} {{generation}}",
                        ),
                        Unit.NUMBER,
                        f.EXPERT_RUNNING.text + " An old generation goes when this is 0.",
                    ),
                    Panel(
                        "Weights loaded for each generation",
                        _one(
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
                        _one(Q.gauge(f.MEMORY, by=("instance",)), "{{instance}}"),
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
                        _one(
                            Q.gauge(f.EXPERT_PROGRESS, "min", ("expert", "generation")),
                            "{{expert}} {{generation}}",
                        ),
                        Unit.SHARE,
                        f.EXPERT_PROGRESS.text,
                    ),
                    Panel(
                        "Phases gone through",
                        _one(Q.increase(f.EXPERT_PHASES, ("phase",)), "{{phase}}"),
                        Unit.NUMBER,
                        f.EXPERT_PHASES.text,
                    ),
                    Panel(
                        "Mean time in a phase",
                        _one(moves, "{{phase}}"),
                        Unit.SECONDS,
                        "Of generations that left the phase. loading, verifying and warming make up a swap.",
                    ),
                    Panel(
                        "Failed swaps",
                        _one(Q.increase(f.EXPERT_FAILURES, ("phase",)), "{{phase}}"),
                        Unit.NUMBER,
                        f.EXPERT_FAILURES.text + " The old generation goes on serving.",
                    ),
                    Panel(
                        "Rollbacks",
                        _one(Q.increase(f.EXPERT_ROLLBACKS)),
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


def _keys() -> Board:
    return Board(
        "keys",
        "proxyserve / keys and limits",
        "Who uses the server, and who is refused.",
        (
            Row(
                "Use",
                (
                    Panel(
                        "Choices",
                        _one(Q.rate(f.KEY_REQUESTS, ("key",)), "{{key}}"),
                        Unit.PER_SECOND,
                        f.KEY_REQUESTS.text,
                        stacked=True,
                    ),
                    Panel(
                        "Tokens generated",
                        _one(Q.rate(f.KEY_TOKENS, ("key",), 'kind="generation"'), "{{key}}"),
                        Unit.TOKENS_PER_SECOND,
                        "By key.",
                        stacked=True,
                    ),
                    Panel(
                        "Prompt tokens",
                        _one(Q.rate(f.KEY_TOKENS, ("key",), 'kind="prompt"'), "{{key}}"),
                        Unit.TOKENS_PER_SECOND,
                        "By key.",
                        stacked=True,
                    ),
                ),
            ),
            Row(
                "Refusals",
                (
                    Panel(
                        "Too much asked (429)",
                        _one(
                            Q.rate(f.REJECTED, ("reason",), 'reason=~"queue_full|key_limit|rate_limit"'),
                            "{{reason}}",
                        ),
                        Unit.PER_SECOND,
                        "queue_full: the whole server's caps; key_limit and rate_limit: one key's.",
                        stacked=True,
                    ),
                    Panel(
                        "No or wrong key (401, 403)",
                        _one(
                            Q.rate(f.REJECTED, ("reason",), 'reason=~"unauthorized|forbidden"'), "{{reason}}"
                        ),
                        Unit.PER_SECOND,
                        "A key that has expired counts as unauthorized.",
                        stacked=True,
                    ),
                    Panel(
                        "Wrong or too large",
                        _one(
                            Q.rate(f.REJECTED, ("reason",), 'reason=~"invalid|not_found|too_large|too_slow"'),
                            "{{reason}}",
                        ),
                        Unit.PER_SECOND,
                        "Clients' mistakes.",
                        stacked=True,
                    ),
                ),
            ),
        ),
    )


def _process() -> Board:
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
                        _one(Q.gauge(f.BUILD_INFO, "max", ("instance", "version", "torch", "transformers"))),
                        Unit.NUMBER,
                        f.BUILD_INFO.text,
                        form=Form.TABLE,
                        width=12,
                    ),
                    Panel(
                        "Parts of the base",
                        _one(Q.gauge(f.BASE_PARTS, "max", ("instance",)), "{{instance}}"),
                        Unit.NUMBER,
                        f.BASE_PARTS.text,
                        width=6,
                    ),
                    Panel(
                        "Running for",
                        _one(f"time() - {Q.gauge(f.PROCESS_START, 'max', ('instance',))}", "{{instance}}"),
                        Unit.SECONDS,
                        "Since the process started. Falls to 0 when it is started again.",
                        width=6,
                    ),
                    Panel(
                        "Resident memory",
                        _one(Q.gauge(f.PROCESS_MEMORY, "max", ("instance",)), "{{instance}}"),
                        Unit.BYTES,
                        "Of the host; weights and KV on a GPU are not in it.",
                    ),
                    Panel(
                        "Cores in use",
                        _one(Q.rate(f.PROCESS_CPU, ("instance",)), "{{instance}}"),
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
