"""What the two training commands share."""

import importlib
import os
from typing import Any

import click

from stl_offline.cli.output import run_line
from stl_offline.config import LabelerConfig, StudentConfig

_CONFIGS = {"labeler": LabelerConfig, "student": StudentConfig}


def train_or_look(stage: str, said: dict[str, Any]) -> None:
    """Run a training stage from what was said, or its dry run; the first process tells how it went."""
    recipe, look = said.pop("recipe", None), said.pop("dry_run", False)
    from stl_offline.recipes import resolve

    config = resolve(_CONFIGS[stage], recipe, said)
    if look:
        from stl_offline.training.dry_run import dry_run

        found = dry_run(config, stage)
        lines = found.lines() if found.is_first else []
    else:
        module = importlib.import_module(f"stl_offline.training.train_{stage}")
        summary = getattr(module, f"train_{stage}")(config)
        lines = [run_line(stage, config.out, summary)] if os.environ.get("RANK", "0") == "0" else []
    for line in lines:
        click.echo(line)
