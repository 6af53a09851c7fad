"""`tucodec compare`: codecs, runs and sweeps on one page."""

import argparse

from lightning_tucodec.cli.arguments import (
    Subparsers,
    add_force,
    add_trust,
    command,
    count,
    location,
    positive,
    whole,
)


def register(subparsers: Subparsers) -> None:
    """`tucodec compare`."""
    summary = "compare codecs, runs and sweeps on one HTML page: curves, BD-rate, pictures, costs"
    parser = command(subparsers, "compare", run, summary)
    parser.add_argument(
        "sources",
        type=location,
        nargs="+",
        metavar="SOURCE",
        help="run folder, sweep folder, results.json, published curve (CompressAI's format) or a folder of "
        "them, published:NAME or published:NAME#CURVE, wandb:ENTITY/PROJECT/GROUP",
    )
    parser.add_argument("-o", "--out", type=location, required=True, metavar="REPORT.html")
    add_force(parser)
    add_trust(parser)
    parser.add_argument("--anchor", metavar="NAME", help="reference curve of the BD-rates")
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
        type=location,
        nargs="+",
        metavar="IMAGE|DIR",
        help="originals of results.json: adds the gallery",
    )
    parser.add_argument(
        "--kept", type=location, metavar="DIR", help="coded files kept by `evaluate --keep`"
    )
    parser.add_argument(
        "--bpp", type=positive, help="rate of the gallery; by default the first codec's"
    )
    parser.add_argument(
        "--pictures", type=count, default=6, help="number of images in the gallery (6)"
    )
    parser.add_argument(
        "--samples",
        type=whole(1, 1_000_000),
        default=500,
        help="bootstrap samples over the images (500)",
    )
    parser.add_argument("--json", action="store_true", help="print the BD-rates as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Write the page, print BD-rates."""
    from lightning_tucodec.report.compare import run_compare

    return run_compare(arguments)
