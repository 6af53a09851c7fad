"""`tucodec shards build`: photographs -> patches -> WebDataset shards and an index."""

import hashlib
import io
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from data_pipelines.patches import EXTENSION, candidates, contrast, encode_patch, resize, scaled_size
from lightning_tucodec.errors import DatasetError, ImageInputError
from lightning_tucodec.files import atomic_write
from lightning_tucodec.images import IMAGE_SUFFIXES, read_image


@dataclass(frozen=True)
class BuildOptions:
    """Everything besides the sources that decides the bytes of a build."""

    patch: int = 256
    count: int | None = None
    shard_size: int = 1024
    seed: int = 0
    format: str = "webp"
    long_edge: int = 2000
    max_overlap: float = 0.25
    scales: tuple[float, ...] = (1.0,)
    min_contrast: float = 3.0


def build(sources: Sequence[str], out: Path, options: BuildOptions) -> dict:
    """First version: one process, folders only."""
    from webdataset.writer import TarWriter

    files = [
        (source, path)
        for source in sources
        for path in sorted(Path(source).rglob("*"))
        if path.suffix.lower() in IMAGE_SUFFIXES
    ]
    if not files:
        raise DatasetError(f"{', '.join(sources)}: no images found")
    plan = []
    rejected = []
    for number, (source, path) in enumerate(files):
        try:
            image = read_image(path)
        except ImageInputError as error:
            rejected.append({"image": path.name, "reason": str(error)})
            continue
        rng = np.random.default_rng([options.seed, number])
        height, width = image.shape[:2]
        found = candidates(
            width, height, patch=options.patch, max_overlap=options.max_overlap,
            long_edge=options.long_edge, scales=options.scales, rng=rng,
        )
        plan += [(number, patch) for patch in found]
    order = np.random.default_rng([options.seed]).permutation(len(plan))[: options.count]
    order = np.sort(order)
    order = order[np.random.default_rng([options.seed, 1]).permutation(len(order))]
    shards = []
    out.mkdir(parents=True, exist_ok=True)
    for start in range(0, len(order), options.shard_size):
        name = f"shard-{start // options.shard_size:06d}.tar"
        rows = [plan[i] for i in order[start : start + options.shard_size]]
        samples: dict[int, tuple[bytes, dict]] = {}
        for row, (number, patch) in sorted(enumerate(rows), key=lambda item: item[1]):
            image = read_image(files[number][1])
            size = scaled_size(image.shape[1], image.shape[0], options.long_edge, patch.scale)
            pixels = resize(image, size)[
                patch.y : patch.y + options.patch, patch.x : patch.x + options.patch
            ]
            if contrast(pixels) < options.min_contrast:
                continue
            samples[row] = (encode_patch(pixels, options.format), {"image": files[number][1].name})
        with atomic_write(out / name) as stream, TarWriter(stream, encoder=False, mtime=0) as tar:
            for row in sorted(samples):
                data, meta = samples[row]
                tar.write({
                    "__key__": f"{start + row:09d}",
                    EXTENSION[options.format]: data,
                    "json": json.dumps(meta).encode(),
                })
        import tarfile

        with tarfile.open(out / name) as opened:
            members = [m for m in opened if not m.name.endswith(".json")]
        shards.append({
            "name": name, "samples": len(members), "bytes": (out / name).stat().st_size,
            "sha256": hashlib.sha256((out / name).read_bytes()).hexdigest(),
            "offsets": [m.offset_data for m in members], "sizes": [m.size for m in members],
        })
    index = {
        "version": 1, "patch": options.patch, "format": options.format,
        "samples": sum(s["samples"] for s in shards), "shards": shards,
    }
    with atomic_write(out / "index.json", "w") as stream:
        json.dump(index, stream)
    with atomic_write(out / "rejected.jsonl", "w") as stream:
        stream.writelines(json.dumps(row) + "\n" for row in rejected)
    return index
