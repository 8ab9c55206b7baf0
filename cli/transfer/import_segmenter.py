"""``stl-offline transfer import``."""

from stl_offline.cli.command import command, example, setting_option
from stl_offline.cli.options import debug_option
from stl_offline.cli.output import counted
from stl_offline.cli.terminal import echo
from stl_offline.config_transfer import ImportConfig


@command(
    name="import",
    epilog=example(
        "stl-offline transfer import --checkpoint fan_tiny_city.pth --model fan_tiny_8_p4_hybrid --classes city.txt \\",
        "    --out runs/published",
        "stl-offline transfer evaluate --data city/val --checkpoint runs/published --sliding-window",
    ),
)
@setting_option(ImportConfig, "--checkpoint", group="model", metavar="FILE")
@setting_option(ImportConfig, "--model", group="model")
@setting_option(ImportConfig, "--classes", group="data", metavar="FILE|A,B,…")
@setting_option(ImportConfig, "--ignore-id", group="data", metavar="N")
@setting_option(ImportConfig, "--out", group="output", metavar="RUN")
@debug_option
def import_segmenter(**settings: object) -> None:
    """Convert a segmenter published by FAN's authors, with MMSegmentation's names, to a run that `transfer evaluate`
    takes.
    """
    config = ImportConfig(**settings)
    from stl_offline.transfer import import_segmenter

    written = import_segmenter(config)
    echo(f"{written['out']}: segmenter of {written['model']}, {counted(written['classes'], 'class')}")
