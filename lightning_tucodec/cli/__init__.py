"""The `tucodec` command: one module a family of commands, each with `register(subparsers)`.

Heavy imports (torch above all) stand inside the functions that run, so that `tucodec --help` is instant.
Results go to stdout, progress and logs to stderr. Exit status: 0 ok, 1 the input or the run is at
fault (one line says which and why), 2 usage.
"""

import argparse
import contextlib
import io
import os
import signal
import sys
from collections.abc import Sequence
from importlib import import_module

from lightning_tucodec.errors import TucodecError, first_sentence, reason

_FAMILIES = (
    *("train", "compress", "decompress", "evaluate", "compare", "sets"),
    *("shards", "sweep", "doctor", "bench", "demo", "warmup"),
)
"""Modules of this package, imported by `main`: Ctrl-C while that lasts finds it in charge."""

_BRIEF = ("compress", "decompress", "info", "models")
"""Commands that have written and closed everything when they return; see `main`."""

EXTRAS = {
    "bjontegaard": "report", "compressai": "train", "flip_evaluator": "perceptual",
    "fsspec": "data", "imagehash": "data", "imageio_ffmpeg": "h266", "jinja2": "report",
    "jsonargparse": "train", "lightning_fabric": "train", "matplotlib": "report", "paramiko": "sftp",
    "piq": "perceptual", "plotly": "report", "pytorch_lightning": "train",
    "s3fs": "s3", "scipy": "report", "skimage": "demo", "sklearn": "demo", "ssimulacra2": "perceptual",
    "torchmetrics": "perceptual", "torchvision": "perceptual", "wandb": "wandb", "webdataset": "data",
}  # fmt: skip
"""The extra of this package that brings a module which a plain installation lacks."""


def build_parser() -> argparse.ArgumentParser:
    """All commands with their options."""
    parser = argparse.ArgumentParser(prog="tucodec", description="Learned image compression.")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for family in _FAMILIES:
        import_module(f"{__name__}.{family}").register(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the console script.

    Args:
        argv: the words after `tucodec`; the process's own when None.

    Returns:
        The exit status.
    """
    try:
        if argv is None and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            # Until and after our time for it, Ctrl-C just ends the process: no traceback.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        _usable_streams()
        words = list(sys.argv[1:] if argv is None else argv)
        if argv is None and words[:1] != ["fit"]:  # which runs for days
            import_module("lightning_tucodec.io.memory").keep_memory()
        status = _interruptible(words, argv is None)
        if argv is None and words[:1] and words[0] in _BRIEF:
            # What PyTorch and numba do at the interpreter's end takes longer than to decode an image.
            import_module("lightning_tucodec.io.processes").end(status)
        return status
    except KeyboardInterrupt:  # before the signals were ours
        print("tucodec: interrupted", file=sys.stderr)
        return 130


def _interruptible(words: list[str], own: bool) -> int:
    """The exit status of a command; one that is interrupted leaves nothing behind.

    Args:
        words: the command.
        own: whether the process is ours: then its end need not wait for what libraries clean up.
    """
    from lightning_tucodec.io import processes

    saves_itself = words[:1] == ["fit"]
    with processes.interruptible():
        try:
            if not saves_itself:
                return _run(words)
            with (
                contextlib.suppress(ImportError),
                processes.unwrapped(),
            ):  # which `_run` meets again
                import_module("lightning_tucodec.training.fit")
        except processes.INTERRUPTS as interrupt:
            status = getattr(interrupt, "status", 130)
            processes.announce()
            processes.stop(status)
            if own:
                processes.end(status)
            return status
    # A training saves itself when it is told to end: its signals are `training.preemption`'s.
    return _run(words)


def _run(words: Sequence[str]) -> int:
    """The exit status of a command, whose errors are told."""
    from lightning_tucodec.cli.jobs import drop_output
    from lightning_tucodec.cli.train import LIGHTNING
    from lightning_tucodec.io.processes import unwrapped

    try:
        with unwrapped():
            if words and words[0] in LIGHTNING:
                from lightning_tucodec.training.fit import main as lightning_main

                status = lightning_main(words)
            else:
                if words and words[0] == "doctor":
                    words = import_module(f"{__name__}.doctor").arranged(words)
                arguments = build_parser().parse_args(words)
                with _trusting(getattr(arguments, "trust", [])):
                    status = int(arguments.run(arguments))
            sys.stdout.flush()
        return status
    except ModuleNotFoundError as error:
        module = (error.name or "").partition(".")[0]
        if module not in EXTRAS:
            raise
        install = f"pip install 'lightning-tucodec[{EXTRAS[module]}]'"
        print(f"tucodec: {module} is not installed, which this needs: {install}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        # The reader of our output (head, less) has gone; that is not an error of ours.
        drop_output()
        return 0
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # PyTorch's, which need not be imported here
            raise
        text = f"not enough memory on the GPU for this ({first_sentence(error)})"
        print(f"tucodec: {text}", file=sys.stderr)
        return 1
    except (TucodecError, OSError, MemoryError) as error:
        text = (
            "there is not enough memory for this"
            if isinstance(error, MemoryError)
            else reason(error)
        )
        print(f"tucodec: {text}", file=sys.stderr)
        try:
            sys.stdout.flush()
        except OSError:
            drop_output()
        return 1


def _trusting(packages: Sequence[str]) -> contextlib.AbstractContextManager[None]:
    """See `codecs.network.build.trusting`, which needs PyTorch."""
    if not packages:
        return contextlib.nullcontext()
    from lightning_tucodec.codecs.network.build import trusting

    return trusting(packages)


def _usable_streams() -> None:
    """Replace a closed output by /dev/null; escape characters that an output's encoding lacks."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            # In order, as each takes the lowest free number: so no file of ours is taken for an output.
            setattr(sys, name, open(os.devnull, "r+", encoding="utf-8"))  # noqa: SIM115
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict" and name != "stdin":
            stream.reconfigure(errors="backslashreplace")
