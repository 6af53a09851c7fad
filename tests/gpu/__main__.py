"""`make gpu`: the tests marked `gpu`, then the benches of training and coding, on the GPU of this machine.

Nothing is installed. Results go to docs/gpu.json after every part, so that what is cut off loses only itself.
A part that does not fit into the time is left out and named. Without a GPU nothing is done; that is no error.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "gpu.json"

NEEDED = {
    "torch": "2.11", "pytorch-lightning": "2.6.4", "numba": "0.60", "einops": "0.8", "safetensors": "0.5",
    "numpy": "1.26", "pillow": "11.3", "pyyaml": "6", "tqdm": "4.66", "fsspec": "2025.3", "webdataset": "1.0",
    "imagehash": "4.3", "pytest": "8.3",
    "hypothesis": "6.120",
}  # fmt: skip
"""All that is needed; CompressAI is not: its example loop is written out."""

PRESETS = ("tiny", "fast", "paper")

RESERVE = 8
"""Seconds at the end that no part gets."""


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])


def lacking() -> list[str]:
    """What must be installed first, as pip names it."""
    missing = []
    for name, least in NEEDED.items():
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found = "0"
        if _numbers(found) < _numbers(least):
            missing.append(f"{name}>={least}")
    return missing


class Session:
    """Parts in order, until the time is over.

    Args:
        results: file that gets what was measured.
        minutes: for everything.
    """

    def __init__(self, results: Path, minutes: float) -> None:
        self.results, self.end = results, time.monotonic() + 60 * minutes - RESERVE
        self.found: dict[str, Any] = {
            "tests": {},
            "train": {},
            "codec": {},
            "compiled": {},
            "left_out": [],
        }

    @property
    def left(self) -> float:
        """Seconds."""
        return self.end - time.monotonic()

    def keep(self) -> None:
        """Write what was found so far."""
        from lightning_tucodec.io.temporary import atomic_write

        with atomic_write(self.results, "w") as stream:
            stream.write(json.dumps(self.found, indent=1) + "\n")

    def run(self, name: str, words: Sequence[str], least: float = 0.0) -> str | None:
        """Standard output of a command of this Python; None if it was left out.

        Args:
            name: of the part.
            words: after `python`.
            least: seconds without which it is not begun.
        """
        if self.left < max(least, 1.0):
            self.found["left_out"].append(f"{name}: no time was left")
            return None
        print(f"make gpu: {name} ({self.left:.0f} s left)", flush=True)
        try:
            done = subprocess.run(
                [sys.executable, *words], cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=self.left,
                check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            self.found["left_out"].append(f"{name}: cut off when the time was over")
            return None
        self.status = done.returncode
        return done.stdout


def where() -> dict[str, Any]:
    """The machine, and what was measured."""
    import torch

    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, text=True, check=False,
    ).stdout.strip()  # fmt: skip
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "commit": commit or None,
        "day": time.strftime("%Y-%m-%d"),
        "gpu": gpu,
        "cuda": torch.version.cuda,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in NEEDED},
    }


def tests(session: Session, chosen: Sequence[str]) -> None:
    """Run the tests; their counts and the names of those that failed."""
    # The project's filters name modules that need not be here.
    words = [
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "-o",
        "filterwarnings=default",
        "-ra",
        "--tb=short",
    ]
    words += chosen
    start = time.monotonic()
    output = session.run("tests", words)
    if output is None:
        return
    print(output)
    counts = {
        kind: int(count)
        for count, kind in re.findall(r"(\d+) (passed|failed|skipped|error)", output)
    }
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", output, re.MULTILINE)
    seconds = round(time.monotonic() - start)
    session.found["tests"] = {
        **counts,
        "broken": failed,
        "seconds": seconds,
        "status": session.status,
    }


def bench(
    session: Session, part: str, preset: str, words: Sequence[str], key: str | None = None
) -> None:
    """One bench of one preset, kept under `key`, or under the bench's own name."""
    name = f"bench {part} {preset}{f', {key}' if key else ''}"
    output = session.run(name, ["-m", "lightning_tucodec.cli", "bench", part, *words, "--json"], 10)
    if output is not None:
        if session.status:
            session.found["left_out"].append(f"{name}: ended with status {session.status}")
        else:
            session.found[key or part][preset] = json.loads(output)
    session.keep()


def main(argv: Sequence[str] | None = None) -> int:
    """The command; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="make gpu", description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--minutes", type=float, default=9.0, help="for everything (%(default)s)")
    add("--results", type=Path, default=RESULTS)
    add("--rehearse", action="store_true", help="a small run of every part on the CPU")
    arguments = parser.parse_args(argv)
    if missing := lacking():
        print(f"make gpu: install these first: {' '.join(missing)}", file=sys.stderr)
        return 1
    import torch

    rehearse = arguments.rehearse
    if not torch.cuda.is_available() and not rehearse:
        print("make gpu: there is no CUDA GPU here; nothing was run or measured")
        return 0
    session = Session(arguments.results, arguments.minutes)
    session.found = {"machine": where(), **session.found}
    # Kernels of the entropy coder are compiled while the tests run.
    warmup = subprocess.Popen(
        [sys.executable, "-m", "lightning_tucodec.cli", "warmup"], cwd=ROOT, stdout=sys.stderr
    )
    try:
        tests(session, ["tests/gpu", "-k", "noise"] if rehearse else ["tests/gpu", "-m", "gpu"])
        session.keep()
        warmup.wait(max(1.0, session.left))
        small = [
            "--device",
            "cpu",
            "--steps",
            "1",
            "--batch",
            "1",
            "--crop",
            "64",
            "--repeats",
            "1",
        ]
        training = small if rehearse else ["--device", "cuda", "--repeats", "2"]
        coding = ["--peers", "--repeats", "1" if rehearse else "5"]
        coding += ["--size", "64", "64"] if rehearse else ["--device", "cuda"]
        presets = PRESETS[:1] if rehearse else PRESETS
        for preset in presets:
            bench(session, "train", preset, ["--preset", preset, *training])
            bench(session, "codec", preset, ["--models", preset, "--bpp", "0.5", *coding])
        for preset in (
            () if rehearse else presets
        ):  # last, because compiling may take all that is left
            words = ["--preset", preset, *training, "--compile"]
            bench(session, "train", preset, words, "compiled")
    except subprocess.TimeoutExpired:
        session.found["left_out"].append("benches: kernels were still being compiled")
        session.keep()
    finally:
        warmup.kill()
        warmup.wait()
    found = session.found
    for line in found["left_out"]:
        print(f"make gpu: left out: {line}")
    print(f"make gpu: {found['tests'] or 'no tests'}; {arguments.results}")
    return int(
        bool(found["tests"].get("status", 1)) or any("status" in line for line in found["left_out"])
    )


if __name__ == "__main__":
    sys.exit(main())
