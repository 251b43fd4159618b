"""`proxyserve formula`: check a formula and see what it compiles to, without loading anything."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from proxyserve.cli import options
from proxyserve.cli.printing import AsJson, print_json
from proxyserve.demo.family import BASE, family_paths


def formula_command(
    text: Annotated[str, typer.Argument(metavar="FORMULA", help='Such as "base + 0.8*(qa.tuned - small)".')],
    explain: Annotated[bool, typer.Option("--explain", help="Print the compiled program.")] = False,
    base: Annotated[str, typer.Option("--base", help="Name of the base.")] = BASE,
    expert: options.ExpertOption = None,
    preset: options.PresetOption = None,
    as_json: AsJson = False,
) -> None:
    """Parse a formula over these names (default: the demo family's) and say what it adds up.

    Nothing is loaded: of --expert only the names count. An error points at the character and exits with 1.
    """
    from proxyserve.api.presets import parse_presets
    from proxyserve.fusion.names import catalog_of_names
    from proxyserve.fusion.rules.formula import Formula

    presets = parse_presets(dict(options.parse_preset(entry) for entry in preset or ()), {base})
    catalog = catalog_of_names(base, _untuned_names(expert), presets)
    program = Formula(text).compile(catalog)
    coefficients = {lane: value for lane, value in program.coefficients().items() if value}
    if as_json:
        print_json({"formula": text, "coefficients": coefficients, "program": program.describe()})
    elif explain:
        typer.echo(program.describe())
    else:
        typer.echo(" ".join(f"{value:+g} {lane}" for lane, value in coefficients.items()))


def _untuned_names(experts: list[str] | None) -> dict[str, str | None]:
    if not experts:
        family = family_paths()
        return dict.fromkeys(family.experts, family.untuned.name)
    sources = [options.parse_expert(entry) for entry in experts]
    return {source.name: _folder_name(source.untuned) for source in sources}


def _folder_name(folder: Path | None) -> str | None:
    """What an untuned model is called."""
    return None if folder is None else folder.expanduser().resolve().name
