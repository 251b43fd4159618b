"""What wakes somebody, what they should know then, and what they can do.

Objectives are 99 of 100 first tokens within 2 seconds and 99 of 100 tokens within 0.2 seconds of the one before. An
alert on an objective goes off when the share that may be missed is used up far too fast, over a long window (it
matters) and a short one (it still does): the windows and rates of chapter 5 of Google's Site Reliability Workbook.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass

from proxyserve.api import families as f
from proxyserve.api.families import Family
from proxyserve.monitoring.queries import Queries

#: Share of values that may miss an objective.
_BUDGET = 0.01

#: Name in recorded series, histogram, and a bound of its buckets: the objective.
_OBJECTIVES: tuple[tuple[str, Family, str], ...] = (
    ("first_token", f.FIRST_TOKEN, "2.0"),
    ("inter_token", f.INTER_TOKEN, "0.2"),
)

_WINDOWS = ("5m", "30m", "1h", "6h")


class Severity(enum.StrEnum):
    """CRITICAL: somebody has to act now. WARNING: today."""

    CRITICAL = "critical"
    WARNING = "warning"


@dataclass(frozen=True, slots=True)
class Alert:
    """Goes off when `expression` has had a value for `lasting`. `summary` may hold labels, as Prometheus templates do.
    `meaning` and `steps` are the runbook."""

    name: str
    expression: str
    lasting: str
    severity: Severity
    summary: str
    meaning: str
    steps: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Recording:
    """A series that Prometheus works out ahead."""

    name: str
    expression: str


def recordings(selector: str) -> tuple[Recording, ...]:
    """For each objective and window: the share of values that missed it."""
    q = Queries(selector)
    return tuple(
        Recording(_missed(name, window), q.above(bound, family, window))
        for name, family, bound in _OBJECTIVES
        for window in _WINDOWS
    )


def all_alerts(selector: str) -> tuple[Alert, ...]:
    """Over the series that `selector` picks. An alert may be there twice, with two severities."""
    q = Queries(selector)
    return (*_alive(q), *_answers(q), *_speed(), *_room(q), *_inside(q))


def _alive(q: Queries) -> Iterator[Alert]:
    yield Alert(
        "ProxyserveDown",
        f"{q.up()} == 0",
        "2m",
        Severity.CRITICAL,
        "{{ $labels.instance }} cannot be scraped.",
        "Prometheus cannot reach the server, or its key for `/metrics` is refused. A server that loads its models does "
        "not listen yet.",
        (
            "`curl http://SERVER/health`. An answer means that the scrape is at fault: the key of role `monitor` may "
            "have expired (`/metrics` says 401 or 403).",
            "No answer: the last lines of its log say why it ended, or which model it is loading. Exit status 137 is "
            "the kernel or Kubernetes ending it for memory.",
        ),
    )
    yield Alert(
        "ProxyserveAbsent",
        f"absent({q.up()})",
        "5m",
        Severity.CRITICAL,
        "Prometheus has no proxyserve server to scrape.",
        "No server is configured or discovered under this job. Every other alert is silent meanwhile.",
        (
            "Look at Prometheus' page of targets.",
            "In Kubernetes: does the ServiceMonitor's selector match the Service, and is a Pod running?",
        ),
    )
    yield Alert(
        "ProxyserveNotReady",
        f"{q.each(f.READY)} == 0",
        "2m",
        Severity.CRITICAL,
        "{{ $labels.instance }} answers, but takes no requests.",
        "`/ready` is 503. A server that drains is like this for half a minute; one whose engine died stays so.",
        (
            "`curl http://SERVER/ready` says which it is.",
            "`dead`: save the log, whose traceback names the cause, and restart the server. Published experts come "
            "back if it has a state folder.",
            "`draining` for minutes: somebody called `/admin/v1/drain`. Only a restart undoes it.",
        ),
    )
    yield Alert(
        "ProxyserveRestarting",
        f"changes({q.each(f.PROCESS_START)}[1h]) > 2",
        "0m",
        Severity.WARNING,
        "{{ $labels.instance }} was started {{ $value }} times within an hour.",
        "The process ends again and again, between times it may look healthy.",
        (
            "The end of the previous log (`kubectl logs --previous`, `journalctl -u proxyserve`).",
            "Ended for memory: compare its limit with *Resident memory* and *All weights and KV*; lower `--kv-memory`.",
        ),
    )


def _answers(q: Queries) -> Iterator[Alert]:
    failed = q.rate(f.FAILURE, where='finished_reason="error"', over="5m")
    ended = f"({q.rate(f.SUCCESS, over='5m')} + {q.rate(f.FAILURE, over='5m')})"
    yield Alert(
        "ProxyserveErrors",
        f"{failed} / ({ended} > 0) > 0.02",
        "5m",
        Severity.CRITICAL,
        "{{ $value | humanizePercentage }} of choices end with an error.",
        "Answers break off with an error of the server's making. Clients' mistakes do not count.",
        (
            "*What went wrong inside* on the overview: failed steps, or choices without a finite score?",
            "The log's lines with `error=`; are they all of one expert, or one model name?",
            "If it began with a swap: `proxyserve experts rollback NAME`.",
        ),
    )
    busy = q.rate(f.REJECTED, where='reason=~"queue_full|key_limit|rate_limit"', over="5m")
    yield Alert(
        "ProxyserveRefusing",
        f"{busy} / ({busy} + {ended} > 0) > 0.05",
        "10m",
        Severity.WARNING,
        "{{ $value | humanizePercentage }} of requests are refused with 429.",
        "More is asked than the server, or a key, may have. Clients that honour `Retry-After` come back.",
        (
            "*Refused*, by reason. `queue_full`: the whole server has too much to do; add servers, or find who asks so "
            "much on the board of keys.",
            "`key_limit` or `rate_limit`: one key is at its limits. That is what they are for; raise them if it should "
            "have more.",
        ),
    )
    waiting = q.each(f.WAITING)
    yield Alert(
        "ProxyserveQueueGrowing",
        f"min_over_time({waiting}[10m]) > 0 and deriv({waiting}[10m]) > 0",
        "5m",
        Severity.WARNING,
        "{{ $labels.instance }} has a queue that does not empty, and it grows.",
        "Requests come faster than they are answered. First tokens get later until `--max-waiting-requests`.",
        (
            "Is autoscaling at its maximum, or not there?",
            "*KV blocks in use* near 1: memory is what runs out. Else it is speed: *Where a step's time goes*.",
            "One key with all the traffic: give it `max_running` and `requests_per_minute`.",
        ),
    )


def _speed() -> Iterator[Alert]:
    texts = {
        "first_token": (
            "ProxyserveFirstTokenSlow",
            "first tokens come later than 2 s",
            "More first tokens than the objective (99 of 100 within 2 s) allows come late.",
            (
                "*In the queue* against *Prefill*: which of the two is it?",
                "Queue: see [ProxyserveQueueGrowing](#proxyservequeuegrowing).",
                "Prefill: have prompts become longer (*Length of prompts*), or do they miss the prefix cache?",
            ),
        ),
        "inter_token": (
            "ProxyserveTokensSlow",
            "tokens come more than 0.2 s after the one before",
            "More tokens than the objective (99 of 100 within 0.2 s of the one before) allows come late.",
            (
                "*Steps*, p99, and *Running*: large batches make long steps; `--max-batch` bounds them.",
                "Long prompts between steps: lower `--prefill-tokens`.",
                "*Kernels compiled late* above 0, or a swap in progress: it passes.",
            ),
        ),
    }
    for name, (alert, what, meaning, steps) in texts.items():
        for severity, factor, long, short, lasting in (
            (Severity.CRITICAL, 14.4, "1h", "5m", "2m"),
            (Severity.WARNING, 6.0, "6h", "30m", "15m"),
        ):
            bound = f"{factor * _BUDGET:g}"
            yield Alert(
                alert,
                f"{_missed(name, long)} > {bound} and {_missed(name, short)} > {bound}",
                lasting,
                severity,
                f"{{{{ $value | humanizePercentage }}}} of {what} (over {long}).",
                meaning,
                steps,
            )


def _room(q: Queries) -> Iterator[Alert]:
    per_server = ("job", "instance")
    yield Alert(
        "ProxyserveKVExhausted",
        f"{q.gauge(f.KV_USAGE, 'max', per_server)} > 0.95 and {q.gauge(f.WAITING, by=per_server)} > 0",
        "10m",
        Severity.WARNING,
        "{{ $labels.instance }} has no KV blocks left, and requests wait for them.",
        "Running requests hold (nearly) all KV blocks of a pool. What waits cannot start before something ends.",
        (
            "*KV blocks in use*: which model's pool is it?",
            "More room: `--kv-memory`, a base with `--quantize`, fewer experts. Less need: lower `--max-batch`, and "
            "`max_running` for keys with long answers.",
            "Else add servers.",
        ),
    )
    yield Alert(
        "ProxyservePreempting",
        f"{q.rate(f.PREEMPTIONS, over='15m')} / ({q.rate(f.SUCCESS, over='15m')} > 0) > 0.1",
        "10m",
        Severity.WARNING,
        "{{ $value | humanizePercentage }} as many preemptions as choices finish.",
        "Too much was let in for the KV memory: choices lose their blocks and are computed again.",
        ("Lower `--max-batch`, or give more `--kv-memory`.",),
    )
    memory, weights = q.each(f.PROCESS_MEMORY), q.each(f.MEMORY)
    age = f"time() - {q.each(f.PROCESS_START)}"
    yield Alert(
        "ProxyserveMemoryGrowing",
        f"{memory} > 1.2 * ({memory} offset 6h) and {weights} == ({weights} offset 6h) and {age} > 7 * 3600",
        "30m",
        Severity.WARNING,
        "{{ $labels.instance }} has grown to {{ $value | humanize1024 }}B, and models are not the reason.",
        "Resident memory is a fifth above what it was six hours ago, while weights and KV are the same.",
        (
            "*Open files* growing as well: connections that nobody closes.",
            "Otherwise it is a leak: report it with the versions on the process board. A restart (which drains) helps "
            "for now.",
        ),
    )
    yield Alert(
        "ProxyserveFilesLow",
        f"{q.each(f.PROCESS_FILES)} / {q.each(f.PROCESS_MOST_FILES)} > 0.8",
        "5m",
        Severity.WARNING,
        "{{ $labels.instance }} has {{ $value | humanizePercentage }} of its file descriptors open.",
        "Each connection is one. At the limit nobody can connect.",
        (
            "Raise the limit (`LimitNOFILE`, `ulimit -n`), or lower `--max-connections` below it.",
            "A proxy that opens connections and does not use them again: see the nginx example.",
        ),
    )


def _inside(q: Queries) -> Iterator[Alert]:
    steps = q.rate(f.STEPS, ("job", "instance"), over="2m")
    yield Alert(
        "ProxyserveStuck",
        f"{q.gauge(f.RUNNING, by=('job', 'instance'))} > 0 and {steps} == 0",
        "2m",
        Severity.CRITICAL,
        "{{ $labels.instance }} has requests running, and no step begins.",
        "The engine's thread hangs: in a kernel, in a driver, or waiting for a remote base.",
        (
            "A remote base: is that server up? `--base-timeout` bounds the wait.",
            "Where it hangs: `py-spy dump --pid PID`, and `nvidia-smi` on a GPU. Keep both.",
            "Restart it. It cannot drain: requests on it are lost.",
        ),
    )
    yield Alert(
        "ProxyserveStepFailing",
        f"{q.increase(f.STEP_FAILURES, ('job', 'instance'), over='10m')} > 0",
        "0m",
        Severity.CRITICAL,
        "Steps fail on {{ $labels.instance }}.",
        "A step raised an exception: all requests in it ended with an error, the server goes on.",
        (
            "The log has a traceback at `a step failed`.",
            "Out of memory: lower `--max-batch-tokens` or `--kv-memory`.",
            "Anything else is a bug: report it with the traceback.",
        ),
    )
    yield Alert(
        "ProxyserveNonfinite",
        f"{q.increase(f.NONFINITE, ('job', 'instance'), over='10m')} > 0",
        "0m",
        Severity.WARNING,
        "Choices on {{ $labels.instance }} end for want of a finite score.",
        "NaN or infinity came out of a model, or of a fusion with large weights. Those requests failed alone.",
        (
            "Are they all of one expert (the log's field `experts`)? Roll it back.",
            "float16 or bfloat16 and a model that overflows: `--dtype float32`.",
            "Weights far outside of 0 to 1: narrow `--weight-range`.",
        ),
    )
    yield Alert(
        "ProxyserveSwapFailed",
        f"{q.increase(f.EXPERT_FAILURES, ('job', 'instance', 'phase'), over='10m')} > 0",
        "0m",
        Severity.WARNING,
        "An expert failed while {{ $labels.phase }} on {{ $labels.instance }}.",
        "A new generation was not published. The old one goes on serving.",
        (
            "`proxyserve experts list` gives the reason.",
            "Behind a load balancer: servers may now have different generations. Publish again, or roll others back.",
        ),
    )


def _missed(objective: str, window: str) -> str:
    return f"proxyserve:{objective}_missed:ratio_rate{window}"
