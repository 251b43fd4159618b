"""`proxyserve score`: what each model thought of each token, of a given text or of a server's answer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from proxyserve.cli import options
from proxyserve.cli.connection import ApiKeyFile, Connection, key_in
from proxyserve.cli.exits import Unreachable
from proxyserve.cli.explained import coloured, report, totals
from proxyserve.cli.printing import AsJson, parse_json_object, print_json
from proxyserve.demo.family import family_paths

if TYPE_CHECKING:
    from proxyserve.fusion.catalog import Catalog
    from proxyserve.fusion.fusion import Fusion

_PATIENCE = 120.0


#: Options that only one of the two forms reads.
_LOCAL_ONLY = ("base", "expert", "dtype", "device", "threads")
_SERVER_ONLY = ("max_tokens", "temperature", "api_key_file")


def score_command(
    context: typer.Context,
    base: Annotated[
        Path | None, typer.Argument(metavar="[BASE]", help="Folder of the base; default: the demo family.")
    ] = None,
    text: Annotated[
        str | None, typer.Option("--text", help="Text to score, with models loaded here.")
    ] = None,
    server: Annotated[
        str | None,
        typer.Option("--server", help="Instead: show what this server answers, http://127.0.0.1:8000."),
    ] = None,
    prompt: Annotated[str, typer.Option("--prompt", help="What comes before; not scored.")] = "",
    model: Annotated[
        str | None, typer.Option("--model", help="BASE, BASE+EXPERT:WEIGHT..., or a server's preset.")
    ] = None,
    fusion: Annotated[
        str | None, typer.Option("--fusion", metavar="JSON", help="A fusion object instead.")
    ] = None,
    expert: options.ExpertOption = None,
    top: Annotated[int, typer.Option("--top", min=1, max=20, help="Likeliest tokens per law, in JSON.")] = 3,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", min=1, help="Longest answer of the server.")
    ] = 64,
    temperature: Annotated[
        float, typer.Option("--temperature", min=0.0, help="Of the server's answer.")
    ] = 0.0,
    api_key_file: ApiKeyFile = None,
    as_json: AsJson = False,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    threads: options.Threads = 1,
) -> None:
    """Per token: fused log-prob, the base's, how far each expert pushed it, KL to the base, and flips.

    With --text the text is scored exactly, every position at once. With --server the server generates and explains.
    Green tokens were pushed up, red ones down; underlined ones are flips.
    """
    if (text is None) == (server is None):
        raise typer.BadParameter("give either --text or --server")
    if server is not None:
        _refuse(context, _LOCAL_ONLY, "the server has its own models; leave it out with --server")
    else:
        _refuse(context, _SERVER_ONLY, "nothing is generated with --text; leave it out")
        if not text:
            raise typer.BadParameter("the text is empty", param_hint="--text")
        if base is None and expert:
            raise typer.BadParameter(
                "the demo family has its own experts; for others name BASE", param_hint="--expert"
            )
    wanted = None if fusion is None else _read_json(fusion)
    if server is not None:
        body = {"prompt": prompt, "model": model, "max_tokens": max_tokens, "temperature": temperature}
        found = _ask(server, body, {**(wanted or {}), "explain": top}, api_key_file)
    else:
        found = _score(base, expert, model, wanted, prompt, text or "", top, dtype, device, threads)
    console = Console()
    entries = []
    for entry in found:
        entries.append(entry)
        if not as_json:
            console.print(coloured(entry), end="")
    if as_json:
        print_json({"entries": entries, **totals(entries)})
        return
    console.print()
    console.print(report(entries))


def _refuse(context: typer.Context, names: Sequence[str], why: str) -> None:
    """Raises BadParameter for one of these that was typed. The environment may be set for other commands."""
    for name in names:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            hint = "BASE" if name == "base" else f"--{name.replace('_', '-')}"
            raise typer.BadParameter(why, param_hint=hint)


def _read_json(text: str) -> dict[str, Any]:
    value = parse_json_object(text, "--fusion")
    if "explain" in value:
        raise typer.BadParameter("'explain' is what --top says; leave it out", param_hint="--fusion")
    return value


def _score(
    base: Path | None,
    experts: list[str] | None,
    model: str | None,
    fusion: dict[str, Any] | None,
    prompt: str,
    text: str,
    top: int,
    dtype: str,
    device: str,
    threads: int | None,
) -> Iterator[dict[str, Any]]:
    """Load the models and explain every token of `text`."""
    import torch

    from proxyserve.api.explanations import explained
    from proxyserve.engine.prompts import text_prompts, token_prompts
    from proxyserve.evaluation.beginning import beginning
    from proxyserve.evaluation.likelihood import Likelihood
    from proxyserve.fusion.catalog import Catalog
    from proxyserve.models.family import ExpertSource, load_family
    from proxyserve.models.loading import choose_placement

    if threads is not None:
        torch.set_num_threads(threads)
    sources = [options.parse_expert(entry) for entry in experts or []]
    if base is None:
        family = family_paths()
        base = family.base
        sources = [ExpertSource(name, tuned, family.untuned) for name, tuned in family.experts.items()]
    with Console(stderr=True).status("loading") as status:
        models = load_family(base, sources, placement=choose_placement(device, dtype), progress=status.update)
        catalog = Catalog(models)
        wanted = _fusion(catalog, model, fusion)
        tokenizer = models.base.tokenizer
        prompts = (
            text_prompts(catalog, wanted, prompt)
            if prompt
            else token_prompts(catalog, wanted, beginning(tokenizer))
        )
        ids = tokenizer.encode(text, add_special_tokens=False)
        status.update("scoring")
        entries = Likelihood(catalog).explain(wanted, prompts, ids, top)
    for entry in explained(entries, tokenizer):
        yield entry.model_dump()


def _fusion(catalog: Catalog, model: str | None, fusion: dict[str, Any] | None) -> Fusion:
    from proxyserve.api.presets import parse_fusion
    from proxyserve.fusion.model_name import parse_model_name

    if model is not None and fusion is not None:
        raise typer.BadParameter("give --model or --fusion, not both", param_hint="--fusion")
    if fusion is not None:
        return parse_fusion(fusion)
    return parse_model_name(model or catalog.models.base.name, catalog)


def _ask(
    server: str, body: dict[str, Any], fusion: dict[str, Any], key_file: Path | None
) -> Iterator[dict[str, Any]]:
    """The explained tokens of a streamed answer, as they come."""
    if body["model"] is None:
        raise typer.BadParameter("the server needs to know which model", param_hint="--model")
    if not body["prompt"]:
        raise typer.BadParameter("the server needs something to continue", param_hint="--prompt")
    key = None if key_file is None else key_in(key_file, "--api-key-file")
    body = {**body, "fusion": fusion, "stream": True}
    with (
        Connection(server, key) as connection,
        connection.stream("/v1/completions", body, timeout=_PATIENCE) as events,
    ):
        for event in events:
            yield from _explanations(event, server)


def _explanations(chunk: dict[str, Any], server: str) -> list[dict[str, Any]]:
    """The explained tokens of one event. Raises Unreachable for what no proxyserve sends."""
    try:
        return [entry for choice in chunk["choices"] for entry in choice["explain"]]
    except (TypeError, KeyError) as error:
        raise Unreachable(
            f"{server} does not explain its tokens; --server must be a proxyserve server."
        ) from error
