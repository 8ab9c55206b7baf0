"""Messages of the library in terms of the command that was called: names of Python parameters become options."""

import re
from collections.abc import Iterator

import click

from stl_offline.cli.command import Option

# As the library writes them: `skip_broken`, `skip_broken=True`, `missing="skip"`, and `pull(shards="3")` where only one
# function is meant.
PARAMETER = re.compile(r"`(?:([a-z][a-z0-9_]*)\()?([a-z][a-z0-9_]*)(?:=([^`)]*))?\)?`")


def translate(text: str, ctx: click.Context) -> str:
    """The text with every parameter in backticks as an option of this command, else of the first that has it.

    A parameter in a call, such as `pull(shards="3")`, becomes an option of the command named like the function.
    """

    def replace(match: re.Match[str]) -> str:
        function, name, value = match.groups()
        if function is None and (option := _find(ctx.command, name)) is not None:
            return _spelling(option, value)
        for path, command in _commands(ctx.find_root().command, ctx.find_root().info_name or ""):
            meant = function is None or path.rpartition(" ")[2] == function.replace("_", "-")
            if meant and (option := _find(command, name)) is not None:
                return f"'{path} {_spelling(option, value)}'"
        return match[0]

    return PARAMETER.sub(replace, text)


def memory_advice(ctx: click.Context | None) -> str:
    """What this command's user can do where memory runs out."""
    advice = {"batch_size": "a smaller --batch-size", "workers": "fewer --workers"}
    found = [text for name, text in advice.items() if ctx is not None and _find(ctx.command, name) is not None]
    return f"try {' or '.join(found)}" if found else "free some memory and try again"


def _find(command: click.Command, name: str) -> Option | None:
    for option in command.params:
        if isinstance(option, Option) and option.name == name and not option.hidden:
            return option
    return None


def _spelling(option: Option, value: str | None) -> str:
    if option.secondary_opts and value == "False":
        return option.secondary_opts[0]
    if value is None or option.is_flag:
        return option.opts[0]
    return f"{option.opts[0]} {value.strip(chr(34) + chr(39))}"


def _commands(command: click.Command, path: str) -> Iterator[tuple[str, click.Command]]:
    """All commands below a group, in the order of its help."""
    if not isinstance(command, click.Group):
        yield path, command
        return
    ctx = click.Context(command)
    for name in command.list_commands(ctx):
        yield from _commands(command.get_command(ctx, name), f"{path} {name}")
