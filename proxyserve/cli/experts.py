"""`proxyserve experts`: bring, exchange and take away experts of a running server."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich import filesize
from rich.console import Console, JustifyMethod
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from proxyserve.cli.completing import complete_experts
from proxyserve.cli.connection import DEFAULT_URL, Url
from proxyserve.cli.control import AdminKeyFile, ControlPlane
from proxyserve.cli.exits import Refused
from proxyserve.cli.printing import AsJson, print_json
from proxyserve.errors import ProxyserveError

experts_app = typer.Typer(
    name="experts",
    no_args_is_help=True,
    add_completion=False,
    help="Bring, exchange and take away experts of a running server.",
)

#: Seconds between two looks at a generation that is loading.
_POLL = 0.2

#: Phases on the way to being published, in their order.
_WORK = ("loading", "verifying", "warming")

Name = Annotated[
    str, typer.Argument(metavar="NAME", help="Name of the expert.", autocompletion=complete_experts)
]
Tuned = Annotated[
    str | None,
    typer.Argument(
        metavar="[TUNED]", help="Folder, file or hub id of the tuned model, as the server sees it."
    ),
]
Untuned = Annotated[
    str | None,
    typer.Argument(
        metavar="[UNTUNED]", help="The same of its untuned twin; adapters and diffs have theirs in --of."
    ),
]
FormatOption = Annotated[
    str | None,
    typer.Option("--format", help="folder, lora, diff or compressed; default: told from the files."),
]
Of = Annotated[
    str | None,
    typer.Option("--of", metavar="MODEL", help="Loaded small model that an adapter, diff or merge changes."),
]
Scale = Annotated[float | None, typer.Option("--scale", help="Multiplies an adapter or a diff.")]
Layers = Annotated[
    str | None,
    typer.Option(
        "--layers",
        metavar="FIRST:LAST",
        help="Factors of a diff's first and last layer, linear between them.",
    ),
]
Merge = Annotated[
    list[str] | None,
    typer.Option(
        "--merge",
        metavar="WEIGHT=PATH",
        help="Instead of TUNED: what PATH changes of --of, WEIGHT times. May be given several times; they add up.",
    ),
]
NoWait = Annotated[bool, typer.Option("--no-wait", help="Return as soon as the change has begun.")]


@experts_app.command("list")
def list_command(
    url: Url = DEFAULT_URL, admin_key_file: AdminKeyFile = None, as_json: AsJson = False
) -> None:
    """All experts: what serves, what a rollback would bring back, what it takes."""
    with ControlPlane(url, admin_key_file) as control:
        experts = control.experts()
    if as_json:
        print_json(experts)
    elif experts:
        Console().print(_overview(experts))
    else:
        typer.echo("no experts")


@experts_app.command("show")
def show_command(
    name: Name, url: Url = DEFAULT_URL, admin_key_file: AdminKeyFile = None, as_json: AsJson = False
) -> None:
    """One expert and each of its generations, the newest first."""
    with ControlPlane(url, admin_key_file) as control:
        expert = control.expert(name)
    if as_json:
        print_json(expert)
        return
    typer.echo(_headline(expert))
    if expert["last_error"]:
        typer.echo(f"last error: {expert['last_error']}")
    Console().print(_generations(expert["generations"]))


@experts_app.command("load")
def load_command(
    name: Name,
    tuned: Tuned = None,
    untuned: Untuned = None,
    source_format: FormatOption = None,
    of: Of = None,
    scale: Scale = None,
    layers: Layers = None,
    merge: Merge = None,
    protected: Annotated[
        bool, typer.Option("--protected", help="Only administrators may give it negative weights.")
    ] = False,
    no_wait: NoWait = False,
    url: Url = DEFAULT_URL,
    admin_key_file: AdminKeyFile = None,
    as_json: AsJson = False,
) -> None:
    """Load a new expert and follow it until requests can use it. Requests that run notice nothing."""
    body = _body(tuned, untuned, source_format, of, scale, layers, merge)
    with ControlPlane(url, admin_key_file) as control:
        if _serving(control, name) is not None:
            raise ProxyserveError(f"There is an expert '{name}' already; use: proxyserve experts swap {name}")
        _put(control, name, {**body, "protected": protected}, no_wait=no_wait, as_json=as_json)


@experts_app.command("swap")
def swap_command(
    name: Name,
    tuned: Tuned = None,
    untuned: Untuned = None,
    source_format: FormatOption = None,
    of: Of = None,
    scale: Scale = None,
    layers: Layers = None,
    merge: Merge = None,
    protected: Annotated[
        bool | None,
        typer.Option(
            "--protected/--not-protected",
            help="Only administrators may give it negative weights. Default: as it was.",
        ),
    ] = None,
    no_wait: NoWait = False,
    url: Url = DEFAULT_URL,
    admin_key_file: AdminKeyFile = None,
    as_json: AsJson = False,
) -> None:
    """Load a new generation of an expert and follow it until it serves. Requests that run end on the old one."""
    body = _body(tuned, untuned, source_format, of, scale, layers, merge)
    with ControlPlane(url, admin_key_file) as control:
        existing = _serving(control, name)
        if existing is None:
            raise ProxyserveError(f"There is no expert '{name}' yet; use: proxyserve experts load {name}")
        body["protected"] = existing["protected"] if protected is None else protected
        _put(control, name, body, no_wait=no_wait, as_json=as_json)


@experts_app.command("rollback")
def rollback_command(
    name: Name,
    no_wait: NoWait = False,
    url: Url = DEFAULT_URL,
    admin_key_file: AdminKeyFile = None,
    as_json: AsJson = False,
) -> None:
    """Give new requests the previous generation again."""
    with ControlPlane(url, admin_key_file) as control, _waiting(f"rolling {name} back"):
        answer = control.rollback(name, wait=not no_wait)
    if as_json:
        print_json(answer)
    elif no_wait:
        typer.echo(f"expert {name} is going back to generation {answer['generation']}")
    else:
        typer.echo(_headline(answer))


@experts_app.command("unload")
def unload_command(
    name: Name,
    no_wait: NoWait = False,
    url: Url = DEFAULT_URL,
    admin_key_file: AdminKeyFile = None,
    as_json: AsJson = False,
) -> None:
    """Take an expert away: no new requests, and its weights go when the last one that runs has ended."""
    with ControlPlane(url, admin_key_file) as control, _waiting(f"waiting for requests that run on {name}"):
        answer = control.delete_expert(name, wait=not no_wait)
    if as_json:
        print_json(answer)
    else:
        typer.echo(f"expert {name} takes no new requests" if no_wait else f"expert {name} is unloaded")


def _body(
    tuned: str | None,
    untuned: str | None,
    source_format: str | None,
    of: str | None,
    scale: float | None,
    layers: str | None,
    merge: list[str] | None,
) -> dict[str, Any]:
    """The request that the options make. Raises BadParameter for what cannot be meant together."""
    if not merge:
        if tuned is None:
            raise typer.BadParameter("name the tuned model, or several with --merge", param_hint="TUNED")
        source = {
            "path": tuned,
            "format": source_format,
            "of": of,
            "scale": scale,
            "layers": None if layers is None else _parse_layers(layers),
        }
        body: dict[str, Any] = {"tuned": {key: value for key, value in source.items() if value is not None}}
        return body if untuned is None else {**body, "untuned": untuned}
    if tuned is not None:
        raise typer.BadParameter("with --merge the models are named there; leave it out", param_hint="TUNED")
    if of is None:
        raise typer.BadParameter("a merge needs the loaded model that it changes", param_hint="--of")
    for hint, value in (("--format", source_format), ("--scale", scale), ("--layers", layers)):
        if value is not None:
            raise typer.BadParameter("it is for a single TUNED; leave it out with --merge", param_hint=hint)
    return {"tuned": {"of": of, "merge": [_parse_part(text) for text in merge]}}


def _parse_part(text: str) -> dict[str, Any]:
    """`0.5=/models/qa` -> a part of a merge."""
    weight, equals, path = text.partition("=")
    if equals and path:
        return {"weight": _number(weight, "--merge", "WEIGHT=PATH"), "path": path}
    raise typer.BadParameter(f"'{text}' is not of the form WEIGHT=PATH", param_hint="--merge")


def _parse_layers(text: str) -> dict[str, float]:
    """`0.2:1.0` -> factors of the first and the last layer."""
    first, colon, last = text.partition(":")
    if not colon:
        raise typer.BadParameter(f"'{text}' is not of the form FIRST:LAST", param_hint="--layers")
    return {
        name: _number(part, "--layers", "FIRST:LAST") for name, part in (("first", first), ("last", last))
    }


def _number(text: str, hint: str, form: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise typer.BadParameter(f"'{text}' is no number; the form is {form}", param_hint=hint) from None
    if not math.isfinite(value):
        raise typer.BadParameter(f"'{text}' is not finite", param_hint=hint)
    return value


def _serving(control: ControlPlane, name: str) -> dict[str, Any] | None:
    """The expert if a generation of it serves. A name under which none ever did, or does no more, is as good as new."""
    try:
        expert = control.expert(name)
    except Refused as error:
        if error.unknown_name:
            return None
        raise
    return None if expert["generation"] is None else expert


def _put(control: ControlPlane, name: str, body: dict[str, Any], *, no_wait: bool, as_json: bool) -> None:
    """Begin a generation and follow it. Raises ProxyserveError with the reason if it fails."""
    change = control.put_expert(name, body)
    number: int = change["generation"]
    if no_wait:
        if as_json:
            print_json(change)
        else:
            typer.echo(f"generation {number} of {name} is loading; see: proxyserve experts show {name}")
        return
    expert = _follow(control, name, number)
    generation = _generation(expert, number)
    if generation["phase"] == "failed":
        serving = expert["generation"]
        rest = "no generation serves" if serving is None else f"generation {serving} goes on serving"
        raise ProxyserveError(f"generation {number} of {name} failed ({rest}): {generation['error']}")
    if as_json:
        print_json(expert)
        return
    seconds = ", ".join(f"{phase} {taken:.2f} s" for phase, taken in generation["seconds"].items())
    typer.echo(
        f"generation {number} of {name} is {generation['phase']}" + (f": {seconds}" if seconds else "")
    )


def _follow(control: ControlPlane, name: str, number: int) -> dict[str, Any]:
    """The expert once that generation has been published or has failed; until then its phases are shown."""
    with _phases(f"generation {number} of {name}") as show:
        while True:
            expert = control.expert(name)
            generation = _generation(expert, number)
            if generation["phase"] not in _WORK:
                return expert
            show(generation["phase"], generation["progress"])
            time.sleep(_POLL)


def _generation(expert: dict[str, Any], number: int) -> dict[str, Any]:
    """Raises ProxyserveError if the expert has it no more."""
    for generation in expert["generations"]:
        if generation["generation"] == number:
            found: dict[str, Any] = generation
            return found
    raise ProxyserveError(
        f"generation {number} of {expert['name']} is gone; somebody else changed the expert"
    )


@contextmanager
def _phases(title: str) -> Iterator[Callable[[str, float | None], None]]:
    """Gives what shows a phase and how much of it is done: a bar on a terminal, a line per phase elsewhere."""
    console = Console(stderr=True)
    if not console.is_terminal:
        shown: set[str] = set()

        def say(phase: str, progress: float | None) -> None:
            if phase not in shown:
                shown.add(phase)
                print(f"{title}: {phase}", file=sys.stderr, flush=True)

        yield say
        return
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(title, total=None)

        def draw(phase: str, progress: float | None) -> None:
            # Without a total the bar pulses.
            total = None if progress is None else 1.0
            bar.update(
                task,
                description=f"{title}: {phase}",
                total=total,
                completed=progress or 0.0,
                refresh=True,
            )

        yield draw


@contextmanager
def _waiting(text: str) -> Iterator[None]:
    """Says on a terminal what takes so long."""
    with Console(stderr=True).status(Text(text)):
        yield


def _overview(experts: Sequence[dict[str, Any]]) -> Table:
    table = _table(
        ("name", "left"),
        ("state", "left"),
        ("serves", "right"),
        ("before", "right"),
        ("format", "left"),
        ("size", "right"),
        ("running", "right"),
        ("last error", "left"),
    )
    for expert in experts:
        generations = expert["generations"]
        serving = [entry for entry in generations if entry["generation"] == expert["generation"]]
        formats = [entry["formats"]["tuned"] for entry in serving or generations[:1]]
        _add_row(
            table,
            expert["name"],
            _state(expert),
            expert["generation"],
            expert["previous"],
            *(formats or [""]),
            filesize.decimal(sum(generation["bytes"] for generation in generations)),
            sum(generation["requests"] for generation in generations),
            expert["last_error"],
        )
    return table


def _generations(generations: Sequence[dict[str, Any]]) -> Table:
    table = _table(
        ("gen", "right"),
        ("phase", "left"),
        ("tuned", "left"),
        ("untuned", "left"),
        ("size", "right"),
        ("running", "right"),
        ("took", "right"),
        ("content", "left"),
        ("error", "left"),
    )
    for generation in generations:
        progress = generation["progress"]
        _add_row(
            table,
            generation["generation"],
            generation["phase"] + ("" if progress is None else f" {progress:.0%}"),
            _source(generation, "tuned"),
            _source(generation, "untuned"),
            filesize.decimal(generation["bytes"]),
            generation["requests"],
            f"{sum(generation['seconds'].values()):.2f} s",
            generation["content_hash"][:12],
            generation["error"],
        )
    return table


def _table(*columns: tuple[str, JustifyMethod]) -> Table:
    """Without lines, so that it fits into 80 columns as long as names and errors are short; only what may be long is
    folded."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    for name, justify in columns:
        table.add_column(
            name,
            justify=justify,
            overflow="fold",
            no_wrap=name not in ("tuned", "untuned", "last error", "error"),
        )
    return table


