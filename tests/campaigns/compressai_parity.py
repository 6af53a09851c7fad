"""The same as CompressAI: its example's training loop and `eval_model` beside ours.

    OMP_NUM_THREADS=1 python -m tests.campaigns.compressai_parity --steps 300

Both loops start from the same weights and see the same crops and the same noise (PyTorch is seeded before
each step). Prints, for each network, the median and the largest relative difference of the losses, and the
same of CompressAI's loop from itself with weights one rounding away (the control); bpp and PSNR of both
evaluations; the median processor seconds of a step, both loops in turns.
"""

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from compressai.losses import RateDistortionLoss
from compressai.optimizers import net_aux_optimizer
from numpy.typing import NDArray
from torch import Tensor, nn

from lightning_tucodec.codecs.network.codec import NetworkModel, freeze_network
from lightning_tucodec.quality.metrics import psnr_from_sse, sse
from lightning_tucodec.training.network import NetworkModule
from tests.support import PHOTOS, photo

NETWORKS: dict[str, dict[str, Any]] = {
    "FactorizedPrior": {"N": 32, "M": 48},
    "MeanScaleHyperprior": {"N": 32, "M": 48},
    "Cheng2020AnchorCheckerboard": {"N": 24},
}
LMBDA, LR, AUX_LR, CLIP = 0.013, 1e-4, 1e-3, 1.0


def crops(steps: int, size: int = 4, side: int = 64) -> list[Tensor]:
    """Batches N×3×S×S of parts of photographs."""
    rng = np.random.default_rng(0)
    images = [photo(name, 300, 200, 0, 0) for name in PHOTOS]
    batches = []
    for _ in range(steps):
        parts = []
        for _ in range(size):
            image = images[rng.integers(len(images))]
            top, left = (int(rng.integers(s - side + 1)) for s in image.shape[:2])
            parts.append(image[top : top + side, left : left + side])
        batches.append(
            torch.from_numpy(np.stack(parts)).permute(0, 3, 1, 2).float().contiguous() / 255
        )
    return batches


def theirs(network: nn.Module, batches: list[Tensor]) -> Iterator[tuple[float, float]]:
    """Loss and seconds of each step of the loop in CompressAI's examples/train.py."""
    criterion = RateDistortionLoss(lmbda=LMBDA)
    conf = {"net": {"type": "Adam", "lr": LR}, "aux": {"type": "Adam", "lr": AUX_LR}}
    optimizers = net_aux_optimizer(network, conf)
    network.train()
    for step, d in enumerate(batches):
        torch.manual_seed(step)
        started = time.process_time()
        optimizers["net"].zero_grad()
        optimizers["aux"].zero_grad()
        out = criterion(network(d), d)
        out["loss"].backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), CLIP)
        optimizers["net"].step()
        aux_loss: Any = network.aux_loss()  # type: ignore[operator]
        aux_loss.backward()
        optimizers["aux"].step()
        loss = out["loss"].item()
        yield loss, time.process_time() - started


class _Watch(pl.Callback):
    """Seeds a step as `theirs` does, and notes its loss and seconds."""

    def __init__(self, batches: list[Tensor]) -> None:
        self.rows: list[tuple[float, float]] = []

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
        torch.manual_seed(index)
        self.started = time.process_time()

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        loss = float(trainer.callback_metrics["train/loss"])
        self.rows.append((loss, time.process_time() - self.started))


def ours(module: NetworkModule, batches: list[Tensor]) -> list[tuple[float, float]]:
    """The same of NetworkModule under Lightning's trainer."""
    watch = _Watch(batches)
    rows = [{"image": batch, "index": torch.arange(len(batch))} for batch in batches]
    loader = torch.utils.data.DataLoader(rows, batch_size=None)  # type: ignore[arg-type]
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, max_steps=2 * len(batches), max_epochs=-1, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[watch], limit_val_batches=0, log_every_n_steps=1,
    )  # fmt: skip
    trainer.fit(module, loader)
    return watch.rows


def description(name: str) -> dict[str, Any]:
    return {"class_path": f"compressai.models.{name}", "init_args": NETWORKS[name]}


def pair(name: str) -> tuple[NetworkModule, nn.Module]:
    """Ours, and CompressAI's network with the same weights."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"lmbda": LMBDA, "lr": LR, "aux_lr": AUX_LR, "decay_start": 1.0}
    module = NetworkModule(description(name), clip_norm=CLIP, **options)
    twin = type(module.network)(**NETWORKS[name])
    twin.load_state_dict(module.network.state_dict())
    return module, twin


def trained(name: str, steps: int) -> tuple[NetworkModule, list[float]]:
    """Ours after training, and the relative difference of each step's loss from CompressAI's loop."""
    module, twin = pair(name)
    batches = crops(steps)
    expected = [loss for loss, _ in theirs(twin, batches)]
    return module, _differences([loss for loss, _ in ours(module, batches)], expected)


def _differences(found: list[float], expected: list[float]) -> list[float]:
    return [abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True)]


def control(name: str, steps: int) -> list[float]:
    """How far CompressAI's loop is from itself when every weight starts one rounding away."""
    batches, losses = crops(steps), []
    for factor in (1.0, 1 + 2**-23):
        _, twin = pair(name)
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.mul_(factor)
        losses.append([loss for loss, _ in theirs(twin, batches)])
    return _differences(losses[1], losses[0])


def evaluated(
    module: NetworkModule, name: str, image: NDArray[np.uint8]
) -> tuple[tuple[float, float], tuple[float, float]]:
    """(bpp, PSNR) of an image by CompressAI's eval_model and by ours."""
    from compressai.utils.eval_model.__main__ import inference

    file = freeze_network(module.network, description(name), name, {})
    network: Any = NetworkModel(file).network
    x = torch.from_numpy(image).permute(2, 0, 1).float() / 255
    result = inference(network, x)
    model = NetworkModel(file)
    data = model.encode(image)
    own = psnr_from_sse(sse(image, model.decode(data)), image.size)
    return (result["bpp"], result["psnr-rgb"]), (8 * len(data) / (image.size // 3), own)


def step_seconds(name: str, steps: int, rounds: int = 5) -> tuple[float, float]:
    """Median processor seconds of a step of theirs and of ours, in turns: the machine may be busy."""
    seconds: tuple[list[float], list[float]] = ([], [])
    batches = crops(steps, 8, 128)
    for _ in range(rounds):
        module, twin = pair(name)
        seconds[0].extend(s for _, s in list(theirs(twin, batches))[2:])
        seconds[1].extend(s for _, s in ours(module, batches)[2:])
    return statistics.median(seconds[0]), statistics.median(seconds[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--timed", type=int, default=12)
    parser.add_argument("--only", choices=list(NETWORKS))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    image = photo("coffee.png", 512, 384, 0, 0)
    for name in [arguments.only] if arguments.only else NETWORKS:
        module, differences = trained(name, arguments.steps)
        own = control(name, arguments.steps)
        (bpp, psnr), (own_bpp, own_psnr) = evaluated(module, name, image)
        their_step, our_step = step_seconds(name, arguments.timed)
        row = {
            "network": name, "steps": arguments.steps,
            "loss": {"median": statistics.median(differences), "max": max(differences)},
            "control": {"median": statistics.median(own), "max": max(own)},
            "bpp": bpp, "own_bpp": own_bpp, "psnr": psnr, "own_psnr": own_psnr,
            "step": their_step, "own_step": our_step, "times_faster": their_step / our_step,
        }  # fmt: skip
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
