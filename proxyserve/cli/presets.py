"""`proxyserve presets`: fusions with names, callable as models of a running server."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from proxyserve.cli.completing import complete_presets
from proxyserve.cli.connection import DEFAULT_URL, Url
from proxyserve.cli.control import AdminKeyFile, ControlPlane
from proxyserve.cli.printing import AsJson, parse_json_object, print_json

presets_app = typer.Typer(
    name="presets",
    no_args_is_help=True,
    add_completion=False,
    help="Fusions with names, callable as models of a running server.",
)

Name = Annotated[
    str, typer.Argument(metavar="NAME", help="Name of the preset.", autocompletion=complete_presets)
]


@presets_app.command("list")
def list_command(
    url: Url = DEFAULT_URL, admin_key_file: AdminKeyFile = None, as_json: AsJson = False
) -> None:
    """All presets."""
    with ControlPlane(url, admin_key_file) as control:
        presets = control.presets()
    if as_json:
        print_json(presets)
    elif presets:
        table = Table("name", "fusion")
        for preset in presets:
            table.add_row(Text(preset["name"]), Text(json.dumps(preset["fusion"], ensure_ascii=False)))
        Console().print(table)
    else:
        typer.echo("no presets")


@presets_app.command("show")
def show_command(
    name: Name, url: Url = DEFAULT_URL, admin_key_file: AdminKeyFile = None, as_json: AsJson = False
) -> None:
    """The fusion of a preset, as `presets set` takes it."""
    with ControlPlane(url, admin_key_file) as control:
        preset = control.preset(name)
    print_json(preset if as_json else preset["fusion"])


@presets_app.command("set")
def set_command(
    name: Name,
    fusion: Annotated[
        str,
        typer.Argument(
            metavar="FUSION", help='A fusion object, \'{"rule": "dynamic", "experts": {"qa": 1}}\' say.'
        ),
    ],
    url: Url = DEFAULT_URL,
    admin_key_file: AdminKeyFile = None,
    as_json: AsJson = False,
) -> None:
    """Save a fusion under a name; an older preset of that name is replaced."""
    value = parse_json_object(fusion, "FUSION")
    with ControlPlane(url, admin_key_file) as control:
        preset = control.put_preset(name, value)
    if as_json:
        print_json(preset)
    else:
        typer.echo(f"preset {name} is saved")


@presets_app.command("delete")
def delete_command(
    name: Name, url: Url = DEFAULT_URL, admin_key_file: AdminKeyFile = None, as_json: AsJson = False
) -> None:
    """Delete a preset. Requests that run are not touched."""
    with ControlPlane(url, admin_key_file) as control:
        answer = control.delete_preset(name)
    if as_json:
        print_json(answer)
    else:
        typer.echo(f"preset {name} is deleted")
