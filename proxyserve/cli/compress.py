"""`proxyserve compress`: a small file out of a tuned model, and what that costs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from proxyserve.cli import options
from proxyserve.cli.files import check_writable, read_text
from proxyserve.cli.printing import AsJson, print_json

if TYPE_CHECKING:
    from proxyserve.evaluation.compress import Divergences

_DENSITY = 0.2

#: Told what is done and which share of it.
Report = Callable[[str, float], None]


def compress_command(
    tuned: Annotated[Path, typer.Argument(metavar="TUNED", help="Folder of the tuned model.")],
    untuned: Annotated[Path, typer.Argument(metavar="UNTUNED", help="Folder of what it was tuned from.")],
    out: Annotated[
        Path | None,
        typer.Argument(
            metavar="[OUT]",
            help="New folder, or a new file that ends in .safetensors; default: TUNED-compressed (or -diff) here.",
        ),
    ] = None,
    density: Annotated[
        float | None,
        typer.Option(
            "--density", help=f"Share of the entries to keep, above 0 and at most 1 [{_DENSITY:g}]."
        ),
    ] = None,
    diff: Annotated[
        bool, typer.Option("--diff", help="Write the plain diff vector instead, in float32.")
    ] = False,
    text: Annotated[
        Path | None,
        typer.Option(
            "--text", exists=True, dir_okay=False, help="Text to measure on; default: a short mixed one."
        ),
    ] = None,
    as_json: AsJson = False,
    threads: options.Threads = None,
) -> None:
    """Write what tuning changed as a small file: the largest changes only, by their signs and one scale.

    Prints sizes, and how far the expert's law has moved on a probe text: the mean KL divergence from the tuned model,
    in nats per token, for several scales to serve the file with, and that of the untuned model to compare.
    """
    import torch

    from proxyserve.evaluation.compress import PROBE_TEXT, SCALES, measure
    from proxyserve.models.formats.compressed import compress, read_compressed
    from proxyserve.models.formats.diff import make_diff, read_diff
    from proxyserve.models.formats.tensors import FolderTensors

    if diff and density is not None:
        raise typer.BadParameter("a plain diff keeps everything; leave it out", param_hint="--density")
    density = _DENSITY if density is None else density
    if not 0.0 < density <= 1.0:
        raise typer.BadParameter("must be above 0 and at most 1", param_hint="--density")
    if out is None:
        out = Path(f"{tuned.resolve().name}-{'diff' if diff else 'compressed'}")
    if out.exists():
        raise typer.BadParameter(f"{out} is there already; name another, or remove it", param_hint="OUT")
    check_writable(out, "OUT")
    probe = PROBE_TEXT if text is None else read_text(text)
    if not probe.strip():
        raise typer.BadParameter("the text is empty", param_hint="--text")
    if threads is not None:
        torch.set_num_threads(threads)
    result: dict[str, Any]
    with _progress() as report:
        if diff:
            size = make_diff(tuned, untuned, out, progress=lambda share: report("writing", share))
            with FolderTensors(tuned) as weights:
                parameters, original = weights.parameters, weights.bytes
            result = {"format": "diff", "bytes": size, "total": parameters, "original_bytes": original}
            change, scales = read_diff(out), [1.0]
        else:
            made = compress(
                tuned, untuned, out, density=density, progress=lambda share: report("compressing", share)
            )
            result = {"format": "compressed", "density": density, **asdict(made)}
            change, scales = read_compressed(out), list(SCALES)
        found = measure(
            tuned, untuned, change, probe, scales, progress=lambda share: report("measuring", share)
        )
    result["out"], result["file"] = str(out), str(change.path)
    result["bf16_ratio"] = 2 * result["total"] / result["bytes"]
    result["diff_ratio"] = 4 * result["total"] / result["bytes"]
    if as_json:
        print_json({**result, "probe": _as_json(found)})
    else:
        _show(result, found)


def _as_json(found: Divergences) -> dict[str, Any]:
    return {
        "tokens": found.tokens,
        "kl_untuned": found.untuned,
        "best_scale": found.best_scale,
        "kl": [{"scale": scale, "nats": value} for scale, value in found.changed.items()],
    }


def _show(result: dict[str, Any], found: Divergences) -> None:
    console = Console()
    what = "the diff" if result["format"] == "diff" else f"{result['kept']:,} of {result['total']:,} changes"
    console.print(
        f"{result['file']}: {what} in {result['bytes']:,} bytes. The weights in bfloat16 have "
        f"{result['bf16_ratio']:.1f}x as many, the diff in float32 {result['diff_ratio']:.1f}x.",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    table = Table("expert")
    table.add_column(f"KL(tuned || expert), nats per token (of {found.tokens})", justify="right")
    table.add_row("untuned", f"{found.untuned:.4f}")
    for scale, value in found.changed.items():
        style = "bold" if scale == found.best_scale and len(found.changed) > 1 else ""
        table.add_row(f"this file, scale {scale:g}", f"{value:.4f}", style=style)
    console.print(table)
    source: dict[str, Any] = {"path": result["out"]}
    if found.best_scale != 1.0:
        source["scale"] = found.best_scale
    console.print(f"as a source: {json.dumps(source)}", highlight=False, markup=False, soft_wrap=True)


@contextmanager
def _progress() -> Iterator[Report]:
    """A bar on a terminal, nothing elsewhere."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=1.0)
        yield lambda what, share: bar.update(task, description=what, completed=share)
