"""Who uses the server, and who is refused."""

from __future__ import annotations

from proxyserve.api import families as f
from proxyserve.monitoring.board import Board, Panel, Row, Unit
from proxyserve.monitoring.boards.panels import Q, one


def keys_board() -> Board:
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
                        one(Q.rate(f.KEY_REQUESTS, ("key",)), "{{key}}"),
                        Unit.PER_SECOND,
                        f.KEY_REQUESTS.text,
                        stacked=True,
                    ),
                    Panel(
                        "Tokens generated",
                        one(Q.rate(f.KEY_TOKENS, ("key",), 'kind="generation"'), "{{key}}"),
                        Unit.TOKENS_PER_SECOND,
                        "By key.",
                        stacked=True,
                    ),
                    Panel(
                        "Prompt tokens",
                        one(Q.rate(f.KEY_TOKENS, ("key",), 'kind="prompt"'), "{{key}}"),
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
                        one(
                            Q.rate(f.REJECTED, ("reason",), 'reason=~"queue_full|key_limit|rate_limit"'),
                            "{{reason}}",
                        ),
                        Unit.PER_SECOND,
                        "queue_full: the whole server's caps; key_limit and rate_limit: one key's.",
                        stacked=True,
                    ),
                    Panel(
                        "No or wrong key (401, 403)",
                        one(
                            Q.rate(f.REJECTED, ("reason",), 'reason=~"unauthorized|forbidden"'), "{{reason}}"
                        ),
                        Unit.PER_SECOND,
                        "A key that has expired counts as unauthorized.",
                        stacked=True,
                    ),
                    Panel(
                        "Wrong or too large",
                        one(
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
