"""`proxyserve serve` and what `proxyserve demo` shares with it."""

from __future__ import annotations

import gc
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console, RenderableType
from rich.text import Text

from proxyserve.api.logs import configure_logging
from proxyserve.cli import options
from proxyserve.cli.settings import ServerOptions, ServeSettings, make_settings, taking
from proxyserve.errors import LoadError

if TYPE_CHECKING:
    from proxyserve.models.family import ExpertSource
    from proxyserve.models.upstream import RemoteSource

logger = logging.getLogger(__name__)


@taking(ServerOptions)
def serve_command(
    base: Annotated[
        str,
        typer.Argument(
            metavar="BASE",
            envvar="PROXYSERVE_BASE",
            help="Folder of the large model, or the URL of an OpenAI-style server that has it (http://host:8001/v1).",
        ),
    ],
    expert: options.ExpertOption = None,
    served_name: options.ServedName = None,
    base_tokenizer: options.BaseTokenizer = None,
    base_model: options.BaseModelName = None,
    base_api_key_file: options.BaseApiKeyFile = None,
    base_top_k: options.BaseTopK = None,
    base_timeout: options.BaseTimeout = None,
    base_context: options.BaseContext = None,
    *,
    given: ServerOptions,
) -> None:
    """Serve a large model and the small experts that steer it.

    Every option can also stand in the file of --config (`kv-memory: 4GiB`, say) or in the environment variable that is
    shown beside it; the command line wins over the environment, the environment over the file.
    """
    settings = make_settings(given)
    source = options.parse_base(
        base,
        tokenizer=base_tokenizer,
        model=base_model,
        api_key_file=base_api_key_file,
        top_k=base_top_k,
        timeout=base_timeout,
        context=base_context,
    )
    serve(source, [options.parse_expert(text) for text in expert or []], settings, served_name=served_name)


def serve(
    base: Path | RemoteSource,
    experts: Sequence[ExpertSource],
    settings: ServeSettings,
    *,
    served_name: str | None = None,
) -> None:
    """Load, show the start-up table, listen until a signal. Raises LoadError and StartupError."""
    if isinstance(base, Path) and not base.expanduser().is_dir():  # before seconds of imports
        raise LoadError(f"{base}: no such folder")
    from proxyserve.api.key_ring import Keys
    from proxyserve.api.server import check_binding, check_tls, run_server
    from proxyserve.api.telemetry import check_tracing
    from proxyserve.cli.opening import open_server
    from proxyserve.cli.startup import startup_table
    from proxyserve.models.loading import choose_placement
    from proxyserve_kernels import backend_for

    check_binding(settings.server)  # before minutes of loading, not after
    check_tls(settings.server)
    check_tracing(settings.server.otlp_endpoint)
    keys = Keys.of(settings.server)
    configure_logging(settings.logs)
    console = Console(stderr=True)
    try:
        backend_for(choose_placement(settings.engine.device).device, settings.engine.kernels)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--kernels") from error
    with (
        console.status("loading") as status,
        open_server(
            base,
            experts,
            settings,
            served_name=served_name,
            progress=status.update,
        ) as opened,
    ):
        status.stop()
        # What is here now stays. A full garbage collection, of which some swaps cause one, would look at all of it and
        # steps would wait for a quarter of a second.
        gc.collect()
        gc.freeze()
        messages = [*opened.messages, *keys.warnings]
        table = startup_table(
            opened.engine.engine, settings.server, settings.experts, keys.ring, computing=opened.computing
        )
        if settings.logs.format == "json":  # then every line is for machines
            for message in messages:
                logger.warning("%s", message)
            logger.info("%s", _as_text(table))
        else:
            for message in messages:
                console.print(Text.assemble(("note: ", "bold yellow"), message), soft_wrap=True)
            console.print(table)
        run_server(opened.engine, settings.server, opened.experts)


def _as_text(shown: RenderableType) -> str:
    console = Console(width=120, color_system=None)
    with console.capture() as captured:
        console.print(shown)
    return captured.get()
