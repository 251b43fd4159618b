"""`proxyserve bench`: in process, beside the plain Hugging Face loop, what solving weights, swaps, many experts and
speculation cost or give; `proxyserve bench serve`: load on a server."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from proxyserve.bench.parts import SPECULATED, Part, Sampling
from proxyserve.cli import options
from proxyserve.cli.bench_serve import bench_serve_command
from proxyserve.cli.files import check_writable
from proxyserve.cli.printing import AsJson, print_json

if TYPE_CHECKING:
    from proxyserve.bench.adapters import AdapterResult
    from proxyserve.bench.memory import MemoryRow
    from proxyserve.bench.mixed import MixedRow
    from proxyserve.bench.pairs import PairRow
    from proxyserve.bench.run import BenchResult
    from proxyserve.bench.solving import SolvingResult
    from proxyserve.bench.speculation import SpeculationRow
    from proxyserve.bench.stalls import StallRow
    from proxyserve.bench.swaps import SwapRow

bench_app = typer.Typer(add_completion=False)
bench_app.command("serve")(bench_serve_command)


@bench_app.callback(invoke_without_command=True)
def bench_command(
    context: typer.Context,
    only: Annotated[
        list[Part] | None, typer.Option("--only", help="Measure this part alone; repeatable.")
    ] = None,
    batch: Annotated[
        list[int] | None,
        typer.Option("--batch", min=1, help="Requests at once beside the loop, and mixed; repeatable."),
    ] = None,
    sampling: Annotated[
        list[Sampling] | None,
        typer.Option("--sampling", help="How tokens are chosen beside the loop; repeatable."),
    ] = None,
    prompt: Annotated[int, typer.Option("--prompt", min=1, help="Prompt tokens per request.")] = 64,
    new: Annotated[int, typer.Option("--new", min=1, help="Generated tokens per request.")] = 64,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Measurements of each contestant.")] = 3,
    dtype: options.Dtype = "float32",
    device: options.Device = "auto",
    threads: options.Threads = 1,
    models: Annotated[
        list[str] | None,
        typer.Option("--models", help=f"For speculation, repeatable: {', '.join(SPECULATED)}."),
    ] = None,
    save: Annotated[Path | None, typer.Option("--save", help="Write the result as JSON.")] = None,
    as_json: AsJson = False,
) -> None:
    """Nine parts over random models. loop: tokens per second of proxyserve and of the plain Hugging Face loop.
    solving: how much longer a step takes whose weights are solved. swaps: how long it takes to swap an expert, and what
    running streams notice. adapters: many LoRA experts at once beside as many full ones and beside one. speculation:
    tokens per second with drafts, without, of the base alone and of the plain loop, where drafts stand at a chosen
    share of the tokens, and over the demo family. pairs: small models that differ in their weights only in one forward
    beside one after the other. stalls: how long streams wait for a token while a long prompt is computed. mixed: plain
    requests, some with one expert and some with three in one batch, beside batches of each. memory: what a process of
    its own takes at most with a full batch of long prompts, beside its weights and KV (on Linux, of the CPU's memory).
    """
    if context.invoked_subcommand is not None:
        return
    from proxyserve.bench.run import BenchSettings, run_bench

    unknown = set(models or ()) - {*SPECULATED}
    if unknown:
        raise typer.BadParameter(f"--models must be of {', '.join(SPECULATED)}, not {min(unknown)}")
    check_writable(save, "--save")
    settings = BenchSettings(
        parts=tuple(only or Part),
        batches=tuple(batch or (1, 8, 32)),
        samplings=tuple(sampling or Sampling),
        prompt=prompt,
        new=new,
        rounds=rounds,
        dtype=dtype,
        device=device,
        threads=threads or 1,
        speculated=tuple(models or BenchSettings().speculated),
        mixed=tuple(batch or BenchSettings().mixed),
    )
    console = Console(stderr=True)
    with console.status("starting") as status:
        result = run_bench(settings, progress=status.update)
    if as_json:
        print_json(result.as_dict())
    else:
        for table in bench_tables(result):
            Console().print(table)
    if save is not None:
        save.write_text(json.dumps(result.as_dict(), indent=2) + "\n")


def bench_tables(result: BenchResult) -> list[Table]:
    """A table for each thing that was measured."""
    samplings = dict.fromkeys(row.sampling for row in result.rows)
    tables = [bench_table(result, sampling) for sampling in samplings]
    tables += [solving_table(part) for part in result.solving]
    if result.swaps:
        tables += [swap_table(result.swaps), gap_table(result.swaps)]
    if result.adapters is not None:
        tables.append(adapter_table(result.adapters))
    if result.speculation:
        tables.append(speculation_table(result.speculation))
    if result.pairs:
        tables.append(pair_table(result.pairs))
    if result.stalls:
        tables.append(stall_table(result.stalls))
    if result.mixed:
        tables.append(mixed_table(result.mixed))
    if result.memory:
        tables.append(memory_table(result.memory))
    return tables


def bench_table(result: BenchResult, sampling: Sampling) -> Table:
    """Tokens per second and ratios, a row per batch size."""
    rows = [row for row in result.rows if row.sampling is sampling]
    settings = result.settings
    machine = ", ".join(f"{name} {value}" for name, value in result.machine.items())
    table = Table(
        title=f"generated tokens/s, {sampling}, {settings.dtype}, {settings.threads} thread(s), "
        f"{settings.prompt} prompt and {settings.new} new tokens per request\n{machine}",
        caption="medians; loop: plain Hugging Face, all requests as one batch; single: the same, one at a time; "
        "spread: from the slowest to the fastest round of any contestant",
    )
    for title in ("batch", "fused", "base", "loop fused", "loop base", "single fused"):
        table.add_column(title, justify="right")
    for title in rows[0].ratios:
        table.add_column(title, justify="right", style="bold")
    table.add_column("spread", justify="right")
    for row in rows:
        speeds = (row.fused, row.base, row.loop_fused, row.loop_base, row.single_fused)
        table.add_row(
            str(row.batch),
            *(f"{speed:.0f}" for speed in speeds),
            *(f"{ratio:.2f}x" for ratio in row.ratios.values()),
            f"{row.spread:.0%}",
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


def swap_table(rows: Sequence[SwapRow]) -> Table:
    """Milliseconds from put to published, a row per number of streams."""
    phases = list(rows[0].phases)
    table = Table(title="an expert is swapped: ms from put to published", caption="phases: median swap")
    for title in ("streams", "swaps", "median", "worst"):
        table.add_column(title, justify="right")
    for phase in phases:
        table.add_column(phase, justify="right")
    for row in rows:
        numbers = (median(row.published), max(row.published), *(row.phases[phase] for phase in phases))
        table.add_row(
            str(row.streams), str(len(row.published)), *(f"{number * 1e3:.0f}" for number in numbers)
        )
    return table


def gap_table(rows: Sequence[SwapRow]) -> Table:
    """The longest time between two tokens of any stream, a row per number of streams."""
    table = Table(
        title="what running streams notice: the longest time between two tokens of any stream",
        caption="swap: while an expert is swapped; quiet: as long without a swap, right before",
    )
    for title in ("streams", "usual ms", "swap ms", "quiet ms"):
        table.add_column(title, justify="right")
    for title in rows[0].ratios:
        table.add_column(f"{title} / usual", justify="right", style="bold")
    for row in rows:
        numbers = map(median, (row.usual, row.worst, row.quiet_worst))
        table.add_row(
            str(row.streams),
            *(f"{number * 1e3:.0f}" for number in numbers),
            *(f"{ratio:.2f}x" for ratio in row.ratios.values()),
        )
    return table


def adapter_table(result: AdapterResult) -> Table:
    """Throughput and memory, a row per kind of experts."""
    ratios = ", ".join(f"{name} {ratio:.2f}x" for name, ratio in result.ratios.items())
    table = Table(
        title=f"many experts at once, {result.requests} requests, adapters of rank {result.rank}",
        caption=ratios,
    )
    table.add_column("experts")
    for title in ("tokens/s", "MiB", "MiB per expert", "MiB of the process"):
        table.add_column(title, justify="right")
    for row in result.rows:
        sizes = (row.bytes, row.bytes / row.number, row.resident_bytes)
        table.add_row(
            row.experts,
            f"{result.tokens_per_second(row):.0f}",
            *(f"{size / 2**20:.1f}" for size in sizes),
        )
    return table


def speculation_table(rows: Sequence[SpeculationRow]) -> Table:
    """Tokens per second of everybody and ratios, a row per models, batch and share of drafts that stand."""
    contestants = list(dict.fromkeys(name for row in rows for name in row.contestants))
    ratios = list(dict.fromkeys(title for row in rows for title in row.ratios))
    table = Table(
        title="speculation: generated tokens/s, median round",
        caption="stand: share of drafts, as measured; per step: tokens that a request got in a step of auto; ratios: "
        "median round (slowest to fastest); loop: plain Hugging Face, all requests as one batch",
    )
    table.add_column("models")
    for title in ("batch", "stand", *contestants, "per step"):
        table.add_column(title, justify="right")
    for title in ratios:
        table.add_column(title, justify="right", style="bold")
    for row in rows:
        speeds = (
            f"{row.contestants[name].speed:.0f}" if name in row.contestants else "" for name in contestants
        )
        found = row.ratios_by_round
        table.add_row(
            row.models,
            str(row.batch),
            f"{row.acceptance:.2f}",
            *speeds,
            f"{row.contestants['auto'].tokens_per_step:.2f}",
            *(
                f"{row.ratios[title]:.2f}x ({min(found[title]):.2f}-{max(found[title]):.2f})"
                if title in found
                else ""
                for title in ratios
            ),
        )
    return table


def pair_table(rows: Sequence[PairRow]) -> Table:
    """Milliseconds of the small models' share of a step, a row per size, number and tokens."""
    table = Table(
        title="models that differ in their weights only: ms of all of them in a step",
        caption="apart: one after the other; together: in one forward; median turns",
    )
    table.add_column("models")
    for title in ("tokens of each", "apart", "together"):
        table.add_column(title, justify="right")
    for title in rows[0].ratios:
        table.add_column(title, justify="right", style="bold")
    for row in rows:
        table.add_row(
            f"{row.models} of {row.size}",
            str(row.tokens),
            *(f"{seconds * 1e3:.2f}" for seconds in (row.apart, row.together)),
            *(f"{ratio:.2f}x" for ratio in row.ratios.values()),
        )
    return table


def stall_table(rows: Sequence[StallRow]) -> Table:
    """Milliseconds between two tokens of the streams, a row per number of streams and way to cut the prompt."""
    from proxyserve.bench.stalls import PROMPT

    table = Table(
        title=f"what streams notice of a prompt of {PROMPT:,} tokens",
        caption="worst: the longest time between two tokens while it is computed; medians of the rounds",
    )
    for title in ("streams", "prompts in portions", "usual ms", "worst ms"):
        table.add_column(title, justify="right")
    table.add_column("worst / usual", justify="right", style="bold")
    table.add_column("its first token after s", justify="right")
    for row in rows:
        portions = "yes" if row.portions else "no"
        times = (f"{row.usual * 1e3:.0f}", f"{row.worst * 1e3:.0f}")
        table.add_row(str(row.streams), portions, *times, f"{row.ratio:.1f}x", f"{row.first:.1f}")
    return table


def mixed_table(rows: Sequence[MixedRow]) -> Table:
    """Tokens per second of pure batches and of the mix, a row per batch and way to speculate."""
    table = Table(
        title="different requests in one batch: generated tokens/s",
        caption="mixed / mean: weighted mean of the pure batches' time per token by the mix's, median round (slowest "
        "to fastest); 1.00x: mixing costs nothing",
    )
    table.add_column("speculation")
    for title in ("batch", *rows[0].speeds):
        table.add_column(title, justify="right")
    table.add_column("mixed / mean", justify="right", style="bold")
    for row in rows:
        found = row.ratios_by_round
        table.add_row(
            str(row.speculate),
            str(row.batch),
            *(f"{speed:.0f}" for speed in row.speeds.values()),
            f"{row.ratio:.2f}x ({min(found):.2f}-{max(found):.2f})",
        )
    return table


def memory_table(rows: Sequence[MemoryRow]) -> Table:
    """Mebibytes, a row per process."""
    table = Table(
        title="MiB of a process that serves a full batch of long prompts",
        caption="peaks while loading, starting and serving, beyond bare: everything imported, nothing loaded; copies: "
        "packed weights that are there in plain form as well, beyond the weights",
    )
    table.add_column("requests")
    for title in ("bare", "weights", "KV", "copies", "loading", "starting", "serving"):
        table.add_column(title, justify="right")
    for title in rows[0].ratios:
        table.add_column(title, justify="right", style="bold")
    for row in rows:
        peaks = (peak - row.bare for peak in (row.loading, row.starting, row.serving))
        sizes = (row.bare, row.weights, row.kv, row.copies, *peaks)
        table.add_row(
            f"{row.batch} of {row.prompt} tokens, {row.dtype}",
            *(f"{size / 2**20:.0f}" for size in sizes),
            *(f"{ratio:.2f}x" for ratio in row.ratios.values()),
        )
    return table
