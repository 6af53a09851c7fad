"""What `compress` and `decompress` share: files in, files out, one line for each."""

import argparse
import contextlib
import gc
import io
import json
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from lightning_tucodec.coding.container import MAGIC
from lightning_tucodec.errors import ConfigError, ImageInputError, OutputError, printable, reason
from lightning_tucodec.io.files import read_bytes, target_check

Job = tuple[Path, Path]
"""A file and what is made of it."""


def import_torch() -> None:
    """Import PyTorch without looking for garbage among its hundreds of thousands of new objects."""
    collects = gc.isenabled()
    gc.disable()
    try:
        import torch  # noqa: F401
    finally:
        if collects:
            gc.enable()


def device(name: str) -> str:
    """Where the networks run: `auto` is a GPU when there is one."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: PyTorch finds no GPU here; leave the option out")
    return name


def add_device(parser: argparse.ArgumentParser) -> None:
    """`--device`."""
    parser.add_argument(
        "--device",
        default="auto",
        choices=("auto", "cpu", "cuda"),
        help="device of the transforms (auto: a GPU if there is one); entropy coding stays on the CPU",
    )


def targets(sources: list[Path], out: str, suffix: str) -> list[tuple[Path, Path]]:
    """(source, target): one file when OUT names one, else `<stem><suffix>` in the folder OUT.

    Raises:
        OutputError: OUT is a file of another kind, one file for several sources, or two sources would
            write the same file.
    """
    is_folder = os.path.isdir(out) or out.endswith(os.sep)
    if out.lower().endswith(suffix) and not is_folder:
        if len(sources) > 1:
            raise OutputError(f"-o {out}: one file for {len(sources)} inputs; name a folder")
        return [(sources[0], Path(out))]
    if out == "-" or (Path(out).suffix and not is_folder):
        raise OutputError(
            f"-o {out}: is no {suffix} file; name one, or a folder, which ends in {os.sep} when it is new "
            "and has a dot in its name"
        )
    jobs = [(source, Path(out) / f"{source.stem}{suffix}") for source in sources]
    seen: dict[Path, Path] = {}
    for source, target in jobs:
        if target in seen:
            raise OutputError(f"{seen[target]} and {source} would both be written to {target}")
        seen[target] = source
    return jobs


def outputs(
    images: Iterable[str], out: str, recon: str | None, force: bool
) -> tuple[list[Job], dict[Path, Path], Callable[[Job], None]]:
    """Jobs of `compress`, pictures by source, and what refuses a job whose outputs would replace a file."""
    from lightning_tucodec.io.images import image_files

    files = targets(named(images, image_files), out, ".tuc")
    sources = [source for source, _ in files]
    recons = dict(targets(sources, recon, ".png") if recon else [])
    refuse = target_check(sources, force)

    def check(job: Job) -> None:
        source, target = job
        if os.path.isdir(source):
            os.listdir(source)  # says when it must not be read
            raise ImageInputError(f"{source}: no image files in this folder")
        for path in (target, recons.get(source)):
            if path is not None:
                refuse(path)

    return files, recons, check


def named(names: Iterable[str], listed: Callable[[Path], list[Path]]) -> list[Path]:
    """Files as named, folders replaced by the files in them that `listed` gives.

    A folder without such files stays; reading it will say so.
    """
    files: list[Path] = []
    for path in map(Path, names):
        inside: list[Path] = []
        # Not the method of Path, which raises for names that are too long.
        if os.path.isdir(path):
            with contextlib.suppress(OSError):
                inside = listed(path)
        files += inside or [path]
    return files


def tuc_files(folder: Path) -> list[Path]:
    """The `.tuc` files directly in a folder, sorted; hidden ones do not count."""
    return sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() == ".tuc" and not path.name.startswith(".") and not path.is_dir()
    )


def read(path: Path) -> bytes:
    """The bytes of a `.tuc` file; of another one, however long, only its beginning.

    Raises:
        ImageInputError: it cannot be read, or is a folder: one without `.tuc` files, see `named`.
    """
    try:
        if os.path.isdir(path):
            os.listdir(path)  # says when it must not be read
            raise ImageInputError(f"{path}: no .tuc files in this folder")
        return read_bytes(path, MAGIC)
    except OSError as error:
        raise ImageInputError(f"{path}: {error.strerror}") from None


def drop_output() -> None:
    """Discard what is still to be printed, so that the interpreter does not fail at its end."""
    with contextlib.suppress(io.UnsupportedOperation):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def report(
    outcomes: Iterable[tuple[Job, dict[str, Any] | Exception]], count: int, as_json: bool
) -> int:
    """Print every outcome, with progress; exit status 1 when anything failed."""
    from tqdm import tqdm

    status = 0
    interactive = sys.stderr.isatty() and count > 1
    for (source, _), row in tqdm(
        outcomes, total=count, unit="file", disable=not interactive, leave=False
    ):
        if isinstance(row, Exception):
            status = 1
            text = reason(row)
            named = text if str(source) in text else f"{source}: {text}"
            tqdm.write(f"tucodec: {named}", file=sys.stderr)
            continue
        try:
            tqdm.write(json.dumps(row) if as_json else _line(row), file=sys.stdout)
        except BrokenPipeError:  # the reader has gone; the files are made nevertheless
            drop_output()
        if lost := row.get("damaged_rows"):
            status = 1
            rows = ", ".join(f"{top}–{bottom - 1}" for top, bottom in lost)
            tqdm.write(
                f"tucodec: {source}: rows {rows} are damaged; they are hatched in {row['output']}",
                file=sys.stderr,
            )
    return status


def _line(row: dict[str, Any]) -> str:
    words = [f"{row['file']} -> {row['output']}", f"{row['width']}x{row['height']}"]
    if "bytes" in row:
        words.append(f"{row['bytes']} bytes, {row['bpp']:.4f} bpp")
    return printable("  ".join([*words, f"{row['seconds']:.2f} s", row["model"]]))
