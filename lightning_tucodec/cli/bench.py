"""`tucodec bench`: timings, each beside what it is compared with."""

import argparse
from pathlib import Path
from typing import Any

from lightning_tucodec.cli.arguments import (
    Subparsers,
    add_json,
    command,
    count,
    family,
    location,
    positive,
    show,
    whole,
)

_PEERS = ["mbt2018", "cheng2020-attn"]
_ALL_PEERS = ["mbt2018", "mbt2018:8", "cheng2020-attn", "cheng2020-attn:1"]


def register(subparsers: Subparsers) -> None:
    """`tucodec bench` and its commands."""
    commands = family(subparsers, "bench", "measure times, each beside a reference")
    _add_allocate(commands)
    _add_effort(commands)
    _add_h266(commands)
    _add_parts(commands)
    complexity = command(
        commands,
        "complexity",
        run_complexity,
        "parameters and multiply-accumulates of the networks",
    )
    add_json(complexity)
    _add_coding(commands)
    _add_data(commands)
    _add_train(commands)


def _add_allocate(commands: Subparsers) -> None:
    parser = command(commands, "allocate", run_allocate, "the set-level allocation against HiGHS")
    parser.add_argument("--repeats", type=count, default=5)
    add_json(parser)


def run_allocate(arguments: argparse.Namespace) -> int:
    """`tucodec bench allocate`."""
    from lightning_tucodec.bench import allocate

    return show(allocate.run(arguments.repeats), allocate.table_text, arguments)


def _add_effort(commands: Subparsers) -> None:
    parser = command(
        commands, "effort", run_effort, "measure gain and time of the encoder's refinement"
    )
    add = parser.add_argument
    add("images", type=location, nargs="+", metavar="IMAGE|DIR")
    add(
        "--model",
        type=location,
        nargs="+",
        required=True,
        help="models of one recipe, as tiny-vbr:quality=3 where one has several rates; four or more "
        "give a BD-rate",
    )
    add("--effort", nargs="*", type=whole(0, 9), default=[3, 5, 7], metavar="0-9")
    add("--seconds", nargs="*", type=positive, default=[10, 60], metavar="S",
        help="effort 9 with a time limit in seconds")  # fmt: skip
    add(
        "--rows",
        type=location,
        default="effort.rows.jsonl",
        metavar="JSONL",
        help="file that keeps the measurements",
    )
    add_json(parser)


def run_effort(arguments: argparse.Namespace) -> int:
    """`tucodec bench effort`."""
    from lightning_tucodec.bench import effort

    result = effort.run(
        arguments.images,
        arguments.model,
        arguments.effort,
        arguments.seconds,
        Path(arguments.rows),
    )
    return show(result, effort.table_text, arguments)


def _add_h266(commands: Subparsers) -> None:
    parser = command(
        commands, "h266", run_h266, "measure the gain of each part of the H.266 pipeline"
    )
    add = parser.add_argument
    add("images", type=location, nargs="+", metavar="IMAGE|DIR")
    add("--filter", type=location, nargs="*", default=[], metavar="MODEL")
    add("--preset", default="medium")
    add("--qp", nargs="*", type=whole(0, 63), metavar="QP", help="32, 35, … 47")
    add("--bpp", type=positive, default=0.15, help="rate at which gains are reported (0.15)")
    add(
        "--rows",
        type=location,
        default="h266.rows.jsonl",
        metavar="JSONL",
        help="file that keeps the measurements",
    )
    add("--workers", type=count, help="images coded in parallel")
    add("--whole", action="store_true", help="measure only the whole pipeline, not its parts")
    add_json(parser)


def run_h266(arguments: argparse.Namespace) -> int:
    """`tucodec bench h266`."""
    from lightning_tucodec.bench import h266

    result = h266.run(
        arguments.images,
        arguments.filter,
        arguments.preset,
        arguments.qp or h266.QPS,
        arguments.bpp,
        Path(arguments.rows),
        arguments.workers,
        not arguments.whole,
    )
    return show(result, h266.table_text, arguments)


def _add_parts(commands: Subparsers) -> None:
    parser = command(
        commands,
        "parts",
        run_parts,
        "processor seconds of codecs on one photograph, and of the parts of vvc+postfilter",
    )
    parser.add_argument("image", type=location, metavar="IMAGE")
    parser.add_argument("--codec", nargs="+", required=True, metavar="SPEC")
    add_json(parser)


def run_parts(arguments: argparse.Namespace) -> int:
    """`tucodec bench parts`."""
    from lightning_tucodec.bench import parts

    return show(parts.run(arguments.image, arguments.codec), parts.table_text, arguments)


def run_complexity(arguments: argparse.Namespace) -> int:
    """`tucodec bench complexity`."""
    from lightning_tucodec.bench import complexity

    table = complexity.table()
    if arguments.json:
        return show([row._asdict() for row in table], str, arguments)
    print(complexity.markdown(table))
    return 0


