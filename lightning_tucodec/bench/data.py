"""Building and loading shards, against bare coding and against plain webdataset.

Everything compared is timed in one run, in turns, on the same patches: natural photographs from the
given folder, or generated ones. A ratio above 1 means that the row is faster than its
reference.
"""

import itertools
import json
import multiprocessing
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler

from data_pipelines.options import BuildOptions
from data_pipelines.patches import decode_patch, encode_patch
from data_pipelines.shards import build
from lightning_tucodec.bench.complexity import step_flops
from lightning_tucodec.bench.timing import asked, in_turns, machine, rows_of
from lightning_tucodec.io import processes
from lightning_tucodec.io.processes import cores
from lightning_tucodec.io.temporary import temporary_folder
from lightning_tucodec.training.input.shards import ShardReader

PATCH = 256
BATCH = 16

NODE_CORES, NODE_GPUS = 16, 8

GPU_FLOP_PER_S = 3e14
"""Assumed of a GPU in training: about a third of what bf16 products reach on an H100 at best, 989 TFLOP/s.
`tucodec bench train --device cuda` measures it.
"""


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
    with temporary_folder() as scratch:
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

        with _TwoEncoders(patches) as pool:
            times = in_turns(
                {"bare encoding, 1 process": lambda: _encode_all(patches),
                 "bare encoding, 2 processes": pool.encode,
                 "build, 1 worker": built(1), "build, 2 workers": built(2)}, repeats
            )  # fmt: skip
        ratios = {
            name: {bare: _ratio(times, bare, name)}
            for name, bare in (
                ("build, 1 worker", "bare encoding, 1 process"),
                ("build, 2 workers", "bare encoding, 2 processes"),
            )
        }
        ratios["build, 2 workers"]["build, 1 worker"] = _ratio(
            times, "build, 1 worker", "build, 2 workers"
        )
        webp = sum(int(size) for size in reader.index.sizes)
        png = sum(len(encode_patch(patch, "png")) for patch in patches)
        memory = run_memory(scratch, source)
        two = ratios["build, 2 workers"]
        return {
            "rows": rows_of(times, ratios),
            "asked": [
                asked("build, 2 workers, to bare encoding in 2 processes",
                       two["bare encoding, 2 processes"], at_least=0.75),
                asked("build, 2 workers to 1", two["build, 1 worker"], at_least=1.8),
                asked("bytes to PNG", webp / png, at_most=0.8),
                asked("peak memory of a build process, GB", memory["photographs_gb"], at_most=1.5),
                asked("the same for 100,000 images, extrapolated, GB",
                       memory["extrapolated_gb"], at_most=1.5),
            ],
            "patches": len(patches),
            "memory": memory,
            "machine": machine(),
        }  # fmt: skip


class _TwoEncoders:
    """Two forked processes that share the patches; each encodes half of them."""

    def __init__(self, patches: list[NDArray[np.uint8]]) -> None:
        self.halves = (patches[::2], patches[1::2])

    def __enter__(self) -> "_TwoEncoders":
        context = multiprocessing.get_context("fork")
        self.pipes = []
        self.processes = []
        for half in self.halves:
            ours, theirs = context.Pipe()
            process = context.Process(target=self._serve, args=(theirs, half), daemon=True)
            process.start()
            self.pipes.append(ours)
            self.processes.append(process)
        return self

    def __exit__(self, *exception: object) -> None:
        for pipe, process in zip(self.pipes, self.processes, strict=True):
            if exception[0] is None:
                pipe.send(False)
            else:
                process.kill()
            process.join()
            pipe.close()

    def encode(self) -> None:
        """Encode all patches once."""
        for pipe in self.pipes:
            pipe.send(True)
        for pipe in self.pipes:
            pipe.recv()

    @staticmethod
    def _serve(pipe: Any, patches: list[NDArray[np.uint8]]) -> None:
        while pipe.recv():
            _encode_all(patches)
            pipe.send(None)


def _encode_all(patches: list[NDArray[np.uint8]]) -> None:
    for patch in patches:
        encode_patch(patch, "webp")


_MEASURED_BUILD = """
import sys
from pathlib import Path
from data_pipelines.options import BuildOptions
from data_pipelines.shards import build
source, out, patch = sys.argv[1:]
build([source], out, BuildOptions(patch=int(patch), encoding="webp", duplicate_bits=-1))
status = Path("/proc/self/status").read_text()
print(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))
"""


def run_memory(scratch: Path, source: str, few: int = 1000, many: int = 6000) -> dict[str, float]:
    """Peak memory of builds in fresh processes: of the photographs, and of many small images.

    The small images show the cost of one more image; with large ones noise would hide it.
    """

    def peak(folder: str, patch: int) -> float:
        with temporary_folder(scratch / "out") as out:
            done = processes.run(
                [sys.executable, "-c", _MEASURED_BUILD, folder, str(out), str(patch)],
                check=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )  # fmt: skip
        return int(done.stdout) * 1024 / 1e9

    peaks = {}
    for count in (few, many):
        folder = scratch / f"small{count}"
        folder.mkdir()
        for number in range(count):
            noise = np.random.default_rng(number).integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(noise).save(folder / f"{number:06d}.bmp")
        peaks[count] = peak(str(folder), 16)
        shutil.rmtree(folder)
    an_image = (peaks[many] - peaks[few]) / (many - few)
    photographs = peak(source, PATCH)
    return {
        "photographs_gb": round(photographs, 4),
        f"{few}_small_gb": round(peaks[few], 4),
        f"{many}_small_gb": round(peaks[many], 4),
        "an_image_more_kb": round(an_image * 1e6, 3),
        "extrapolated_gb": round(photographs + 100_000 * max(0.0, an_image), 4),
    }


