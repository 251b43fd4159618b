"""The `proxyserve` command: what the subcommands are called, where they are, and how errors are shown."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import Annotated

# Model folders are local; without this a mistyped path would be looked up on a hub, with minutes of retries.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import typer
from rich.console import Console
from rich.text import Text

from proxyserve import __version__
from proxyserve.api.logs import configure_logging
from proxyserve.cli import exits
from proxyserve.cli.lazy import Entry, add_placeholders, lazy_group
from proxyserve.config import LogConfig
from proxyserve.errors import ProxyserveError

_SERVE, _USE, _MODELS, _LOOK = "Serve", "Use a running server", "Models and weights", "Measure and check"

#: In the order of the list. Nothing that is named here is imported before it is called.
COMMANDS: Mapping[str, Entry] = {
    "serve": Entry("proxyserve.cli.serve:serve_command", "Serve a large model and its experts.", _SERVE),
    "demo": Entry("proxyserve.cli.demo:demo_command", "Serve the small family that is shipped.", _SERVE),
    "keys": Entry("proxyserve.cli.keys:keys_app", "Make keys for a server's key files.", _SERVE),
    "chat": Entry("proxyserve.cli.chat:chat_command", "Talk to a server.", _USE),
    "experts": Entry("proxyserve.cli.experts:experts_app", "Load, swap and unload experts.", _USE),
    "presets": Entry("proxyserve.cli.presets:presets_app", "Save fusions under names.", _USE),
    "score": Entry(
        "proxyserve.cli.score:score_command",
        "Show which expert moved which token, of a text or a server's answer.",
        _USE,
    ),
    "calibrate": Entry(
        "proxyserve.cli.calibrate:calibrate_command", "Find the weight that gains most.", _MODELS
    ),
    "explore": Entry("proxyserve.cli.explore:explore_command", "Show what tuning added.", _MODELS),
    "compress": Entry("proxyserve.cli.compress:compress_command", "Make a small file of a tuning.", _MODELS),
    "formula": Entry("proxyserve.cli.formula:formula_command", "Check and explain a formula.", _MODELS),
    "doctor": Entry(
        "proxyserve.cli.doctor:doctor_command",
        "What this machine can run, and whether models fit and match.",
        _LOOK,
    ),
    "eval": Entry("proxyserve.cli.evaluate:eval_command", "How much of the gap each rule closes.", _LOOK),
    "bench": Entry("proxyserve.cli.bench:bench_app", "Speed, in process or of a server.", _LOOK),
}

app = typer.Typer(
    name="proxyserve",
    cls=lazy_group(COMMANDS),
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["--help", "-h"]},
    epilog="Exit codes: 0 done, 1 failed, 2 wrong usage, 3 no server there, 4 refused by the server, 130 interrupted.",
)
add_placeholders(app, COMMANDS)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit."),
    ] = False,
) -> None:
    """Small tuned models steer a large frozen one while it decodes."""


def main() -> None:
    """Entry point. Errors made on purpose are one line on stderr, or one JSON document on stdout where `--json` was
    asked for, and an exit code of `proxyserve.cli.exits`."""
    configure_logging(LogConfig())
    wants_json = "--json" in sys.argv[1:]
    try:
        # Outside of its standalone mode Typer raises what it would print, and returns the code of an Exit.
        sys.exit(app(prog_name="proxyserve", standalone_mode=not wants_json))
    except ProxyserveError as error:
        if wants_json:
            typer.echo(exits.as_json(error))
        else:
            Console(stderr=True).print(Text.assemble(("error: ", "bold red"), str(error)), soft_wrap=True)
        sys.exit(exits.exit_code(error))
    except usage_error() as error:
        typer.echo(exits.error_document(error.format_message(), "usage"))
        sys.exit(exits.USAGE)
    except typer.Abort:
        typer.echo(exits.error_document("interrupted", "interrupted"))
        sys.exit(exits.INTERRUPTED)


def usage_error() -> type[typer.BadParameter]:
    """What Typer raises for all that is wrong with a command line. It gives only this one of them a public name, and
    takes the others from Click or, since 0.2x, from a copy of it."""
    base: type[typer.BadParameter] = typer.BadParameter.__bases__[0]
    return base
