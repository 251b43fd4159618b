"""`proxyserve bench`: side by side with the plain Hugging Face loop."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from proxyserve.bench.run import BenchResult, BenchSettings, run_bench
from proxyserve.cli import options


def bench_command(
    batch: Annotated[
        list[int] | None, typer.Option("--batch", min=1, help="Requests at once; repeatable.")
    ] = None,
    prompt: Annotated[int, typer.Option("--prompt", min=1, help="Prompt tokens per request.")] = 64,
    new: Annotated[int, typer.Option("--new", min=1, help="Generated tokens per request.")] = 64,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Measurements of each contestant.")] = 3,
    dtype: options.Dtype = "float32",
    device: options.Device = "auto",
    threads: options.Threads = 1,
    output: Annotated[Path | None, typer.Option("--output", help="Write the result as JSON.")] = None,
) -> None:
    """Tokens per second of proxyserve and of the plain loop over the same random models, and their ratios."""
    settings = BenchSettings(
        batches=tuple(batch or (1, 8, 32)),
        prompt=prompt,
        new=new,
        rounds=rounds,
        dtype=dtype,
        device=device,
        threads=threads or 1,
    )
    console = Console(stderr=True)
    with console.status("starting") as status:
        result = run_bench(settings, progress=status.update)
    Console().print(bench_table(result))
    if output is not None:
        output.write_text(json.dumps(result.as_dict(), indent=2) + "\n")


def bench_table(result: BenchResult) -> Table:
    """Tokens per second and ratios, a row per batch size."""
    settings = result.settings
    machine = ", ".join(f"{name} {value}" for name, value in result.machine.items())
    table = Table(
        title=f"generated tokens/s, {settings.dtype}, {settings.threads} thread(s), {settings.prompt} prompt and "
        f"{settings.new} new tokens per request\n{machine}",
        caption="loop: plain Hugging Face, all requests as one batch; single: the same, one request at a time",
    )
    for title in ("batch", "fused", "base", "loop fused", "loop base", "single fused"):
        table.add_column(title, justify="right")
    for title in result.rows[0].ratios:
        table.add_column(title, justify="right", style="bold")
    for row in result.rows:
        speeds = (row.fused, row.base, row.loop_fused, row.loop_base, row.single_fused)
        table.add_row(
            str(row.batch),
            *(f"{speed:.0f}" for speed in speeds),
            *(f"{ratio:.2f}x" for ratio in row.ratios.values()),
        )
    return table
