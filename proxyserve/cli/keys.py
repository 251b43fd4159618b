"""`proxyserve keys`: making keys, and hashing those that there are."""

from __future__ import annotations

import sys
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any

import typer
import yaml
from pydantic import ValidationError

from proxyserve.api.keys import KeyRecord, digest_of, new_key
from proxyserve.cli.panels import LIMITS
from proxyserve.cli.printing import AsJson, print_json

keys_app = typer.Typer(
    name="keys",
    no_args_is_help=True,
    add_completion=False,
    help="Keys of a server: made here, kept as digests in the files of --api-key-file and --admin-key-file.",
)


def _limit(what: str) -> Any:
    return typer.Option(min=1, help=f"{what} Default: the server's limit.", rich_help_panel=LIMITS)


@keys_app.command("new")
def new_command(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Whose key it is; work is accounted to it.")],
    admin: Annotated[bool, typer.Option("--admin", help="An administrator's key.")] = False,
    monitor: Annotated[
        bool, typer.Option("--monitor", help="A key for /metrics and /load, and nothing else.")
    ] = False,
    expert: Annotated[
        list[str] | None,
        typer.Option("--expert", help="Expert that it may use; several times for several. Default: all."),
    ] = None,
    explain: Annotated[
        bool | None, typer.Option("--explain/--no-explain", help="May ask for explanations, or may not.")
    ] = None,
    days: Annotated[int | None, typer.Option("--days", min=1, help="Days until it expires.")] = None,
    max_logprobs: Annotated[
        int | None,
        typer.Option("--max-logprobs", min=0, help="Log-probabilities per token that it may have."),
    ] = None,
    max_running: Annotated[int | None, _limit("Choices that may run at once.")] = None,
    max_waiting_requests: Annotated[
        int | None, _limit("Choices that may wait for their first token.")
    ] = None,
    max_waiting_tokens: Annotated[int | None, _limit("Prompt tokens that these may have together.")] = None,
    requests_per_minute: Annotated[int | None, _limit("Requests in a minute.")] = None,
    tokens_per_minute: Annotated[int | None, _limit("Tokens of prompts and answers in a minute.")] = None,
    priority: Annotated[int, typer.Option("--priority", help="Of its requests; lower goes first.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Make a key. It is shown once, on stderr; the record for the key file, on stdout, has its digest alone. With
    --json both are in the document."""
    if admin and monitor:
        raise typer.BadParameter("a key has one role", param_hint="--monitor")
    key = new_key()
    given: dict[str, Any] = {
        "name": name,
        "sha256": digest_of(key).hex(),
        "role": "admin" if admin else "monitor" if monitor else "user",
        "experts": expert or None,
        "explain": explain,
        "max_logprobs": max_logprobs,
        "max_running": max_running,
        "max_waiting_requests": max_waiting_requests,
        "max_waiting_tokens": max_waiting_tokens,
        "requests_per_minute": requests_per_minute,
        "tokens_per_minute": tokens_per_minute,
        "priority": priority or None,
        "expires": None
        if days is None
        else (datetime.now(UTC) + timedelta(days=days)).replace(microsecond=0).isoformat(),
    }
    record = {field: value for field, value in given.items() if value is not None}
    try:
        KeyRecord.model_validate(record)
    except ValidationError as error:
        first = error.errors()[0]
        raise typer.BadParameter(first["msg"], param_hint=str(first["loc"][0]).upper()) from None
    if as_json:
        print_json({"key": key, "record": record})
        return
    typer.echo(f"The key, which is not shown again: {key}", err=True)
    typer.echo(yaml.safe_dump([record], sort_keys=False).rstrip())


@keys_app.command("hash")
def hash_command() -> None:
    """Read keys from stdin, one per line, and write what a key file needs of them: `sha256:HEX`."""
    for line in sys.stdin:
        key = line.strip()
        if key:
            typer.echo(f"sha256:{digest_of(key).hex()}")
