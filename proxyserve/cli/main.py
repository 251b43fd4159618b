"""The `proxyserve` command: what the subcommands are called, and how errors are shown."""

from __future__ import annotations

import os
import sys
from typing import Annotated

# Model folders are local; without this a mistyped path would be looked up on a hub, with minutes of retries.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import typer
from rich.console import Console
from rich.text import Text

from proxyserve import __version__
from proxyserve.api.errors import StartupError
from proxyserve.api.logs import configure_logging
from proxyserve.cli.bench import bench_app
from proxyserve.cli.calibrate import calibrate_command
from proxyserve.cli.compress import compress_command
from proxyserve.cli.demo import demo_command
from proxyserve.cli.evaluate import eval_command
from proxyserve.cli.experts import experts_app
from proxyserve.cli.explore import explore_command
from proxyserve.cli.formula import formula_command
from proxyserve.cli.keys import keys_app
from proxyserve.cli.presets import presets_app
from proxyserve.cli.score import score_command
from proxyserve.cli.serve import serve_command
from proxyserve.config import LogConfig
from proxyserve.errors import ProxyserveError

app = typer.Typer(name="proxyserve", no_args_is_help=True, pretty_exceptions_enable=False)
app.command("serve")(serve_command)
app.command("demo")(demo_command)
app.command("eval")(eval_command)
app.command("score")(score_command)
app.command("calibrate")(calibrate_command)
app.command("formula")(formula_command)
app.command("explore")(explore_command)
app.command("compress")(compress_command)
app.add_typer(bench_app, name="bench")
app.add_typer(experts_app, name="experts")
app.add_typer(presets_app, name="presets")
app.add_typer(keys_app, name="keys")


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Small tuned models steer a large frozen one while it decodes."""


def main() -> None:
    """Entry point. Errors made on purpose are one line on stderr and exit code 1."""
    configure_logging(LogConfig())
    try:
        app()
    except (ProxyserveError, StartupError) as error:
        Console(stderr=True).print(Text.assemble(("error: ", "bold red"), str(error)), soft_wrap=True)
        sys.exit(1)
