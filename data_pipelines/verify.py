"""`tucodec shards verify | stats`: reading shards back, and pictures of what is in them."""

import hashlib
import io
import json
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_pipelines.patches import EXTENSION, contrast, decode_patch, luma, pixel_hash
from data_pipelines.tasks import progress
from lightning_tucodec.errors import DatasetError, TucodecError
from lightning_tucodec.io.hashing import permute
from lightning_tucodec.io.storage import Storage
from lightning_tucodec.io.temporary import atomic_write
from lightning_tucodec.training.input.precoded import FORMAT, Precoded
from lightning_tucodec.training.input.shards import ShardIndex, ShardReader

_CONTACT = 64  # patches on the contact sheet
_HISTOGRAM = 4096  # patches behind the histograms


class Report(NamedTuple):
    """What `verify` found.

    Attributes:
        samples: samples read.
        shards: shards read.
        wrong: one line for each fault.
    """

    samples: int
    shards: int
    wrong: list[str]


def verify(location: str) -> Report:
    """Read every byte of every shard and compare with index and metadata.

    Checked: size and SHA-256 of each shard; count, names and offsets of its samples; that each patch
    decodes to the stated side and to the pixels whose hash its metadata state.

    Raises:
        DatasetError: there is no readable index.
    """
    storage = Storage(location)
    index = ShardIndex.read(storage)
    wrong: list[str] = []
    samples = 0
    for shard in progress(range(len(index.names)), len(index.names), "verify"):
        name = index.names[shard]
        try:
            data = storage.read(name)
        except FileNotFoundError:
            wrong.append(f"{storage.path(name)}: is missing")
            continue
        except (OSError, TucodecError) as error:
            wrong.append(f"{storage.path(name)}: cannot be read ({error})")
            continue
        if len(data) != index.bytes[shard]:
            wrong.append(f"{storage.path(name)}: has {len(data)} bytes, not {index.bytes[shard]}")
        elif hashlib.sha256(data).hexdigest() != index.sha256[shard]:
            wrong.append(f"{storage.path(name)}: SHA-256 differs from the index")
        else:
            samples += int(index.starts[shard + 1] - index.starts[shard])
            wrong += [f"{storage.path(name)}: {line}" for line in _check_tar(data, index, shard)]
            continue
        # The bytes are not those that were built; say which samples are affected.
        wrong += [f"{storage.path(name)}: {line}" for line in _check_tar(data, index, shard)]
    return Report(samples, len(index.names), wrong)


def _check_tar(data: bytes, index: ShardIndex, shard: int) -> Iterator[str]:
    """Faults of the samples of one shard."""
    extension = EXTENSION.get(index.format, index.format)
    first, end = int(index.starts[shard]), int(index.starts[shard + 1])
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
            members = {member.name: member for member in tar}
    except tarfile.TarError as error:
        yield f"not a readable tar ({error})"
        return
    for sample in range(first, end):
        key = f"{shard:06d}-{sample - first:06d}" if index.format == FORMAT else f"{sample:09d}"
        image, meta = members.pop(f"{key}.{extension}", None), members.pop(f"{key}.json", None)
        if image is None or meta is None:
            yield f"sample {key} is missing"
            continue
        if (image.offset_data, image.size) != (index.offsets[sample], index.sizes[sample]):
            yield f"sample {key} does not lie where the index says"
        problem = _check_sample(
            data[image.offset_data : image.offset_data + image.size],
            data[meta.offset_data : meta.offset_data + meta.size],
            index,
        )
        if problem:
            yield f"sample {key} {problem}"
    for name in members:
        yield f"holds {name}, which the index does not know"


