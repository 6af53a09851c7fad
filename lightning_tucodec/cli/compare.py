"""Options of the commands of this package; imports nothing heavy, so that `--help` is instant."""

import argparse

from lightning_tucodec.cli.arguments import add_force, count, location, positive


def add_compare_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `tucodec compare`."""
    parser.add_argument(
        "sources",
        nargs="+",
        type=location,
        metavar="SOURCE",
        help="run folder, sweep folder, results.json, published curve (CompressAI's format) or a folder of "
        "them, published:NAME, wandb:ENTITY/PROJECT/GROUP",
    )
    parser.add_argument("-o", "--out", type=location, required=True, metavar="REPORT.html")
    add_force(parser)
    parser.add_argument("--anchor", metavar="NAME", help="the curve that BD-rates refer to")
    parser.add_argument(
        "--at",
        nargs="+",
        type=positive,
        metavar="BPP",
        help="rates at which qualities are compared",
    )
    parser.add_argument("--title", default="Comparison of image codecs")
    parser.add_argument(
        "--images",
        nargs="+",
        type=location,
        metavar="IMAGE|DIR",
        help="originals of results.json: adds the gallery",
    )
    parser.add_argument(
        "--kept", type=location, metavar="DIR", help="coded files that `evaluate --keep` has left"
    )
    parser.add_argument(
        "--bpp", type=positive, help="rate of the gallery; by default the first codec's"
    )
    parser.add_argument("--pictures", type=count, default=6, help="images in the gallery")
    parser.add_argument("--samples", type=count, default=500, help="of the bootstrap over images")
    parser.add_argument("--json", action="store_true", help="print the BD rows")
