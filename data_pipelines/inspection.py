"""What a build notes of each photograph: hashes, size, worthwhile patches, or why it is rejected."""

import hashlib
from collections.abc import Sequence
from typing import Any

from data_pipelines.options import BuildOptions
from data_pipelines.patches import contrast, grid, luma, perceptual_hash, scaled
from data_pipelines.sources import Entry, Source
from data_pipelines.store import json_line, named_stream
from lightning_tucodec.errors import ImageInputError
from lightning_tucodec.io.files import TooLargeError
from lightning_tucodec.io.hashing import derive
from lightning_tucodec.io.images import read_image
from lightning_tucodec.io.storage import Storage


def inspect_chunk(
    locations: Sequence[str], out: str, name: str, options: BuildOptions, entries: list[Entry]
) -> None:
    """Write the notes of a chunk of images, a line of JSON each, as `name` into `out`."""
    sources = {entry.source: Source(locations[entry.source]) for entry in entries}
    notes = [inspect_image(sources[entry.source], entry, options) for entry in entries]
    Storage(out).write(name, b"".join(json_line(note) for note in notes))


def inspect_image(source: Source, entry: Entry, options: BuildOptions) -> dict[str, Any]:
    """Hashes, size and worthwhile patches of one image, or why it is rejected."""
    try:
        data = source.read(entry)
        image = read_image(named_stream(data, entry.name))
    except (ImageInputError, FileNotFoundError, PermissionError) as error:
        reason = str(error).removeprefix(f"{entry.name}: ")
        return {"kind": "unreadable", "reason": reason}
    except TooLargeError as error:
        return {"kind": "unreadable", "reason": str(error.strerror)}
    digest = hashlib.sha256(data).hexdigest()
    key = derive(options.seed, int(digest[:16], 16))
    patches, flat = [], 0
    for number, scale in enumerate(options.scales):
        view = scaled(image, options.long_edge, scale)
        gray = luma(view)
        height, width = gray.shape
        corners = grid(width, height, options.patch, options.max_overlap, derive(key, number))
        for x, y in corners:
            if contrast(gray[y : y + options.patch, x : x + options.patch]) < options.min_contrast:
                flat += 1
            else:
                patches.append((number, x, y))
    height, width = image.shape[:2]
    if not patches:
        if flat:
            return {"kind": "flat", "reason": f"contrast below {options.min_contrast} everywhere"}
        return {"kind": "small", "reason": f"{width}×{height} is smaller than a patch"}
    return {
        "sha256": digest, "hash": f"{perceptual_hash(image):016x}", "width": width,
        "height": height, "patches": patches,
    }  # fmt: skip