def _check_sample(image: bytes, meta: bytes, index: ShardIndex) -> str | None:
    try:
        if index.format == FORMAT:  # planes have no hash but that of their shard
            Precoded.from_bytes(image, index.patch)
            json.loads(meta)
            return None
        pixels = decode_patch(image, index.format)
    # A damaged patch can make a decoder raise nearly anything.
    except Exception as error:
        return f"cannot be decoded ({' '.join(str(error).split())})"
    if pixels.shape != (index.patch, index.patch, 3):
        return f"has the shape {pixels.shape}"
    try:
        stated = json.loads(meta)["sha256"]
    except (ValueError, KeyError, TypeError):
        return "has damaged metadata"
    return None if stated == pixel_hash(pixels) else "has other pixels than its metadata state"


def stats(location: str, out: str) -> dict[str, Any]:
    """Draw a contact sheet and histograms; sizes come from all samples, the rest from some.

    Args:
        location: folder or URL of shards.
        out: PNG to write.

    Returns:
        Samples, shards, bytes, bits per pixel and the mix of sources.
    """
    from matplotlib.figure import Figure

    reader = ShardReader(location)
    index, count = reader.index, len(reader)
    if index.format == FORMAT:
        raise DatasetError(f"{location}: pre-coded shards hold no plain pictures to draw")
    described = json.loads(Storage(location).read("index.json"))
    order = permute(np.arange(min(count, _HISTOGRAM)), count, 0).astype(np.int64).tolist()
    bits = index.sizes * 8 / index.patch**2
    mix: Counter[str] = Counter()
    contrasts = []
    for sample in progress(order, len(order), "stats"):
        contrasts.append(contrast(luma(reader.pixels(sample))))
        mix[_metadata(reader, sample)["source"]] += 1
    figure = Figure(figsize=(16, 9), layout="constrained")
    halves: Any = figure.subfigures(1, 2, width_ratios=[9, 7])
    left, right = halves
    side = round(_CONTACT**0.5)
    for axes, sample in zip(left.subplots(side, side).flat, order[:_CONTACT], strict=False):
        axes.imshow(reader.pixels(sample))
    for axes in left.axes:
        axes.axis("off")
    top, middle, bottom = right.subplots(3, 1)
    top.hist(bits, bins=60)
    top.set(xlabel=f"bits per pixel ({index.format})", ylabel="patches")
    middle.hist(contrasts, bins=60)
    middle.set(xlabel="luma standard deviation, gray levels", ylabel=f"patches of {len(order)}")
    names = sorted(mix)
    bottom.barh(names, [mix[name] / len(order) * 100 for name in names])
    bottom.set(xlabel="share of patches, %")
    figure.suptitle(f"{count} patches of {index.patch}×{index.patch} in {len(index.names)} shards")
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=100)
    with atomic_write(Path(out)) as stream:
        stream.write(picture.getvalue())
    return {
        "samples": count,
        "shards": len(index.names),
        "bytes": sum(index.bytes),
        "mean_bits_per_pixel": round(float(bits.mean()), 3),
        "mean_bits_per_patch": round(float(index.sizes.mean() * 8), 1),
        "sources": {name: round(mix[name] / len(order), 4) for name in names},
        "rejected": described.get("rejected", {}),
        "picture": out,
    }


def _metadata(reader: ShardReader, sample: int) -> dict[str, Any]:
    """Metadata of a sample, which lie right before its image in the tar."""
    index = reader.index
    shard = index.shard_of(sample)
    first = int(index.starts[shard])
    begin = 0
    if sample > first:
        before = int(index.offsets[sample - 1] + index.sizes[sample - 1])
        begin = -(-before // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    header = reader.bytes_of(shard, begin, begin + tarfile.BLOCKSIZE)
    try:
        size = tarfile.TarInfo.frombuf(bytes(header), "utf-8", "strict").size
        start = begin + tarfile.BLOCKSIZE
        found: dict[str, Any] = json.loads(bytes(reader.bytes_of(shard, start, start + size)))
    except (tarfile.TarError, ValueError) as error:
        raise DatasetError(
            f"{reader.location}/{index.names[shard]}: metadata of sample {sample} are damaged "
            f"({error})"
        ) from None
    return found
