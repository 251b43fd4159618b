"""`python -m benchmarks.peers`: proxyserve beside other servers. See README.md in this folder."""

from __future__ import annotations

import enum
import json
import signal
import sys
from pathlib import Path
from tempfile import mkdtemp
from time import perf_counter
from typing import Annotated

import transformers
import typer

from benchmarks.chart import save_comparison_chart
from benchmarks.compare import Settings, compare
from benchmarks.contestants import SEATS
from benchmarks.table import markdown
from proxyserve.bench.speculation import SIZES
from proxyserve.errors import ProxyserveError

_HERE = Path(__file__).parent
_CLIENTS, _ROUNDS = "1,16,32", 2
_QUICK_CLIENTS = "1,16"


class Dtype(enum.StrEnum):
    """What everybody computes in."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


def command(
    peers: Annotated[
        Path, typer.Option("--peers", help="Folder that setup_peers.sh filled.", file_okay=False)
    ] = _HERE / ".peers",
    size: Annotated[str, typer.Option("--size", help=f"Of the models: {', '.join(SIZES)}.")] = "68M",
    dtype: Annotated[Dtype, typer.Option("--dtype", help="What everybody computes in.")] = Dtype.FLOAT32,
    share: Annotated[
        float, typer.Option("--share", min=0.0, max=1.0, help="Of tokens at which a draft stands.")
    ] = 0.8,
    clients: Annotated[
        str | None,
        typer.Option(
            "--clients", metavar="N[,N]...", help=f"Who wait for their answers, at once. Default: {_CLIENTS}."
        ),
    ] = None,
    requests: Annotated[
        int,
        typer.Option("--requests", min=1, help="Of each client in each round; a single one asks twice that."),
    ] = 1,
    rounds: Annotated[
        int | None,
        typer.Option("--rounds", min=1, help=f"Turns of everybody at each load. Default: {_ROUNDS}."),
    ] = None,
    prompt: Annotated[int, typer.Option("--prompt", min=1, help="Tokens of each prompt.")] = 64,
    new: Annotated[int, typer.Option("--new", min=2, help="Tokens of each answer.")] = 64,
    cores: Annotated[
        str | None,
        typer.Option(
            "--cores", metavar="N[,N]...", help="CPU cores for all servers; default: all there are."
        ),
    ] = None,
    quick: Annotated[
        bool,
        typer.Option("--quick", help=f"Where not said otherwise, {_QUICK_CLIENTS} clients and one round."),
    ] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the result as JSON.")] = None,
    table: Annotated[Path | None, typer.Option("--table", help="Write the table as Markdown.")] = None,
    chart: Annotated[Path | None, typer.Option("--chart", help="Write a chart as PNG.")] = None,
) -> None:
    """Tokens per second of proxyserve, of other servers with the base alone and of the plain Hugging Face loop: same
    machine, models and requests, in turns. A peer that is not installed or does not start is left out, and the table
    says why."""
    began = perf_counter()
    settings = Settings(
        peers=peers.absolute(),
        size=_known_size(size),
        dtype=dtype.value,
        share=share,
        clients=_numbers(clients or (_QUICK_CLIENTS if quick else _CLIENTS), "--clients", 1, SEATS),
        requests=requests,
        rounds=rounds or (1 if quick else _ROUNDS),
        prompt=prompt,
        new=new,
        cores=None if cores is None else _numbers(cores, "--cores", 0, 4095),
    )
    transformers.utils.logging.disable_progress_bar()
    logs = Path(mkdtemp(prefix="peers-logs-"))

    def progress(message: str) -> None:
        print(f"[{perf_counter() - began:4.0f} s] {message}", file=sys.stderr, flush=True)

    progress(f"what servers say is in {logs}")
    found = compare(settings, logs=logs, progress=progress).as_dict()
    text = markdown(found)
    print(text)
    if json_file is not None:
        json_file.write_text(json.dumps(found, indent=2) + "\n")
    if table is not None:
        table.write_text(text)
    if chart is not None:
        save_comparison_chart(found, chart)


def _known_size(name: str) -> str:
    if name not in SIZES:
        raise ProxyserveError(f"'{name}' for --size: there are {', '.join(SIZES)}.")
    return name


def _numbers(text: str, option: str, low: int, high: int) -> tuple[int, ...]:
    try:
        numbers = tuple(int(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if not numbers or not all(low <= number <= high for number in numbers):
        raise ProxyserveError(f"'{text}' for {option}: write numbers from {low} to {high}, as 1,16.")
    return numbers


def main() -> None:
    """Mistakes of the user end with a line, not with a traceback; whoever ends this process ends the servers too."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        typer.run(command)
    except ProxyserveError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
