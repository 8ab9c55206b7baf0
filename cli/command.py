"""click's commands and options with three additions: options in named groups, each given once, old ones that warn."""

import dataclasses
import re
from collections.abc import Callable
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from stl_offline.cli.terminal import complain

F = TypeVar("F", bound=Callable[..., object])

# The sections of --help, in their order.
GROUPS = (
    "general",
    "data",
    "model",
    "labels",
    "optimisation",
    "augmentation",
    "checkpoints",
    "output",
    "machine",
    "advanced",
)


class Option(click.Option):
    """An option that belongs to a section of --help: one of `GROUPS`."""

    def __init__(self, *names: Any, group: str = "general", **settings: Any) -> None:
        super().__init__(*names, **settings)
        self.group = group


class Command(click.Command):
    """A command that lists its options by group and refuses one that is given twice."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        options = [each for each in self.get_params(ctx) if isinstance(each, click.Option)]
        for group in GROUPS:
            own = [each for each in options if getattr(each, "group", GROUPS[0]) == group]  # --help is click's own
            rows = [row for option in own if (row := option.get_help_record(ctx)) is not None]
            if rows:
                with formatter.section(f"{group.removesuffix('s').capitalize()} options"):
                    formatter.write_dl(rows)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        # click takes the last of several in silence. The order of what was given is only known to its parser.
        _, _, given = self.make_parser(ctx).parse_args(list(args))
        for option in given:
            if isinstance(option, Option) and not option.multiple and given.count(option) > 1:
                names = " or ".join((*option.opts, *option.secondary_opts))
                raise click.UsageError(f"{names} is given {given.count(option)} times; give it once", ctx)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        if ctx.obj is not None:
            ctx.obj.begin(ctx)
        return super().invoke(ctx)


def command(**settings: Any) -> Callable[[Callable[..., object]], Command]:
    """click's command, as a `Command`."""
    return click.command(cls=Command, **settings)


def option(*names: str, group: str, **settings: Any) -> Callable[[F], F]:
    """click's option in a group, with its default shown."""
    return click.option(*names, cls=Option, group=group, **{"show_default": True, **settings})


def setting_option(config: type, *names: str, group: str, more: str = "", **settings: Any) -> Callable[[F], F]:
    """The option of a field of a settings class, which declares its help, default and choices.

    Args:
        names: as for `option`; the field is the one that the option's value is handed over as.
        more: text that the help ends with, after a colon.
    """
    name = names[-1] if not names[-1].startswith("-") else names[0].partition("/")[0].lstrip("-").replace("-", "_")
    field = next(each for each in dataclasses.fields(config) if each.name == name)
    text = _in_options(field.metadata["help"])
    text = f"{text.removesuffix('.')}: {more}." if more else text
    settings["help"] = f"{text} May be given several times." if settings.get("multiple") else text
    if field.default is dataclasses.MISSING:
        settings["required"] = True
    elif field.default is not None:
        listed = settings.get("multiple") and isinstance(field.default, str)
        settings.setdefault("default", [field.default] if listed else field.default)
    if field.metadata["choices"] is not None:
        settings["type"] = click.Choice(field.metadata["choices"])
    return option(*names, group=group, **settings)


def _in_options(text: str) -> str:
    """A help text with other settings as options: `labels=online` → --labels online."""
    return re.sub(r"`(\w+)(?:=(\w+))?`", lambda m: f"--{m[1].replace('_', '-')}" + (f" {m[2]}" if m[2] else ""), text)


def together(*options: Callable[[F], F]) -> Callable[[F], F]:
    """Several options as one decorator, listed by --help in the order given."""

    def decorate(function: F) -> F:
        for single in reversed(options):
            function = single(function)
        return function

    return decorate


def ignored(*names: str) -> Callable[[F], F]:
    """Options that a command had and never used: hidden, accepted for now, with a warning."""

    def warn(ctx: click.Context, parameter: click.Parameter, value: object) -> None:
        if value is not None:
            name = parameter.opts[0]
            complain(f"warning: {ctx.command_path} does not use {name}; the option will be removed in version 0.3")

    return together(*(option(name, group="advanced", hidden=True, expose_value=False, callback=warn) for name in names))


def given(ctx: click.Context) -> dict[str, Any]:
    """The options given on the command line or in the environment, by name; defaults are left out."""
    defaults = (ParameterSource.DEFAULT, ParameterSource.DEFAULT_MAP)
    return {name: value for name, value in ctx.params.items() if ctx.get_parameter_source(name) not in defaults}


def example(*lines: str) -> str:
    """An epilog that shows how a command is called."""
    return "\n".join(["\b", "Example:", *(f"  {line}" for line in lines)])


class Numbers(click.ParamType):
    """Numbers with commas between them, as a tuple."""

    name = "numbers"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        try:
            return tuple(float(part) for part in value.split(",")) if isinstance(value, str) else tuple(value)
        except ValueError:
            self.fail(f"{value!r} is not a list of numbers with commas between them, such as 0.5,0.5,0.5", param, ctx)


class Names(click.ParamType):
    """Names with commas between them, as a tuple."""

    name = "names"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        return tuple(part.strip() for part in value.split(",")) if isinstance(value, str) else tuple(value)


NUMBERS, NAMES = Numbers(), Names()
