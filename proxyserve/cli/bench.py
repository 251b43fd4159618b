"""`proxyserve bench`: side by side with the plain Hugging Face loop, and what solving weights costs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from proxyserve.bench.run import BenchResult, BenchSettings, run_bench
from proxyserve.bench.solving import SolvingResult
from proxyserve.cli import options


def bench_command(
    batch: Annotated[
        list[int] | None, typer.Option("--batch", min=1, help="Requests at once; repeatable.")
    ] = None,
    prompt: Annotated[int, typer.Option("--prompt", min=1, help="Prompt tokens per request.")] = 64,
    new: Annotated[int, typer.Option("--new", min=1, help="Generated tokens per request.")] = 64,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Measurements of each contestant.")] = 3,
    loop: Annotated[
        bool, typer.Option("--loop/--no-loop", help="Without: only what solving weights costs.")
    ] = True,
    dtype: options.Dtype = "float32",
    device: options.Device = "auto",
    threads: options.Threads = 1,
    output: Annotated[Path | None, typer.Option("--output", help="Write the result as JSON.")] = None,
) -> None:
    """Tokens per second of proxyserve and of the plain loop over the same random models, and their ratios; then
    how much longer a step takes whose weights are solved."""
    settings = BenchSettings(
        batches=tuple(batch or (1, 8, 32)) if loop else (),
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
    if result.rows:
        Console().print(bench_table(result))
    for part in result.solving:
        Console().print(solving_table(part))
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


def solving_table(result: SolvingResult) -> Table:
    """Milliseconds per step with solved and with fixed weights, a row per way to solve."""
    table = Table(
        title=f"a step of rule dynamic beside one of proxy, {result.batch} requests\n{result.laws}",
        caption="proxy: the same experts at weight 1; median step of the best turn",
    )
    table.add_column("dynamic")
    for title in ("ms", "proxy ms", "mean weight"):
        table.add_column(title, justify="right")
    table.add_column("costs", justify="right", style="bold")
    for row in result.rows:
        table.add_row(
            row.law,
            f"{row.step * 1e3:.2f}",
            f"{row.proxy_step * 1e3:.2f}",
            f"{row.mean_weight:.2f}",
            f"{row.overhead:+.1%}",
        )
    return table
