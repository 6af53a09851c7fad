"""Scale: a build from thousands of distinct generated images, read back whole.

    python -m tests.campaigns.data_scale --images 5000 --scratch DIR

Each image of 576×576 gives four patches of 256×256, 20,000 in all. The build's time and bytes, and
what they come to for a million patches if both grow in proportion, go to docs/campaigns.json under
"data", "scale". The exit status is 1 when `verify` finds anything wrong or a patch is missing.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_pipelines.options import BuildOptions
from data_pipelines.shards import build
from data_pipelines.tasks import progress
from data_pipelines.verify import verify
from lightning_tucodec.io.processes import cores
from lightning_tucodec.io.temporary import atomic_write
from tests.campaigns.data import RESULTS

SIDE = 576
PATCHES = 4
MILLION = 10**6


def make_images(folder: Path, count: int) -> None:
    """JPEG pictures with detail at every scale, each from a seed of its own."""
    folder.mkdir()
    for number in progress(range(count), count, "images"):
        rng = np.random.default_rng(number)
        picture = np.full((1, 1, 3), 128.0, np.float32)
        for side in (9, 18, 36, 72, 144, 288, SIDE):
            grown = Image.fromarray(picture.clip(0, 255).astype(np.uint8)).resize((side, side), 3)
            detail = 900 / side if side < SIDE else 3.0
            noise = rng.standard_normal((side, side, 3), np.float32)
            picture = np.asarray(grown, np.float32) + min(45.0, detail) * noise
        Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(
            folder / f"{number:06d}.jpg", quality=92
        )


def measure(images: int, workers: int, scratch: Path) -> dict[str, Any]:
    """Generate, build and verify; returns what the campaign file says."""
    make_images(scratch / "images", images)
    start = time.perf_counter()
    built = build(
        [str(scratch / "images")], str(scratch / "shards"), BuildOptions(), workers=workers
    )
    seconds = time.perf_counter() - start
    assert built.contents is not None
    report = verify(str(scratch / "shards"))
    samples, size = built.contents["samples"], built.contents["bytes"]
    return {
        "images": images,
        "patches": samples,
        "rejected": built.contents["rejected"],
        "workers": workers,
        "build_seconds": round(seconds, 1),
        "bytes": size,
        "verified_patches": report.samples,
        "wrong": report.wrong,
        "extrapolated_to_a_million_patches": {
            "hours": round(seconds / samples * MILLION / 3600, 2),
            "gigabytes": round(size / samples * MILLION / 1e9, 1),
        },
    }


def main(argv: Sequence[str] | None = None) -> int:
    """The command; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--workers", type=int, default=cores())
    parser.add_argument("--scratch", help="folder with 2.5 GB of room (default: the system's)")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as folder:
        found = measure(arguments.images, arguments.workers, Path(folder))
    everything = json.loads(arguments.results.read_text()) if arguments.results.exists() else {}
    everything.setdefault("data", {})["scale"] = found
    with atomic_write(arguments.results, "w") as stream:
        stream.write(json.dumps(everything, indent=2, sort_keys=True) + "\n")
    print(json.dumps(found, indent=1))
    whole = found["verified_patches"] == found["patches"] == PATCHES * arguments.images
    return int(bool(found["wrong"]) or not whole)


if __name__ == "__main__":
    sys.exit(main())
