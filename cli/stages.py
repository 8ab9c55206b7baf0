"""What training commands share."""

import os
from typing import Any, TypeVar

import click

from stl_offline.cli.command import given
from stl_offline.cli.output import run_line
from stl_offline.cli.terminal import echo
from stl_offline.config import RunConfig

C = TypeVar("C", bound=RunConfig)


def settings_of_run(kind: type[C], ctx: click.Context, recipe: str | None, settings: dict[str, Any]) -> C:
    """The settings of a run: the options given, else the recipe's settings, else the defaults."""
    from stl_offline.recipes import resolve

    named = given(ctx)
    return resolve(kind, recipe, {name: value for name, value in settings.items() if name in named})


def print_dry_run(found: Any) -> None:
    """A `DryRun`: settings, steps, time and memory of a run that is not started; printed by a job's first process."""
    if found.is_first:
        echo(*found.lines())


def print_run(stage: str, out: str, summary: dict[str, Any]) -> None:
    """How a run went; printed by the first process of a job."""
    if os.environ.get("RANK", "0") == "0":
        echo(run_line(stage, out, summary))
