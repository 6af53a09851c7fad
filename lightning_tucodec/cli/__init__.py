"""The `tucodec` command: one small function a subcommand.

Heavy imports (torch above all) stand inside the functions, so that `tucodec --help` is instant.
Results go to stdout, progress and logs to stderr. Exit status: 0 ok, 1 the input or the run is at
fault (one line says which and why), 2 usage.
"""

import argparse
import contextlib
import io
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from lightning_tucodec.cli.arguments import add_force, count, location, positive, real, whole
from lightning_tucodec.errors import TucodecError, reason

Command = Callable[[argparse.Namespace], int]


def _command(subparsers: Any, name: str, run: Command, summary: str) -> argparse.ArgumentParser:
    """Add one subcommand whose parsed arguments go to `run`, which returns the exit status."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        name, help=summary, description=summary[0].upper() + summary[1:] + "."
    )
    parser.set_defaults(run=run)
    return parser


_LIGHTNING_COMMANDS = {
    "fit": "train; options come from --config FILE and the command line (LightningCLI)",
    "validate": "evaluate a checkpoint on the validation images (LightningCLI)",
    "test": "evaluate a checkpoint on the test images (LightningCLI)",
}
"""Subcommands whose options LightningCLI parses."""


def build_parser() -> argparse.ArgumentParser:
    """All subcommands with their options."""
    parser = argparse.ArgumentParser(prog="tucodec", description="Learned image compression.")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, summary in _LIGHTNING_COMMANDS.items():
        subparsers.add_parser(name, help=summary)
    for register in _REGISTER:
        register(subparsers)
    return parser


def _register_shards(subparsers: Any) -> None:
    from lightning_tucodec.cli.shards import (
        add_build_arguments,
        add_precode_arguments,
        run_build,
        run_precode,
        run_stats,
        run_verify,
    )

    family = subparsers.add_parser("shards", help="photographs -> patches -> WebDataset shards")
    commands = family.add_subparsers(dest="shards_command", metavar="COMMAND", required=True)
    add_build_arguments(
        _command(commands, "build", run_build, "cut photographs into shards of patches")
    )
    add_precode_arguments(
        _command(commands, "precode", run_precode, "code photographs with H.266, for post-filters")
    )
    verify = _command(commands, "verify", run_verify, "read all shards back and name what is wrong")
    stats = _command(commands, "stats", run_stats, "draw a contact sheet and histograms")
    stats.add_argument("-o", "--out", type=location, default="stats.png", metavar="PNG")
    add_force(stats)
    for command in (verify, stats):
        command.add_argument("shards", type=location, metavar="DIR|URL")
        command.add_argument("--json", action="store_true")


def _register_coding(subparsers: Any) -> None:
    from lightning_tucodec.cli import compress

    compress = _command(subparsers, "compress", compress.run_compress, "images to .tuc files")
    compress.add_compress_arguments(compress)
    decompress = _command(subparsers, "decompress", compress.run_decompress, ".tuc files to PNG")
    compress.add_decompress_arguments(decompress)
    info = _command(subparsers, "info", compress.run_info, "say what stands in a .tuc file")
    info.add_argument("file", type=location, metavar="TUC")
    models = _command(subparsers, "models", compress.run_models, "list shipped and local models")
    for command in (info, models):
        command.add_argument("--json", action="store_true")


def _register_demo(subparsers: Any) -> None:
    def run(arguments: argparse.Namespace) -> int:
        from pathlib import Path

        from lightning_tucodec.demo import run as demo

        demo(Path(arguments.out))
        return 0

    parser = _command(
        subparsers, "demo", run, "the whole chain on photos that ship with a dependency"
    )
    parser.add_argument("--out", type=location, default="demo", metavar="DIR")


def _register_export(subparsers: Any) -> None:
    def run(arguments: argparse.Namespace) -> int:
        from lightning_tucodec.training.export import run_export

        return run_export(arguments)

    parser = _command(subparsers, "export", run, "a run's weights and integer tables to one file")
    parser.add_argument(
        "runs",
        nargs="+",
        type=location,
        metavar="RUN",
        help="a run folder, a checkpoint, or a model",
    )
    parser.add_argument("-o", "--out", type=location, required=True, metavar="MODEL.safetensors")
    add_force(parser)
    parser.add_argument(
        "--average",
        nargs="+",
        type=real(),
        metavar="SHARE",
        help="of each of several runs in an average of their weights; equal ones when left out",
    )
    parser.add_argument("--name", help="the model's name; the file's stem when left out")
    parser.add_argument(
        "--card", type=location, metavar="YAML", help="file with more entries of the card"
    )


def _register_doctor(subparsers: Any) -> None:
    def run(arguments: argparse.Namespace) -> int:
        from lightning_tucodec.training.doctor import run as doctor

        return doctor(arguments)

    parser = _command(subparsers, "doctor", run, "what would fail in a training, and what to do")
    parser.add_argument("--config", type=location, metavar="YAML", help="a configuration of `fit`")
    parser.add_argument("--mirror", type=location, metavar="URL", help="as that of `fit`")
    parser.add_argument(
        "--script", type=location, metavar="FILE", help="a batch script, or the call of sbatch"
    )
    parser.add_argument("--json", action="store_true")


def _register_wandb_sync(subparsers: Any) -> None:
    def run(arguments: argparse.Namespace) -> int:
        from lightning_tucodec.training.beside.wandb_view import run_sync

        return run_sync(arguments)

    parser = _command(
        subparsers, "wandb-sync", run, "send what W&B lacks of runs, from their metrics.jsonl"
    )
    parser.add_argument("runs", nargs="+", type=location, metavar="RUN", help="run folders")
    parser.add_argument("--offline", action="store_true", help="write an offline run instead")


def _register_evaluate(subparsers: Any) -> None:
    def run(arguments: argparse.Namespace) -> int:
        import json

        from lightning_tucodec.sets import evaluate

        sets = evaluate.run(
            *(arguments.images, arguments.codec, arguments.out),
            *(arguments.workers, arguments.keep, arguments.memory),
            [name for names in arguments.metrics for name in names.split(",")],
            arguments.force,
        )
        print(json.dumps(evaluate.finite(sets)) if arguments.json else evaluate.table_text(sets))
        return 0

    parser = _command(subparsers, "evaluate", run, "real bytes and quality of any codecs on images")
    parser.add_argument("images", nargs="+", type=location, metavar="IMAGE|DIR")
    parser.add_argument(
        "--codec",
        nargs="+",
        required=True,
        metavar="SPEC",
        help="NAME[:KEY=VALUE,...] as in jpeg:q=30 or vvc:qp=37, or the name of a learned model",
    )
    parser.add_argument("-o", "--out", type=location, required=True, metavar="RESULTS.json")
    add_force(parser)
    parser.add_argument(
        "--workers", type=count, help="codings at a time; all processors by default"
    )
    parser.add_argument(
        "--keep", type=location, metavar="DIR", help="keep the coded files, named by their SHA-256"
    )
    parser.add_argument(
        "--memory", action="store_true", help="also the peak memory of every codec on one image"
    )
    parser.add_argument(
        "--metrics",
        nargs="+",
        default=[],
        metavar="NAME",
        help="further measures: vmaf, xpsnr, flip, ssimulacra2, lpips, dists",
    )
    parser.add_argument("--json", action="store_true")


def _register_compare(subparsers: Any) -> None:
    def run(arguments: argparse.Namespace) -> int:
        from lightning_tucodec.report.compare import run_compare

        return run_compare(arguments)

    from lightning_tucodec.cli.compare import add_compare_arguments

    summary = "codecs, runs and sweeps on one HTML page: curves, BD-rate, pictures, costs"
    add_compare_arguments(_command(subparsers, "compare", run, summary))


def _add_limits(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("limits that the set must keep to").add_argument
    add("--max-bpp", type=positive)
    add("--max-bytes", type=count)
    add("--min-psnr", type=real(0), metavar="DB", help="pooled over the set")
    add("--min-ms-ssim", type=real(0, 1), help="weighted by pixels")


def _register_allocate(subparsers: Any) -> None:
    from lightning_tucodec.cli.shards import part_argument

    def run(arguments: argparse.Namespace) -> int:
        from lightning_tucodec.sets.submission import run_allocate

        return run_allocate(arguments)

    parser = _command(
        subparsers,
        "allocate",
        run,
        "code a set under one budget: the best candidate for each image",
    )
    add = parser.add_argument
    add("images", nargs="+", type=location, metavar="IMAGE|DIR")
    add("--candidate", nargs="+", required=True, metavar="SPEC", help="as --codec of evaluate")
    add("-o", "--out", type=location, required=True, metavar="DIR")
    add("--maximise", choices=("psnr", "ms-ssim"), help="else bytes are minimised")
    _add_limits(parser)
    add("--max-decode-seconds", type=positive, help="for the whole set")
    add("--workers", type=count, help="codings at a time; all processors by default")
    add("--part", type=part_argument, metavar="I/N",
        help="only code share I (from 1) of N, and choose nothing")  # fmt: skip
    add("--slurm", type=count, metavar="N", help="code in a Slurm array of N jobs and choose in a "
        "last one; slurm/site.sh says what the cluster wants")  # fmt: skip
    add("--dry-run", action="store_true", help="with --slurm: print the commands of sbatch")
    add("--json", action="store_true")


def _register_bench(subparsers: Any) -> None:
    family = subparsers.add_parser("bench", help="timings, each beside what it is compared with")
    commands = family.add_subparsers(dest="bench_command", metavar="COMMAND", required=True)

    def run_allocate(arguments: argparse.Namespace) -> int:
        import json

        from lightning_tucodec.bench import allocate

        result = allocate.run(arguments.repeats)
        print(json.dumps(result, indent=1) if arguments.json else allocate.table_text(result))
        return 0

    allocate_command = _command(
        commands, "allocate", run_allocate, "the set-level allocation against HiGHS"
    )
    allocate_command.add_argument("--repeats", type=count, default=5)
    allocate_command.add_argument("--json", action="store_true")

    def run_effort(arguments: argparse.Namespace) -> int:
        import json
        from pathlib import Path

        from lightning_tucodec.bench import effort

        result = effort.run(
            arguments.images,
            arguments.model,
            arguments.effort,
            arguments.seconds,
            Path(arguments.rows),
        )
        print(json.dumps(result, indent=1) if arguments.json else effort.table_text(result))
        return 0

    effort_command = _command(
        commands, "effort", run_effort, "what refinement at the encoder brings, and costs"
    )
    effort_command.add_argument("images", nargs="+", type=location, metavar="IMAGE|DIR")
    effort_command.add_argument(
        "--model",
        nargs="+",
        type=location,
        required=True,
        help="of one recipe; four or more give a BD-rate",
    )
    effort_command.add_argument(
        "--effort", nargs="*", type=whole(0, 9), default=[3, 5, 7], metavar="0-9"
    )
    effort_command.add_argument(
        "--seconds",
        nargs="*",
        type=positive,
        default=[10, 60],
        metavar="S",
        help="effort 9 in time",
    )
    effort_command.add_argument(
        "--rows",
        type=location,
        default="effort.rows.jsonl",
        metavar="JSONL",
        help="measurements, kept",
    )
    effort_command.add_argument("--json", action="store_true")

    def run_h266(arguments: argparse.Namespace) -> int:
        import json
        from pathlib import Path

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
        print(json.dumps(result, indent=1) if arguments.json else h266.table_text(result))
        return 0

    h266_command = _command(
        commands, "h266", run_h266, "what each part of the H.266 pipeline is worth"
    )
    h266_command.add_argument("images", nargs="+", type=location, metavar="IMAGE|DIR")
    h266_command.add_argument("--filter", nargs="*", type=location, default=[], metavar="MODEL")
    h266_command.add_argument("--preset", default="medium")
    h266_command.add_argument(
        "--qp", nargs="*", type=whole(0, 63), metavar="QP", help="32, 35, … 47"
    )
    h266_command.add_argument(
        "--bpp", type=positive, default=0.15, help="where gains are read (0.15)"
    )
    h266_command.add_argument(
        "--rows",
        type=location,
        default="h266.rows.jsonl",
        metavar="JSONL",
        help="measurements, kept",
    )
    h266_command.add_argument("--workers", type=count, help="codings at a time")
    h266_command.add_argument("--whole", action="store_true", help="leave out the parts")
    h266_command.add_argument("--json", action="store_true")

    def run_complexity(arguments: argparse.Namespace) -> int:
        import json

        from lightning_tucodec.bench import complexity

        table = complexity.table()
        rows = json.dumps([row._asdict() for row in table], indent=1)
        print(rows if arguments.json else complexity.markdown(table))
        return 0

    complexity_command = _command(
        commands,
        "complexity",
        run_complexity,
        "parameters and multiply-accumulates of the networks",
    )
    complexity_command.add_argument("--json", action="store_true")

    def run_coding(arguments: argparse.Namespace) -> int:
        import json

        from lightning_tucodec.bench import codec, entropy

        height, width = arguments.size
        if arguments.bench_command == "codec" and arguments.large:
            result = codec.large(arguments.models[-1])
        else:
            options = {
                "models": arguments.models,
                "rates": arguments.bpp,
                "peers": arguments.peers,
                "size": (height, width),
                "repeats": arguments.repeats,
            }
            if arguments.bench_command == "codec":
                result = codec.run(image=arguments.image, **options)
            else:
                result = entropy.run(**options)
        print(json.dumps(result, indent=1) if arguments.json else codec.table_text(result))
        return 0

    for name, summary in (
        ("codec", "whole coding and decoding and their parts beside CompressAI's, in one process"),
        ("entropy", "the entropy path alone beside CompressAI's, and how it grows with the image"),
    ):
        command = _command(commands, name, run_coding, summary)
        command.add_argument(
            "--models",
            nargs="+",
            type=location,
            default=["paper", "fast", "tiny-mse-2"],
            metavar="NAME",
            help="presets (untrained; symbols drawn from their own P) or trained models (%(default)s)",
        )
        command.add_argument("--bpp", nargs="+", type=positive, default=[0.15, 0.5], metavar="RATE")
        command.add_argument(
            "--peers",
            nargs="*",
            default=["mbt2018", "cheng2020-attn"],
            choices=["mbt2018", "cheng2020-attn"],
            help="CompressAI's models; none when nothing follows",
        )
        command.add_argument(
            "--size", nargs=2, type=count, default=[512, 768], metavar=("HEIGHT", "WIDTH")
        )
        command.add_argument("--repeats", type=count, default=5)
        command.add_argument("--json", action="store_true")
        if name == "codec":
            command.add_argument(
                "--image", type=location, help="a photograph instead of the generated picture"
            )
            command.add_argument(
                "--large",
                action="store_true",
                help="instead: peak memory of 6000×4000 pixels with the last of --models",
            )

    def run_data(arguments: argparse.Namespace) -> int:
        import json

        from lightning_tucodec.bench import data, timing

        runners: dict[str, Callable[..., dict[str, Any]]] = {
            "shards": data.run_shards,
            "loader": data.run_loader,
        }
        result = runners[arguments.bench_command](
            arguments.photos, arguments.count, repeats=arguments.repeats
        )
        print(json.dumps(result, indent=1) if arguments.json else timing.table_text(result))
        return 0

    for name, summary in (
        ("shards", "building shards against bare encoding of the same patches"),
        ("loader", "loading patches against plain webdataset on PNG, and bare decoding"),
    ):
        command = _command(commands, name, run_data, summary)
        command.add_argument(
            "--photos", type=location, metavar="SRC", help="by default generated ones"
        )
        command.add_argument("--count", type=count, default=600, help="patches of 256×256")
        command.add_argument("--repeats", type=count, default=3)
        command.add_argument("--json", action="store_true")

    def run_train(arguments: argparse.Namespace) -> int:
        import json

        from lightning_tucodec.bench import timing, train, train_peer

        if arguments.peer:
            result = train_peer.run(repeats=arguments.repeats)
        else:
            result = train.run(
                arguments.photos, arguments.preset, arguments.steps, repeats=arguments.repeats
            )
        print(json.dumps(result, indent=1) if arguments.json else timing.table_text(result))
        return 0

    command = _command(
        commands, "train", run_train, "`fit` with all it does against a bare Lightning loop"
    )
    command.add_argument("--photos", type=location, metavar="SRC", help="by default generated ones")
    command.add_argument("--preset", default="tiny", choices=("tiny", "fast", "paper"))
    command.add_argument("--steps", type=count, default=60, help="of each training")
    command.add_argument("--repeats", type=count, default=3)
    command.add_argument(
        "--peer",
        action="store_true",
        help="instead: a step of tiny beside CompressAI's joint model with as many parameters",
    )
    command.add_argument("--json", action="store_true")


def _register_clic(subparsers: Any) -> None:
    def run(arguments: argparse.Namespace) -> int:
        if arguments.clic_command == "decode":
            from lightning_tucodec.sets.submission import run_decode

            return run_decode(arguments)
        from lightning_tucodec.sets import clic

        run_command = {
            "verify": clic.run_verify,
            "compare": clic.run_compare,
            "check": clic.run_check,
        }
        return run_command[arguments.clic_command](arguments)

    family = subparsers.add_parser("clic", help="decode and verify what `allocate` has written")
    commands = family.add_subparsers(dest="clic_command", metavar="COMMAND", required=True)
    verify = _command(commands, "verify", run, "decode a submission and measure everything anew")
    verify.add_argument("submission", type=location, metavar="DIR")
    compare = _command(
        commands, "compare", run, "verify submissions; their numbers beside Tucodec's of 2019"
    )
    compare.add_argument("submission", type=location, metavar="DIR", nargs="+")
    check = _command(commands, "check", run, "count: are these CLIC 2019's validation images?")
    check.add_argument("images", type=location, metavar="IMAGE|DIR", nargs="+")
    decode = _command(commands, "decode", run, "decode a submission to PNG files")
    decode.add_argument("submission", type=location, metavar="DIR")
    decode.add_argument("-o", "--out", type=location, required=True, metavar="DIR")
    add_force(decode)
    for command in (verify, compare):
        _add_limits(command)
        command.add_argument(
            "--originals", nargs="+", type=location, required=True, metavar="IMAGE|DIR"
        )
    for command in (verify, compare, decode):
        command.add_argument("--json", action="store_true")


def _register_sweep(subparsers: Any) -> None:
    from lightning_tucodec.sweeps.commands import add_arguments

    family = subparsers.add_parser("sweep", help="many trainings as jobs of Slurm")
    commands = family.add_subparsers(dest="sweep_command", metavar="COMMAND", required=True)
    add_arguments(commands, _command)


# One line a subcommand family; each function adds its parser(s) and names what runs.
_REGISTER: list[Callable[[Any], None]] = [
    _register_demo,
    _register_doctor,
    _register_allocate,
    _register_bench,
    _register_clic,
    _register_coding,
    _register_compare,
    _register_evaluate,
    _register_export,
    _register_shards,
    _register_sweep,
    _register_wandb_sync,
]


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the console script.

    Args:
        argv: the words after `tucodec`; the process's own when None.

    Returns:
        The exit status.
    """
    from lightning_tucodec.io import processes

    words = list(sys.argv[1:] if argv is None else argv)
    _usable_streams()
    # A training saves itself when it is told to end: its signals are `training.preemption`'s.
    saves_itself = bool(words) and words[0] == "fit"
    with contextlib.nullcontext() if saves_itself else processes.interruptible():
        try:
            return _run(words)
        except processes.INTERRUPTS as interrupt:
            status = getattr(interrupt, "status", 130)
            processes.announce()
            processes.stop(status)
            if (
                argv is None
            ):  # the process is ours: its end need not wait for what libraries clean up
                os._exit(status)
            return status


def _run(words: Sequence[str]) -> int:
    """The exit status of a command, whose errors are told."""
    try:
        if words and words[0] in _LIGHTNING_COMMANDS:
            from lightning_tucodec.training.fit import main as lightning_main

            status = lightning_main(words)
        else:
            arguments = build_parser().parse_args(words)
            status = int(arguments.run(arguments))
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        # The reader of our output (head, less) has gone; that is not an error of ours.
        _drop_output()
        return 0
    except (TucodecError, OSError) as error:
        print(f"tucodec: {reason(error)}", file=sys.stderr)
        try:
            sys.stdout.flush()
        except OSError:
            _drop_output()
        return 1


def _usable_streams() -> None:
    """Closed output counts as /dev/null; what an output's encoding lacks is escaped."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            # In order, as each takes the lowest free number: so no file of ours is taken for an output.
            setattr(sys, name, open(os.devnull, "r+", encoding="utf-8"))  # noqa: SIM115
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict" and name != "stdin":
            stream.reconfigure(errors="backslashreplace")


def _drop_output() -> None:
    """What is still to be printed goes nowhere, so that the interpreter's end does not fail on it."""
    with contextlib.suppress(io.UnsupportedOperation):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())
