"""`tucodec evaluate`: real bytes and quality of codecs on images."""

import argparse
import json

from lightning_tucodec.cli.arguments import (
    Subparsers,
    add_force,
    add_json,
    add_trust,
    command,
    count,
    location,
)


def register(subparsers: Subparsers) -> None:
    """`tucodec evaluate`."""
    parser = command(subparsers, "evaluate", run, "measure bytes and quality of codecs on images")
    add = parser.add_argument
    add("images", type=location, nargs="+", metavar="IMAGE|DIR")
    add("--codec", nargs="+", required=True, metavar="SPEC",
        help="NAME[:KEY=VALUE,...], such as jpeg:q=30 or vvc:qp=37, or a learned model's name")  # fmt: skip
    add("-o", "--out", type=location, required=True, metavar="RESULTS.json")
    add_force(parser, "; former results of `evaluate` are written anew without it")
    add("--workers", type=count, help="images coded in parallel (default: all processors)")
    add("--keep", type=location, metavar="DIR", help="keep the coded files, named by their SHA-256")
    add(
        "--memory",
        action="store_true",
        help="also measure the peak memory of every codec on one image",
    )
    add("--metrics", nargs="+", default=[], metavar="NAME",
        help="additional measures: vmaf, xpsnr, flip, ssimulacra2, lpips, dists, fsim, vif, psnr_hvs, "
        "iw_ssim; jpeg-ai: those of JPEG AI")  # fmt: skip
    add_trust(parser)
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Measure, write the results, print the table."""
    from lightning_tucodec.sets import evaluate
    from lightning_tucodec.sets.results import finite, table_text

    sets = evaluate.run(
        *(arguments.images, arguments.codec, arguments.out),
        *(arguments.workers, arguments.keep, arguments.memory),
        [name for names in arguments.metrics for name in names.split(",")],
        arguments.force,
    )
    print(json.dumps(finite(sets)) if arguments.json else table_text(sets))
    return 0
