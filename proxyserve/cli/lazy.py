"""A group of commands that imports each command when it is called: `proxyserve --help` and the completion of a word
need not wait for torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import typer
from typer.core import TyperGroup


@dataclass(frozen=True, slots=True)
class Entry:
    """Where a command is: `module:attribute`, a function or a Typer of several. `panel` and `help` are for the list of
    commands; a command's own help has its docstring."""

    where: str
    help: str
    panel: str

    def load(self, name: str) -> Any:
        module, _, attribute = self.where.partition(":")
        found = getattr(import_module(module), attribute)
        if not isinstance(found, typer.Typer):
            alone = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
            alone.command(name)(found)
            found = alone
        command = typer.main.get_command(found)
        command.name = name
        return command


def lazy_group(entries: Mapping[str, Entry]) -> type[TyperGroup]:
    """For `typer.Typer(cls=...)`: its commands are placeholders until they are called."""

    class LazyGroup(TyperGroup):
        def resolve_command(self, ctx: Any, args: list[str]) -> Any:
            if args and args[0] in entries:
                self.commands[args[0]] = entries[args[0]].load(args[0])
            return super().resolve_command(ctx, args)

    return LazyGroup


def add_placeholders(app: typer.Typer, entries: Mapping[str, Entry]) -> None:
    """Names and help of the commands, for lists and for completion."""
    for name, entry in entries.items():
        app.command(name, help=entry.help, rich_help_panel=entry.panel)(_placeholder())


def _placeholder() -> Callable[[], None]:
    def never_called() -> None: ...

    return never_called
