"""How fast a training step is, and what it waits for: `tucodec bench train`.

The same network is trained on the same crops in turns: by this package's module under Lightning, and by
the loop of CompressAI's `examples/train.py` (float32 batches, Adam, clipping to 1, reading the loss every
ten steps). Time is measured over many steps at once, with the device's queue empty at both ends.
"""

import resource
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from multiprocessing import util
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from data_pipelines.options import BuildOptions
from data_pipelines.shards import build
from lightning_tucodec.bench.complexity import step_flops
from lightning_tucodec.bench.data import photographs
from lightning_tucodec.bench.step import Clock, bare_trainer
from lightning_tucodec.bench.timing import check_device, machine, rows_of, synchronise
from lightning_tucodec.io.processes import cores
from lightning_tucodec.io.temporary import temporary_folder
from lightning_tucodec.training.advice import without_advice
from lightning_tucodec.training.arithmetic import Arithmetic, arithmetic
from lightning_tucodec.training.data import PatchDataModule
from lightning_tucodec.training.input.batches import RankBatches
from lightning_tucodec.training.input.loader import PlanLoader
from lightning_tucodec.training.vae import VAE

PEER = "CompressAI's example loop"

WARM_STEPS = 3
"""Steps at the start of each turn that do not count."""

_LMBDA = 0.0130


def defaults(device: str) -> tuple[int, int]:
    """Batch and crop that a device of this kind is measured with."""
    return (16, 256) if device.startswith("cuda") else (4, 128)


def matmul_peak(device: str, dtype: torch.dtype, repeats: int = 10) -> float:
    """FLOP/s of the fastest of several products of square matrices: the peak for a step's share."""
    side = 8192 if device.startswith("cuda") else 1024
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(3 + repeats):
        synchronise(device)
        start = time.perf_counter()
        a @ b
        synchronise(device)
        seconds.append(time.perf_counter() - start)
    return 2 * side**3 / min(seconds[3:])


class _Repeated:
    """The first batch of a loader, again and again, from the device's own memory."""

    def __init__(self, loader: PlanLoader, device: str) -> None:
        self.batches = loader.batches
        self.batch = {k: v.to(device) for k, v in next(iter(loader)).items()}
        loader.close()

    def __len__(self) -> int:
        return 1 << 30

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        while True:
            yield dict(self.batch)


class _Resident(PatchDataModule):
    """Data that lies on the device already, so that no step waits for it."""

    device = "cpu"
    repeated: _Repeated | None = None

    def train_dataloader(self) -> Any:
        """One batch for ever."""
        if self.repeated is None:
            self.repeated = _Repeated(super().train_dataloader(), self.device)
        return self.repeated


class _Floats(Dataset[Tensor]):
    """The same crops in the same order, as torchvision's ToTensor makes them."""

    def __init__(self, batches: RankBatches) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return 1 << 30

    def __getitem__(self, position: int) -> Tensor:
        """float32 3×C×C in [0, 1]."""
        pixels = np.empty(self.batches.shape, np.uint8)
        self.batches.read(position, pixels)
        return torch.from_numpy(pixels[0]).permute(2, 0, 1).contiguous().float().div(255)


def example_loop(
    network: nn.Module, batches: Iterable[Tensor], device: str, tick: Callable[[], None], steps: int
) -> None:
    """Train as CompressAI's `examples/train.py` does.

    Args:
        network: its output has an `as_dict()` of CompressAI's form; it has no auxiliary loss.
        batches: float32 N×3×H×W on the host.
        device: of the network.
        tick: called after every step.
        steps: how many.
    """
    network.train()
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-4)
    for number, x in zip(range(steps), batches, strict=False):
        x = x.to(device)
        optimizer.zero_grad()
        output = network(x).as_dict()
        pixels = x.shape[0] * x.shape[2] * x.shape[3]
        likelihoods = output["likelihoods"].values()
        bpp = sum(-values.log2().sum() / pixels for values in likelihoods)
        mse = nn.functional.mse_loss(output["x_hat"], x)
        loss = _LMBDA * 255**2 * mse + bpp
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        if number % 10 == 0:
            _ = loss.item(), mse.item(), bpp.item()
        tick()


