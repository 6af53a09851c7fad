"""Time of complete encoding and decoding, and of their parts, beside CompressAI's autoregressive models.

All run in one process with the same number of threads, on the same picture, in turns. `ratio_to` is a
row's median divided by its reference's: below 1 is faster.
"""

import resource
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from lightning_tucodec.bench.subjects import PEERS, Peer, Subject, picture, sampled, trained
from lightning_tucodec.bench.timing import check_device, in_turns, machine, rows_of, synchronise
from lightning_tucodec.codecs.library import find
from lightning_tucodec.codecs.registry import own_model, split
from lightning_tucodec.coding.container import unpack
from lightning_tucodec.io import processes
from lightning_tucodec.io.images import read_image, write_png
from lightning_tucodec.io.temporary import temporary_folder
from lightning_tucodec.nn.codec import PRESETS
from lightning_tucodec.quality.metrics import as_tensor

SIZE = (512, 768)
RATES = (0.15, 0.5)

Actions = dict[str, Callable[[], Any]]


def subjects_of(
    models: Sequence[str], rates: Sequence[float], pixels: NDArray[np.uint8], device: str = "cpu"
) -> list[Subject]:
    """Presets at every rate, any other name as a trained model; their transforms run on `device`."""
    subjects = []
    for name in models:
        if name in PRESETS:
            subjects += [sampled(name, bpp, pixels, device) for bpp in rates]
        else:
            subjects.append(trained(name, pixels, device))
    return subjects


def run(
    models: Sequence[str],
    rates: Sequence[float] = RATES,
    peers: Sequence[str] = PEERS,
    size: tuple[int, int] = SIZE,
    image: str | None = None,
    repeats: int = 5,
    device: str = "cpu",
) -> dict[str, Any]:
    """The rows, what was coded, how the time divides, the cost of importing, and the machine.

    Args:
        models: presets (untrained, symbols drawn from their own P) or names of trained models.
        rates: bpp of the presets; the peers get the first one.
        peers: names of CompressAI's models.
        size: height and width of the generated picture.
        image: a photograph to use instead.
        repeats: of every action.
        device: where our transforms run, "cpu" or "cuda".

    Raises:
        ConfigError: there is no such device.
    """
    check_device(device)
    pixels = read_image(image) if image else picture(*size)
    subjects = subjects_of(models, rates, pixels, device)
    others = [Peer(name, rates[0], pixels) for name in peers]
    actions: Actions = {}
    with temporary_folder() as folder:
        for subject in subjects:
            actions |= _actions(subject, folder)
        for peer in others:
            actions |= {
                f"{peer.name} encode": peer.compress,
                f"{peer.name} g_a": peer.analyse,
                f"{peer.name} decode": peer.decompress,
                f"{peer.name} g_s": peer.synthesise,
                f"{peer.name} exact encode": peer.exact_compress,
                f"{peer.name} exact decode": peer.exact_decompress,
                f"{peer.name} exact latents": peer.exact_latents,
            }
        for name, action in actions.items():
            if not name.startswith(tuple(peers)):
                action()  # warm-up; a peer's ran when it was built
        times = in_turns(actions, repeats)
    median = {name: statistics.median(seconds) for name, seconds in times.items()}

    ratios: dict[str, dict[str, float]] = {}
    for name in (*(s.name for s in subjects), *peers):
        for whole, alone in (("encode", "g_a"), ("decode", "g_s")):
            key = f"{name} {whole}"
            against = [f"{name} {alone}", *(f"{p} {whole}" for p in peers if p != name)]
            ratios[key] = {other: median[key] / median[other] for other in against}
    for peer in others:
        # The same network, coded by our exact engine for it.
        for whole, alone in (("encode", "g_a"), ("decode", "g_s")):
            key = f"{peer.name} exact {whole}"
            against = [f"{peer.name} {alone}", f"{peer.name} {whole}"]
            ratios[key] = {other: median[key] / median[other] for other in against}
    return {
        "rows": rows_of(times, ratios),
        "exact_bits_to_likelihoods": {p.name: round(p.exact_bits(), 5) for p in others},
        "split_s": {s.name: _split(s.name, median) for s in subjects},
        "coded": {s.name: coded(s.bpp, s.constant_channels) for s in subjects}
        | {p.name: coded(p.bpp, p.constant_channels) for p in others},
        "import_beyond_torch_s": import_seconds(repeats),
        "size": f"{pixels.shape[1]}x{pixels.shape[0]}",
        "threads": torch.get_num_threads(),
        "machine": machine(device),
    }


def coded(bpp: float, constant_channels: int) -> dict[str, Any]:
    """What a subject's latents hold."""
    return {"bpp": round(bpp, 4), "constant_channels": constant_channels}


