"""`proxyserve demo`: the server on the family of small models that comes with the package."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import typer

from proxyserve.cli.serve import serve
from proxyserve.cli.settings import ServerOptions, make_settings, taking
from proxyserve.demo.family import family_paths


@taking(ServerOptions, dtype="float32", kv_memory="256MiB")
def demo_command(
    paths: Annotated[
        bool, typer.Option("--paths", help="Print the family's folders as JSON and exit.")
    ] = False,
    *,
    given: ServerOptions,
) -> None:
    """Serve the demo family: a base that knows facts, and experts that know how to answer.

    Experts may come from the family's own folder, unless --expert-root names another one.
    """
    family = family_paths()
    if paths:
        typer.echo(family.as_json())
        return
    from proxyserve.models.family import ExpertSource

    experts = [ExpertSource(name, tuned, family.untuned) for name, tuned in family.experts.items()]
    settings = make_settings(replace(given, expert_root=given.expert_root or [family.base.parent]))
    serve(family.base, experts, settings)
