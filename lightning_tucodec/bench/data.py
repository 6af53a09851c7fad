"""Building and loading shards, against bare coding and against plain webdataset.

Everything compared is timed in one run, in turns, on the same patches: natural photographs from the
given folder, or generated ones. Ratios above 1 say that the row is faster than what it is held
against.
"""

import io
import itertools
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler

from data_pipelines.patches import decode_patch, encode_patch
from data_pipelines.shards import BuildOptions, build
from lightning_tucodec.training.shards import ShardReader

PATCH = 256
BATCH = 16


def photographs(folder: Path, count: int) -> Path:
    """Generated pictures of 1024×768 with the spectrum and the grain of photographs, as JPEG."""
    folder.mkdir()
    for number in range(count):
        rng = np.random.default_rng(number)
        total = np.zeros((768, 1024, 3))
        for octave in range(1, 9):
            small = rng.normal(128, 50, (3 * 2**octave // 4 + 1, 2**octave, 3)).clip(0, 255)
            picture = Image.fromarray(small.astype(np.uint8)).resize((1024, 768), 3)
            total += (np.asarray(picture, float) - 128) / octave
        total += rng.normal(128, 2.5, total.shape)
        Image.fromarray(total.clip(0, 255).astype(np.uint8)).save(
            folder / f"{number:05d}.jpg", quality=92
        )
    return folder


def run_shards(source: str | None, count: int = 600, repeats: int = 3) -> dict[str, Any]:
    """Building with one and two workers against encoding the same patches in memory."""
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        source = source or str(photographs(scratch / "photographs", max(4, count // 12)))
        options = BuildOptions(patch=PATCH, count=count, shard_size=max(1, count // 12))
        build([source], str(scratch / "first"), options, workers=2)  # warms the worker processes
        reader = ShardReader(str(scratch / "first"))
        patches = [np.array(reader.pixels(sample)) for sample in range(len(reader))]

        def built(workers: int) -> Callable[[], None]:
            def action() -> None:
                shutil.rmtree(scratch / "out", ignore_errors=True)
                build([source], str(scratch / "out"), options, workers=workers)

            return action

        def bare() -> None:
            for patch in patches:
                encode_patch(patch, "webp")

        times = _in_turns(
            {"bare encoding, 1 core": bare, "build, 1 worker": built(1),
             "build, 2 workers": built(2)}, repeats
        )  # fmt: skip
        bare_s = statistics.median(times["bare encoding, 1 core"])
        one_s = statistics.median(times["build, 1 worker"])
        ratios = {
            "build, 1 worker": {"bare encoding, 1 core": bare_s / one_s},
            "build, 2 workers": {
                "bare encoding, 2 cores (half of 1)": bare_s
                / 2
                / statistics.median(times["build, 2 workers"]),
                "build, 1 worker": one_s / statistics.median(times["build, 2 workers"]),
            },
        }
        webp = sum(int(size) for size in reader.index.sizes)
        png = sum(len(encode_patch(patch, "png")) for patch in patches)
        return {
            "rows": _rows(times, ratios),
            "patches": len(patches),
            "bytes_to_png": round(webp / png, 3),
            "machine": _machine(),
        }


def run_loader(
    source: str | None, count: int = 600, workers: int = 2, repeats: int = 3
) -> dict[str, Any]:
    """Batches of float tensors from our shards against plain webdataset on PNG, and bare decoding."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        source = source or str(photographs(scratch / "photographs", max(4, count // 12)))
        for encoding in ("webp", "png", "raw"):
            options = BuildOptions(
                patch=PATCH, count=count, shard_size=max(1, count // 12), encoding=encoding
            )
            build([source], str(scratch / encoding), options, workers=2)
        batches = 3 * (count // BATCH)
        streams = {
            "plain webdataset, PNG": _plain(scratch / "png", workers),
            "ours, webp": _ours(scratch / "webp", workers),
            "ours, png": _ours(scratch / "png", workers),
            "ours, raw": _ours(scratch / "raw", workers),
            "bare decoding, webp": _bare(scratch / "webp", workers),
        }
        for stream in streams.values():
            list(itertools.islice(stream, 2 * workers + 2))

        def passes(stream: Iterator[Any]) -> Callable[[], None]:
            def action() -> None:
                for _ in itertools.islice(stream, batches):
                    pass

            return action

        times = _in_turns({key: passes(stream) for key, stream in streams.items()}, repeats)
        plain = statistics.median(times["plain webdataset, PNG"])
        bare = statistics.median(times["bare decoding, webp"])
        ratios: dict[str, dict[str, float]] = {
            key: {"plain webdataset, PNG": plain / statistics.median(times[key])}
            for key in ("ours, webp", "ours, png", "ours, raw")
        }
        ratios["ours, webp"]["bare decoding, webp"] = bare / statistics.median(times["ours, webp"])
        start = time.perf_counter()
        next(_ours(scratch / "webp", 0))
        first = time.perf_counter() - start
        rows = _rows(times, ratios)
        for row in rows:
            row["samples_per_s"] = round(batches * BATCH / row["median_s"])
        streams.clear()
    torch.set_num_threads(threads)
    return {"rows": rows, "first_batch_s": round(first, 4), "workers": workers, "plan": run_plan(),
            "machine": _machine()}  # fmt: skip


def run_plan(samples: int = 10**9) -> dict[str, float]:
    """Seconds to the first batch's sample numbers at a random place, and the memory for it."""
    import tracemalloc

    from lightning_tucodec.training.plan import DataPlan

    times = []
    tracemalloc.start()
    for seed in range(20):
        start = time.perf_counter()
        place = seed * 123_456_789_012 + 17
        DataPlan(samples, seed).indices(np.arange(place, place + BATCH))
        times.append(time.perf_counter() - start)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return {"samples": samples, "max_start_ms": max(times) * 1e3, "peak_mb": peak / 1e6}


def _ours(shards: Path, workers: int) -> Iterator[Any]:
    from lightning_tucodec.training.data import PatchDataModule

    loader = PatchDataModule(str(shards), BATCH, num_workers=workers, flip=False).train_dataloader()
    while True:
        yield from loader


def _plain(shards: Path, workers: int) -> Iterator[Any]:
    """What webdataset's documentation shows: decode to float tensors, shuffle, batch in workers."""
    import webdataset

    urls = sorted(str(path) for path in shards.glob("*.tar"))
    dataset = (
        webdataset.WebDataset(urls, shardshuffle=len(urls), seed=0)
        .shuffle(1000, initial=100)
        .decode("torchrgb")
        .to_tuple("png")
        .batched(BATCH, partial=False)
    )
    loader = webdataset.WebLoader(dataset.repeat(), batch_size=None, num_workers=workers)
    yield from loader


def _bare(shards: Path, workers: int) -> Iterator[Any]:
    """Nothing but decoding in `workers` processes; only a number comes back for each batch."""
    data: DataLoader[int] = DataLoader(
        _Decode(str(shards)), batch_size=None, num_workers=workers, multiprocessing_context="fork",
        sampler=_Forever(),
    )  # fmt: skip
    yield from data


class _Forever(Sampler[int]):
    def __iter__(self) -> Iterator[int]:
        return itertools.count()


class _Decode(Dataset[int]):
    def __init__(self, shards: str) -> None:
        reader = ShardReader(shards)
        self.format = reader.index.format
        self.data = [bytes(reader.encoded(sample)) for sample in range(len(reader))]

    def __getitem__(self, batch: int) -> int:
        for number in range(batch * BATCH, (batch + 1) * BATCH):
            decode_patch(self.data[number % len(self.data)], self.format)
        return batch


def _in_turns(actions: dict[str, Callable[[], None]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each action; the actions take turns, so that a busy moment hits all alike."""
    times: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(repeats):
        for name, action in actions.items():
            start = time.perf_counter()
            action()
            times[name].append(time.perf_counter() - start)
    return times


def _rows(
    times: dict[str, list[float]], ratios: dict[str, dict[str, float]]
) -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            "median_s": round(statistics.median(seconds), 4),
            "min_s": round(min(seconds), 4),
            "max_s": round(max(seconds), 4),
            "ratio_to": {key: round(ratio, 3) for key, ratio in ratios.get(name, {}).items()},
        }
        for name, seconds in times.items()
    ]


def _machine() -> str:
    import os

    return f"{platform.machine()}, {os.cpu_count()} cores"


def table_text(result: dict[str, Any]) -> str:
    """The rows for people."""
    text = io.StringIO()
    for row in result["rows"]:
        beside = ", ".join(f"{ratio:.2f} × {name}" for name, ratio in row["ratio_to"].items())
        print(
            f"{row['name']:24s} {row['median_s']:8.3f} s ({row['min_s']:.3f} to "
            f"{row['max_s']:.3f})  {beside}",
            file=text,
        )
    for key, value in result.items():
        if key != "rows":
            print(f"{key}: {value}", file=text)
    return text.getvalue().rstrip()
