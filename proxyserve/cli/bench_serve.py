"""`proxyserve bench serve`: load on a server that speaks OpenAI's API, ours or any other."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from proxyserve.bench.load.answer import Checks
from proxyserve.bench.load.chart import check_charts, save_load_chart
from proxyserve.bench.load.drive import Load, Target
from proxyserve.bench.load.lengths import Lengths
from proxyserve.bench.load.prompts import Prompts
from proxyserve.bench.load.run import LoadResult, LoadSettings, run_load
from proxyserve.bench.load.statistics import Figure, Summary
from proxyserve.bench.load.workload import Workload
from proxyserve.cli.files import read_text
from proxyserve.cli.printing import AsJson, print_json
from proxyserve.errors import ProxyserveError

#: Seconds of arrivals, and requests of each client, where --requests does not say how many.
_ARRIVAL_SECONDS = 20.0
_PER_CLIENT = 4
_LEAST = 8


def bench_serve_command(
    url: Annotated[str, typer.Argument(metavar="URL", help="Address of the server: http://127.0.0.1:8000")],
    model: Annotated[
        list[str],
        typer.Option(
            "--model",
            metavar="NAME[=SHARE]",
            help="What to ask for; repeatable, with shares of the requests. Ours may be BASE+EXPERT:0.5.",
        ),
    ],
    tokenizer: Annotated[
        Path,
        typer.Option(
            "--tokenizer",
            exists=True,
            file_okay=False,
            help="Folder of the model served: its tokenizer.json.",
        ),
    ],
    clients: Annotated[
        str | None,
        typer.Option(
            "--clients", metavar="N[,N]...", help="Closed loop: so many ask again as soon as answered."
        ),
    ] = None,
    rate: Annotated[
        str | None,
        typer.Option("--rate", metavar="R[,R]...", help="Open loop: Poisson arrivals, so many per second."),
    ] = None,
    requests: Annotated[
        int | None,
        typer.Option(
            "--requests",
            min=1,
            help=f"Of each load in each round. Default: {_PER_CLIENT} per client or {_ARRIVAL_SECONDS:g} seconds of "
            f"arrivals, {_LEAST} at least.",
        ),
    ] = None,
    prompt: Annotated[
        str,
        typer.Option(
            "--prompt", metavar="LENGTHS", help="Tokens: 64, 16-256, mix:16=3,512=1, lognormal:128:0.8:1024."
        ),
    ] = "64",
    output: Annotated[
        str, typer.Option("--output", metavar="LENGTHS", help="Tokens of the answers, in the same forms.")
    ] = "64",
    texts: Annotated[
        bool, typer.Option("--texts", help="Send texts of exactly so many tokens instead of token ids.")
    ] = False,
    chat: Annotated[
        bool,
        typer.Option("--chat", help="Ask /v1/chat/completions instead of /v1/completions; implies --texts."),
    ] = False,
    stream: Annotated[bool, typer.Option("--stream/--no-stream", help="Have answers streamed.")] = True,
    ids: Annotated[
        bool,
        typer.Option("--ids", help="Ask for token ids too (ours, vLLM) and count answers by them as well."),
    ] = False,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Measurements of each load, in turns.")] = 3,
    warmup: Annotated[
        int, typer.Option("--warmup", min=0, help="Requests before each load, not counted.")
    ] = 4,
    seed: Annotated[int, typer.Option("--seed", help="The same one asks the same at the same times.")] = 0,
    body: Annotated[
        str,
        typer.Option(
            "--body",
            metavar="JSON",
            help="More fields of every request. Without null for ignore_eos, answers have to be as long as asked for.",
        ),
    ] = '{"temperature": 0}',
    key_file: Annotated[
        Path | None,
        typer.Option("--api-key-file", exists=True, dir_okay=False, help="File with a key of the server."),
    ] = None,
    timeout: Annotated[float, typer.Option("--timeout", min=0.1, help="Seconds for an answer.")] = 600.0,
    save: Annotated[Path | None, typer.Option("--save", help="Write the result as JSON.")] = None,
    chart: Annotated[Path | None, typer.Option("--chart", help="Write a chart as PNG.")] = None,
    as_json: AsJson = False,
) -> None:
    """Ask a server as many clients would, and say how fast it answers. Runs in this process: see what it takes of the
    CPU itself, in the last columns. Exit code 1 if no request of some load was answered."""
    extra = _fields(body)
    if ids:
        extra["return_token_ids"] = True
    target = Target(
        url=url,
        key=None if key_file is None else read_text(key_file).strip(),
        chat=chat,
        stream=stream,
        extra=extra,
        checks=Checks(prompt=not chat, length=extra.get("ignore_eos", True) is True),
        timeout=timeout,
    )
    workload = Workload(
        models=_shares(model),
        prompt=_lengths(prompt, "--prompt"),
        output=_lengths(output, "--output"),
        prompts=Prompts(tokenizer, as_text=texts or chat),
        seed=seed,
    )
    _check_files(save, chart)
    settings = LoadSettings(target, workload, _loads(clients, rate, requests), rounds=rounds, warmup=warmup)
    console = Console(stderr=True)
    # Lines, not a spinner: that is a thread, which would wake up in the middle of what is timed.
    result = run_load(settings, progress=lambda message: console.print(message, style="dim", markup=False))
    if as_json:
        print_json(result.as_dict())
    else:
        Console().print(load_table(result))
    for summary in result.summaries:
        for trouble in summary.troubles:
            console.print(f"{summary.load}: {trouble}", style="yellow", markup=False)
        for kind, message in summary.messages.items():
            if message:
                console.print(f"first {kind}: {message}", style="yellow", markup=False)
    if save is not None:
        save.write_text(json.dumps(result.as_dict(), indent=2) + "\n")
    if chart is not None:
        save_load_chart(result, chart)
    if any(summary.answered == 0 for summary in result.summaries):
        raise typer.Exit(1)


def load_table(result: LoadResult) -> Table:
    """A row per load: medians of the rounds; tokens per second with the lowest and the highest round."""
    settings = result.settings
    target, workload = settings.target, settings.workload
    table = Table(
        title=f"{target.url}: {', '.join(workload.models)}\n{workload.prompt.text} prompt and {workload.output.text} "
        f"new tokens, {'streamed' if target.stream else 'not streamed'}, medians of {settings.rounds} rounds",
        caption="ms as p50 / p90 / p99; gap: between two pieces of text; CPU: of the load generator itself",
    )
    table.add_column("load")
    for title in (
        "tokens/s",
        "of rounds",
        "first text",
        "gap",
        "per token",
        "whole",
        "failed",
        "CPU",
        "us/token",
    ):
        table.add_column(title, justify="right")
    for summary in result.summaries:
        table.add_row(*_row(summary))
    return table


def _row(summary: Summary) -> Sequence[str]:
    speed = summary.tokens_per_second
    failed = sum(summary.errors.values())
    return (
        str(summary.load),
        f"{speed.median:.0f}",
        f"{speed.low:.0f}-{speed.high:.0f}",
        *(_milliseconds(figures) for figures in summary.times.values()),
        f"{failed} of {failed + summary.answered}",
        f"{summary.cpu_share.median:.1%}",
        f"{summary.cpu_per_token.median * 1e6:.0f}",
    )


def _milliseconds(figures: dict[float, Figure]) -> str:
    medians = [figure.median for figure in figures.values()]
    if any(map(math.isnan, medians)):
        return "-"
    return " / ".join(
        f"{seconds * 1e3:.0f}" if seconds > 0.1 else f"{seconds * 1e3:.1f}" for seconds in medians
    )


def _loads(clients: str | None, rate: str | None, requests: int | None) -> list[Load]:
    if clients is None and rate is None:
        raise ProxyserveError("Give --clients or --rate (or both): how much load there should be.")
    loads = []
    for count in _numbers(clients, "--clients"):
        if count != int(count):
            raise ProxyserveError(f"'{clients}' for --clients: {count:g} is no whole number.")
        loads.append(Load(requests or max(_LEAST, _PER_CLIENT * int(count)), clients=int(count)))
    for per_second in _numbers(rate, "--rate"):
        loads.append(Load(requests or max(_LEAST, round(_ARRIVAL_SECONDS * per_second)), rate=per_second))
    return loads


def _numbers(text: str | None, option: str) -> list[float]:
    if text is None:
        return []
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or not all(0 < number < math.inf for number in numbers):
        raise ProxyserveError(f"'{text}' for {option} is no list of numbers above 0; write 1,8,32.")
    return numbers


def _shares(models: Sequence[str]) -> dict[str, float]:
    shares: dict[str, float] = {}
    for name, share in map(_share, models):
        if name in shares:
            raise ProxyserveError(
                f"--model has '{name}' twice; give it once, with its share of the requests."
            )
        shares[name] = share
    return shares


def _share(text: str) -> tuple[str, float]:
    """`NAME` or `NAME=SHARE`; names may have an equals sign themselves."""
    name, equals, share = text.rpartition("=")
    try:
        number = float(share) if equals else math.nan
    except ValueError:
        number = math.nan
    if math.isnan(number):
        return text, 1.0
    if not 0.0 < number < math.inf or not name:
        raise ProxyserveError(f"'{text}' for --model: the share after '=' must be above 0.")
    return name, number


def _lengths(text: str, option: str) -> Lengths:
    try:
        return Lengths.parse(text)
    except ProxyserveError as error:
        raise ProxyserveError(f"{option}: {error}") from error


def _check_files(save: Path | None, chart: Path | None) -> None:
    """Before minutes are measured, not after."""
    for option, file in (("--save", save), ("--chart", chart)):
        if file is not None and not file.absolute().parent.is_dir():
            raise ProxyserveError(f"{option}: there is no folder {file.parent}.")
    if chart is not None:
        check_charts()


def _fields(text: str) -> dict[str, Any]:
    try:
        fields = json.loads(text)
    except ValueError as error:
        raise ProxyserveError(f"--body is no JSON: {error}.") from error
    if not isinstance(fields, dict):
        raise ProxyserveError('--body must be a JSON object: {"temperature": 0}.')
    return fields