def _add_row(table: Table, *cells: Any) -> None:
    """What the server says is text, not markup."""
    table.add_row(*(Text("" if cell is None else str(cell)) for cell in cells))


def _headline(expert: dict[str, Any]) -> str:
    """`expert qa: published, generation 3, previous 2, protected`"""
    parts = [_state(expert)]
    parts += [f"{key} {expert[key]}" for key in ("generation", "previous") if expert[key] is not None]
    parts += ["protected"] if expert["protected"] else []
    return f"expert {expert['name']}: {', '.join(parts)}"


def _state(expert: dict[str, Any]) -> str:
    """With the phase of a generation that is about to replace the one that serves."""
    for newest in expert["generations"][:1]:
        if expert["state"] != "loading" and newest["phase"] in _WORK:
            return f"{expert['state']}, {newest['generation']} {newest['phase']}"
    return str(expert["state"])


def _source(generation: dict[str, Any], which: str) -> str:
    """`lora /models/qa of small`, or a line for each part of a merge."""
    source = generation["sources"].get(which)
    if source is None:
        return ""
    of = f" of {source['of']}" if "of" in source else ""
    parts = [f"{part['weight']:g} {part['path']}" for part in source.get("merge", ())]
    return "\n".join(
        [f"{generation['formats'].get(which, '')} {source.get('path', '')}".strip() + of, *parts]
    )
