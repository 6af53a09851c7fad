"""Arguments and output of `tucodec shards`; what does the work is imported when it runs."""

import argparse
import json
import sys

from lightning_tucodec.cli.arguments import (
    Subparsers,
    add_force,
    add_json,
    command,
    count,
    family,
    location,
    part,
)
from lightning_tucodec.io.files import check_targets
from lightning_tucodec.io.processes import cores


def register(subparsers: Subparsers) -> None:
    """`tucodec shards`."""
    commands = family(subparsers, "shards", "build WebDataset shards from photographs")
    build = command(commands, "build", run_build, "cut photographs into shards of patches")
    _add_build_arguments(build)
    precode = command(
        commands, "precode", run_precode, "code photographs with H.266 to train post-filters"
    )
    _add_precode_arguments(precode)
    verify = command(commands, "verify", run_verify, "read all shards and report errors")
    stats = command(commands, "stats", run_stats, "draw a contact sheet and histograms")
    stats.add_argument("-o", "--out", type=location, default="stats.png", metavar="PNG")
    add_force(stats)
    for parser in (verify, stats):
        parser.add_argument("shards", type=location, metavar="DIR|URL")
    add_json(verify, stats)


def _add_build_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `tucodec shards build`."""
    add = parser.add_argument
    add(
        "sources",
        type=location,
        nargs="+",
        metavar="SRC",
        help="folder, uncompressed tar, image, or URL of one",
    )
    add(
        "--out", type=location, required=True, metavar="DIR|URL", help="output folder of the shards"
    )
    add(
        "--patch",
        type=int,
        default=256,
        metavar="N",
        help="side of a patch in pixels (default 256)",
    )
    add(
        "--count",
        type=int,
        metavar="N",
        help="at most N patches, chosen over all images (default: all there are)",
    )
    add(
        "--shard-size",
        type=int,
        default=1024,
        metavar="N",
        help="patches in a shard (default 1024)",
    )
    add(
        "--seed",
        type=int,
        default=0,
        metavar="K",
        help="seed of positions, choice and order (default 0)",
    )
    add("--workers", type=int, default=cores(), metavar="W", help="processes (default: all cores)")
    add(
        "--part",
        type=part,
        metavar="I/N",
        help="do only share I (from 1) of N; see docs/data.md",
    )
    add("--format", choices=("webp", "png", "raw"), default="webp", help="default: lossless webp")
    add(
        "--long-edge",
        type=int,
        default=2000,
        metavar="N",
        help="first scale the long edge down to N pixels (2000)",
    )
    add("--scales", type=_scales, default=(1.0,), metavar="S,...", help="also cut at these scales")
    add("--max-overlap", type=float, default=0.0, metavar="F",
        help="largest overlap of neighbouring patches, as a share of the side (0)")  # fmt: skip
    add("--min-contrast", type=float, default=3.0, metavar="C",
        help="skip patches whose luma has a smaller standard deviation, in grey levels (3)")  # fmt: skip
    add("--duplicate-bits", type=int, default=4, metavar="B",
        help="photographs whose 64-bit perceptual hashes differ in at most B bits are the same "
        "(default 4; -1: only identical files)")  # fmt: skip
    add("--licence", action="append", default=[], metavar="NOTE",
        help="licence of all sources, or one for each (default: the LICENSE file)")  # fmt: skip
    add("--json", action="store_true", help="print a summary as JSON")


def run_build(arguments: argparse.Namespace) -> int:
    """`tucodec shards build`."""
    from data_pipelines.options import BuildOptions
    from data_pipelines.shards import Part, build

    options = BuildOptions(
        patch=arguments.patch,
        count=arguments.count,
        shard_size=arguments.shard_size,
        seed=arguments.seed,
        encoding=arguments.format,
        long_edge=arguments.long_edge,
        scales=arguments.scales,
        max_overlap=arguments.max_overlap,
        min_contrast=arguments.min_contrast,
        duplicate_bits=arguments.duplicate_bits,
    )
    summary = build(
        arguments.sources,
        arguments.out,
        options,
        workers=arguments.workers,
        part=Part(*arguments.part) if arguments.part else None,
        licences=arguments.licence,
    )
    index = summary.contents
    if index is None:
        done = (
            "is done" if not summary.missing else f"has done its share for now: {summary.missing}"
        )
        report = {"out": arguments.out, "part": "/".join(map(str, arguments.part)),
                  "complete": False, "missing": summary.missing}  # fmt: skip
        text = f"part {report['part']} {done}; the same command without --part completes the build"
    else:
        used = sum(source["images"] for source in index["sources"])
        report = {
            "out": arguments.out, "complete": True, "samples": index["samples"],
            "shards": len(index["shards"]), "bytes": index["bytes"],
            "images": used, "rejected": index["rejected"],
        }  # fmt: skip
        refused = ", ".join(f"{n} {kind}" for kind, n in index["rejected"].items()) or "none"
        text = (
            f"{arguments.out}: {index['samples']} patches in {len(index['shards'])} shards, "
            f"{index['bytes'] / 1e6:.1f} MB, from {used} images (rejected: {refused})"
        )
        if summary.wanted:
            print(
                f"{arguments.out}: the images have {index['samples']} patches within these limits, "
                f"fewer than --count {summary.wanted} allows; raise --max-overlap or add --scales",
                file=sys.stderr,
            )
    print(json.dumps(report) if arguments.json else text)
    return 0


def _add_precode_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `tucodec shards precode`."""
    add = parser.add_argument
    add(
        "sources",
        type=location,
        nargs="+",
        metavar="SRC",
        help="folder, uncompressed tar, or image",
    )
    add("--out", type=location, required=True, metavar="DIR", help="output folder of the shards")
    add(
        "--codec",
        nargs="+",
        required=True,
        metavar="SPEC",
        help="codec settings, such as vvc:qp={34,38,42}",
    )
    add("--per-photo", type=count, default=2, metavar="N", help="settings for each photograph (2)")
    add("--patch", type=int, default=160, metavar="N", help="side of a patch in pixels (160)")
    add("--shard-size", type=int, default=1024, metavar="N", help="patches in a shard (1024)")
    add(
        "--seed", type=int, default=0, metavar="K", help="seed of settings, positions and order (0)"
    )
    add("--workers", type=int, default=cores(), metavar="W")
    add(
        "--cache",
        type=location,
        metavar="DIR",
        help="folder for the coded streams (default: in --out)",
    )
    add("--json", action="store_true", help="print a summary as JSON")


