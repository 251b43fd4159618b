"""On whose behalf a request is made, and what they may do."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class CallerLimits:
    """How much one caller may ask for; None is no limit beyond the server's. `running` are choices that hold KV blocks
    at once (more of them wait), `waiting_requests` choices that wait and `waiting_tokens` their prompts' tokens (more
    are refused), `requests_per_minute` and `tokens_per_minute` what is let in over time, `logprobs` how many
    log-probabilities may be listed per token."""

    running: int | None = None
    waiting_requests: int | None = None
    waiting_tokens: int | None = None
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    logprobs: int | None = None


@dataclass(frozen=True, slots=True)
class Caller:
    """`name` is what the work is accounted to (the name of a key): callers share the engine fairly, and limits are per
    caller. `admin`: may do what the policy keeps for administrators. `monitor`: may watch the
    server, and nothing else. `experts` are those that the caller may use, None for all. `explain`: may ask what each
    model thought of a token; None leaves that to the server's policy.
    `priority` is that of requests that do not say, and the lowest that may be asked for (administrators: any)."""

    name: str = ""
    admin: bool = True
    monitor: bool = False
    experts: frozenset[str] | None = None
    explain: bool | None = None
    priority: int = 0
    limits: CallerLimits = field(default_factory=CallerLimits)

    def may_use(self, expert: str) -> bool:
        return self.experts is None or expert in self.experts
