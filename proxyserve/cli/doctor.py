"""`proxyserve doctor`: what this machine can run, and what a server started like this would do."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from proxyserve.cli import exits, findings, options
from proxyserve.cli.findings import Finding
from proxyserve.cli.printing import AsJson, print_json
from proxyserve.cli.settings import ServerOptions, ServeSettings, make_settings, taking
from proxyserve.errors import ProxyserveError

if TYPE_CHECKING:
    from proxyserve.models.family import ExpertSource
    from proxyserve.models.upstream import RemoteSource


@taking(ServerOptions)
def doctor_command(
    base: Annotated[
        str | None,
        typer.Argument(
            metavar="[BASE]",
            envvar="PROXYSERVE_BASE",
            help="As for `serve`: plan the memory of this base and the experts, and compare their vocabularies. "
            "Weights are not read.",
        ),
    ] = None,
    expert: options.ExpertOption = None,
    served_name: options.ServedName = None,
    base_tokenizer: options.BaseTokenizer = None,
    base_model: options.BaseModelName = None,
    base_api_key_file: options.BaseApiKeyFile = None,
    base_top_k: options.BaseTopK = None,
    base_timeout: options.BaseTimeout = None,
    base_context: options.BaseContext = None,
    as_json: AsJson = False,
    *,
    given: ServerOptions,
) -> None:
    """Look this machine over: versions, devices, dtypes and kernels (really tried), memory, ports, files.

    It takes what `serve` takes: put the same options behind it to see what that start would find, without loading
    anything. Exit code 1 if there is a problem; warnings are no problems.
    """
    if base is None and expert:
        raise typer.BadParameter("experts need a base: name BASE", param_hint="--expert")
    settings = make_settings(given)
    source = None
    if base is not None:
        source = options.parse_base(
            base,
            tokenizer=base_tokenizer,
            model=base_model,
            api_key_file=base_api_key_file,
            top_k=base_top_k,
            timeout=base_timeout,
            context=base_context,
        )
    experts = [options.parse_expert(text) for text in expert or []]
    with Console(stderr=True).status("looking") as status:
        found = []
        for finding in _look(source, experts, settings, served_name):
            found.append(finding)
            status.update(f"{finding.topic}: {finding.what}")
    if as_json:
        print_json(findings.as_json(found))
    else:
        findings.show(found, Console())
    if not findings.is_fine(found):
        raise typer.Exit(exits.FAILED)


def _look(
    base: Path | RemoteSource | None,
    experts: list[ExpertSource],
    settings: ServeSettings,
    served_name: str | None,
) -> Iterator[Finding]:
    try:
        from proxyserve.cli import checkup
        from proxyserve.models.loading import choose_placement
    except ImportError as error:
        yield Finding(
            "versions",
            "imports",
            f"do not work: {error}",
            "problem",
            "install proxyserve again, with what it needs",
        )
        return
    yield from checkup.versions()
    yield from checkup.packages()
    yield from checkup.processors()
    yield from checkup.kernels()
    try:
        device = choose_placement(settings.engine.device).device
    except ProxyserveError as error:
        yield Finding("memory", "--device", "cannot be used", "problem", error.message)
    else:
        yield from checkup.memory(settings, device)
        if base is not None:
            yield from _models(base, experts, settings, served_name)
    yield from checkup.network(settings.server)
    yield from checkup.files(settings)


def _models(
    base: Path | RemoteSource,
    experts: list[ExpertSource],
    settings: ServeSettings,
    served_name: str | None,
) -> Iterator[Finding]:
    from proxyserve.cli.plan import make_plan
    from proxyserve.engine.memory import spelled

    try:
        plan = make_plan(base, experts, settings, served_name=served_name)
    except ProxyserveError as error:
        yield Finding("models", "plan", "these cannot be served", "problem", error.message)
        return
    for model in plan.models:
        [weights, kv] = spelled([model.weights, model.kv])
        cache = f"{kv} of KV, {model.kv_tokens:,} tokens" if model.kv else "KV shared"
        found = f"{model.parameters / 1e6:,.1f}M parameters, {weights}; {cache}; context {model.context:,}"
        data = {
            name: getattr(model, name) for name in ("parameters", "weights", "kv", "kv_tokens", "context")
        }
        yield Finding("models", model.name, found if model.parameters else "on another server", data=data)
    for expert, tokens in plan.shared.items():
        yield Finding(
            "models",
            f"expert {expert}",
            f"{tokens:,} tokens shared with the base",
            data={"shared_tokens": tokens},
        )
    for message in plan.messages:
        yield Finding("models", "plan", message, "note")
    [used, most, aside] = spelled([plan.weights + plan.kv, plan.limit, plan.scoring])
    yield Finding(
        "models",
        "memory",
        f"{used} of {most} for weights and KV in {plan.dtype}; {aside} to score prompts",
        data={"weights": plan.weights, "kv": plan.kv, "limit": plan.limit, "scoring": plan.scoring},
    )
