"""``stl-offline demo``."""

from stl_offline.cli.command import command, example, option
from stl_offline.cli.options import debug_option, device_option, workers_option
from stl_offline.cli.terminal import echo


@command(epilog=example("stl-offline demo --out runs/demo", "stl-offline demo --draws 16 --out runs/demo-draws"))
@option("--train", group="data", default=1600, metavar="N", help="Training images to generate.")
@option("--val", group="data", default=300, metavar="N", help="Validation images to generate.")
@option("--shards", group="labels", default=4, metavar="N", help="Shards of the label set.")
@option(
    "--draws",
    group="labels",
    default=0,
    metavar="S",
    help="Store S classes drawn per token, in place of the 5 most probable ones (0: none).",
)
@option("--epochs", group="optimisation", default=5, metavar="N", help="Epochs of each student.")
@option("--labeler-epochs", group="optimisation", default=12, metavar="N", help="Epochs of the labeler.")
@option("--seed", group="optimisation", default=0, metavar="N", help="Seed of the images and of every stage.")
@option("--out", group="output", default="runs/demo", metavar="DIR", help="Folder for all results of the demo.")
@device_option
@workers_option
@debug_option
def demo(
    out: str,
    train: int,
    val: int,
    shards: int,
    draws: int,
    epochs: int,
    labeler_epochs: int,
    seed: int,
    device: str,
    workers: int,
) -> None:
    """Run all stages on synthetic images: train a labeler, dump its token labels, train students, show the results.

    Prints a table of each stage's time and accuracy, and writes a page of the labels and a report of the runs.
    """
    from stl_offline.demo import run_demo

    sizes = {"train": train, "val": val, "shards": shards, "draws": draws}
    epochs_of = {"epochs": epochs, "labeler_epochs": labeler_epochs}
    echo(*run_demo(out, **sizes, **epochs_of, seed=seed, device=device, workers=workers).splitlines())
