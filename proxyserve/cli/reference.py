"""The help of every command as Markdown: `python -m proxyserve.cli.reference > docs/cli.md`."""

from __future__ import annotations

import enum
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from proxyserve.cli.lazy import Entry
from proxyserve.cli.main import COMMANDS
from proxyserve.cli.settings import ServerOptions

_HEAD = """# Reference of the command line

Made by `python -m proxyserve.cli.reference > docs/cli.md` from what `--help` says; do not edit. What the commands have
in common, chats, check-ups, exit codes and files are in [command_line.md](command_line.md).
"""


_NOTHING = object()
_KINDS: Mapping[Any, str] = {str: "TEXT", int: "N", float: "X", Path: "PATH"}


def reference() -> str:
    parts = [_HEAD, "| command | does |\n| --- | --- |"]
    parts[-1] += "".join(
        f"\n| [`{name}`](#proxyserve-{name}) | {entry.help} |" for name, entry in COMMANDS.items()
    )
    for name, entry in COMMANDS.items():
        parts += _sections(name, entry)
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def _sections(name: str, entry: Entry) -> Iterator[str]:
    command = entry.load(name)
    yield from _section(f"proxyserve {name}", command, level=2)
    for inner in getattr(command, "commands", {}).values():
        yield from _section(f"proxyserve {name} {inner.name}", inner, level=3)


def _section(title: str, command: Any, *, level: int) -> Iterator[str]:
    yield f"{'#' * level} {title}"
    arguments = [each for each in command.params if each.param_type_name == "argument"]
    names = " ".join(each.metavar or f"[{each.name}]" for each in arguments)
    inner = getattr(command, "commands", None)
    if command.params and not (inner and not getattr(command, "invoke_without_command", False)):
        yield f"```text\n{title} [OPTIONS]{' ' if names else ''}{names}\n```"
    yield inspect.cleandoc(command.help or "")
    if arguments:
        yield _table("argument", [(f"`{each.metavar or each.name}`", each) for each in arguments])
    panels: dict[str, list[tuple[str, Any]]] = {}
    told = {} if title == "proxyserve serve" else _of_serve()
    if not told.keys() - {each.name for each in command.params}:
        yield "Beside what follows it takes the options of [`serve`](#proxyserve-serve) from *Network and keys* on."
    else:
        told = {}
    for each in command.params:
        if told.get(each.name, _NOTHING) == each.default:
            continue
        if each.param_type_name == "option" and not each.hidden and each.name != "help":
            panel = getattr(each, "rich_help_panel", None) or "Options"
            panels.setdefault(panel, []).append((_names(each), each))
    for panel, options in panels.items():
        yield _table("option" if panel == "Options" else panel, options)


def _of_serve() -> dict[str, Any]:
    """Defaults of the options that `serve` shares with others."""
    return {each.name: each.default for each in fields(ServerOptions)}


def _names(option: Any) -> str:
    names = ", ".join(f"`{name}`" for name in option.opts)
    if option.secondary_opts:
        names += " / " + ", ".join(f"`{name}`" for name in option.secondary_opts)
    value = _value(option)
    return f"{names} {value}" if value else names


def _table(first: str, rows: Sequence[tuple[str, Any]]) -> str:
    lines = [f"| {first} | meaning | default | variable |", "| --- | --- | --- | --- |"]
    for name, each in rows:
        variables = [each.envvar] if isinstance(each.envvar, str) else each.envvar or []
        cells = (name, _one_line(each.help or ""), _default(each), ", ".join(f"`{v}`" for v in variables))
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def _value(option: Any) -> str:
    if option.is_flag:
        return ""
    if option.metavar:
        return f"`{option.metavar}`"
    # How Typer keeps types is its own affair; the pinned version keeps them here.
    kind = option.type_descriptor.annotation
    if get_origin(kind) is list:
        (kind,) = get_args(kind)
    if get_origin(kind) is Literal:
        return f"`{'|'.join(map(_spelled, get_args(kind)))}`"
    if isinstance(kind, enum.EnumType):
        return f"`{'|'.join(map(_spelled, kind))}`"
    bounds = [f"from {option.min:g}"] if option.min is not None else []
    bounds += [f"to {option.max:g}"] if option.max is not None else []
    return f"`{_KINDS[kind]}`" + (f" ({' '.join(bounds)})" if bounds else "")


def _default(parameter: Any) -> str:
    if parameter.required:
        return "required"
    value = parameter.default
    if value is None or value == () or value == [] or callable(value):
        return ""
    if isinstance(value, bool):
        if parameter.secondary_opts:
            return f"`{(parameter.opts if value else parameter.secondary_opts)[0]}`"
        return ""
    if value == "":
        return ""
    return f"`{_spelled(value)}`"


def _spelled(value: Any) -> str:
    if isinstance(value, enum.Enum):
        return str(value.value)
    if isinstance(value, float):
        return f"{value:g}"
    return str(value)


def _one_line(text: str) -> str:
    return " ".join(text.split())


if __name__ == "__main__":
    print(reference(), end="")