def run_loader(
    source: str | None, count: int = 600, workers: int = 2, repeats: int = 3
) -> dict[str, Any]:
    """Batches of float tensors from our shards against plain webdataset on PNG, and bare decoding."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    busy = min(workers, cores())  # more workers than cores decode no faster
    with temporary_folder() as scratch:
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

        times = in_turns({key: passes(stream) for key, stream in streams.items()}, repeats)
        streams.clear()
        ratios = {
            key: {"plain webdataset, PNG": _ratio(times, "plain webdataset, PNG", key)}
            for key in ("ours, webp", "ours, png", "ours, raw")
        }
        ratios["ours, webp"]["bare decoding, webp"] = _ratio(
            times, "bare decoding, webp", "ours, webp"
        )
        first = _first_batch(scratch)
        rows = rows_of(times, ratios)
        for row in rows:
            row["samples_per_s"] = round(batches * BATCH / row["median_s"])
    torch.set_num_threads(threads)
    plan = run_plan()
    webp = ratios["ours, webp"]
    bounds = [
        asked("webp to plain webdataset with PNG", webp["plain webdataset, PNG"], at_least=1.2),
        asked("webp to bare decoding", webp["bare decoding, webp"], at_least=0.85),
        asked("raw to plain webdataset with PNG",
               ratios["ours, raw"]["plain webdataset, PNG"], at_least=4.0),
        asked("plan of 10^9 samples: start at any place, ms", plan["max_start_ms"], at_most=50.0),
        asked("plan of 10^9 samples: memory, MB", plan["peak_mb"], at_most=20.0),
        asked("first batch of 1,000 shards, s", max(first.values()), at_most=2.0),
    ]  # fmt: skip
    a_core = {
        row["name"]: row["samples_per_s"] / busy for row in rows if row["name"].startswith("ours")
    }
    return {"rows": rows, "asked": bounds, "first_batch_s": first, "workers": workers,
            "plan": plan, **node(a_core), "machine": machine()}  # fmt: skip


def node(a_core: dict[str, float]) -> dict[str, Any]:
    """Images of 256×256 a second that a node's cores can supply, and that its GPUs consume.

    Args:
        a_core: images a second that one core decodes, by name.
    """
    from lightning_tucodec.nn.codec import PRESETS
    from lightning_tucodec.training.vae import VAE

    gpus = NODE_GPUS * GPU_FLOP_PER_S
    return {
        f"{NODE_CORES}_cores_feed_per_s": {n: round(NODE_CORES * v) for n, v in a_core.items()},
        f"{NODE_GPUS}_gpus_eat_per_s": {
            name: round(gpus / step_flops(VAE(preset=name), 1, PATCH)) for name in PRESETS
        },
        "assumed_flop_per_s_of_a_gpu": GPU_FLOP_PER_S,
    }


def _first_batch(scratch: Path) -> dict[str, float]:
    """Seconds from naming 1,000 local shards of 1,024 samples to the first batch.

    All 1,000 names refer to one file, so its samples count several times.
    """
    index = json.loads((scratch / "webp" / "index.json").read_text())
    shard = index["shards"][0]
    for key in ("offsets", "sizes"):
        shard[key] = list(itertools.islice(itertools.cycle(shard[key]), 1024))
    names = [f"shard-{number:06d}.tar" for number in range(1000)]
    index["shards"] = [{**shard, "samples": 1024, "name": name} for name in names]
    (scratch / "many").mkdir()
    for name in names:
        (scratch / "many" / name).hardlink_to(scratch / "webp" / shard["name"])
    (scratch / "many" / "index.json").write_text(json.dumps(index))
    seconds = {}
    for workers in (0, 2):
        start = time.perf_counter()
        next(_ours(scratch / "many", workers))
        seconds[f"{workers} workers"] = round(time.perf_counter() - start, 4)
    return seconds


def run_plan(samples: int = 10**9) -> dict[str, float]:
    """Seconds to the first batch's sample numbers at a random place, and the memory for it."""
    import tracemalloc

    from lightning_tucodec.training.input.plan import DataPlan

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

    data = PatchDataModule(str(shards), BATCH, num_workers=workers, flip=False)
    loader = data.train_dataloader()
    while True:
        for batch in loader:
            yield data.on_after_batch_transfer(batch, 0)


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
    """Decoding alone, in `workers` processes; each batch returns only a number."""
    data: DataLoader[int] = DataLoader(
        _Decode(str(shards)), batch_size=None, num_workers=workers, sampler=_Forever(),
        multiprocessing_context="fork" if workers else None,
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


def _ratio(times: dict[str, list[float]], base: str, name: str) -> float:
    """How many times as fast `name` is as `base`."""
    return statistics.median(times[base]) / statistics.median(times[name])
