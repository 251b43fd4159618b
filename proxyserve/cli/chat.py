"""`proxyserve chat`: a conversation with a running server, in a terminal or one message at a time."""

from __future__ import annotations

import sys
from contextlib import closing
from typing import Annotated, Any

import typer
from rich.console import Console

from proxyserve.cli.chat_answer import Answer
from proxyserve.cli.chat_session import Session
from proxyserve.cli.chat_state import Conversation
from proxyserve.cli.connection import (
    DEFAULT_URL,
    ApiKey,
    ApiKeyFile,
    Connection,
    ModelName,
    Url,
    choose_key,
)
from proxyserve.cli.line_editor import state_folder
from proxyserve.cli.panels import SAMPLING
from proxyserve.cli.printing import AsJson, parse_json_object, print_json
from proxyserve.errors import ProxyserveError


def chat_command(
    message: Annotated[
        str | None,
        typer.Argument(metavar="[MESSAGE]", help="Ask this alone; without it a conversation begins."),
    ] = None,
    model: ModelName = None,
    system: Annotated[
        str | None,
        typer.Option("--system", "-s", metavar="TEXT", help="System message, before everything else."),
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(
            "--temperature",
            "-t",
            min=0.0,
            help="0 is greedy; default: the server's, 1.",
            rich_help_panel=SAMPLING,
        ),
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-tokens",
            min=1,
            help="Longest answer, in tokens; default: the context.",
            rich_help_panel=SAMPLING,
        ),
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(
            "--top-p",
            min=0.0,
            max=1.0,
            help="Draw from the fewest likeliest tokens with this much probability.",
            rich_help_panel=SAMPLING,
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            "--seed",
            help="The same seed draws the same answer.",
            rich_help_panel=SAMPLING,
        ),
    ] = None,
    fusion: Annotated[
        str | None,
        typer.Option(
            "--fusion",
            metavar="JSON",
            help='A fusion object, for one message: \'{"rule": "dynamic", "experts": {"qa": 1}}\'.',
            rich_help_panel=SAMPLING,
        ),
    ] = None,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    api_key_file: ApiKeyFile = None,
    timeout: Annotated[
        float, typer.Option("--timeout", min=0.1, help="Seconds of silence that are too many.")
    ] = 300.0,
    history: Annotated[
        bool,
        typer.Option(
            "--history/--no-history",
            envvar="PROXYSERVE_HISTORY",
            help="Remember what was typed, in chat_history under $XDG_STATE_HOME/proxyserve, for you alone.",
        ),
    ] = True,
    as_json: AsJson = False,
) -> None:
    """Talk to a server.

    In a terminal it is a conversation: lines can be edited and come back with the arrow keys, /help lists the commands
    that change model, experts, weights and rule, Ctrl-C stops an answer. With MESSAGE, or with a message piped in, it
    prints the answer to that and nothing else.
    """
    text = message
    if text is None and not sys.stdin.isatty():
        text = sys.stdin.read().rstrip("\n")
    if text is not None and not text.strip():
        raise typer.BadParameter("the message is empty", param_hint="MESSAGE")
    if text is None and not sys.stdout.isatty():
        raise typer.BadParameter("a conversation needs a terminal; give a message", param_hint="MESSAGE")
    for option, given in (("--json", as_json), ("--fusion", fusion is not None)):
        if text is None and given:
            raise typer.BadParameter("it is for one message; give it or pipe it in", param_hint=option)
    sampling = {"temperature": temperature, "max_tokens": max_tokens, "top_p": top_p, "seed": seed}
    sampling = {name: value for name, value in sampling.items() if value is not None}
    with Connection(url, choose_key(api_key, api_key_file), key_option="--api-key-file") as server:
        known = server.models()
        if not known and model is None:
            raise ProxyserveError("The server lists no model that this key may use; name one with --model.")
        talk = Conversation(
            base=known[0].split("+", 1)[0] if known else str(model).split("+", 1)[0],
            model=model or _usual(known),
            system=system,
            sampling=sampling,
        )
        if text is None:
            file = state_folder() / "chat_history" if history else None
            Session(server, talk, known, Console(), history=file, timeout=timeout).run()
            return
        body = talk.request(text)
        if fusion is not None:
            body["fusion"] = parse_json_object(fusion, "--fusion")
            body["model"] = model or talk.base
        _once(server, body, timeout=timeout, as_json=as_json)


def _usual(known: list[str]) -> str:
    """Of a server where nobody chose: the base with its first expert, since that is what it is there for."""
    return next((name for name in known if "+" in name), known[0])


def _once(server: Connection, body: dict[str, Any], *, timeout: float, as_json: bool) -> None:
    """The answer as it is, as it comes; reasoning is in the JSON alone."""
    answer = Answer()
    with closing(answer.pieces(server, body, timeout=timeout)) as pieces:
        for piece in pieces:
            if not as_json:
                typer.echo(piece.text, nl=False)
    if as_json:
        print_json(answer.as_json(body["model"]))
    else:
        typer.echo()
