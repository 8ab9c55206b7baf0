"""``stl-offline transfer``: fine-tune a trained backbone for dense prediction."""

import click

from stl_offline.cli.command import example
from stl_offline.cli.lazy import lazy_group

COMMANDS = {
    "segment": ("stl_offline.cli.transfer.segment:segment", "Fine-tune a backbone on masks."),
    "detect": ("stl_offline.cli.transfer.detect:detect", "Fine-tune a backbone on boxes."),
    "zero-train": ("stl_offline.cli.transfer.zero_train:zero_train", "Measure a token head as a coarse segmenter."),
    "evaluate": ("stl_offline.cli.transfer.evaluate:evaluate", "Measure a fine-tuned model, clean and corrupted."),
    "import": ("stl_offline.cli.transfer.import_segmenter:import_segmenter", "Convert a published segmenter of FAN."),
}


@click.group(
    cls=lazy_group(COMMANDS),
    epilog=example(
        "stl-offline transfer segment --data camvid.tar --split train --val camvid.tar --val-split val \\",
        "    --classes camvid.txt --ignore-id 11 --backbone runs/student --out runs/segmenter",
        "stl-offline transfer evaluate --data camvid.tar --split val --checkpoint runs/segmenter",
    ),
)
def transfer() -> None:
    """Fine-tune a trained backbone for dense prediction, and measure what it learned."""