def _add_coding(commands: Subparsers) -> None:
    for name, summary in (
        ("codec", "whole coding and decoding and their parts beside CompressAI's, in one process"),
        ("entropy", "the entropy path alone beside CompressAI's, and how it grows with the image"),
    ):
        parser = command(commands, name, run_coding, summary)
        add = parser.add_argument
        add("--models", type=location, nargs="+", default=["paper", "fast", "tiny-mse-2"], metavar="NAME",
            help="presets (untrained; symbols drawn from their own P) or trained models, "
            "as tiny-vbr:quality=3 (%(default)s)")  # fmt: skip
        add("--bpp", nargs="+", type=positive, default=[0.15, 0.5], metavar="RATE")
        add("--peers", nargs="*", default=_PEERS, choices=_ALL_PEERS, metavar="NAME",
            help="CompressAI's models, each also by our exact engine: " + ", ".join(_ALL_PEERS) +
            "; without names: none (%(default)s)")  # fmt: skip
        add("--size", nargs=2, type=count, default=[512, 768], metavar=("HEIGHT", "WIDTH"))
        add("--repeats", type=count, default=5)
        add_json(parser)
        if name == "codec":
            add("--device", default="cpu", choices=("cpu", "cuda"), help="of our transforms (cpu)")
            add("--image", type=location, help="use this photograph instead of a generated picture")
            add("--large", action="store_true",
                help="instead: peak memory of 6000×4000 pixels with the last of --models")  # fmt: skip


def run_coding(arguments: argparse.Namespace) -> int:
    """`tucodec bench codec` and `tucodec bench entropy`."""
    from lightning_tucodec.bench import codec, entropy

    height, width = arguments.size
    options: dict[str, Any] = {
        "models": arguments.models,
        "rates": arguments.bpp,
        "peers": arguments.peers,
        "size": (height, width),
        "repeats": arguments.repeats,
    }
    if arguments.bench_command == "entropy":
        result = entropy.run(**options)
    elif arguments.large:
        result = codec.large(arguments.models[-1])
    else:
        result = codec.run(image=arguments.image, device=arguments.device, **options)
    return show(result, codec.table_text, arguments)


def _add_data(commands: Subparsers) -> None:
    for name, summary in (
        ("shards", "building shards against bare encoding of the same patches"),
        ("loader", "loading patches against plain webdataset on PNG, and bare decoding"),
    ):
        parser = command(commands, name, run_data, summary)
        add = parser.add_argument
        add("--photos", type=location, metavar="SRC", help="photographs (default: generated ones)")
        add("--count", type=count, default=600, help="patches of 256×256")
        add("--repeats", type=count, default=3)
        add_json(parser)


def run_data(arguments: argparse.Namespace) -> int:
    """`tucodec bench shards` and `tucodec bench loader`."""
    from lightning_tucodec.bench import data, timing

    run = data.run_shards if arguments.bench_command == "shards" else data.run_loader
    result = run(arguments.photos, arguments.count, repeats=arguments.repeats)
    return show(result, timing.table_text, arguments)


def _add_train(commands: Subparsers) -> None:
    fit = command(
        commands,
        "fit",
        run_fit,
        "`fit` with everything switched on against a bare Lightning loop",
    )
    train = command(
        commands,
        "train",
        run_train,
        "a training step: images/s, waiting for data, FLOP/s, beside CompressAI's example loop",
    )
    for parser, steps in ((fit, 60), (train, 20)):
        add = parser.add_argument
        add("--photos", type=location, metavar="SRC",
            help="photographs (default: generated ones)")  # fmt: skip
        add("--preset", default="tiny", choices=("tiny", "fast", "paper"))
        add("--steps", type=count, default=steps, help="steps of each training (%(default)s)")
        add("--repeats", type=count, default=3)
        add_json(parser)
    add = train.add_argument
    add("--device", default="cpu", choices=("cpu", "cuda"))
    add("--batch", type=count, help="crops a step (4; on a GPU 16)")
    add("--crop", type=count, help="side of the crops (128; on a GPU 256)")
    add("--workers", type=whole(0, 1024), help="decoding processes (the cores but one, at most 16)")
    add(
        "--compile",
        action="store_true",
        help="ours as one compiled graph (on a GPU bf16-mixed alone)",
    )
    add("--arithmetic", default="fast", choices=("fast", "reproducible"),
        help="of a GPU, as run.arithmetic of fit (fast)")  # fmt: skip
    add("--peer", action="store_true",
        help="instead: a step of tiny beside CompressAI's joint model with as many parameters")  # fmt: skip


def run_fit(arguments: argparse.Namespace) -> int:
    """`tucodec bench fit`."""
    from lightning_tucodec.bench import fit, timing

    result = fit.run(arguments.photos, arguments.preset, arguments.steps, repeats=arguments.repeats)
    return show(result, timing.table_text, arguments)


def run_train(arguments: argparse.Namespace) -> int:
    """`tucodec bench train`."""
    from lightning_tucodec.bench import timing, train, train_peer

    if arguments.peer:
        result = train_peer.run(repeats=arguments.repeats)
    else:
        result = train.run(
            arguments.photos,
            arguments.preset,
            arguments.steps,
            arguments.repeats,
            arguments.device,
            arguments.batch,
            arguments.crop,
            arguments.workers,
            arguments.compile,
            kind=arguments.arithmetic,
        )
    return show(result, timing.table_text, arguments)