def run_precode(arguments: argparse.Namespace) -> int:
    """`tucodec shards precode`."""
    from data_pipelines.precode_vvc import PrecodeOptions, precode

    options = PrecodeOptions(
        codecs=tuple(dict.fromkeys(arguments.codec)),
        per_photo=arguments.per_photo,
        patch=arguments.patch,
        shard_size=arguments.shard_size,
        seed=arguments.seed,
    )
    index = precode(
        arguments.sources,
        arguments.out,
        options,
        workers=arguments.workers,
        cache=arguments.cache,
    )
    report = {
        "out": arguments.out,
        "samples": index["samples"],
        "shards": len(index["shards"]),
        "bytes": index["bytes"],
    }
    text = (
        f"{arguments.out}: {report['samples']} patches in {report['shards']} shards, "
        f"{index['bytes'] / 1e6:.1f} MB"
    )
    print(json.dumps(report) if arguments.json else text)
    return 0


def run_verify(arguments: argparse.Namespace) -> int:
    """`tucodec shards verify`: status 1 when anything is wrong."""
    from data_pipelines.verify import verify

    report = verify(arguments.shards)
    if arguments.json:
        print(
            json.dumps({"samples": report.samples, "shards": report.shards, "wrong": report.wrong})
        )
    else:
        for line in report.wrong:
            print(line)
        verdict = f"{len(report.wrong)} things wrong" if report.wrong else "all as the index says"
        print(f"{report.samples} samples in {report.shards} shards read: {verdict}")
    return 1 if report.wrong else 0


def run_stats(arguments: argparse.Namespace) -> int:
    """`tucodec shards stats`."""
    from data_pipelines.verify import stats

    check_targets([arguments.out], force=arguments.force)
    report = stats(arguments.shards, arguments.out)
    if arguments.json:
        print(json.dumps(report))
    else:
        for key, value in report.items():
            print(f"{key}: {value}")
    return 0


def _scales(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(word) for word in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form 1,0.8") from None
