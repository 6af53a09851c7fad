"""`tucodec allocate | clic`: a set of images under one budget, coded and verified."""

import argparse

from lightning_tucodec.cli.arguments import (
    Subparsers,
    add_force,
    add_json,
    add_limits,
    add_trust,
    command,
    count,
    family,
    location,
    part,
    positive,
)


def register(subparsers: Subparsers) -> None:
    """`tucodec allocate` and `tucodec clic`."""
    _add_allocate(subparsers)
    commands = family(subparsers, "clic", "decode and verify submissions of `allocate`")
    verify = command(
        commands, "verify", run_verify, "decode a submission and measure everything again"
    )
    verify.add_argument("submission", type=location, metavar="DIR")
    compare = command(
        commands,
        "compare",
        run_compare,
        "verify submissions and list them beside Tucodec's results of 2019",
    )
    compare.add_argument("submission", type=location, metavar="DIR", nargs="+")
    check = command(
        commands, "check", run_check, "check whether these are the validation images of CLIC 2019"
    )
    check.add_argument("images", type=location, metavar="IMAGE|DIR", nargs="+")
    decode = command(commands, "decode", run_decode, "decode a submission to PNG files")
    decode.add_argument("submission", type=location, metavar="DIR")
    decode.add_argument("-o", "--out", type=location, required=True, metavar="DIR")
    add_force(decode)
    _add_reach(commands)
    for parser in (verify, compare):
        add_limits(parser)
        parser.add_argument(
            "--originals", type=location, nargs="+", required=True, metavar="IMAGE|DIR"
        )
    add_json(verify, compare, decode)
    add_trust(verify, compare, decode)


def _add_reach(commands: Subparsers) -> None:
    parser = command(
        commands,
        "reach",
        run_reach,
        "what evaluated and published codings reach as a set, each alone and together; codes nothing",
    )
    parser.add_argument(
        "sources",
        type=location,
        nargs="+",
        metavar="SOURCE",
        help="results.json of `evaluate`, published:NAME or published:NAME#CURVE",
    )
    parser.add_argument(
        "--maximise",
        choices=("psnr", "ms-ssim"),
        help="quality to maximise; without it bytes are minimised",
    )
    parser.add_argument(
        "--times",
        type=location,
        metavar="PARTS.json",
        help="of `bench parts --json`: processor seconds instead of the evaluation's wall clock",
    )
    add_limits(parser)
    add_json(parser)


def _add_allocate(subparsers: Subparsers) -> None:
    parser = command(
        subparsers,
        "allocate",
        run_allocate,
        "code a set under one budget with the best candidate for each image",
    )
    add = parser.add_argument
    add("images", type=location, nargs="+", metavar="IMAGE|DIR")
    add(
        "--candidate",
        nargs="+",
        required=True,
        metavar="SPEC",
        help="codec settings to choose from, as for `evaluate --codec`",
    )
    add("-o", "--out", type=location, required=True, metavar="DIR",
        help="the submission's folder: new, or a former submission, which is replaced")  # fmt: skip
    add(
        "--maximise",
        choices=("psnr", "ms-ssim"),
        help="quality to maximise; without it bytes are minimised",
    )
    add_limits(parser)
    add("--max-decode-seconds", type=positive, help="decoding time of the whole set")
    add("--workers", type=count, help="images coded in parallel (default: all processors)")
    add("--part", type=part, metavar="I/N",
        help="only code share I (from 1) of N, without choosing")  # fmt: skip
    add("--slurm", type=count, metavar="N", help="code in a Slurm array of N jobs and choose in a "
        "last one; slurm/site.sh describes the cluster")  # fmt: skip
    add("--dry-run", action="store_true", help="with --slurm: print the sbatch commands")
    add_json(parser)
    add_trust(parser)


def run_allocate(arguments: argparse.Namespace) -> int:
    """`tucodec allocate`."""
    from lightning_tucodec.sets import submission

    return submission.run_allocate(arguments)


def run_decode(arguments: argparse.Namespace) -> int:
    """`tucodec clic decode`."""
    from lightning_tucodec.sets import submission

    return submission.run_decode(arguments)


def run_verify(arguments: argparse.Namespace) -> int:
    """`tucodec clic verify`."""
    from lightning_tucodec.sets import clic

    return clic.run_verify(arguments)


def run_compare(arguments: argparse.Namespace) -> int:
    """`tucodec clic compare`."""
    from lightning_tucodec.sets import clic

    return clic.run_compare(arguments)


def run_reach(arguments: argparse.Namespace) -> int:
    """`tucodec clic reach`."""
    from lightning_tucodec.report import set_level

    return set_level.run(arguments)


def run_check(arguments: argparse.Namespace) -> int:
    """`tucodec clic check`."""
    from lightning_tucodec.sets import clic2019

    return clic2019.run_check(arguments)