def _actions(subject: Subject, folder: Path) -> Actions:
    """Whole operations and their parts, by name."""
    model, latents = subject.model, subject.latents
    height, width = subject.pixels.shape[:2]
    network = model.network
    x = as_tensor(subject.pixels).float() / 255
    x = network.pad(x).contiguous(memory_format=model.layout).to(model.device)
    y_hat = model.dequantise(torch.from_numpy(latents.y)[None].to(model.device))
    file = folder / f"{len(subject.data)}-{subject.name}.tuc"
    file.write_bytes(subject.data)
    coded = subject.data

    @torch.inference_mode()
    def g_a() -> None:
        network.g_a(x)
        synchronise(model.device.type)

    @torch.inference_mode()
    def g_s() -> None:
        network.g_s(y_hat)
        synchronise(model.device.type)

    def encode() -> None:
        model.analyse(subject.pixels)
        model.write(latents, width, height)

    def decode() -> None:
        model.decode_pixels(unpack(coded))

    def file_to_png() -> None:
        write_png(file.with_suffix(".png"), model.decode_pixels(unpack(file.read_bytes())))

    forth, back = subject.coder()
    return {
        f"{subject.name} encode": encode,
        f"{subject.name} g_a": g_a,
        f"{subject.name} entropy encode": lambda: entropy_encode(subject),
        f"{subject.name} coder forth": forth,
        f"{subject.name} decode": decode,
        f"{subject.name} g_s": g_s,
        f"{subject.name} entropy decode": lambda: entropy_decode(subject),
        f"{subject.name} coder back": back,
        f"{subject.name} file to PNG": file_to_png,
    }


def entropy_encode(subject: Subject) -> bytes:
    """The file of a subject's latents: networks and coder, nothing else."""
    height, width = subject.pixels.shape[:2]
    return subject.model.write(subject.latents, width, height)


def entropy_decode(subject: Subject) -> None:
    """The symbols of a subject's file: networks and coder, nothing else."""
    subject.model.read(unpack(subject.data))


def _split(name: str, median: dict[str, float]) -> dict[str, dict[str, float]]:
    """Medians of the parts of coding and decoding; what is left is h_a, quantising and copying."""

    def part(key: str) -> float:
        return median[f"{name} {key}"]

    def rounded(parts: dict[str, float]) -> dict[str, float]:
        return {key: round(value, 4) for key, value in parts.items()}

    return {
        "encode": rounded(
            {
                "g_a": part("g_a"),
                "entropy": part("entropy encode") - part("coder forth"),
                "coder": part("coder forth"),
                "rest": part("encode") - part("g_a") - part("entropy encode"),
            }
        ),
        "decode": rounded(
            {
                "entropy": part("entropy decode") - part("coder back"),
                "coder": part("coder back"),
                "g_s": part("g_s"),
                "rest": part("decode") - part("entropy decode") - part("g_s"),
                "I/O": part("file to PNG") - part("decode"),
            }
        ),
    }


def import_seconds(repeats: int = 3) -> float:
    """Median seconds of importing what coding needs and loading a model, after torch, in new processes."""
    code = (
        "import time, torch; t = time.perf_counter(); import lightning_tucodec as tuc; tuc.load; "
        "import lightning_tucodec.codecs.learned.codec; print(time.perf_counter() - t)"
    )
    command = [sys.executable, "-c", code]
    seconds = [
        float(processes.run(command, check=True, stdout=subprocess.PIPE).stdout)
        for _ in range(repeats + 1)
    ]
    return round(statistics.median(seconds[1:]), 3)


def large(model: str, size: tuple[int, int] = (4000, 6000)) -> dict[str, Any]:
    """Peak memory and seconds of `compress` and `decompress` of a large JPEG, each in a new process."""
    level = own_model(model).level
    # The model's file, since the command runs in another folder.
    coder = ["--model", str(find(split(model)[0]).resolve())]
    quality = [] if level is None else ["--quality", str(level)]
    result: dict[str, Any] = {}
    with temporary_folder() as folder:
        Image.fromarray(picture(*size)).save(folder / "large.jpg", quality=92)
        for words in (["compress", "large.jpg", *quality], ["decompress", "large.tuc"]):
            command = [sys.executable, "-m", "lightning_tucodec.cli", *words, *coder, "-o", "."]
            # In a separate child process, so that no other command counts in its peak.
            code = (
                "import os, resource, subprocess, sys, time\n"
                "t = time.perf_counter(); subprocess.run(sys.argv[1:], check=True, stdout=2)\n"
                "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, time.perf_counter() - t)"
            )
            done = processes.run(
                [sys.executable, "-c", code, *command],
                cwd=folder,
                check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            )  # fmt: skip
            kilobytes, seconds = done.stdout.split()
            result[words[0]] = {
                "peak_memory_mb": int(kilobytes) // (1024 if _KILOBYTES else 1 << 20),
                "seconds": round(float(seconds), 2),
            }
    return {"large": result, "size": f"{size[1]}x{size[0]}", "machine": machine()}


_KILOBYTES = sys.platform != "darwin"  # the unit of ru_maxrss


def table_text(result: dict[str, Any]) -> str:
    """The rows as a text table."""
    lines = []
    for row in result.get("rows", ()):
        beside = ", ".join(f"{ratio:.3f} of {name}" for name, ratio in row["ratio_to"].items())
        times = f"{row['median_s']:9.4f} s ({row['min_s']:.4f} to {row['max_s']:.4f})"
        lines.append(f"{row['name']:32} {times}  {beside}".rstrip())
    for key, value in result.items():
        if key == "rows":
            continue
        if isinstance(value, dict):
            lines += [f"{key} {name}: {entry}" for name, entry in value.items()]
        else:
            lines.append(f"{key}: {value}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return "\n".join([*lines, f"peak memory of this process: {peak // 1024} MB"])
