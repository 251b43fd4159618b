"""`proxyserve eval`: the gap-closed tables of a demo family, through the engine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from proxyserve.cli import options
from proxyserve.cli.files import check_writable
from proxyserve.cli.printing import AsJson
from proxyserve.config import EngineConfig
from proxyserve.demo.family import family_paths
from proxyserve.demo.world import make_world


def eval_command(
    families: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[FAMILY]...",
            exists=True,
            file_okay=False,
            help="Folders made by `python -m proxyserve.demo.train`; default: the shipped family.",
        ),
    ] = None,
    weight: Annotated[float, typer.Option("--weight", help="Weight of rule proxy, own expert.")] = 1.0,
    people: Annotated[
        int | None, typer.Option("--people", min=1, help="Only so many held-out people.")
    ] = None,
    validation: Annotated[
        bool, typer.Option("--validation", help="The people that recipes are chosen on, not the test people.")
    ] = False,
    reference: Annotated[
        bool,
        typer.Option(
            "--reference",
            help="Plain Hugging Face models instead of proxyserve's engine, for rule proxy alone.",
        ),
    ] = False,
    save: Annotated[Path | None, typer.Option("--save", help="Write the result as JSON.")] = None,
    chart: Annotated[Path | None, typer.Option("--chart", help="Write a chart as PNG.")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the tables as Markdown.")] = False,
    as_json: AsJson = False,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    threads: options.Threads = 1,
) -> None:
    """Accuracy of base, small models, fused laws and oracle on held-out people, and the gap that each rule closes, with
    the right expert alone and with all experts at once."""
    import torch

    from proxyserve.evaluation.chart import save_chart
    from proxyserve.evaluation.engine_generator import EngineGenerator
    from proxyserve.evaluation.evaluate import evaluate_family
    from proxyserve.evaluation.reference import ReferenceGenerator
    from proxyserve.evaluation.report import markdown as as_markdown
    from proxyserve.evaluation.report import sheets, to_json
    from proxyserve.evaluation.systems import Generator

    if threads is not None:
        torch.set_num_threads(threads)
    if markdown and as_json:
        raise typer.BadParameter("one document at a time; leave --json out", param_hint="--markdown")
    check_writable(save, "--save")
    check_writable(chart, "--chart")
    world = make_world()
    asked = (world.validation if validation else world.test)[:people]
    generator: Generator = (
        ReferenceGenerator()
        if reference
        else EngineGenerator(EngineConfig(device=device, dtype=dtype, kv_memory=256 * 2**20))
    )
    folders: list[Path | None] = [*families] if families else [None]
    results = []
    with Console(stderr=True).status("starting") as status:
        for folder in folders:
            label = "shipped" if folder is None else folder.name
            results.append(
                evaluate_family(
                    family_paths(folder), asked, generator, label=label, weight=weight, progress=status.update
                )
            )
    if as_json:
        typer.echo(to_json(results).rstrip())
    elif markdown:
        typer.echo(as_markdown(results))
    else:
        for sheet in sheets(results):
            Console().print(sheet.as_rich())
    if save is not None:
        save.write_text(to_json(results))
    if chart is not None:
        save_chart(results, chart)
