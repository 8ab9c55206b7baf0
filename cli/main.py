"""``stl-offline``: the group of commands.

A command's module is loaded when the command is called, and the library behind it only once its options are parsed:
``--help`` stays quick, and works without the packages that the command itself needs.
"""

import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import click

from stl_offline import __version__
from stl_offline.cli.failures import Session, end_process, run
from stl_offline.cli.lazy import lazy_group
from stl_offline.cli.terminal import prepare_streams

# In the order in which the data goes: name → (module:attribute, one line of help).
COMMANDS = {
    "pack": ("stl_offline.cli.pack:pack", "Pack images into one .beton file for fast loading."),
    "train-labeler": ("stl_offline.cli.train_labeler:train_labeler", "Stage 1: train a model that labels tokens."),
    "dump-labels": ("stl_offline.cli.dump_labels:dump_labels", "Label every token of a data set, once."),
    "labels": ("stl_offline.cli.labels:labels", "Inspect, check, convert, merge and share label sets."),
    "train-student": ("stl_offline.cli.train_student:train_student", "Stage 2: train a student from the labels."),
    "evaluate": ("stl_offline.cli.evaluate:evaluate", "Measure the accuracy of a trained model."),
    "transfer": ("stl_offline.cli.transfer:transfer", "Fine-tune a trained model on masks or boxes, and measure it."),
    "report": ("stl_offline.cli.report:report", "Compare training runs on one page, with examples."),
    "demo": ("stl_offline.cli.demo:demo", "Run all stages on synthetic images, in minutes."),
}


EPILOG = """\b
Example:
  stl-offline train-labeler --data images/train --val images/val --out runs/labeler
  stl-offline dump-labels --data images/train --labeler runs/labeler --out labels
  stl-offline train-student --data images/train --val images/val --labels labels --out runs/student

Each command has its own --help. `stl-offline demo` runs everything on a small set of synthetic images."""


@click.command(cls=lazy_group(COMMANDS), epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="stl-offline", message="%(prog)s %(version)s")
def group() -> None:
    """Label the tokens of a data set once, share the labels, and train vision transformers from them at the speed of
    plain training.

    Images (SRC) can be a folder with one folder per class, webdataset tars such as 'train-{000..015}.tar', a .beton
    file, or the name of a timm reader.
    """


def main(arguments: Sequence[str] | None = None, session: Session | None = None) -> int:
    """Run the command line and return its exit code.

    0: done. 1: the input or the machine does not allow it. 2: wrong usage. 70: a fault in this program. 130 and 143:
    interrupted by Ctrl-C and by a termination signal. Every failure is one line on standard error.
    """
    session = session or Session()
    return run(lambda: _call(sys.argv[1:] if arguments is None else list(arguments), session), session)


def _call(arguments: list[str], session: Session) -> Any:
    if "_STL_OFFLINE_COMPLETE" in os.environ:  # a shell asks for completions: click answers and exits
        group.main(arguments, prog_name="stl-offline")
    # Not click's own main: it ends the process in silence where any pipe breaks, and prints an empty line at Ctrl-C.
    with group.make_context("stl-offline", arguments, obj=session) as ctx:
        return group.invoke(ctx)


def command_line() -> NoReturn:
    """The command ``stl-offline``: `main` in a process of its own."""
    prepare_streams()
    session = Session(own_process=True)
    try:
        code = main(session=session)
    finally:
        session.end()
    end_process(code)