class _Bench:
    """The network and the data of all turns.

    Args:
        shards: of patches that are not smaller than the crops.
        model: arguments of `VAE`.
    """

    def __init__(
        self, shards: Path, model: dict[str, Any], device: str, batch: int, crop: int,
        steps: int, workers: int,
    ) -> None:  # fmt: skip
        self.model, self.device, self.steps, self.workers = model, device, steps, workers
        self.data = {"shards": str(shards), "batch_size": batch, "crop": crop}
        self.memory: dict[str, list[float]] = {}
        self.compiled: VAE | None = None

    def module(self, **options: Any) -> VAE:
        """Equal networks, whatever was trained before."""
        torch.manual_seed(0)
        return VAE(**{**self.model, **options})

    def ours(self, precision: str, compiled: bool, resident: bool) -> float:
        """Seconds of a step of `VAE` under Lightning's trainer."""
        util.get_temp_dir()  # workers share ours, which we remove, instead of making their own
        clock = Clock(self.device, WARM_STEPS, self.steps)
        kind = _Resident if resident else PatchDataModule
        data = kind(**self.data, num_workers=self.workers)  # type: ignore[arg-type]
        if isinstance(data, _Resident):
            data.device = self.device
        trainer = bare_trainer(
            self.device, WARM_STEPS + self.steps, precision, callbacks=[clock], log_every_n_steps=10
        )
        # A module keeps its graph: only its first turn compiles.
        module = self.compiled if compiled else self.module()
        if module is None:
            module = self.compiled = self.module(compile=True)
        trainer.fit(module, datamodule=data)
        assert clock.seconds is not None
        return clock.seconds

    def theirs(self) -> float:
        """Seconds of a step of CompressAI's loop on the same network."""
        clock = Clock(self.device, WARM_STEPS, self.steps)
        loader = PatchDataModule(**{**self.data, "batch_size": 1}).train_dataloader()  # type: ignore[arg-type]
        batches: DataLoader[Tensor] = DataLoader(
            _Floats(loader.batches), self.data["batch_size"], num_workers=self.workers,  # type: ignore[arg-type]
            pin_memory=self.device.startswith("cuda"), generator=torch.Generator(),
            multiprocessing_context="fork" if self.workers else None,
        )  # fmt: skip
        network = self.module().network.to(self.device)
        example_loop(network, batches, self.device, clock.tick, WARM_STEPS + self.steps)
        assert clock.seconds is not None
        return clock.seconds

    def timed(self, name: str, action: Callable[[], float]) -> float:
        """What `action` returns; keeps the peak of the GPU's memory."""
        if self.device.startswith("cuda"):
            torch.cuda.reset_peak_memory_stats()
        seconds = action()
        if self.device.startswith("cuda"):
            self.memory.setdefault(name, []).append(torch.cuda.max_memory_allocated() / 1e6)
        return seconds


def run(
    source: str | None = None,
    preset: str = "tiny",
    steps: int = 20,
    repeats: int = 3,
    device: str = "cpu",
    batch: int | None = None,
    crop: int | None = None,
    workers: int | None = None,
    compiled: bool = False,
    codec: dict[str, Any] | None = None,
    kind: Arithmetic = "fast",
) -> dict[str, Any]:
    """Images a second, the share of time spent waiting for data, FLOP/s, their share of the peak, memory.

    The waiting share: how much shorter a step is when its batch already lies in the device's memory.

    Args:
        source: photographs; by default generated ones.
        preset: size of the network.
        steps: of each turn that count.
        repeats: turns.
        device: "cpu" or "cuda".
        batch, crop: by default those of `defaults`.
        workers: decoding processes; by default all cores but one, at most 16.
        compiled: ours as one compiled graph, on a GPU in bf16-mixed only.
        codec: replaced fields of the preset, see `training.vae.resolve_codec`.
        kind: how a GPU computes, in all turns and for the peak, see `training.arithmetic`.

    Raises:
        ConfigError: there is no such device.
    """
    check_device(device)
    usual = defaults(device)
    batch, crop = batch or usual[0], crop or usual[1]
    workers = min(16, cores() - 1) if workers is None else workers
    precisions = ["32-true", "bf16-mixed"] if device == "cuda" else ["32-true"]
    precisions = precisions[-1:] if compiled else precisions  # compiling takes minutes
    model = {"preset": preset, "codec": codec}
    with temporary_folder() as scratch, arithmetic(kind), without_advice():
        source = source or str(photographs(scratch / "photographs", 8))
        count = max(64, 4 * batch)
        options = BuildOptions(patch=crop, count=count, shard_size=16)
        build([source], str(scratch / "shards"), options)
        bench = _Bench(scratch / "shards", model, device, batch, crop, steps, workers)
        actions: dict[str, Callable[[], float]] = {PEER: bench.theirs}
        for precision in precisions:
            name = f"ours, {precision}{', compiled' if compiled else ''}"
            actions[name] = partial(bench.ours, precision, compiled, False)
            actions[f"{name}, batch at hand"] = partial(bench.ours, precision, compiled, True)
        times: dict[str, list[float]] = {name: [] for name in actions}
        for _ in range(repeats):
            for name, action in actions.items():
                times[name].append(bench.timed(name, action))
        peaks = {p: matmul_peak(device, _dtype(p)) for p in dict.fromkeys(["32-true", *precisions])}
    median = {name: statistics.median(seconds) for name, seconds in times.items()}
    flops = step_flops(bench.module(), batch, crop)
    ours = [name for name in actions if f"{name}, batch at hand" in actions]

    def peak(name: str) -> float:
        return peaks[next((p for p in peaks if p in name), "32-true")]

    return {
        "rows": rows_of(times, {name: {PEER: median[name] / median[PEER]} for name in ours}),
        "asked": [],
        "images_per_s": {name: round(batch / median[name], 2) for name in actions},
        "share_waiting_for_data": {
            name: round(max(0.0, 1 - median[f"{name}, batch at hand"] / median[name]), 3)
            for name in ours
        },
        "flop_per_step": flops,
        "flop_per_s": {name: flops / median[name] for name in actions},
        "matmul_peak_flop_per_s": peaks,
        "share_of_matmul_peak": {
            name: round(flops / median[name] / peak(name), 4) for name in actions
        },
        "peak_memory_mb": {name: round(max(found)) for name, found in bench.memory.items()}
        or {"the process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024},
        "batch": f"{batch} crops of {crop}x{crop}",
        "preset": preset,
        "arithmetic": kind if device == "cuda" else None,
        "workers": workers,
        "threads": torch.get_num_threads(),
        "machine": machine(device),
    }


def _dtype(precision: str) -> torch.dtype:
    return torch.bfloat16 if precision.startswith("bf16") else torch.float32
