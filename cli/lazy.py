"""Groups of commands that load a command's module only when that command is called."""

import importlib
from collections.abc import Mapping

import click


class LazyGroup(click.Group):
    """A group that knows its commands by a table: name → (module:attribute, one line of help)."""

    commands_table: Mapping[str, tuple[str, str]] = {}

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands_table)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.commands_table:
            return None
        module, attribute = self.commands_table[cmd_name][0].split(":")
        return getattr(importlib.import_module(module), attribute)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        # The one line of help comes from the table: click would load every command for it.
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in self.commands_table.items()])


def lazy_group(commands: Mapping[str, tuple[str, str]]) -> type[LazyGroup]:
    """The class of a group with these commands."""
    return type("Commands", (LazyGroup,), {"commands_table": commands})
